"""Updates where they agree with the gradient, and nothing elsewhere."""

import jax
import jax.numpy as jnp
import optax

from optimorph._core.moments import nodes_with
from optimorph._core.numbers import cast_like, is_absent, upcast
from optimorph._core.paths import leaf_paths
from optimorph._core.rule import Leaf, Leaves, aligned, map_updates
from optimorph._core.types import Rules
from optimorph._core.wrapped import wrapped
from optimorph._distributed.reductions import Reduction, reduction
from optimorph._routing.rules import match_shardings, warn_unused

LEAST = 1e-3


def cautious(
    inner: optax.GradientTransformation, shardings: Rules | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keep the updates of a transformation where they have the sign of the gradient.

        φ = [u g > 0]                     (1)
        u ← φ u / max(mean(φ), 10⁻³)      (2)

    Cautious AdamW is AdamW with `cautious` around its division, before weight decay and the learning rate.
    The division by the mean roughly keeps the size of a leaf's update. The mean is taken over a whole leaf.
    Over a mesh this takes an all-reduce of one number for each sharded leaf.

    Args:
      inner: any transformation that returns a direction of ascent. The state is that of `inner`.
      shardings: the shardings of the leaves, needed inside `jax.shard_map`, as in `muon`.

    Raises:
      ValueError: at `init`, an optimizer with a learning rate of this library. Of optax's `adamw(1e-3)` the
        state does not tell, and all its updates become 0.

    References:
      Liang et al. 2024, "Cautious optimizers: improving training with one line of code", arXiv:2411.16085.
    """
    inner, match = wrapped("cautious", inner, wide=True), match_shardings("cautious", shardings)

    def update(updates, state, params=None, **extra):
        wide = map_updates("cautious", upcast, updates)
        out, after = inner.update(wide, state, params, **extra)
        gs, tree, _ = aligned("cautious", updates, None)
        us, leaves = tree.flatten_up_to(out), Leaves(tree, gs)
        for k, g in enumerate(gs):
            if not is_absent(g):
                over = reduction("cautious", match, Leaf(None, k, leaves), None)
                us[k] = cast_like(_kept(upcast(us[k]), upcast(g), over), g)
        return tree.unflatten(us), after

    def init(params):
        warn_unused("cautious", "shardings", shardings, leaf_paths(params))
        state = inner.init(params)
        if nodes_with(state, "last_learning_rate"):
            raise ValueError(
                "cautious: inner has a learning rate. Its updates have the opposite sign of the gradient, so "
                "all would become 0. Type the learning rate behind cautious: "
                "optimorph.chain(cautious(optax.scale_by_adam()), optimorph.scale_by_learning_rate(1e-3))."
            )
        return state

    return optax.GradientTransformationExtraArgs(init, update)


def _kept(u: jax.Array, g: jax.Array, over: Reduction) -> jax.Array:
    """(2), with the mean of a whole leaf."""
    agree = ((jnp.sign(u) * jnp.sign(g).conj()).real > 0).astype(u.real.dtype)  # (1), without underflow
    return (agree / jnp.maximum(over.mean(agree), LEAST)).astype(u.dtype) * u  # (2)
