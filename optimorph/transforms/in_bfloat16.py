"""A state in half the bytes, right on average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph.core.checks import is_integer
from optimorph.core.count import increment
from optimorph.core.rounding import leaf_key, stochastic_bfloat16
from optimorph.core.tree import leaf_paths


class HalfState(NamedTuple):
    """The inner state in bfloat16, the seed of its rounding, and how many updates there have been."""

    inner: Any
    seed: jax.Array
    count: jax.Array


def in_bfloat16(inner: optax.GradientTransformation, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Keep a transformation's state in bfloat16, every number of it rounded up or down by chance.

        u, s' = inner(g, widen(s))        (1)
        s ← round(s'),  E[round(s')] = s'        (2)

    An average with β = 0.999 moves by a thousandth of the way to its goal, a bfloat16 number by 1/256 of
    itself or not at all: rounded to the nearest, the average stands still before half of the way. Rounded by
    chance it arrives, with a noise of about 1/256 √((1 - β) / 2) of itself for slow averages. The updates are
    those of s', before it is rounded.

    The noise is that of the seed, the step and the leaf's path in the state, all of which are kept: a run
    repeats to the bit, resumed or on another mesh; under `jax.vmap` all runs have the same. Arrays of real
    numbers are stored in bfloat16, float64 too, which is float32 in between; scalars, integers and complex
    numbers stay as they are.

    Args:
      inner: any transformation; of a recipe, ask for `nu_dtype="bfloat16"`.
      seed: of the noise, an integer in [0, 2³²); that of a state which is restored goes on.

    Raises:
      ValueError: another seed.

    References:
      Gupta et al. 2015, "Deep learning with limited numerical precision", arXiv:1502.02551, section 3.1.
    """
    if not is_integer(seed, 0, 2**32):
        raise ValueError(f"in_bfloat16: seed must be an integer in [0, 2**32), but is {seed!r}. Type seed=0.")
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state = jax.tree.map(_narrowed, inner.init(params))
        return HalfState(state, jnp.uint32(seed), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra):
        out, after = inner.update(updates, jax.tree.map(_widened, state.inner), params, **extra)  # (1)
        key = jax.random.fold_in(jax.random.key(state.seed), state.count)
        leaves, structure = jax.tree.flatten(after)
        before = jax.tree.leaves(state.inner)
        rounded = [  # (2)
            stochastic_bfloat16(_widened(new), leaf_key(key, path)) if old.dtype == jnp.bfloat16 else new
            for path, new, old in zip(leaf_paths(after), leaves, before, strict=True)
        ]
        return out, HalfState(jax.tree.unflatten(structure, rounded), state.seed, increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _narrowed(x: jax.Array) -> jax.Array:
    return x.astype(jnp.bfloat16) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating) else x


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
