"""SOAP and its relatives: a quotient of averages in the eigenbasis of the gradient's Kronecker factors."""

from typing import Any, Unpack

import optax

from optimorph._core.checks import if_injected, is_one_of
from optimorph._core.shown import shown
from optimorph._core.types import DTypeLike, Numeric, ScalarOrSchedule
from optimorph._recipes.moments import stored
from optimorph._recipes.of_matrices import MatrixArguments, of_matrices
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain, divide
from optimorph._transforms.eigenbasis import NOT_IN_8_BITS, in_eigenbasis
from optimorph._transforms.factored import factored
from optimorph._transforms.pointwise import debias, root, square


class EigenbasisArguments(MatrixArguments, total=False):
    """The arguments that all optimizers in an eigenbasis share, as in `soap`. None is the default."""

    factor_decay: Numeric | None
    spread: bool | None
    refresh_warmup: int | None
    block_size: int | None
    factor_dtype: DTypeLike | None


@recipe
def soap(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.95,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-8,
    weight_decay: ScalarOrSchedule = 0.01,
    *,
    every: int = 10,
    max_dim: int | None = 10_000,
    **arguments: Unpack[EigenbasisArguments],
) -> Recipe:
    """SOAP: Adam in the eigenbasis of Shampoo's factors, for matrices; AdamW for everything else.

        in_eigenbasis((ema → debias) / (square → ema → root → debias^½)) → decay → learning rate

    A matrix of n x m numbers has two factors, running averages of g gᴴ (n x n) and gᴴ g (m x m). Their
    eigenvectors are the basis. `in_eigenbasis` has the equations. The first step only finds the basis; it
    moves matrices by weight decay alone.

    Args:
      every: the number of steps between two updates of the bases.
      max_dim: the longest side of a matrix that has a factor; None for no limit.
      factor_decay: the decay of the factors. The default is `b2`.
      spread: whether every step updates a part of the bases, as in `in_eigenbasis`.
      refresh_warmup: the number of first steps that update all bases, as in `in_eigenbasis`.
      block_size: longer sides are divided into blocks with their own factors, as in `in_eigenbasis`.
      factor_dtype: the dtype of stored factors and bases, as `dtype` of `in_eigenbasis`.
      state: must be None. 8 bits are too few for factors and bases, which are most of the state.
      weight_decay_form, mask, axes, others, others_learning_rate, mu_dtype, nu_dtype, shardings: as in
        `muon`.

    Raises:
      ValueError: a `state` that is not None; the errors of `muon` and `in_eigenbasis`.

    Equals:
      SOAP(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=0, precondition_frequency=every) of
        nikhilvyas/SOAP, soap.py at a1e5535, from the same first basis
    References:
      Vyas et al. 2024, "SOAP: Improving and stabilizing Shampoo using Adam", arXiv:2409.11321, algorithm 3.
    """
    first = chain(ema(b1, dtype=arguments.get("mu_dtype")), debias(b1))
    second = chain(stored(ema, b2, dtype=arguments.get("nu_dtype")), root(eps), debias(b2, power=0.5))
    matrices, others = basis("soap", divide(first, by=chain(square(), second)), b2, every, max_dim, arguments)
    return of_matrices("soap", matrices, learning_rate=learning_rate, weight_decay=weight_decay, **others)


@recipe
def klsoap(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-8,
    weight_decay: ScalarOrSchedule = 0.01,
    *,
    every: int = 10,
    max_dim: int | None = 10_000,
    **arguments: Unpack[EigenbasisArguments],
) -> Recipe:
    """KL-SOAP: SOAP in which each factor is weighted by the inverse of the other. It corrects no bias.

        in_eigenbasis(ema / (square → ema → root), kl=True) → decay → learning rate

    In track 3 of the modded-nanogpt speedrun matrices keep their norms, without a weight decay:

        chain(in_eigenbasis(divide(ema(0.95), by=chain(square(), ema(0.9), root(1e-8))), decay=0.9, every=1,
            kl=True, whole_first=True, largest_inverse_root=4000), hyperball(0.018))

    Args:
      every, max_dim, weight_decay_form, arguments: as in `soap`.

    Raises:
      ValueError: the errors of `soap`.

    Equals:
      KLOpt(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=0, using_klsoap=True,
        precondition_frequency=every) of yorkerlin/KL-Methods, optim/kl_opt.py at a02e622, from the same first
        basis
    References:
      Lin et al. 2025, "Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization",
      arXiv:2509.03378.
    """
    second = chain(square(), stored(ema, b2, dtype=arguments.get("nu_dtype")), root(eps))
    quotient = divide(ema(b1, dtype=arguments.get("mu_dtype")), by=second)
    matrices, others = basis("klsoap", quotient, b2, every, max_dim, arguments, kl=True)
    return of_matrices("klsoap", matrices, learning_rate=learning_rate, weight_decay=weight_decay, **others)


@recipe
def shampoo(
    learning_rate: ScalarOrSchedule,
    b1: Numeric = 0.9,
    b2: Numeric = 0.95,
    eps: Numeric = 1e-8,
    weight_decay: ScalarOrSchedule = 0.01,
    *,
    power: float = 0.25,
    every: int = 10,
    max_dim: int | None = 10_000,
    **arguments: Unpack[EigenbasisArguments],
) -> Recipe:
    """Shampoo: the average gradient, multiplied from both sides by inverse roots of its factors L and R.

        u = (n m)^¼ L^-¼ m R^-¼        (1)  of n x m matrices
        u = √(tr L) L^-½ m R^-½        (2)  with `power=0.5`

    In the eigenbasis each root is a diagonal matrix: one number for each row or column. These numbers come
    from running averages there:

        in_eigenbasis((ema → debias) / (square → factored → debias → root)) → decay → learning rate

    If all gradients are equal, (1) is their polar factor, and the singular values of (2) are the inverses of
    theirs. Use (2) only if gradients are mostly noise: without noise it diverges on a quadratic that (1) and
    `soap` solve.

    Args:
      power: the power of the inverse factors, 0.25 as in the paper, or 0.5.
      every, max_dim, weight_decay_form, arguments: as in `soap`.

    Raises:
      ValueError: another `power`; the errors of `soap`.

    Equals:
      Adafactor in the eigenbasis of Shampoo, arXiv:2409.11321, claim 1, with power=0.5, from the same first
        basis
    References:
      Gupta, Koren & Singer 2018, "Shampoo", arXiv:1802.09568, algorithm 1, with averages in place of sums;
      (2): Vyas et al. 2024, arXiv:2409.11321, claim 1.
    """
    if not is_one_of(power, (0.25, 0.5)):
        raise ValueError(
            f"shampoo: power must be 0.25 or 0.5, but is {shown(power)}. Type power=0.25."
            f"{if_injected('power', power)}"
        )
    first = chain(ema(b1, dtype=arguments.get("mu_dtype")), debias(b1))
    rank_one = chain(square(), factored(b2, geometric=power == 0.25), debias(b2), root(eps))
    matrices, others = basis("shampoo", divide(first, by=rank_one), b2, every, max_dim, arguments, sort=False)
    return of_matrices("shampoo", matrices, learning_rate=learning_rate, weight_decay=weight_decay, **others)


def basis(
    who: str,
    inner: optax.GradientTransformation,
    b2: Numeric,
    every: int,
    max_dim: int | None,
    arguments: EigenbasisArguments,
    **options: Any,
) -> tuple[optax.GradientTransformation, dict[str, Any]]:
    """`in_eigenbasis` with its own arguments out of those of an optimizer, and the remaining arguments."""
    others: dict[str, Any] = {**arguments}
    if others.get("state") is not None:
        raise ValueError(f"{who}: state must be None: {NOT_IN_8_BITS}")
    decay, spread = others.pop("factor_decay", None), others.pop("spread", None)
    warmup = others.pop("refresh_warmup", None)
    return in_eigenbasis(
        inner,
        decay=b2 if decay is None else decay,
        every=every,
        spread=bool(spread),
        refresh_warmup=1 if warmup is None else warmup,
        max_dim=max_dim,
        block_size=others.pop("block_size", None),
        dtype=others.pop("factor_dtype", None),
        **options,
    ), others
