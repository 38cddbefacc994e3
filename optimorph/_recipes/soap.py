"""SOAP and its relatives: a quotient of averages in the eigenbasis of the gradient's Kronecker factors."""

from typing import Any, Unpack

import optax

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
    """What all optimizers in an eigenbasis take, as `soap` says. None stands for the default."""

    factor_decay: Numeric | None
    spread: bool | None
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
    weight_decay_form: str = "coupled",
    **arguments: Unpack[EigenbasisArguments],
) -> Recipe:
    """SOAP: Adam in the eigenbasis of Shampoo's factors, for matrices; AdamW for everything else.

        in_eigenbasis((ema → debias) / (square → ema → root → debias^½)) → decay → learning rate

    The first step only finds the basis. It moves matrices by weight decay alone.

    Args:
      every: the number of steps from one refresh of the bases to the next.
      max_dim: sides that are longer have no factor; None for no limit.
      factor_decay: decay of the factors; by default `b2`.
      spread: refresh a part of the bases in every step, as `spread` of `in_eigenbasis`.
      block_size: the longest side of a block with factors of its own, as `block_size` of `in_eigenbasis`.
      factor_dtype: dtype of stored factors and bases, as `dtype` of `in_eigenbasis`.
      state: only None. 8 bits are too few for factors and bases, which are most of the state.
      weight_decay_form: and `mask`, `axes`, `others`, `others_learning_rate`, `mu_dtype`, `nu_dtype`,
        `shardings`: as those of `muon`.

    Raises:
      ValueError: a `state`; as `muon` and `in_eigenbasis`.

    Equals:
      nikhilvyas's SOAP(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=0,
        precondition_frequency=every), from the same first basis
    References:
      Vyas et al. 2024, "SOAP: Improving and stabilizing Shampoo using Adam", arXiv:2409.11321, algorithm 3.
    """
    first = chain(ema(b1, dtype=arguments.get("mu_dtype")), debias(b1))
    second = chain(stored(ema, b2, dtype=arguments.get("nu_dtype")), root(eps), debias(b2, power=0.5))
    matrices, others = basis("soap", divide(first, by=chain(square(), second)), b2, every, max_dim, arguments)
    return of_matrices(
        "soap",
        matrices,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        weight_decay_form=weight_decay_form,
        **others,
    )


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
    weight_decay_form: str = "coupled",
    **arguments: Unpack[EigenbasisArguments],
) -> Recipe:
    """KL-SOAP: SOAP whose factors are each weighted by the inverse of the other, without bias corrections.

        in_eigenbasis(ema / (square → ema → root), kl=True) → decay → learning rate

    In the speedrun of modded-nanogpt, track 3, matrices keep their norms instead:

        chain(in_eigenbasis(divide(ema(0.95), by=chain(square(), ema(0.9), root(1e-8))), decay=0.9, every=1,
            kl=True, whole_first=True, largest_inverse_root=4000), hyperball(0.018))

    Args:
      arguments: and `every`, `max_dim`, `weight_decay_form`: as those of `soap`.

    Raises:
      ValueError: as `soap`.

    Equals:
      yorkerlin's KLOpt(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=0, using_klsoap=True,
        precondition_frequency=every), from the same first basis
    References:
      Lin et al. 2025, "Understanding and improving Shampoo and SOAP via Kullback-Leibler minimization",
      arXiv:2509.03378.
    """
    second = chain(square(), stored(ema, b2, dtype=arguments.get("nu_dtype")), root(eps))
    quotient = divide(ema(b1, dtype=arguments.get("mu_dtype")), by=second)
    matrices, others = basis("klsoap", quotient, b2, every, max_dim, arguments, kl=True)
    return of_matrices(
        "klsoap",
        matrices,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        weight_decay_form=weight_decay_form,
        **others,
    )


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
    weight_decay_form: str = "coupled",
    **arguments: Unpack[EigenbasisArguments],
) -> Recipe:
    """Shampoo: the average gradient between the inverse roots of both factors.

        u = (n m)^¼ L^-¼ m R^-¼        (1)  of n x m matrices
        u = √(tr L) L^-½ m R^-½        (2)  with `power=0.5`

    In the eigenbasis of L and R these roots are numbers for each row and column, which are averaged there:

        in_eigenbasis((ema → debias) / (square → factored → debias → root)) → decay → learning rate

    If all gradients are alike, (1) is their polar factor, and (2) has the inverses of their singular values.
    (2) is for gradients that are mostly noise; without noise it diverges on a quadratic that (1) and `soap`
    solve.

    Args:
      power: of the inverse factors, 0.25 as in the paper, or 0.5.
      arguments: and `every`, `max_dim`, `weight_decay_form`: as those of `soap`.

    Raises:
      ValueError: another `power`; as `soap`.

    Equals:
      with power=0.5, Adafactor in the eigenbasis of Shampoo (Vyas et al. 2024, claim 1), from the same
        first basis
    References:
      Gupta, Koren & Singer 2018, "Shampoo", arXiv:1802.09568, algorithm 1, with averages in place of sums;
      (2): Vyas et al. 2024, arXiv:2409.11321, claim 1.
    """
    if power not in (0.25, 0.5):
        raise ValueError(f"shampoo: power must be 0.25 or 0.5, but is {power!r}. Type power=0.25.")
    first = chain(ema(b1, dtype=arguments.get("mu_dtype")), debias(b1))
    rank_one = chain(square(), factored(b2, geometric=power == 0.25), debias(b2), root(eps))
    matrices, others = basis("shampoo", divide(first, by=rank_one), b2, every, max_dim, arguments, sort=False)
    return of_matrices(
        "shampoo",
        matrices,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        weight_decay_form=weight_decay_form,
        **others,
    )


def basis(
    who: str,
    inner: optax.GradientTransformation,
    b2: Numeric,
    every: int,
    max_dim: int | None,
    arguments: EigenbasisArguments,
    **options: Any,
) -> tuple[optax.GradientTransformation, dict[str, Any]]:
    """`in_eigenbasis` with its arguments among those of a recipe, and the other arguments.

    Raises:
      ValueError: naming `who`, if `state` is among them.
    """
    others: dict[str, Any] = {**arguments}
    if others.get("state") is not None:
        raise ValueError(f"{who}: state must be None: {NOT_IN_8_BITS}")
    decay, spread = others.pop("factor_decay", None), others.pop("spread", None)
    return in_eigenbasis(
        inner,
        decay=b2 if decay is None else decay,
        every=every,
        spread=bool(spread),
        max_dim=max_dim,
        block_size=others.pop("block_size", None),
        dtype=others.pop("factor_dtype", None),
        **options,
    ), others
