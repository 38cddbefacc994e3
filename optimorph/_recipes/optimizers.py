"""The optimizers: each one is a short chain of transforms, and the chain is the formula.

First moments and velocities are stored in `mu_dtype` (`accumulator_dtype` of `sgd`, optax's name), rounded
to the nearest. Second moments are stored in `nu_dtype`; bfloat16 is rounded stochastically, as by
`in_bfloat16`. The default is float32, or the parameter's own dtype if that is wider. float16 cannot hold
numbers above 65504. `state="int8"` stores the moments of large leaves in one byte each, as `compress_state`
does; `state` also takes its rules.
"""

import jax.numpy as jnp
import optax

from optimorph._core.rule import Rule, called, pointwise, transform
from optimorph._core.types import DTypeLike, Mask, Numeric, Rules, ScalarOrSchedule
from optimorph._recipes.moments import identity, second_moment, stored
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._recipes.state_storage import with_state_storage
from optimorph._routing.rules import check_mask
from optimorph._transforms.averages import accumulate, ema
from optimorph._transforms.averages import momentum as heavy_ball
from optimorph._transforms.combine import add, chain, divide, mix
from optimorph._transforms.pointwise import dampen, debias, root, square
from optimorph._transforms.step import add_decayed_weights, decay_and_step, scale_by_learning_rate


@recipe
def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric | None = None,
    nesterov: bool = False,
    accumulator_dtype: DTypeLike | None = None,
    *,
    dampening: Numeric | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    mask: Mask | None = None,
    state: str | Rules | None = None,
) -> Recipe:
    """Gradient descent.

    With `momentum` it is Polyak's heavy ball, and with `nesterov` Nesterov's accelerated gradient.

    `weight_decay` is L2 regularisation: λ w is added to the gradient. The state holds a velocity if
    `momentum` is given, and a step count if `dampening` is given.

    Raises:
      ValueError: a number outside its range; `dampening` without `momentum`, or with `nesterov`.

    Equals:
      optax.sgd(learning_rate, momentum, nesterov)
      torch.optim.SGD(lr=learning_rate, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay) of
        PyTorch 2.14
      torch.optim.SGD(lr=learning_rate, momentum=momentum, dampening=dampening) of PyTorch 2.14
    References:
      Robbins & Monro 1951; Polyak 1964; Nesterov 1983; Sutskever et al. 2013.
    """
    if dampening is not None and (momentum is None or nesterov):
        raise ValueError(
            "sgd: dampening needs a momentum and nesterov=False. Type momentum=0.9, for example, or "
            "leave out dampening."
        )
    tx = chain(
        _l2(weight_decay, mask),
        identity if dampening is None else dampen(dampening),
        identity if momentum is None else heavy_ball(momentum, nesterov=nesterov, dtype=accumulator_dtype),
        scale_by_learning_rate(learning_rate),
    )
    return with_state_storage("sgd", tx, state, accumulator_dtype=accumulator_dtype)


@recipe
def adagrad(
    learning_rate: ScalarOrSchedule,
    initial_accumulator_value: Numeric = 0.1,
    eps: Numeric = 1e-7,
    *,
    eps_in_sqrt: bool = True,
    nu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    mask: Mask | None = None,
    state: str | Rules | None = None,
) -> Recipe:
    """AdaGrad: the gradient divided by the root of the sum of all squared gradients.

    `weight_decay` is L2 regularisation: λ w is added to the gradient.

    Equals:
      optax.adagrad(learning_rate, initial_accumulator_value, eps)
      torch.optim.Adagrad(lr=learning_rate, initial_accumulator_value=initial_accumulator_value, eps=eps,
        weight_decay=weight_decay) of PyTorch 2.14, with eps_in_sqrt=False
    References:
      Duchi, Hazan & Singer 2011, "Adaptive subgradient methods", algorithm 1 (diagonal).
    """
    tx = chain(
        _l2(weight_decay, mask),
        divide(
            identity,
            by=chain(
                square(),
                stored(accumulate, initial_accumulator_value, dtype=nu_dtype),
                _root(eps, eps_in_sqrt),
            ),
        ),
        scale_by_learning_rate(learning_rate),
    )
    return with_state_storage("adagrad", tx, state, nu_dtype=nu_dtype)


@recipe
def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: Numeric = 0.9,
    eps: Numeric = 1e-8,
    initial_scale: Numeric = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Numeric | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    mask: Mask | None = None,
    state: str | Rules | None = None,
) -> Recipe:
    """RMSprop: the gradient divided by its root mean square or, if `centered`, by its standard deviation.

    `weight_decay` is L2 regularisation: λ w is added to the gradient. As in optax, the learning rate is
    applied before the momentum. With a constant learning rate the order makes no difference.

    Raises:
      ValueError: a number outside its range; `centered` with a narrow `nu_dtype`.

    Equals:
      optax.rmsprop(learning_rate, decay, eps, initial_scale, eps_in_sqrt, centered, momentum, nesterov,
        bias_correction)
      torch.optim.RMSprop(lr=learning_rate, alpha=decay, eps=eps, centered=centered, momentum=momentum,
        weight_decay=weight_decay) of PyTorch 2.14, with eps_in_sqrt=False
    References:
      Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, arXiv:1308.0850, equations 38-45.
    """
    if centered and nu_dtype is not None and jnp.finfo(nu_dtype).bits < 32:
        raise ValueError(
            "rmsprop: centered=True needs nu_dtype='float32', because the variance is a small difference of "
            "two moments. Type nu_dtype=None, or centered=False."
        )
    correct = debias(decay) if bias_correction else identity
    mean_square = chain(square(), stored(ema, decay, initial=initial_scale, dtype=nu_dtype), correct)
    square_mean = chain(stored(ema, decay, dtype=nu_dtype), correct, square())
    variance = chain(add(mean_square, chain(square_mean, _negative)), _not_negative())
    spread = variance if centered else mean_square
    tx = chain(
        _l2(weight_decay, mask),
        divide(identity, by=chain(spread, _root(eps, eps_in_sqrt))),
        scale_by_learning_rate(learning_rate),
        identity if momentum is None else heavy_ball(momentum, nesterov=nesterov, dtype=mu_dtype),
    )
    return with_state_storage("rmsprop", tx, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype)


@recipe
def adam(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    mask: Mask | None = None,
    state: str | Rules | None = None,
) -> Recipe:
    """Adam: the average gradient divided by the root of the average squared gradient.

    Both averages start at zero, and the bias from this start is corrected. `weight_decay` is L2
    regularisation: λ w is added to the gradient, so the division rescales the decay of each weight. In
    `adamw` every weight decays by the same fraction.

    Equals:
      optax.adam(learning_rate, b1, b2, eps, eps_root)
      torch.optim.Adam(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=weight_decay) of PyTorch 2.14
    References:
      Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """
    tx = chain(
        _l2(weight_decay, mask),
        divide(chain(ema(b1, dtype=mu_dtype), debias(b1)), by=second_moment(b2, eps, eps_root, nu_dtype)),
        scale_by_learning_rate(learning_rate),
    )
    return with_state_storage("adam", tx, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype)


@recipe
def nadam(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    mask: Mask | None = None,
    state: str | Rules | None = None,
) -> Recipe:
    """Nadam: Adam whose average gradient looks one step ahead.

    `weight_decay` is L2 regularisation: λ w is added to the gradient.

    Equals:
      optax.nadam(learning_rate, b1, b2, eps, eps_root)
    References:
      Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 2, whose extra factor b2 in the
      denominator is left out here as in optax and PyTorch. PyTorch's NAdam also changes b1 from step to step
      (its `momentum_decay`), which no argument here expresses.
    """
    tx = chain(
        _l2(weight_decay, mask),
        divide(_dozat(b1, mu_dtype), by=second_moment(b2, eps, eps_root, nu_dtype)),
        scale_by_learning_rate(learning_rate),
    )
    return with_state_storage("nadam", tx, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype)


@recipe
def adamw(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    nu_dtype: DTypeLike | None = None,
    weight_decay_form: str = "coupled",
    state: str | Rules | None = None,
) -> Recipe:
    """AdamW: Adam with decoupled weight decay, which shrinks every weight by the same fraction.

    L2 regularisation adds the decay before the division, AdamW adds it after the division:

        adam(η, weight_decay=λ)  = chain(add_decayed_weights(λ), divide(...), scale_by_learning_rate(η))
        adamw(η, weight_decay=λ) = chain(divide(...), add_decayed_weights(λ), scale_by_learning_rate(η))

    `weight_decay_form` says how the decay λ and the learning rate η act together:

    - "coupled": -η (u + λ w), as in PyTorch and optax.
    - "independent": -η u - λ w. The learning rate does not affect the decay; λ may have its own schedule.
    - "cautious": as "coupled", but only for weights that -η u already makes smaller.
    - "corrected": -η (u + λ η / max η w). The decay falls with the square of the learning rate, so that
      weights before a normalization keep their norms. max η is the highest learning rate so far, so the decay
      is coupled during a warm-up. For the maximum of the whole schedule use the coupled form with
      weight_decay=lambda count: λ * schedule(count) / maximum.

    Equals:
      optax.adamw(learning_rate, b1, b2, eps, eps_root, weight_decay=weight_decay, mask=mask)
      torch.optim.AdamW(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=weight_decay) of PyTorch 2.14
    References:
      Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; cautious: Chen et al. 2025, arXiv:2510.12402;
      corrected: Defazio 2025, "Why gradients rapidly increase near the end of training", arXiv:2506.02285.
    """
    tx = chain(
        divide(chain(ema(b1, dtype=mu_dtype), debias(b1)), by=second_moment(b2, eps, eps_root, nu_dtype)),
        *decay_and_step("adamw", learning_rate, weight_decay, mask, weight_decay_form),
    )
    return with_state_storage("adamw", tx, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype)


@recipe
def nadamw(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.999,
    eps: Numeric = 1e-8,
    eps_root: Numeric = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: Mask | None = None,
    *,
    nu_dtype: DTypeLike | None = None,
    weight_decay_form: str = "coupled",
    state: str | Rules | None = None,
) -> Recipe:
    """NadamW: Nadam with decoupled weight decay, whose forms are those of `adamw`.

    Equals:
      optax.nadamw(learning_rate, b1, b2, eps, eps_root, weight_decay=weight_decay, mask=mask)
    References:
      Dozat 2016, "Incorporating Nesterov momentum into Adam", algorithm 2; Loshchilov & Hutter 2019,
      arXiv:1711.05101.
    """
    tx = chain(
        divide(_dozat(b1, mu_dtype), by=second_moment(b2, eps, eps_root, nu_dtype)),
        *decay_and_step("nadamw", learning_rate, weight_decay, mask, weight_decay_form),
    )
    return with_state_storage("nadamw", tx, state, mu_dtype=mu_dtype, nu_dtype=nu_dtype)


_negative = transform("negative", pointwise(lambda g: -g))


def _root(eps: Numeric, eps_in_sqrt: bool) -> optax.GradientTransformation:
    return root(eps_root=eps) if eps_in_sqrt else root(eps)


def _not_negative() -> optax.GradientTransformation:
    """max(g, 0): a variance, the difference of two moments, is below 0 by rounding alone."""
    return transform("rmsprop", pointwise(lambda g: jnp.maximum(g, 0)))


def _l2(weight_decay: ScalarOrSchedule | None, mask: Mask | None) -> optax.GradientTransformation:
    if weight_decay is not None:
        return add_decayed_weights(weight_decay, mask)
    who = called("add_decayed_weights")
    rule = Rule(
        optax.EmptyState(), lambda g, s, leaf, now: (g, s), begin=lambda leaves: check_mask(who, mask, leaves)
    )
    return transform("add_decayed_weights", rule)


def _dozat(b1: Numeric, mu_dtype: DTypeLike | None) -> optax.GradientTransformation:
    """The next step's average as seen from this one, each term corrected for its own weight."""
    return mix(b1, chain(ema(b1, dtype=mu_dtype), debias(b1, ahead=1)), debias(b1))
