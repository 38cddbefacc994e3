"""Sums over the matrices of a leaf, or over one side of them, also where the leaf is a local shard."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.rule import Leaf, not_in_parts
from optimorph._core.types import Shape
from optimorph._distributed.shardings import (
    Match,
    Names,
    devices,
    local_shard_spec,
    manual_axes,
    undecided,
)
from optimorph.linalg import Axes


@dataclasses.dataclass(frozen=True)
class Reduction:
    """Over some sides of every matrix; of a leaf that is not a matrix, over all of it.

    Args:
      form: how the leaf reads as matrices; None if it is no matrix.
      letters: the sides: "i", "o" or "io".
      names: inside `jax.shard_map`, the mesh axes that divide these sides.
    """

    form: Axes | None
    letters: str
    names: Names

    def sums(self, *arrays: jax.Array) -> list[jax.Array]:
        """Of each array, keeping all axes with a number for each block; over a mesh by one all_reduce."""
        found = [self._each(jnp.sum, x) for x in arrays]
        return jax.lax.psum(found, self.names) if self.names else found

    def maximum(self, x: jax.Array) -> jax.Array:
        """The largest number, or 0 if none is larger."""
        found = self._each(jnp.max, x)
        return jax.lax.pmax(found, self.names) if self.names else found

    def mean(self, x: jax.Array) -> jax.Array:
        """The mean of the numbers; that of none is 0."""
        count = np.array(np.size(x)) if self.form is None else self.form.counts(x.shape, self.letters)
        count = np.maximum(count * devices(manual_axes(), self.names), 1)
        return self.sums(x)[0] / jnp.asarray(count, x.dtype)

    def mean_over_devices(self, x: jax.Array) -> jax.Array:
        """Of numbers that each device has computed of its part of these sides."""
        return jax.lax.pmean(x, self.names) if self.names else x

    def spread(self, y: jax.Array, shape: Shape) -> jax.Array:
        """What one of these leaves of an array of this shape, so that it broadcasts against that array."""
        return y if self.form is None else self.form.repeat(y, shape)

    def _each(self, f: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
        if self.form is None:
            return f(x, keepdims=True, initial=0)
        return self.form.reduce(f, x, self.letters)


def reduction(who: str, match: Match | None, leaf: Leaf, form: Axes | None, letters: str = "io") -> Reduction:
    """The sums over some sides of the matrices of a leaf.

    Raises:
      ValueError: naming `who`: inside `jax.shard_map`, no sharding of the leaf, or one that divides its
        blocks; inside `compress_state`, a part of a leaf.
    """
    if leaf.part:
        raise not_in_parts(who, f"{who} needs whole matrices")
    if not manual_axes():
        return Reduction(form, letters, ())
    shape = np.shape(leaf.leaves.values[leaf.index])
    if match is None:
        raise undecided(who, leaf.path, shape)
    spec, _ = local_shard_spec(who, match, leaf.path, shape)
    if form is None:
        return Reduction(form, letters, tuple(name for names in spec for name in names))
    sides: list[Any] = [pair for pair in zip(spec, form.parts, strict=True) if pair[1].letter in letters]
    if any(names and not axis.whole for names, axis in sides):
        raise ValueError(
            f"{who}: inside jax.shard_map, the axis of {leaf.path!r} that holds several matrices is sharded. "
            "Type axes without blocks, such as 'io', or shard another axis."
        )
    return Reduction(form, letters, tuple(name for names, _ in sides for name in names))
