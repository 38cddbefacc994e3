"""One rounding at the end of a chain instead of one after every transform."""

import optax

from optimorph._core.wrapped import wrapped


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation in float32 or wider and round its updates to the gradient's dtype.

        u = round(inner(widen(g)))        (1)

    For float32 and wider gradients this is `inner` itself. The state is `inner`'s. Updates of an optax
    transformation have the dtype of the parameters if that is wider.

    Args:
      inner: any transformation. It gets updates and parameters in float32 or wider.
    """
    return wrapped("in_float32", inner, wide=True)  # (1), as every rule does
