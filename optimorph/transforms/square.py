"""The elementwise square."""

import jax.numpy as jnp
import optax

from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates


def square() -> optax.GradientTransformation:
    """Replace every update by its squared modulus, which is real also for complex leaves.

        u = |g|²        (1)

    In float32, and so for bfloat16 too, (1) is zero where |g| < 1e-19, which is as good as the true square
    beside any ε ≥ 1e-16, and infinite where |g| > 1.8e19. An average or a sum of squares stays infinite from
    then on: AdaGrad, RMSprop, Adam and their like make no more updates but those of weight decay, and a
    centered RMSprop has NaN for a variance. `skip_nonfinite` around the sentence leaves such a step out,
    `clip_by_global_norm` in front of it makes it an ordinary one, and float64 has no such limit below 1e154.

    References:
      Duchi, Hazan & Singer 2011, "Adaptive subgradient methods", algorithm 1 (diagonal).
    """

    def squared(g):
        x = wide(g)
        return cast_like((x * x.conj()).real if jnp.iscomplexobj(x) else x * x, g)  # (1)

    return optax.stateless(lambda updates, params: map_updates("square", squared, updates))
