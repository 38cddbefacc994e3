"""Continue a run with another optimizer: make its state from the state of the old one."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._carry.leaves import (
    WHO,
    Renamed,
    chosen,
    leaves_of,
    new_names,
    places,
    that_fit,
    to_the_devices_of,
    under_old_names,
    with_names,
)
from optimorph._carry.match import ASKED, Match
from optimorph._carry.report import DROPPED, CarryReport, CarryRow
from optimorph._carry.slots import Slot, owners, slots
from optimorph._core.checks import abbreviated, check_flags, check_transforms
from optimorph._core.numbers import in_dtype_of
from optimorph._core.rule import arrays
from optimorph._core.types import Mask, PyTree
from optimorph._core.warn import quietly
from optimorph._storage.stored import Codecs, Stored, codecs_of, with_stored, without_stored


def carry_state(
    state: PyTree,
    tx: optax.GradientTransformation,
    params: PyTree,
    *,
    written_by: optax.GradientTransformation | None = None,
    renamed: Renamed | None = None,
    fresh: Mask | None = None,
    grown: bool | Mapping[str, Any] = False,
    strict: bool = False,
) -> tuple[PyTree, CarryReport]:
    """Continue a run with another optimizer, other parameters or other storage of the state.

        state, report = carry_state(state, tx, params)
        print(report)

    The result has the structure of `tx.init(params)`. It contains every array of `state` for which this
    structure has a place. All other arrays are as `tx.init` makes them; they are called fresh. `state` and
    `tx` may each belong to this library or to optax.

    Moments and velocities are matched by their kind and by the path of their leaf. They are found inside
    chains, masks, partitions, `multi_steps`, `inject_hyperparams`, `probe`, `skip_nonfinite`, and optax's
    `MultiSteps` and `apply_if_finite`. A first moment of Adam becomes the average of Lion or Muon. The
    velocity of RMSprop is not a velocity of gradients, because RMSprop divides before it sums. A first moment
    that is divided by a fresh second moment is fresh too. States of unknown types are carried over to states
    of the same types.

    A state does not say everything. optax's `adamax` and `contrib.adopt` have the state of `adam`, with other
    moments in it. A velocity behind a transform without a state, such as the constant learning rate of
    `lars`, looks like one of gradients. The state of a square matrix in `soap`, its relatives and `factored`
    is the same for the axes "io" and "oi". There `carry_state` keeps what it should not, also with `strict`;
    begin with `tx.init` instead.

    The arrays get the dtypes and codecs of `tx`. 8-bit codes can only be decoded with the codecs that wrote
    them, so pass the old optimizer as `written_by`. Codes are copied if `tx` uses the same codec, and encoded
    once more if it does not.

    Counts of schedules continue. If `state` has no such count, the number of steps is used. A schedule of a
    new part of a partition continues at the count of the others. Counts for bias corrections continue with
    the moments that they correct; if all of those are fresh, the count is 0. If `state` has moments but no
    count of steps at all, these moments are used without a correction, as before.

    A fresh leaf shares the count t of the leaves that are kept. After k steps of its own,

        m / (1 - β₁ᵗ) = (1 - β₁ᵏ) / (1 - β₁ᵗ) m̂ₖ        (1)
        v / (1 - β₂ᵗ) = (1 - β₂ᵏ) / (1 - β₂ᵗ) v̂ₖ        (2)

    where m̂ₖ and v̂ₖ are the corrected moments in a separate Adam for this leaf. Its updates are longer than
    those of a separate Adam, by the factor of (1) over the root of that of (2). For β = 0.9 and 0.999 and a
    large t this is 3.2 in the first step, 6.6 at most (in the 12th), and 1.3 after 1000 steps. The new rows
    of a leaf with `grown` have the same factor. A separate part of a partition avoids it:

        tx = partition({"head/*": "new", "*": "old"}, {"new": adamw(1e-3), "old": adamw(1e-3)})

    Another way is to warm up the learning rate again. The average of Muon, velocities and Lion have no count,
    so their updates are not longer.

    The arguments, such as the learning rate, β and schedules, are those of `tx`. Injected hyperparameters
    that both optimizers have are the exception: they keep their values in `state`, because they may have been
    set there. The gradients that `multi_steps` has accumulated are kept if `tx` has `multi_steps` too, and
    dropped if not. The values of probes are fresh.

    The arrays of the result are copies, so both states may be donated. If an array is on other devices than
    the parameters, it is moved: moments get the sharding of their parameters, and counts are replicated. On
    the same devices every array keeps its sharding.

    A checkpoint must be restored into the structure that its own `init` made, because the types of states say
    what they hold. For a checkpoint of version 0.1.0, in which constant rates had no state, this is
    `tx.init(params)` with `optax.EmptyState()` in place of `LearningRateState` and `DecayState`. For a
    checkpoint of `multi_steps` without a weight, it is the state with `weight=None`.

    To make some leaves fresh and keep the optimizer:

        state, _ = carry_state(state, tx, params, written_by=tx, fresh={"head/*": True, "*": False})

    Args:
      state: a state of any optimizer of this library or of optax.
      tx: the optimizer with which the run continues.
      params: the parameters that `tx` will update, or their shapes.
      written_by: the optimizer that made `state`. It is required if `state` has 8-bit codes.
      renamed: old path → new path, as a function or a mapping. The keys of a mapping are paths or their
        beginnings; the first that matches is replaced: `{"encoder": "backbone/encoder"}`. If the new path is
        None, the arrays of the leaf are dropped: `{"old_head": None}`.
      fresh: the leaves whose moments should be fresh, as a mask of `add_decayed_weights`.
      grown: whether leaves whose axes have grown keep the old part of their moments. With True the old part
        comes first. A mapping from path patterns says where the old part is, as a NumPy index:
        `{"head/kernel": np.s_[:, 6:], "layers/*": np.s_[[0, 1, 3, 4]]}`. With False, moments of another shape
        are fresh.
      strict: whether to raise an error if anything is lost on which the updates depend, or if a moment would
        become one of another kind. Leaves that `fresh` selects, that `renamed` drops, or whose growth `grown`
        allows, are not counted as lost.

    Returns:
      The state, and a report with a row for every array: kept, converted, fresh or dropped, and why.

    Raises:
      ValueError: with `strict`, naming paths: arrays that only one of `tx` and `state` has, or that differ in
        shape. Always: codes without `written_by`, or written by another codec; states whose types were lost;
        `renamed` with a path that the state does not have, or with one new name for two leaves.
    """
    check_transforms(WHO, tx, *([] if written_by is None else [written_by]))
    if state is None:
        raise ValueError(f"{WHO}: state is None. Type the state of the old optimizer, or tx.init(params).")
    if params is None:
        raise ValueError(f"{WHO}: params is None. Type the parameters that tx is to update.")
    arrays(WHO, params)
    check_flags(WHO, strict=strict)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(state)):
        raise ValueError(
            f"{WHO}: the state has shapes and no arrays. Restore the checkpoint first, or type "
            f"jax.eval_shape(lambda s: {WHO}(s, tx, params), state) for the shapes and the report."
        )
    blank, codecs = codecs_of(tx, params)
    paths = list(dict.fromkeys(path for slot in slots(state) for path in leaves_of(slot)))
    name = new_names(renamed, paths)
    before = params if renamed is None else under_old_names(params, paths, name)
    anew, move = chosen(fresh, params), to_the_devices_of(params)
    held, gone = [], []
    for old in slots(with_stored(state, _codecs_of_state(written_by, before))):
        slot = with_names(old, name)
        fit = that_fit(slot, params) if slot and slot.leaves else ()
        lost = bool(old.leaves) and not fit
        if slot is None or (lost and any(name(path) in (None, *anew) for path in old.leaves)):
            gone.append(old)
        else:
            held.append(move(slot._replace(leaves=fit or slot.leaves)))
    in_codes = [slot for slot in held if isinstance(slot.array, Stored) and not slot.array.readable]
    if in_codes and written_by is None:
        raise ValueError(
            f"{WHO}: {in_codes[0].where!r}, {in_codes[0].kind}, is stored in codes. Only the codecs that "
            f"wrote them can decode them. Type {WHO}(state, tx, params, written_by=old_tx), where old_tx is "
            "the optimizer that made the state."
        )
    stored = with_stored(blank, codecs)
    wanted = [slot._replace(leaves=that_fit(slot, params) if slot.leaves else ()) for slot in slots(stored)]
    match = Match(held, wanted, anew, places(grown, params), strict)
    asked = [CarryRow(slot.where, slot.title, DROPPED, ASKED) for slot in gone]
    report = CarryReport(tuple(dict.fromkeys([*match.rows(), *asked, *match.dropped()])))
    if strict and report.lost:
        lines = [f"{row.name}: {row.why}" for row in report.lost]
        raise ValueError(
            f"{WHO}: the state does not fit tx.\n  {abbreviated(lines)}\n"
            f"The state belongs to {owners(state)}. Pass that optimizer with the same arguments as tx, and "
            f"the parameters of that state, or leave out strict=True.{_of_leaves(held, wanted)}"
        )
    need = [k for k, origin in enumerate(match.origins) if origin.begins]
    starts = _starts(tx, params, codecs, need, wanted)
    filled = [
        origin.make(starts.get(k)) if origin.make else starts[k] for k, origin in enumerate(match.origins)
    ]
    made = without_stored(jax.tree.unflatten(jax.tree.structure(stored), filled), codecs)
    return jax.tree.map(in_dtype_of, made, blank), report  # also what a wrapper stores in another dtype


def _codecs_of_state(written_by: optax.GradientTransformation | None, params: PyTree) -> Codecs:
    if written_by is None:
        return Codecs()
    with quietly():  # of rules for leaves that are gone
        return codecs_of(written_by, params)[1]


def _of_leaves(held: list[Slot], wanted: list[Slot]) -> str:
    """What to type if the state knows nothing of some leaves, or of other leaves than tx."""
    old, new = (
        {path: None for slot in each if slot.moment for path in leaves_of(slot)} for each in (held, wanted)
    )

    def rules(paths: dict[str, None], without: dict[str, None], value: str) -> str:
        typed = [f"{path!r}: {value}" for path in paths if path not in without]
        return ", ".join(typed[:8] + ["..."] * (len(typed) > 8))

    added, gone = rules(new, old, "True"), rules(old, new, "None")
    fresh = f" If leaves were added, type fresh={{{added}, '*': False}}." if added else ""
    return fresh + (f" If leaves were removed, type renamed={{{gone}}}." if gone else "")


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
    with quietly():  # they were given before
        if any(np.shape(wanted[k].array) or isinstance(wanted[k].array, Stored) for k in need):
            return parts(jax.tree.map(array, params))
        return jax.jit(lambda: parts(jax.tree.map(zeros, params)))()
