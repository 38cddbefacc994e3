"""The state of `compress_state`; its moments in codes, with their scales and the codecs that wrote them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph._core.moments import Fields, moments_of, with_moments
from optimorph._core.numbers import is_trainable
from optimorph._core.paths import by_path, map_paths
from optimorph._core.roles import holds, scalar
from optimorph._core.rounding import leaf_key
from optimorph._core.rule import handed_down
from optimorph._core.types import PyTree, Shape
from optimorph._storage.encoding import CodecRule, decoded, encoded, in_codes, initial, named, stored_by
from optimorph.codecs import Codec, Encoded


class CompressedState(NamedTuple):
    """The inner state with codes in place of moments, their scales, the seed of the noise, and a count.

    Args:
      inner: the state of the inner transformation. The codes have the shapes of the moments.
      scales: for each moment a tree like the parameters, whose leaves are `(*batch, blocks)`. Moments that
        are not compressed have zeros.
      seed: the seed of the noise, uint32.
      noise_count: the number of updates, int32.
    """

    averages = holds(inner="")  # stored as codes, which are no moments to others
    inner: Any
    scales: tuple[Any, ...]
    seed: Any
    noise_count: Any
    roles = holds(seed=scalar("seed of compress_state"), noise_count=scalar("count of compress_state"))


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A moment inside a `CompressedState`; no container, so that trees of moments keep their leaves.

    Args:
      codes: or the moment itself, where it has no codec.
      name: `first/blocks/0/kernel`.
      readable: whether the codec is known.
    """

    codes: Any
    scales: Any
    codec: Codec | None
    name: str
    readable: bool = True

    @property
    def shape(self) -> Shape:
        return self.codes.shape

    @property
    def dtype(self) -> Any:
        return self.codes.dtype if self.codec is None else jnp.dtype(jnp.float32)

    def decoded(self) -> jax.Array:
        return jnp.asarray(decoded(self.codec, Encoded(self.codes, self.scales)))

    def encoding(self, x: jax.Array) -> "Stored":
        before = initial(self.codec, x)
        key = leaf_key(jax.random.key(0), self.name)  # no step has this key: those are folded
        after = encoded(self.codec, x, key, None, before)
        return dataclasses.replace(self, codes=after.codes, scales=after.scales)


@dataclasses.dataclass
class Codecs:
    """Which rule of codecs each moment of a transformation has."""

    rules: dict[tuple[str, str], CodecRule] = dataclasses.field(default_factory=dict)
    fields: Fields = dataclasses.field(default_factory=dict)
    untrained: frozenset[str] = frozenset()


def codecs_of(tx: optax.GradientTransformation, params: PyTree) -> tuple[PyTree, Codecs]:
    """The shapes of a fresh state, and the codecs of its moments."""
    found = Codecs(untrained=frozenset(path for path, w in by_path(params).items() if not is_trainable(w)))
    with handed_down(codecs=found):
        return jax.eval_shape(lambda p: tx.init(p), params), found  # a new function, which is traced


def with_stored(state: PyTree, codecs: Codecs) -> PyTree:
    """The state with `Stored` in the place of every array of compressed moments, and without scales."""
    return _each(_with_stored, state, codecs)


def without_stored(state: PyTree, codecs: Codecs) -> PyTree:
    """The state as its transformation has it: the inverse of `with_stored`."""
    return _each(_without_stored, state, codecs)


def _each(f: Any, state: PyTree, codecs: Codecs) -> PyTree:
    return jax.tree.map(
        lambda node: f(node, codecs) if _is_compressed(node) else node, state, is_leaf=_is_compressed
    )


def _is_compressed(node: Any) -> bool:
    return isinstance(node, CompressedState)


def _with_stored(node: CompressedState, codecs: Codecs) -> CompressedState:
    trees = [
        map_paths(lambda path, c, s, kind=kind: _stored(codecs, kind, path, c, s), codes, scales)
        for (kind, codes), scales in zip(moments_of(node.inner, codecs.fields), node.scales, strict=True)
    ]
    return node._replace(inner=with_moments(node.inner, trees, codecs.fields), scales=())


def _without_stored(node: CompressedState, codecs: Codecs) -> CompressedState:
    moments = [moment for _, moment in moments_of(node.inner, codecs.fields)]
    codes, scales = (
        [jax.tree.map(lambda x, part=part: getattr(x, part), moment) for moment in moments]
        for part in ("codes", "scales")
    )
    return node._replace(inner=with_moments(node.inner, codes, codecs.fields), scales=tuple(scales))


def _stored(codecs: Codecs, kind: str, path: str, codes: Any, scales: Any) -> Stored:
    rule = codecs.rules.get((kind, path))
    if path in codecs.untrained:
        return Stored(codes, scales, None, named(kind, path))
    if rule is None:
        return Stored(codes, scales, None, named(kind, path), not in_codes(codes.dtype))
    codec, found = stored_by("carry_state", rule, kind, path, Encoded(codes, scales))
    return Stored(*found, codec, named(kind, path))
