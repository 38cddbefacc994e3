"""The elementwise square."""

import jax.numpy as jnp
import optax

from optimorph.core.tree import cast_like, map_updates, wide


def square() -> optax.GradientTransformation:
    """Replace every update by its squared modulus, which is real also for complex leaves.

        u = |g|²        (1)

    References:
      Duchi, Hazan & Singer 2011, "Adaptive subgradient methods", algorithm 1 (diagonal).
    """

    def squared(g):
        x = wide(g)
        return cast_like((x * x.conj()).real if jnp.iscomplexobj(x) else x * x, g)  # (1)

    return optax.stateless(lambda updates, params: map_updates("square", squared, updates))
