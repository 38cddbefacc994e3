"""A state in half the bytes, right on average."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_seed
from optimorph._core.differences import checked_state
from optimorph._core.numbers import as_made, increment
from optimorph._core.paths import leaf_paths
from optimorph._core.roles import holds, scalar
from optimorph._core.rounding import leaf_key, step_key, stochastic_bfloat16
from optimorph._core.rule import Rule, rule_of, transform
from optimorph._core.warn import warn
from optimorph._core.wrapped import wrapped


class BFloat16State(NamedTuple):
    """The inner state in bfloat16, the seed of its rounding, and the number of updates."""

    inner: Any
    seed: Any
    noise_count: Any
    roles = holds(seed=scalar("seed of in_bfloat16"), noise_count=scalar("count of in_bfloat16"))


def in_bfloat16(inner: optax.GradientTransformation, seed: int = 0) -> optax.GradientTransformationExtraArgs:
    """Keep a transformation's state in bfloat16, rounded stochastically.

        u, s' = inner(g, widen(s))               (1)
        s ← round(s'),  E[round(s')] = s'        (2)

    In one step an average with β = 0.999 covers a thousandth of the distance to its limit, but two
    neighbouring bfloat16 numbers differ by 1/256. With rounding to the nearest, the average stops before it
    has covered half of the distance. With stochastic rounding it reaches the limit; for slow averages the
    relative noise is about 1/256 √((1 - β) / 2). The updates are computed from s' before it is rounded.

    The noise depends on the seed, the step and the leaf's path. Seed and step are in the state, so a run
    repeats bit by bit, also when it is resumed or moved to another mesh. Under `jax.vmap` all runs have the
    same noise.

    Arrays of real numbers are stored in bfloat16. Scalars, integers and complex numbers are not changed. Do
    not use it around a transformation that needs the difference of the parameters and weights in its state,
    such as `optax.contrib.mechanize`, `dog` and `cocob`: rounding the weights loses the difference.

    Args:
      inner: any transformation. Optimizers of this library have `nu_dtype="bfloat16"` for the same purpose.
      seed: the seed of the noise, an integer in [0, 2³²). A restored state keeps its own seed.

    Raises:
      ValueError: a seed outside its range.

    References:
      Gupta et al. 2015, "Deep learning with limited numerical precision", arXiv:1502.02551, section 3.1.
    """
    inner = wrapped("in_bfloat16", inner, wide=True)
    check_seed("in_bfloat16", seed)
    if rule := rule_of(inner):
        return transform("in_bfloat16", _rule(rule, seed))

    def init(params):
        made = inner.init(params)
        if jax.tree.leaves(params) and not any(map(_is_narrowed, jax.tree.leaves(made))):
            _warn_nothing()
        state = jax.tree.map(_narrow, made)
        return BFloat16State(state, jnp.uint32(seed), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra):
        state = as_made(init, checked_state("in_bfloat16", state, BFloat16State), params)
        out, after = inner.update(updates, jax.tree.map(_widen, state.inner), params, **extra)  # (1)
        key = step_key(state)
        leaves, structure = jax.tree.flatten(after)
        rounded = [
            _rounded(new, leaf_key(key, path)) for path, new in zip(leaf_paths(after), leaves, strict=True)
        ]
        seed, count = jnp.uint32(state.seed), increment(state.noise_count)
        return out, BFloat16State(structure.unflatten(rounded), seed, count)

    return optax.GradientTransformationExtraArgs(init, update)


def _rule(rule: Rule, seed: int) -> Rule:
    def begin(leaves):
        if leaves.shapes and not any(role.tree for role in rule.roles):
            _warn_nothing()
        return BFloat16State(rule.filled(rule.begin(leaves)), jnp.uint32(seed), jnp.zeros([], jnp.int32))

    def init(leaf):
        return BFloat16State(jax.tree.map(_narrow, rule.filled(rule.init(leaf))), None, None)

    def advance(shared, leaves):
        now, inner = rule.advance(shared.inner, leaves)
        after = BFloat16State(inner, jnp.uint32(shared.seed), increment(shared.noise_count))
        return (now, step_key(shared)), after

    def update(g, state, leaf, now):
        now, key = now
        u, s = rule.update(g, jax.tree.map(_widen, state.inner), leaf, now)  # (1)
        if leaf.part:
            return u, BFloat16State(_unrounded(s, state.inner), None, None)
        rounded = [
            None if x is None else _rounded(x, leaf_key(key, f"{k}/{leaf.path}"))
            for k, x in enumerate(rule.slots(s))
        ]
        return u, BFloat16State(rule.structure.unflatten(rounded), None, None)

    state = BFloat16State(rule.state, **BFloat16State.roles)
    return Rule(state, update, init, begin, advance)


def _warn_nothing() -> None:
    warn(
        "in_bfloat16: the state has no array of real numbers to store in bfloat16. Leave it out.",
        stacklevel=3,
    )


def _rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    return stochastic_bfloat16(_widen(x), key) if _is_narrowed(x) else x  # (2)


def _unrounded(state: Any, before: Any) -> Any:
    """The state of a part of a leaf, which the codec that stored it rounds; without a codec it is refused."""
    if any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(before)):
        raise ValueError(
            "compress_state: a moment without a codec is in bfloat16, and rounding it stochastically needs "
            "the whole leaf. Type a codec for it, such as optimorph.codecs.BFloat16(stochastic=True), or "
            "leave out nu_dtype or in_bfloat16, which store it in bfloat16."
        )
    return state


def _is_narrowed(x: Any) -> bool:
    return bool(np.ndim(x)) and jnp.issubdtype(x.dtype, jnp.floating)


def _narrow(x: Any) -> Any:
    return x.astype(jnp.bfloat16) if _is_narrowed(x) else x


def _widen(x: Any) -> Any:
    return x.astype(jnp.float32) if _is_narrowed(x) else x
