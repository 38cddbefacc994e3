"""Muon: matrices by their polar factors, all other leaves by another optimizer."""

from typing import Unpack

from optimorph._core.types import Numeric, ScalarOrSchedule
from optimorph._recipes.of_matrices import PolarArguments, of_polar_factors
from optimorph._recipes.recipe import Recipe, recipe
from optimorph._transforms.averages import ema
from optimorph._transforms.matrices import Scale


@recipe
def muon(
    learning_rate: ScalarOrSchedule,
    momentum: Numeric = 0.95,
    *,
    nesterov: bool = True,
    weight_decay: ScalarOrSchedule = 0.0,
    scale: Scale = "rms_to_rms",
    **arguments: Unpack[PolarArguments],
) -> Recipe:
    """Muon: the polar factor of the average gradient, for matrices. AdamW updates all other leaves.

        ema(nesterov) → orthogonalize → scale_by_shape → add_decayed_weights → scale_by_learning_rate

    Args:
      learning_rate: the learning rate of matrices, a number or a schedule.
      momentum: β of the average gradient, in [0, 1).
      nesterov: whether the average looks one step ahead, as (3) of `ema`.
      weight_decay: the decay of matrices, and of other leaves if `others` is not given.
      orthogonalizer: a function of stacks of matrices. The default `linalg.NewtonSchulz()` takes five steps
        of Polar Express.
      scale: how an update depends on the shape of its matrix, as in `scale_by_shape`: "rms_to_rms", "keller",
        "adamw_rms", a function (inputs, outputs) → factor, or None.
      weight_decay_form: as in `adamw`.
      state: "int8" stores the moments of large leaves in one byte for each number; the codes of matrices are
        evenly spaced. `state` may also be rules for `compress_state`.
      axes: which leaves are matrices, and which of their axes are inputs and outputs, for leaves that the
        default rules do not know or read wrongly. It is an ordered mapping from a path pattern to a spec,
        such as "io" (see `linalg.Axes`), or to None for "not a matrix"; the first match decides. A pattern is
        one of fnmatch, where `*` also matches slashes, or a compiled regular expression. A path also matches
        all leaves below it. `axes` may also be a function (path, shape) → spec, or a tree of specs. The
        default rules know the names of Flax, Equinox, Haiku, MaxText and Levanter. `plan` shows how every
        leaf is read.
      others: the transformation of the other leaves. The default is `adamw(others_learning_rate)` with the
        same `weight_decay`, `weight_decay_form`, `mask` and `state`.
      others_learning_rate: the learning rate of that AdamW; by default `learning_rate`.
      shardings: the shardings of the leaves over a mesh: a tree of `jax.sharding.PartitionSpec` or
        `NamedSharding`, or a mapping or function as for `axes`. They are found automatically if they are not
        given, except inside `jax.shard_map`, where they are needed; `P()` means replicated.
      comm_dtype: the dtype of the data in collectives, as in `orthogonalize`.
      divide: whether one matrix may be divided over several devices, as in `orthogonalize`.

    Raises:
      ValueError: at `init`, if no rule decides how a leaf reads, or if a spec does not fit its leaf. The
        message names all such leaves, and says what to type.

    Equals:
      torch.optim.Muon(lr=learning_rate, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay) of
        PyTorch 2.14, with NewtonSchulz("jordan") and scale="keller"; adjust_lr_fn="match_rms_adamw", with
        "adamw_rms"; but for the bfloat16 that PyTorch forces upon the iteration
      Muon(lr=learning_rate, momentum=momentum, weight_decay=weight_decay) of KellerJordan/Muon, muon.py at
        00ba60d, with NewtonSchulz("jordan") and scale="keller", but for its bfloat16
    References:
      Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025,
      arXiv:2502.16982; Amsel et al. 2025, arXiv:2505.16932.
    """
    return of_polar_factors(
        "muon",
        ema(momentum, nesterov=nesterov, dtype=arguments.get("mu_dtype")),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        scale=scale,
        **arguments,
    )
