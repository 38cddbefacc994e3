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
    weight_decay_form: str = "coupled",
    scale: Scale = "rms_to_rms",
    **arguments: Unpack[PolarArguments],
) -> Recipe:
    """Muon: the polar factor of the average gradient, for matrices; AdamW for everything else.

    Args:
      orthogonalizer: a function of stacks of matrices; `linalg.NewtonSchulz()`, the default, takes five
        Polar Express steps.
      scale: of a matrix's update by its shape, as that of `scale_by_shape`: "rms_to_rms", "keller",
        "adamw_rms", a function (inputs, outputs) → factor, or None.
      weight_decay_form: as that of `adamw`.
      state: "int8" stores moments of large leaves in one byte each, the average of matrices linearly; or the
        rules of `compress_state`.
      axes: how leaves read as matrices, for those that the default rules do not know or get wrong: an
        ordered mapping from path pattern (fnmatch, `*` crosses slashes; or a compiled regular expression) to
        a spec of `linalg.Axes`, or to None for no matrix, the first match wins; or a function
        (path, shape) → spec; or a tree of specs. The default rules know the names of Flax, Equinox, Haiku,
        MaxText and Levanter: `plan` shows what becomes of every leaf.
      others: the transform of the other leaves; without one `adamw(others_learning_rate)` with this
        `weight_decay`, in this form, and this state.
      others_learning_rate: of that AdamW; `learning_rate` without one.
      shardings: how leaves lie over a mesh, which is found out where it is not said: a tree of
        `jax.sharding.PartitionSpec` or `NamedSharding`, or a mapping or function as of `axes`. Inside
        `jax.shard_map` it must be said of what leaves are shards; `P()` is whole.
      comm_dtype: the dtype of the data in collectives, as that of `orthogonalize`.
      divide: when a matrix is divided over several devices, as that of `orthogonalize`.

    Raises:
      ValueError: at `init`, all leaves that no rule decides and specs that do not fit, with some that do.

    Equals:
      torch.optim.Muon(lr=learning_rate, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay),
        with NewtonSchulz("jordan") and scale="keller"; adjust_lr_fn="match_rms_adamw", with "adamw_rms";
        but for the bfloat16 that PyTorch forces upon the iteration
      Keller Jordan's Muon(lr=learning_rate, momentum=momentum, weight_decay=weight_decay), with
        NewtonSchulz("jordan") and scale="keller"
    References:
      Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al. 2025,
      arXiv:2502.16982; Amsel et al. 2025, arXiv:2505.16932.
    """
    return of_polar_factors(
        "muon",
        ema(momentum, nesterov=nesterov, dtype=arguments.get("mu_dtype")),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        weight_decay_form=weight_decay_form,
        scale=scale,
        **arguments,
    )
