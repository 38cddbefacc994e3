"""One rounding at the end of a chain instead of one after every transform."""

import optax

from optimorph._core.numbers import cast_like, upcast
from optimorph._core.rule import map_updates, rule_of
from optimorph._core.wrapped import wrapped


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Run a transformation in float32 or wider and round its updates to the gradient's dtype.

        u = round(inner(widen(g)))        (1)

    For float32 and wider gradients this is `inner` itself. The state is `inner`'s.

    Args:
      inner: any transformation. It gets updates in float32 or wider, and the parameters in their own dtype.
    """
    inner = wrapped("in_float32", inner, wide=True)
    if rule_of(inner):
        return inner  # as every rule does

    def update(updates, state, params=None, **extra):
        out, state = inner.update(map_updates("in_float32", upcast, updates), state, params, **extra)
        return map_updates("in_float32", lambda g, u: cast_like(u, g), updates, out), state  # (1)

    return optax.GradientTransformationExtraArgs(inner.init, update)
