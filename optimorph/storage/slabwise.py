"""The update of one large leaf with compressed moments, slab by slab."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from optimorph.codecs import Codec, Encoded
from optimorph.storage.encoding import decoded, encoded
from optimorph.storage.slabs import in_slabs, slab_shape

Step = Callable[[jax.Array, Any, Sequence[Any]], tuple[jax.Array, Sequence[Any]]]
"""(gradient, weight, moments) → update, moments; of a leaf or of a part of it."""


def is_large(g: jax.Array, moments: Sequence[Any], codecs: Sequence[Codec | None]) -> bool:
    """Whether a leaf is updated slab by slab."""
    return (
        any(codec is not None for codec in codecs)
        and all(
            np.shape(getattr(m, "codes", m)) == g.shape for m in moments if isinstance(m, Encoded | jax.Array)
        )
        and slab_shape(g.shape) is not None
    )


def decode(moments: Sequence[Any], codecs: Sequence[Codec | None]) -> list[Any]:
    """The moments of a leaf without codecs."""
    return [
        decoded(codec, m) if isinstance(m, Encoded) else m for m, codec in zip(moments, codecs, strict=True)
    ]


def encode(
    new: Sequence[Any],
    old: Sequence[Any],
    codecs: Sequence[Codec | None],
    keys: Sequence[Any],
    place: Any = None,
) -> list[Any]:
    """The moments of a leaf, stored as the old ones are."""
    return [
        encoded(codec, x, key, place, before) if isinstance(before, Encoded) else x
        for x, before, codec, key in zip(new, old, codecs, keys, strict=True)
    ]


def slabwise(
    step: Step,
    g: jax.Array,
    weight: Any,
    moments: Sequence[Any],
    codecs: Sequence[Codec | None],
    keys: Sequence[Any],
    programs: dict[Any, Callable[..., Any]],
) -> tuple[jax.Array, Sequence[Any]]:
    """The update and the new moments of one large leaf; leaves with the same program share it.

    Args:
      step: of a slab, with decoded moments.
      g: the gradient, whose buffer the update takes if it has the same dtype.
      weight: the parameter, or None.
      moments: `Encoded`, arrays or None.
      codecs: of the moments; None where there is none.
      keys: of the noise of each moment.
      programs: of the leaves before.
    """

    def run(keys, g, weight, moments):
        dtype = jax.eval_shape(lambda: step(g, weight, decode(moments, codecs)))[0].dtype
        in_place = dtype == g.dtype

        def make(written, read):
            u, held = written
            own, weight = read
            return step(u if in_place else own, weight, decode(held, codecs))

        def store(place, made, before):
            (update, new), (_, old) = made, before
            return update, encode(new, old, codecs, keys, place)

        update, read = (g, None) if in_place else (jnp.zeros_like(g, dtype=dtype), g)
        return in_slabs(make, store, g.shape, (update, list(moments)), (read, weight))

    arguments, inside = jax.tree.flatten((keys, g, weight, list(moments)))

    def flat(*arrays):
        return run(*jax.tree.unflatten(inside, arrays))

    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*arguments)
    same = str(closed.jaxpr), tuple(map(id, closed.consts))
    program = programs.setdefault(same, jax.jit(_named(jaxpr_as_fun(closed))))
    return jax.tree.unflatten(jax.tree.structure(shapes), program(*arguments))


def _named(program: Callable[..., Any]) -> Callable[..., Any]:
    def update_leaf(*arrays):
        return program(*arrays)

    return update_leaf
