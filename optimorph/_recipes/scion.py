"""Scion: steps of steepest descent under a norm for each layer, inside a ball of that norm."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from optimorph._core.checks import LeafError, check_factor
from optimorph._core.rule import handed
from optimorph._core.shown import shown
from optimorph._core.types import AxesRules, DTypeLike, Mask, Numeric, Rules, ScalarOrSchedule, Shape
from optimorph._distributed.hardware import AUTO, Hardware
from optimorph._recipes.moments import identity
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._recipes.route_matrices import routed
from optimorph._recipes.state_storage import warning_if_nothing, with_state_storage
from optimorph._routing.default_roles import role_of
from optimorph._routing.leaf_spec import HEAD, INFERRED_HEAD, LeafSpec, axes_of
from optimorph._routing.partition import partition
from optimorph._routing.resolve import Resolve
from optimorph._routing.rules import NO_MATCH, lookup, warning_of_unused
from optimorph._storage.codec_rules import linear
from optimorph._transforms.averages import ema
from optimorph._transforms.combine import chain, divide
from optimorph._transforms.matrices import orthogonalize, scale_by_shape
from optimorph._transforms.means import mean
from optimorph._transforms.pointwise import root, sign, square
from optimorph._transforms.scale_by_rules import scale_by_rules
from optimorph._transforms.step import decay_and_step

TABLES = ("embedding", HEAD, INFERRED_HEAD)


@recipe
def scion(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric = 0.9,
    *,
    norms: Rules | None = None,
    radius: Numeric | Rules | None = None,
    weight_decay: ScalarOrSchedule = 1.0,
    weight_decay_form: str = "coupled",
    mask: Mask | None = None,
    orthogonalizer: Callable[[jax.Array], jax.Array] | None = None,
    axes: AxesRules | None = None,
    mu_dtype: DTypeLike | None = None,
    state: str | Rules | None = None,
    shardings: Rules | None = None,
    comm_dtype: DTypeLike | None = None,
    divide: str | Hardware = AUTO,
) -> Recipe:
    """Scion: steps in the direction of steepest descent for a norm that depends on the kind of leaf.

        w ← (1 - η) w - η ρ lmo(m)                      (1)

        lmo(m) = √(out / in) polar(m)                   (2)  "spectral"
        lmo(m) = sign(m) / in                           (3)  "sign"
        lmo(m) = m / (in (rms_i(m) + ε))                (4)  "row": rms over the weights of each output
        lmo(m) = m / (in (rms_o(m) + ε))                (5)  "column": rms over the weights of each input
        lmo(m) = m / (rms(m) + ε)                       (6)  "rms": for leaves that are not matrices

    m is the average gradient and ε is 1e-8. lmo (linear minimization oracle) has norm 1. With
    `weight_decay=1`, the default, the norm of every leaf stays at most ρ. With 0 it is not bounded.

    Args:
      momentum: β of the average. The argument of the published program is 1 - β.
      norms: the norm of each matrix, by rules as in `labels`. Where no rule matches, it is "sign" for
        embeddings and heads, and "spectral" for other matrices.
      radius: ρ, a number, or rules with a number for each leaf as in `scale_by_rules`. Where no rule matches,
        it is 3000 for embeddings and heads, and 50 for all other leaves.
      weight_decay: λ, where 1 - λ η replaces the 1 - η of (1).
      weight_decay_form: as in `adamw`.
      axes: how leaves read as matrices, as in `muon`. Here embeddings (vocabulary, width) and heads are
        matrices too. Embeddings read as "oi", like a head that shares their weights. A head reads as "oi" if
        it is named `weight`, and as "io" otherwise. In `axes` the spec "head" makes a leaf a head.
      orthogonalizer, mask, mu_dtype, state, shardings, comm_dtype, divide: as in `muon`.

    Raises:
      ValueError: as `muon`; at `init`, an unknown norm.

    Equals:
      Scion(lr=learning_rate, momentum=1 - momentum, scale=radius) of LIONS-EPFL/scion, scion.py at f58a393,
        with norm="Spectral", "Sign", "RowNorm", "BiasRMS" or normalized "ColNorm", and the polar factor
        computed alike
    References:
      Pethick et al. 2025, "Training deep learning models with norm-constrained LMOs", arXiv:2502.07529.
    """
    average = with_state_storage("scion", ema(momentum, dtype=mu_dtype), state, linear, mu_dtype=mu_dtype)
    polar = orthogonalize(orthogonalizer, comm_dtype=comm_dtype, divide=divide)
    factors = scale_by_rules(_radius(radius))
    step = decay_and_step("scion", learning_rate, weight_decay, mask, weight_decay_form)
    matrices = chain(average, _lmo(norms, polar), factors, *step)  # (2-5)
    others = chain(average, _over_rms("io"), factors, *step)  # (6)
    tx = routed(
        "scion",
        matrices,
        others,
        axes,
        shardings,
        ("scion", "rms"),
        polar=orthogonalizer,
        divide=divide,
        reads=_with_tables,
    )
    return warning_if_nothing(warning_of_unused(tx, "scion", norms=norms, radius=radius), "scion", state)


def _lmo(norms: Rules | None, polar: optax.GradientTransformation) -> optax.GradientTransformation:
    given = lookup({} if norms is None else norms, "scion", "norms")

    def norm(path: str, shape: Shape) -> Any:
        found = given(path, shape)
        if found is NO_MATCH:
            found = "sign" if _is_table(path, shape) else "spectral"
        if found not in [*directions]:  # a list: the norm may not be hashable
            raise LeafError(
                f"scion: the norm of {path!r} must be one of {[*directions]}, but is {shown(found)}."
            )
        return found

    over_inputs = scale_by_shape(lambda inputs, outputs: 1 / inputs)
    directions = {
        "spectral": chain(polar, scale_by_shape("rms_to_rms")),  # (2)
        "sign": chain(sign(), over_inputs),  # (3)
        "row": chain(_over_rms("i"), over_inputs),  # (4)
        "column": chain(_over_rms("o"), over_inputs),  # (5)
    }
    return partition(norm, directions)


def _radius(radius: Numeric | Rules | None) -> Callable[[str, Shape], Any]:
    rules = callable(radius) or isinstance(radius, Mapping)
    given = lookup(radius if rules else {"*": radius}, "scion", "radius")

    def own(path: str, shape: Shape) -> Any:
        found = given(path, shape)
        if found is NO_MATCH or found is None:
            return 3000.0 if _is_table(path, shape) else 50.0
        check_factor("scion", path, shape, found, "radius")
        return found

    return own


def _over_rms(sides: str) -> optax.GradientTransformationExtraArgs:
    return divide(identity, by=chain(square(), mean(sides), root(1e-8)))


def _with_tables(resolve: Resolve) -> Resolve:
    """Embeddings and heads as matrices, which they are not for other optimizers."""

    def read(path: str, shape: Shape, spec: LeafSpec) -> LeafSpec:
        if spec.axes is not None or spec.unresolved is not None or len(shape) != 2 or spec.role not in TABLES:
            return spec
        return spec._replace(
            axes=axes_of("oi" if spec.role == "embedding" or path.endswith("weight") else "io")
        )

    def resolve_with_tables(paths: Sequence[str], shapes: Sequence[Shape]) -> list[LeafSpec]:
        return [*map(read, paths, shapes, resolve(paths, shapes))]

    return resolve_with_tables


def _is_table(path: str, shape: Shape) -> bool:
    """Whether a leaf is an embedding or a head, by all leaves; or by its name, if a rule gives its axes."""
    role = (handed("roles") or {}).get(path, "rule")
    return (role_of(path, shape) if role.startswith("rule") else role) in TABLES
