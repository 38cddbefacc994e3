"""Optimizers for JAX, from gradient descent to Muon, as chains of small gradient transformations.

Transforms, such as `ema`, `orthogonalize` and `add_decayed_weights`, are the parts of optimizers, such as
`adamw`, `muon` and `soap`. `chain` joins them, and takes transformations of optax too.

Routing: `plan` shows what an optimizer does with every leaf, and what every device of a mesh computes and
sends. `Hardware` describes devices whose speed the library does not know. `route_matrices` gives matrices to
one transform and other leaves to another. `partition` and `labels` route leaves by path and shape, and
`roles`, `not_roles` and `role_of` by their role, such as "embedding" or "bias". `decay_mask` is a mask of
what is usually decayed.

Weights: `qk_clip` keeps attention logits below a threshold. `apply_updates` can round bfloat16 weights
stochastically. `split_weights` and `join_weights` store float32 weights as bfloat16 and one or two bytes.

8-bit state: `compress_state` stores moments in 8 bits, as does the argument `state="int8"` of optimizers.

Changing a run: `carry_state` continues with another optimizer, also from optax, or with other parameters.
`inject_hyperparams` keeps hyperparameters in the state, in float32. `register_for_export` lets `jax.export`
save programs that take states.

Leaves of integers, booleans and random keys are not trained. Their gradient is None, or the float0 that
`jax.grad(allow_int=True)` returns. Their update is None, and their state does not change.

Modules: `linalg` (polar factors, norms), `codecs` (numbers in fewer bytes), `rules` (transforms of your
own), `layouts` (rules for parameters of known frameworks), `schedules`, `theory` (learning rates for
quadratic losses), `curvature` (eigenvalues of a Hessian), and `probes` (norms and ranks of every leaf, for a
logger). `race` trains your own model with several optimizers (`pip install 'optimorph[race]'`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimorph import codecs, curvature, layouts, linalg, probes, rules, schedules, theory
from optimorph._apply_updates import apply_updates
from optimorph._carry.carry_state import carry_state
from optimorph._carry.report import CarryReport, CarryRow
from optimorph._distributed.hardware import Hardware
from optimorph._inject_hyperparams import inject_hyperparams
from optimorph._plan import Plan, PlanRow, plan
from optimorph._recipes.adamh import adamh
from optimorph._recipes.adamuon import adamuon
from optimorph._recipes.ademamix import ademamix
from optimorph._recipes.laprop import laprop
from optimorph._recipes.lion import lion
from optimorph._recipes.mars_adamw import mars_adamw
from optimorph._recipes.muon import muon
from optimorph._recipes.muon2 import muon2
from optimorph._recipes.muonh import muonh
from optimorph._recipes.normuon import normuon
from optimorph._recipes.optimizers import adagrad, adam, adamw, nadam, nadamw, rmsprop, sgd
from optimorph._recipes.route_matrices import route_matrices
from optimorph._recipes.scion import scion
from optimorph._recipes.soap import klsoap, shampoo, soap
from optimorph._recipes.soap_muon import soap_muon
from optimorph._register_for_export import register_for_export
from optimorph._routing.default_roles import decay_mask, not_roles, role_of, roles
from optimorph._routing.partition import partition
from optimorph._routing.rules import labels
from optimorph._split_weights import join_weights, split_weights
from optimorph._storage.compress_state import compress_state
from optimorph._storage.stored import CompressedState
from optimorph._transforms.averages import (
    AccumulateState,
    EmaState,
    ExtrapolateState,
    MomentumState,
    SlowEmaState,
    accumulate,
    ema,
    extrapolate,
    momentum,
    slow_ema,
)
from optimorph._transforms.cautious import cautious
from optimorph._transforms.clip_by_global_norm import ClipState, clip_by_global_norm
from optimorph._transforms.clip_leaf import clip_norm, clip_rms
from optimorph._transforms.combine import AddState, DivideState, MixState, add, chain, divide, mix
from optimorph._transforms.eigenbasis import EigenbasisState, in_eigenbasis
from optimorph._transforms.factored import FactoredState, factored
from optimorph._transforms.hyperball import hyperball
from optimorph._transforms.in_bfloat16 import BFloat16State, in_bfloat16
from optimorph._transforms.in_float32 import in_float32
from optimorph._transforms.matrices import orthogonalize, scale_by_shape
from optimorph._transforms.means import MeanState, keep_norm, mean
from optimorph._transforms.multi_steps import MultiStepsState, multi_steps
from optimorph._transforms.pointwise import DampenState, DebiasState, dampen, debias, root, sign, square
from optimorph._transforms.qk_clip import QKClipState, clip_attention_logits, qk_clip
from optimorph._transforms.scale_by_rules import scale_by_rules
from optimorph._transforms.skip_nonfinite import SkipState, skip_nonfinite
from optimorph._transforms.step import (
    CorrectedDecayState,
    DecayState,
    LearningRateState,
    add_decayed_weights,
    scale_by_learning_rate,
)

if TYPE_CHECKING:
    from optimorph._racing.race import race as race

__version__ = "0.1.0"

__all__ = [
    "AccumulateState",
    "AddState",
    "BFloat16State",
    "CarryReport",
    "CarryRow",
    "ClipState",
    "CompressedState",
    "CorrectedDecayState",
    "DampenState",
    "DebiasState",
    "DecayState",
    "DivideState",
    "EigenbasisState",
    "EmaState",
    "ExtrapolateState",
    "FactoredState",
    "Hardware",
    "LearningRateState",
    "MeanState",
    "MixState",
    "MomentumState",
    "MultiStepsState",
    "Plan",
    "PlanRow",
    "QKClipState",
    "SkipState",
    "SlowEmaState",
    "accumulate",
    "adagrad",
    "adam",
    "adamh",
    "adamuon",
    "adamw",
    "add",
    "add_decayed_weights",
    "ademamix",
    "apply_updates",
    "carry_state",
    "cautious",
    "chain",
    "clip_attention_logits",
    "clip_by_global_norm",
    "clip_norm",
    "clip_rms",
    "codecs",
    "compress_state",
    "curvature",
    "dampen",
    "debias",
    "decay_mask",
    "divide",
    "ema",
    "extrapolate",
    "factored",
    "hyperball",
    "in_bfloat16",
    "in_eigenbasis",
    "in_float32",
    "inject_hyperparams",
    "join_weights",
    "keep_norm",
    "klsoap",
    "labels",
    "laprop",
    "layouts",
    "linalg",
    "lion",
    "mars_adamw",
    "mean",
    "mix",
    "momentum",
    "multi_steps",
    "muon",
    "muon2",
    "muonh",
    "nadam",
    "nadamw",
    "normuon",
    "not_roles",
    "orthogonalize",
    "partition",
    "plan",
    "probes",
    "qk_clip",
    "register_for_export",
    "rmsprop",
    "role_of",
    "roles",
    "root",
    "route_matrices",
    "rules",
    "scale_by_learning_rate",
    "scale_by_rules",
    "scale_by_shape",
    "schedules",
    "scion",
    "sgd",
    "shampoo",
    "sign",
    "skip_nonfinite",
    "slow_ema",
    "soap",
    "soap_muon",
    "split_weights",
    "square",
    "theory",
]


def __getattr__(name: str) -> Any:
    """`race`, imported when it is asked for: it needs packages that training does not."""
    if name != "race":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return import_module("optimorph._racing.race").race
    except ModuleNotFoundError as error:
        package = (error.name or "optimorph").split(".")[0]
        if package == "optimorph":
            raise
        raise ModuleNotFoundError(
            f"optimorph.race needs {package}: pip install 'optimorph[race]'", name=error.name
        ) from error


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "race"]
