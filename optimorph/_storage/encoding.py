"""The moments of one leaf as codes and scales, updated whole or slab by slab."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_jaxpr
from jax.sharding import NamedSharding, PartitionSpec

from optimorph._core.numbers import recast
from optimorph._core.target import Target, for_target
from optimorph._core.types import PyTree, Shape
from optimorph._distributed.shardings import devices, manual_axes, spec_of
from optimorph._storage.elementwise import Elementwise, check_elementwise
from optimorph._storage.slabs import in_slabs, slab_shape
from optimorph.codecs import Codec, Encoded, Signed8

CodecRule = Callable[[str, str, Shape], Codec | None]
"""(kind, path, shape) → the codec of a moment, or None for no codec."""

LARGE = 1 << 13
"""The fewest numbers of a leaf that is updated slab by slab for some target."""

Step = Callable[[jax.Array, Any, Sequence[Any]], tuple[jax.Array, Sequence[Any]]]
"""(gradient, weight, moments) → update, moments; of a leaf or of a slab of it."""


def initial(codec: Codec | None, x: jax.Array) -> Encoded:
    """A moment that is one number everywhere, encoded. Complex and float64 moments are not encoded.

    Scales are zeros where a codec has none. So a tree of scales always matches the parameters, has as many
    axes and the same shardings, and can be saved.
    """
    if codec is None or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize > 4:
        zero = jnp.zeros([], x.dtype if x.dtype.itemsize > 4 else jnp.float32)
        return Encoded(x, _full_beside(x, _scales_shape(Signed8(), x.shape), zero))
    number = jnp.max(x.astype(jnp.float32)) if x.size else jnp.float32(0)
    one = _encode(codec)(number, jax.random.key(0))
    codes = jnp.full_like(x, one.codes, dtype=one.codes.dtype)
    if one.scales is None:
        return initial(None, codes)
    return Encoded(codes, _full_beside(x, _scales_shape(codec, x.shape), one.scales))


@functools.cache
def _encode(codec: Codec) -> Callable[..., Encoded]:
    return jax.jit(codec.encode)  # traced once for all leaves


def _scales_shape(codec: Codec, shape: Shape) -> Shape:
    scales = codec.form(shape).scales
    assert scales is not None
    return scales.shape


def decoded(codec: Codec | None, encoded: Encoded) -> jax.Array:
    return encoded.codes if codec is None else codec.decode(encoded)


def encoded(
    codec: Codec | None, x: jax.Array, key: jax.Array, place: Any, before: Encoded, scales: Any = None
) -> Encoded:
    if codec is None:
        return Encoded(x, before.scales)
    found = codec.encode(x, key, place, scales)
    return found if found.scales is not None else Encoded(found.codes, before.scales)


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    def is_encoded(x: Any) -> bool:
        return isinstance(x, Encoded)

    return (
        jax.tree.map(lambda x: x.codes, tree, is_leaf=is_encoded),
        jax.tree.map(lambda x: x.scales, tree, is_leaf=is_encoded),
    )


def _full_beside(x: jax.Array, shape: Shape, value: jax.Array) -> jax.Array:
    """One number everywhere, with the sharding of `x` if it is known and cuts no block."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    if not isinstance(sharding, NamedSharding) or not sharding.mesh.shape or not shape:
        return jnp.full(shape, value)
    return jax.lax.full(shape, value, sharding=beside(sharding, shape))


def beside(sharding: NamedSharding, shape: Shape) -> NamedSharding:
    """The sharding of scales of this shape where codes have `sharding`, which cuts no block."""
    *rows, last = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    *_, names = spec_of(sharding.spec, len(shape), sharding.mesh.shape)
    spec = (*rows, None if shape[-1] % devices(sharding.mesh.shape, names) else last)
    return sharding.update(spec=PartitionSpec(*spec))


def named(kind: str, path: str) -> str:
    """The name of a moment in rules: `first/blocks/0/kernel`."""
    return f"{kind}/{path}" if path else kind


def in_codes(dtype: jnp.dtype) -> bool:
    """Whether an array is one of codes: integers of one or two bytes, or floats of one."""
    return dtype.itemsize < (4 if jnp.issubdtype(dtype, jnp.integer) else 2)


def stored_by(
    who: str, codec_of: CodecRule, kind: str, path: str, stored: Encoded
) -> tuple[Codec | None, Encoded]:
    """The codec of a stored moment, and the moment as that stores it, in whichever dtype it was restored.

    There is no codec if it is stored uncompressed, as complex and float64 moments are. What another codec
    stored is refused.
    """
    dtype, scales = stored.codes.dtype, stored.scales
    assert scales is not None
    shape = stored.codes.shape
    codec = codec_of(kind, path, shape)
    coded = in_codes(dtype) or jnp.issubdtype(dtype, jnp.integer)  # JSON has one type of integer
    if codec is None and coded and shape:  # a local shard, which is smaller than the leaf that `init` had
        codec = codec_of(kind, path, (shape[0] * math.prod(manual_axes().values()), *shape[1:]))
    if jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 4:
        return None, stored
    fit = not coded
    if codec is not None:
        form = codec.form(shape)
        own = scales if form.scales is None else recast(scales, form.scales)
        stored = Encoded(recast(stored.codes, form.codes), own)
        fit = stored.codes.dtype == form.codes.dtype and (
            form.scales is None or (own.shape, own.dtype) == (form.scales.shape, form.scales.dtype)
        )
    if not fit:
        said = "no codec" if codec is None else repr(codec)
        blocks = f" with {scales.shape[-1]} scales a row" if coded and scales.ndim else ""
        cause = "The state was made with other rules: use those, or type tx.init(params)."
        if not coded:
            cause = "Type state, _ = optimorph.carry_state(state, tx, params), which encodes it."
        raise ValueError(
            f"{who}: {named(kind, path)!r} is stored in {dtype}{blocks}, but the rules say {said}. {cause}"
        )
    return codec, stored


def is_large(g: jax.Array, moments: Sequence[Any], codecs: Sequence[Codec | None]) -> bool:
    """Whether a leaf may be updated slab by slab, which depends on what the program is compiled for."""
    return (
        any(codec is not None for codec in codecs)
        and all(np.shape(x) == g.shape for x in jax.tree.leaves([_codes(m) for m in moments]))
        and may_be_in_slabs(g)
    )


def may_be_in_slabs(x: Any) -> bool:
    """Whether an array is large enough to be updated slab by slab."""
    return np.ndim(x) > 1 and np.size(x) >= LARGE


def _codes(moment: Any) -> Any:
    return moment.codes if isinstance(moment, Encoded) else moment


def _in_float32(moment: Encoded) -> Any:
    """The type of a decoded moment, which lies and varies over a mesh as its codes do.

    `jax.eval_shape` has no shardings over a mesh that has an axis which is not `Explicit`.
    """
    return jax.typeof(moment.codes).update(dtype=jnp.dtype(jnp.float32))


def decode(moments: Sequence[Any], codecs: Sequence[Codec | None]) -> list[Any]:
    return [
        decoded(codec, m) if isinstance(m, Encoded) else m for m, codec in zip(moments, codecs, strict=True)
    ]


def encode(
    new: Sequence[Any],
    old: Sequence[Any],
    codecs: Sequence[Codec | None],
    keys: Sequence[Any],
    place: Any = None,
    scales: Sequence[Any] | None = None,
) -> list[Any]:
    """The moments of a leaf, stored as the old ones are, with `scales` where they are computed already."""
    known = [None] * len(new) if scales is None else scales
    return [
        encoded(codec, x, key, place, before, own) if isinstance(before, Encoded) else x
        for x, before, codec, key, own in zip(new, old, codecs, keys, known, strict=True)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class LargeLeaf:
    """The update of a large leaf, slab by slab or at once.

    Args:
      name: the same for updates that are the same.
      step: the update with decoded moments, of any part of the leaf.
      in_place: whether the update takes the gradient's buffer.
    """

    name: Any
    step: Elementwise
    codecs: Sequence[Codec | None]
    in_place: bool
    results: Any
    operands: Any

    def __hash__(self) -> int:
        """Equal programs are compiled once, also by updates that are not inside `jax.jit`."""
        return hash(self.name)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, LargeLeaf) and self.name == other.name

    def run(self, target: Target, *operands: jax.Array) -> list[jax.Array]:
        return _shared(self, target)(*operands)

    def update(self, target: Target, written: PyTree, read: PyTree) -> PyTree:
        g, weight, keys, constants = read

        def make(written, read):
            u, held = written
            own, weight = read
            arrays = jax.tree.leaves((u if self.in_place else own, weight, decode(held, self.codecs)))
            return self.results.unflatten(self.step(constants, arrays, u.shape))

        def store(place, made, before, scales=None):
            (update, new), (_, old) = made, before
            return update, encode(new, old, self.codecs, keys, place, scales)

        if slab_shape(self.step.whole, target) is not None:
            return in_slabs(make, store, self.step.whole, target, written, (g, weight))
        scales = None
        if target.platform == "gpu":  # a kernel for scales, and one that writes the update over the gradient
            scales = self._scales(make(written, (g, weight)))
            scales, written, g, weight = jax.lax.optimization_barrier((scales, written, g, weight))
        stored = store(None, make(written, (g, weight)), written, scales)
        # without it, the moments of all leaves are in float32 at a time, until all updates are computed
        return jax.lax.optimization_barrier(stored) if target.platform in ("gpu", "tpu") else stored

    def _scales(self, made: PyTree) -> list[Any]:
        _, new = made
        return [
            None if codec is None else codec.scales(x.astype(jnp.float32))
            for x, codec in zip(new, self.codecs, strict=True)
        ]


@functools.lru_cache(maxsize=1 << 8)
def _shared(leaf: LargeLeaf, target: Target) -> Callable[..., list[jax.Array]]:
    def update_leaf(*operands):
        return jax.tree.leaves(leaf.update(target, *leaf.operands.unflatten(operands)))

    return jax.jit(update_leaf)


@functools.lru_cache(maxsize=1 << 8)
def _check(leaf: LargeLeaf) -> None:
    check_elementwise(leaf.step)


def update_large(
    step: Step,
    g: jax.Array,
    weight: Any,
    moments: Sequence[Any],
    codecs: Sequence[Codec | None],
    keys: Sequence[Any],
    check: bool,
) -> tuple[jax.Array, Sequence[Any]]:
    """The update and the new moments of one large leaf; leaves with the same jaxpr share a program.

    The update takes the gradient's buffer if it has the same dtype. Moments are `Encoded`, arrays or None;
    each has a codec or None and a key of noise. With `check`, a step that is not element-wise is refused.
    """
    decoded = [m if codec is None else _in_float32(m) for m, codec in zip(moments, codecs, strict=True)]
    arguments, inside = jax.tree.flatten((g, weight, list(map(_codes, decoded))))
    closed, made = jax.make_jaxpr(lambda *x: step(*inside.unflatten(x)), return_shape=True)(*arguments)
    consts = list(closed.consts)
    alone = jax.make_jaxpr(lambda consts, *x: eval_jaxpr(closed.jaxpr, consts, *x))(consts, *arguments)
    in_place = made[0].dtype == g.dtype
    written = g if in_place else jnp.zeros_like(g, dtype=made[0].dtype), list(moments)
    read = None if in_place else g, weight, list(keys), consts
    leaves, operands = jax.tree.flatten((written, read))
    types = *map(jax.typeof, leaves), jax.sharding.get_abstract_mesh()  # which a jaxpr does not print
    same = str(alone.jaxpr), types, operands, tuple(codecs)
    whole = Elementwise(alone, len(consts), g.shape)
    leaf = LargeLeaf(same, whole, tuple(codecs), in_place, jax.tree.structure(made), operands)
    if check and not manual_axes():
        _check(leaf)
    out = for_target(LargeLeaf.run, leaf, *leaves, results=len(jax.tree.leaves(written)))
    return jax.tree.structure(written).unflatten(out)
