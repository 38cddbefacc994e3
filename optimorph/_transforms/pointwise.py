"""Functions of one number: a square, a root, and corrections that depend on the step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_integer, check_numbers
from optimorph._core.numbers import as_scalar, increment
from optimorph._core.roles import holds, roles_of, scalar
from optimorph._core.rule import Rule, pointwise, transform
from optimorph._core.types import Numeric


class DebiasState(NamedTuple):
    """The number of updates."""

    debias_count: jax.Array
    roles = holds(debias_count=scalar("count for bias correction"))


class DampenState(NamedTuple):
    """The number of updates."""

    dampen_count: jax.Array
    roles = holds(dampen_count=scalar("count for dampening"))


def square() -> optax.GradientTransformationExtraArgs:
    """Replace every update by its squared modulus, which is real also for complex leaves.

        u = |g|²        (1)

    Squares are computed in float32 or wider. In float32 (1) is zero where |g| < 1e-19, which makes no
    difference beside any ε ≥ 1e-16. It is infinite where |g| > 1.8e19, and an average or a sum of squares
    then stays infinite: AdaGrad, RMSprop and Adam no longer move that weight except by weight decay, and a
    centered RMSprop becomes NaN. `skip_nonfinite` around the optimizer leaves such a step out.
    `clip_by_global_norm` in front of the optimizer makes it an ordinary step. float64 has this limit only at
    1e154.

    References:
      Duchi, Hazan & Singer 2011, "Adaptive subgradient methods", algorithm 1 (diagonal).
    """

    def squared(g):
        return (g * g.conj()).real if jnp.iscomplexobj(g) else g * g  # (1)

    return transform("square", pointwise(squared))


def sign() -> optax.GradientTransformationExtraArgs:
    """Replace every update by its sign: -1, 0 or 1; a complex number g becomes g / |g|.

        u = sign(g)        (1)

    References:
      Riedmiller & Braun 1993, "RPROP"; Bernstein et al. 2018, "signSGD", arXiv:1802.04434.
    """
    return transform("sign", pointwise(jnp.sign))  # (1)


def root(eps: Numeric = 0.0, eps_root: Numeric = 0.0) -> optax.GradientTransformationExtraArgs:
    """Replace every update by its square root.

        u = √(g + ε_root) + ε        (1)

    The updates must not be negative; second moments never are. The derivative of √g is infinite at 0. So in
    meta-learning, which differentiates through the optimizer, the derivative is NaN for a weight that never
    had a gradient. Use eps_root=1e-8 in that case.

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

    def plus(x, eps):  # adding a plain 0 would cost an operation for each leaf
        return x if type(eps) in (int, float) and eps == 0 else x + as_scalar(eps, x)

    return transform("root", pointwise(lambda g: plus(jnp.sqrt(plus(g, eps_root)), eps)))  # (1)


def debias(decay: Numeric, *, ahead: int = 0, power: Numeric = 1.0) -> optax.GradientTransformationExtraArgs:
    """Correct the bias of an average that started at zero.

        t ← t + 1                      (1)
        u = g / (1 - β^(t + a))^p      (2)

    Args:
      decay: β in [0, 1) of the average, a number, an array or a tracer.
      ahead: a, at least 0, the number of steps by which the average looks ahead; 1 in the first term of
        Nadam.
      power: p, above 0. After `root`, p = 1/2 corrects an average of squares.

    Raises:
      ValueError: β outside [0, 1), when it is a concrete number; a that is not an integer of at least 0; p
        that is not above 0.

    Equals:
      optax.tree.bias_correction(updates, decay, t)
    References:
      Kingma & Ba 2015, arXiv:1412.6980, section 3; `ahead`: Dozat 2016, "Incorporating Nesterov
      momentum into Adam", algorithm 2.
    """
    check_numbers("debias", decay=decay, power=power)
    check_integer("debias", "ahead", ahead, 1, least=0, below=2**31)

    def advance(state, leaves):
        count = increment(state.debias_count)  # (1)
        t = count.astype(float) + ahead
        weight = 1 - jnp.power(as_scalar(decay, t), t)  # x^1 would cost an operation
        weight = weight if type(power) is float and power == 1 else jnp.power(weight, as_scalar(power, t))
        return weight, DebiasState(count)

    def update(g, state, leaf, weight):
        return g / as_scalar(weight, g), state  # (2)

    def begin(leaves):
        return DebiasState(jnp.zeros([], jnp.int32))

    return transform("debias", Rule(roles_of(DebiasState), update, begin=begin, advance=advance))


def dampen(dampening: Numeric) -> optax.GradientTransformationExtraArgs:
    """Shrink every update but the first.

        u = g               (1)  t = 1
        u = (1 - τ) g       (2)  t > 1

    Before `momentum` this is PyTorch's dampened momentum, whose velocity starts at the whole first gradient.

    Args:
      dampening: τ in [0, 1], a number, an array or a tracer.

    Raises:
      ValueError: τ outside [0, 1], when it is a concrete number.

    References:
      torch.optim.SGD, argument `dampening`.
    """
    check_numbers("dampen", dampening=dampening)

    def advance(state, leaves):
        return state.dampen_count == 0, DampenState(increment(state.dampen_count))

    def update(g, state, leaf, first):
        return jnp.where(first, g, (1 - as_scalar(dampening, g)) * g), state  # (1), (2)

    def begin(leaves):
        return DampenState(jnp.zeros([], jnp.int32))

    return transform("dampen", Rule(roles_of(DampenState), update, begin=begin, advance=advance))
