"""The state of one optimizer as that of another: a run changes in mid-training."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._carry_leaves import (
    WHO,
    chosen,
    leaves_of,
    new_names,
    places,
    to_the_devices_of,
    under_old_names,
    with_name,
)
from optimorph._carry_match import Match
from optimorph._carry_report import CarryReport
from optimorph._core.checks import abbreviated
from optimorph._core.types import Mask, PyTree
from optimorph._state_slots import Slot, owners, slots
from optimorph._storage.stored import Codecs, Stored, codecs_of, with_stored, without_stored


def carry_state(
    state: PyTree,
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    written_by: optax.GradientTransformation | None = None,
    renamed: Mapping[str, str] | Callable[[str], str] | None = None,
    fresh: Mask | None = None,
    grown: bool | Mapping[str, Any] = False,
    strict: bool = False,
) -> tuple[PyTree, CarryReport]:
    """Go on with another optimizer, other parameters or other storage, and keep what the state knows.

        state, report = carry_state(state, tx, params)
        print(report)

    The result is a state of `tx` for `params`, as `tx.init(params)` makes it, with every array of `state`
    that it has a place for. `state` and `tx` may each be of this library or of optax.

    Moments and velocities are found by kind and by the leaf's path, wherever they stand: in chains, masks,
    partitions, `multi_steps`, `inject_hyperparams`, `probe`, `skip_nonfinite`, and optax's `MultiSteps`
    and `apply_if_finite`. dtypes and codecs become those of `tx`. Codes can only be read with the codecs that
    wrote them: `written_by`. What `tx` stores in the same codes is copied, and else encoded once. A first
    moment of Adam becomes the average of Lion or Muon. A velocity behind a quotient, as RMSprop has it, is no
    velocity of gradients. States of types that are not known are carried over to the same types.

    Counts of schedules go on. Where `state` has none, they take the count of steps; a schedule of a new part
    of a partition joins the others. Counts for bias corrections go on with the moments that they correct; if
    all those are fresh, they begin at 0. If `state` has moments but counted no steps at all, the moments are
    used without a correction, as before.

    A fresh leaf beside leaves that are kept shares their count t. After k steps of its own,

        m / (1 - β₁ᵗ) = (1 - β₁ᵏ) / (1 - β₁ᵗ) m̂ₖ        (1)
        v / (1 - β₂ᵗ) = (1 - β₂ᵏ) / (1 - β₂ᵗ) v̂ₖ        (2)

    where m̂ₖ and v̂ₖ are what an Adam of its own would have. So its updates are (1) / √(2) times as long: with
    β = 0.9 and 0.999 and t large 3.2 times in the first step, at most 6.6 times in the 12th, and 1.3 times
    after 1000. The same holds of the new rows of a leaf with `grown`. A part of its own has its own counts,
    and none of this:

        tx = partition({"head/*": "new", "*": "old"}, {"new": adamw(1e-3), "old": adamw(1e-3)})

    Or warm up the learning rate again. The average of Muon, velocities and Lion have no count.

    The arguments are those of `tx`: the learning rate, β, the schedules. Only injected hyperparameters which
    both have are kept as they are in `state`, because they may have been set there. A window of `multi_steps`
    that is not full goes on in `multi_steps` and is dropped without it. Numbers of probes begin anew.

    The arrays are copies, which may be donated. If they are on other devices than the parameters they are
    moved there: moments are divided as their parameters are, and counts are on every device. On the same
    devices each stays divided as it is. Inside `jax.jit` no report is made: return the state alone. A
    checkpoint must be restored into what its own `init` made, because its types say what it holds. One of
    version 0.1.0, where constant rates had no state, is restored into `tx.init(params)` with
    `optax.EmptyState()` in place of `LearningRateState` and `DecayState`; one of `multi_steps` that had no
    weight with `weight=None`.

    To begin some leaves anew in an optimizer that stays as it is:

        state, _ = carry_state(state, tx, params, written_by=tx, fresh={"head/*": True, "*": False})

    Args:
      state: any state of an optimizer of this library or of optax.
      tx: the optimizer that the run goes on with.
      params: what `tx` is to update, or their shapes.
      written_by: the optimizer that made `state`; needed if `state` has moments in codes.
      renamed: path in the state → path in the parameters, as a function or a mapping. A mapping has paths or
        their beginnings, of which the first that matches is exchanged: `{"encoder": "backbone/encoder"}`.
      fresh: leaves whose moments begin anew, as `add_decayed_weights` takes a mask.
      grown: where a leaf's axes have grown, keep the old part of its moments and begin the rest anew. True:
        the old part comes first. A mapping from patterns of paths says where it is, as a NumPy index:
        `{"head/kernel": np.s_[:, 6:], "layers/*": np.s_[[0, 1, 3, 4]]}`. Otherwise a moment of another shape
        is fresh.
      strict: refuse to lose anything that updates depend on, and to take a moment for one of another kind.
        What begins anew by `fresh` is not lost.

    Returns:
      The state and a report with a row for every array: kept, converted, fresh or dropped, and why.

    Raises:
      ValueError: with `strict`, arrays that `tx` wants and `state` lacks or the other way round, by path, or
        that differ in shape; codes without `written_by`, or of other codecs; states whose types are lost;
        new names that no leaf of the state or two leaves would have.
    """
    blank, codecs = codecs_of(tx, params)
    name = new_names(renamed, leaves_of(slots(state)))
    before = params if renamed is None else under_old_names(params, leaves_of(slots(state)), name)
    held = slots(with_stored(state, _codecs_of_state(written_by, before)))
    in_codes = [slot for slot in held if isinstance(slot.array, Stored) and not slot.array.readable]
    if in_codes and written_by is None:
        raise ValueError(
            f"{WHO}: {in_codes[0].where!r}, {in_codes[0].kind}, is in codes, which only the codecs that "
            f"wrote them can read. Type {WHO}(state, tx, params, written_by=...), with the optimizer of the "
            "state."
        )
    stored = with_stored(blank, codecs)
    wanted = slots(stored)
    move = to_the_devices_of(params)
    held = [move(with_name(slot, name)) for slot in held]
    match = Match(held, wanted, chosen(fresh, params), places(grown, params), strict)
    report = CarryReport(tuple(dict.fromkeys([*match.rows(), *match.dropped()])))
    if strict and report.lost:
        lines = [f"{row.name}: {row.why}" for row in report.lost]
        raise ValueError(
            f"{WHO}: the state does not fit tx.\n  {abbreviated(lines)}\n"
            f"The state belongs to {owners(state)}. Pass as tx that recipe with the same arguments, and the "
            f"parameters of that state, or leave out strict=True.{_of_new_leaves(held, wanted)}"
        )
    need = [k for k, origin in enumerate(match.origins) if origin.begins]
    starts = _starts(tx, params, codecs, need, wanted)
    filled = [
        origin.make(starts.get(k)) if origin.make else starts[k] for k, origin in enumerate(match.origins)
    ]
    return without_stored(jax.tree.unflatten(jax.tree.structure(stored), filled), codecs), report


def _codecs_of_state(written_by: optax.GradientTransformation | None, params: PyTree) -> Codecs:
    if written_by is None:
        return Codecs()
    with warnings.catch_warnings(action="ignore"):  # of rules for leaves that are gone
        return codecs_of(written_by, params)[1]


def _of_new_leaves(held: list[Slot], wanted: list[Slot]) -> str:
    """What to type if the state knows nothing of some leaves."""
    known = {slot.path for slot in held if slot.moment}
    new = list(dict.fromkeys(slot.path for slot in wanted if slot.moment and slot.path not in known))
    if not new:
        return ""
    rules = "".join(f"{path!r}: True, " for path in new[:8]) + "..., " * (len(new) > 8)
    return f" If leaves were added, type fresh={{{rules}'*': False}}."


def _starts(
    tx: optax.GradientTransformation, params: PyTree, codecs: Codecs, need: list[int], wanted: list[Slot]
) -> dict[int, Any]:
    """Some of the arrays that `tx` begins with. If all are scalars, no other array is made."""

    def parts(params):
        made = jax.tree.leaves(with_stored(tx.init(params), codecs))
        return {k: made[k] for k in need}

    def zeros(p):
        return jnp.zeros(np.shape(p), jnp.result_type(p))

    def array(p):
        shape = isinstance(p, jax.ShapeDtypeStruct)
        return jnp.zeros(p.shape, p.dtype, device=p.sharding) if shape else p

    if not need:
        return {}
    with warnings.catch_warnings(action="ignore"):  # they were given before
        if any(np.shape(wanted[k].array) or isinstance(wanted[k].array, Stored) for k in need):
            return parts(jax.tree.map(array, params))
        return jax.jit(lambda: parts(jax.tree.map(zeros, params)))()
