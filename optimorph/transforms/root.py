"""The square root, kept away from zero."""

import jax.numpy as jnp
import optax

from optimorph.core.checks import check_numbers
from optimorph.core.dtypes import cast_like, wide
from optimorph.core.tree import map_updates, number
from optimorph.core.types import Numeric


def root(eps: Numeric = 0.0, eps_root: Numeric = 0.0) -> optax.GradientTransformation:
    """Replace every update by its square root.

        u = √(g + ε_root) + ε        (1)

    The updates should not be negative, as second moments are not.

    Args:
      eps: ε, at least 0, outside the root, in units of the gradient.
      eps_root: ε_root, at least 0, inside the root, in units of the squared gradient.

    Raises:
      ValueError: ε or ε_root negative, when they are concrete numbers.

    References:
      Outside: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1. Inside: Hinton's RMSprop as
      TensorFlow wrote it; Graves 2013, arXiv:1308.0850, equation 40.
    """
    check_numbers("root", eps=eps, eps_root=eps_root)

    def plus(x, eps):  # a plain 0 is not worth an operation a leaf
        return x if type(eps) in (int, float) and eps == 0 else x + number(eps, x)

    def rooted(g):
        return cast_like(plus(jnp.sqrt(plus(wide(g), eps_root)), eps), g)  # (1)

    return optax.stateless(lambda updates, params: map_updates("root", rooted, updates))
