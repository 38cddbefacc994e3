"""An element-wise transformation of large leaves, slab by slab."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxpr_as_fun

from optimorph.codecs import Codec, Encoded
from optimorph.core.elementwise import not_elementwise
from optimorph.core.rounding import leaf_words
from optimorph.core.slabs import in_slabs, slab_shape
from optimorph.core.tree import leaf_paths
from optimorph.core.types import PyTree, Shape
from optimorph.storage.choice import named
from optimorph.storage.encoding import decoded, encoded
from optimorph.storage.moments import Fields, moments_of, with_moments


class Leaf(NamedTuple):
    """What there is at one path.

    Args:
      gradient: or the update; None if it is missing.
      weight: None without parameters.
      moments: codes and scales of each moment of the state; None where the leaf has none.
      codecs: of each moment, None for as it is.
      kinds: of each moment.
    """

    gradient: Any
    weight: Any
    moments: tuple[Encoded | None, ...]
    codecs: tuple[Codec | None, ...]
    kinds: tuple[str, ...]


class Program(NamedTuple):
    """What an update does to a slab of a leaf, and how to tell whether it does the same to another.

    Args:
      run: (gradient, weight, decoded moments) → (update, moments).
      dtype: of the update.
      same: equal of leaves that are treated alike.
    """

    run: Callable[..., Any]
    dtype: jnp.dtype
    same: Any


class Alone:
    """A transformation of one leaf by itself: all trees have None in place of the others."""

    def __init__(
        self,
        inner: optax.GradientTransformationExtraArgs,
        trees: tuple[PyTree, ...],
        fields: Fields,
        extra: Any,
    ):
        """Number the leaves of the gradients, the state and the parameters."""
        updates, self.state, params = trees
        self.inner, self.fields, self.extra = inner, fields, extra
        self.gradient, self.weight = _placed(updates), _placed(params)
        self.moments = [_placed(moment) for _, moment in moments_of(self.state, fields)]

    def step(self, path: str) -> Callable[..., tuple[jax.Array, list[Any]]]:
        """(gradient, weight, decoded moments) → (update, moments), of a leaf or of a part of it."""

        def step(gradient, weight, moments):
            held = [put(path, x) for put, x in zip(self.moments, moments, strict=True)]
            state = with_moments(self.state, held, self.fields)
            out, after = self.inner.update(
                self.gradient(path, gradient), state, self.weight(path, weight), **self.extra
            )
            (update,) = jax.tree.leaves(out)
            return update, [next(iter(jax.tree.leaves(m)), None) for _, m in moments_of(after, self.fields)]

        return step


def in_parts(alone: Alone, leaves: dict[str, Leaf], key: jax.Array) -> dict[str, Any]:
    """Path → (update, moments) of large leaves; those that are treated alike are traced once.

    Raises:
      ValueError: the transformation is not element-wise; naming the primitive that shows it.
    """
    known: dict[Any, Callable[..., Any]] = {}
    found = {}
    for path, leaf in leaves.items():
        program = _program(alone, path, leaf)
        run = known.setdefault(program.same, jax.jit(_run(alone, path, leaf, program)))
        keys = [leaf_words(key, named(kind, path)) for kind in leaf.kinds]
        found[path] = run(keys, leaf.gradient, leaf.weight, leaf.moments)
    return found


def _run(alone: Alone, path: str, leaf: Leaf, program: Program) -> Callable[..., Any]:
    """(keys, gradient, weight, moments) → (update, moments), slab by slab."""
    shape = leaf.gradient.shape
    in_place = program.dtype == leaf.gradient.dtype  # the update takes the gradient's place

    def run(keys, gradient, weight, moments):
        def step(place, written, read):
            (buffer, moments), (gradient, weight) = written, read
            tail = place.shape != slab_shape(shape)
            inner = _program(alone, path, leaf, place.shape).run if tail else program.run
            wide = [
                None if moment is None else decoded(codec, moment)
                for codec, moment in zip(leaf.codecs, moments, strict=True)
            ]
            update, after = inner(buffer if gradient is None else gradient, weight, wide)
            each = zip(leaf.codecs, after, keys, moments, strict=True)
            return update, tuple(
                None if old is None else encoded(codec, new, key, place, old) for codec, new, key, old in each
            )

        buffer = gradient if in_place else jnp.zeros_like(gradient, dtype=program.dtype)
        return in_slabs(step, shape, (buffer, moments), (None if in_place else gradient, weight))

    return run


def _program(alone: Alone, path: str, leaf: Leaf, slab: Shape | None = None) -> Program:
    """Of a slab of this shape, or else of the usual one."""
    shape = slab_shape(leaf.gradient.shape) if slab is None else slab

    def like(x, dtype=None):
        return None if x is None else jax.ShapeDtypeStruct(shape, x.dtype if dtype is None else dtype)

    moments = [
        None if moment is None else like(moment.codes, None if codec is None else jnp.float32)
        for codec, moment in zip(leaf.codecs, leaf.moments, strict=True)
    ]
    args = like(leaf.gradient), like(leaf.weight), moments
    jaxpr, (update, after) = jax.make_jaxpr(alone.step(path), return_shape=True)(*args)
    if (name := not_elementwise(jaxpr.jaxpr)) is not None:
        raise ValueError(
            f"compress_state: the transformation is said to be element-wise, but there is a {name!r} in its "
            f"update of {path!r}, which mixes places or asks where they are. Type elementwise=False; or put "
            "what does so, clipping by a norm for example, outside: "
            "optax.chain(clip_by_global_norm(1.0), compress_state(...))."
        )
    function, structure = jaxpr_as_fun(jaxpr), jax.tree.structure((update, after))
    shapes = [x.shape for x in (leaf.gradient, *jax.tree.leaves(leaf.moments))]
    same = str(jaxpr.jaxpr), tuple(map(id, jaxpr.consts)), tuple(shapes), leaf.codecs, structure
    return Program(lambda *args: structure.unflatten(function(*jax.tree.leaves(args))), update.dtype, same)


def _placed(tree: PyTree) -> Callable[[str, Any], PyTree]:
    """(path, x) → the tree with x there, and None everywhere else."""
    structure = jax.tree.structure(tree)
    number = {path: k for k, path in enumerate(leaf_paths(tree))}

    def placed(path: str, x: Any) -> PyTree:
        leaves = [None] * structure.num_leaves
        if path in number:
            leaves[number[path]] = x
        return structure.unflatten(leaves)

    return placed
