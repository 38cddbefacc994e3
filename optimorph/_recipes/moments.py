"""What recipes make second moments of."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from optimorph._core.rule import pointwise, transform
from optimorph._core.types import DTypeLike, Numeric
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain
from optimorph._transforms.in_bfloat16 import in_bfloat16
from optimorph._transforms.pointwise import debias, root, square

identity = transform("identity", pointwise(lambda g: g))


def second_moment(
    b2: Numeric, eps: Numeric, eps_root: Numeric, dtype: DTypeLike | None
) -> optax.GradientTransformation:
    return chain(square(), stored(ema, b2, dtype=dtype), debias(b2), root(eps, eps_root))


def stored(
    moment: Callable[..., optax.GradientTransformation],
    *args: Numeric,
    dtype: DTypeLike | None,
    **initial: Numeric,
) -> optax.GradientTransformation:
    """A second moment in this dtype; bfloat16 is rounded stochastically, or small changes would be lost."""
    if dtype is not None and jnp.dtype(dtype) == jnp.bfloat16:
        return in_bfloat16(moment(*args, **initial))
    return moment(*args, dtype=dtype, **initial)
