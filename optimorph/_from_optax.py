"""The state of an optax optimizer as that of one of these: a run changes over in mid-training."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core import roles
from optimorph._core.checks import abbreviated
from optimorph._core.numbers import cast_like, is_trainable
from optimorph._core.paths import leaf_paths
from optimorph._core.types import PyTree
from optimorph._storage.compressed import CompressedState
from optimorph._transforms.combine import AddState, DivideState, MixState

WHO = "from_optax_state"
Part = tuple[str, ...]

FIRST, SECOND, MEAN = "first moment", "second moment", "mean of a centered RMSprop"
AVERAGE, VELOCITY, TOTAL = "average of Muon", roles.VELOCITY.name, roles.TOTAL.name
STEPS, RATE, DECAY = (
    "count for bias correction",
    "count of a learning rate schedule",
    "count of a decay schedule",
)
DAMPED, UNUSED = "count for dampening", ""
SLOW, SLOW_STEPS = "slow average", "count of a slow average"
COUNTS = (STEPS, RATE, DECAY, DAMPED, SLOW_STEPS)
NEW = "new"

OPTAX: dict[str, tuple[str, dict[str, str]]] = {
    "ScaleByAdamState": ("adam, adamw, nadam or nadamw", {"count": STEPS, "mu": FIRST, "nu": SECOND}),
    "TraceState": ("sgd with momentum", {"trace": VELOCITY}),
    "ScaleByRmsState": ("rmsprop", {"nu": SECOND}),
    "ScaleByRmsWithCountState": ("rmsprop with bias_correction", {"count": STEPS, "nu": SECOND}),
    "ScaleByRStdDevState": ("rmsprop with centered", {"mu": MEAN, "nu": SECOND}),
    "ScaleByRStdDevWithCountState": (
        "rmsprop with centered and bias_correction",
        {"count": STEPS, "mu": MEAN, "nu": SECOND},
    ),
    "ScaleByRssState": ("adagrad", {"sum_of_squares": TOTAL}),
    "ScaleByAdemamixState": (
        "contrib.ademamix",
        {"count": STEPS, "count_m2": SLOW_STEPS, "m1": FIRST, "m2": SLOW, "nu": SECOND},
    ),
    "ScaleByLionState": ("lion", {"count": UNUSED, "mu": AVERAGE}),
    "MuonState": ("contrib.muon", {"count": UNUSED, "mu": AVERAGE, "ns_coeffs": UNUSED}),
    "ScaleByScheduleState": ("a schedule of learning rates", {"count": RATE}),
    "WeightDecaySchedule": ("a schedule of weight decay", {"count": DECAY}),
}
"""optax's states by the names of their types: whose they are, and what each field holds."""

SAME: dict[Any, str] = {"matrix": "muon", "other": "adam"}
"""The two parts of a Muon, here and in optax."""

ADVICE = {
    STEPS: "bias_correction must be as it was",
    DAMPED: "optax has no dampening",
}


class Slot(NamedTuple):
    """What one array of a state is.

    Args:
      kind: one of the names above.
      where: the leaf's path, or of a count the part of a partition.
    """

    kind: str
    where: str | Part

    def __str__(self) -> str:
        """As errors name it."""
        if isinstance(self.where, str):
            return f"{self.where!r}, {self.kind}"
        return f"{'/'.join(self.where)!r}, {self.kind}" if self.where else self.kind


Fields = Callable[[Any, str], dict[str, str] | None]


def from_optax_state(state: PyTree, tx: optax.GradientTransformation, params: PyTree) -> PyTree:
    """Carry a run over from optax: its optimizer's state becomes that of `tx`, and training goes on.

        opt_state = from_optax_state(opt_state, optimorph.adamw(schedule), params)

    It knows optax's `adam`, `adamw`, `nadam`, `nadamw`, `sgd`, `rmsprop`, `adagrad`, `lion`,
    `contrib.ademamix` and `contrib.muon`, also in chains with transforms that hold nothing (clipping, say)
    and inside `optax.masked` and `optax.partition`. Moments are found by their leaves' paths, counts by what
    they count.

    A state of this library is taken as well: that of an earlier version, one whose moments were stored in
    another dtype, or another `weight_decay_form`. (A checkpoint of 0.1.0, where constant rates had no state,
    is restored into `tx.init(params)` with `optax.EmptyState()` in place of `LearningRateState` and
    `DecayState`, and then given to this function.)

    A state says which averages there are, not what is made of them: the numbers, the schedules and `nesterov`
    are those of `tx`. A state of optax's `adamax`, `yogi` or `lamb` looks like Adam's and passes for it.
    With the same arguments the run goes on as it would have in optax, by the `Equals:` of each recipe.

    Muon's average is carried over too, but the rule differs: optax divides it by 1 - β^t, which this library
    does not. Without `nesterov` that is one number, which the polar factor ignores; with it the difference
    is gone after some multiples of 1 / (1 - β) steps. Beside a Muon with `nesterov` optax's other leaves
    have Nadam: `others=optimorph.nadamw(...)`.

    A schedule goes on from its own count; where optax had a constant, from the count of steps, and where
    optax counted none, from zero.

    The arrays are copies, in the dtypes of `tx.init(params)`; inside a `jax.jit` to which `state` is
    donated none is made.

    Args:
      state: as optax returned it; of a checkpoint, restored into the state of optax's own `init`.
      tx: one of this library's recipes, alone or in a chain.
      params: what `tx` is to update, or their shapes.

    Raises:
      ValueError: arrays that `tx` wants and `state` lacks or the other way round, by path, or that differ in
        shape; states of other optimizers and of wrappers such as `optax.MultiSteps`.
    """
    blank = jax.eval_shape(tx.init, params)
    wanted = [*_wanted(blank)]
    slots = [*_slots(state, lambda node, kind: _optax_fields(node, kind) or _own_fields(node, kind))]
    held = dict(slots)
    faults = [*_repeated(slots), *_misfits(held, dict(wanted))]
    if faults:
        raise ValueError(
            f"{WHO}: the state does not fit tx.\n  {abbreviated(faults)}\n"
            f"The state belongs to {_owners(state)}. Pass as tx that recipe with the same arguments, and the "
            "parameters of that state."
        )
    sources = [_source(slot, held) for slot, _ in wanted]
    starts = _scalars(tx, params)
    filled = [
        start if source is None else _copy(held[source], leaf)
        for source, start, (_, leaf) in zip(sources, starts, wanted, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(blank), filled)


def _wanted(blank: PyTree) -> Iterator[tuple[Slot, Any]]:
    """Every array of the state of `tx`.

    Raises:
      ValueError: `tx` is no recipe of this library, or there is a wrapper around it.
    """
    try:
        yield from _slots(blank, _own_fields)
    except ValueError as error:
        if "CompressedState" in str(error):
            raise ValueError(
                f"{WHO}: tx stores its moments in 8 bits, and moments cannot be converted to that. Type "
                "tx.init(params) to begin with new moments, or leave out state='int8'."
            ) from error
        raise ValueError(
            f"{WHO}: tx must be a recipe of this library, in chains, partitions, skip_nonfinite or behind "
            "clip_by_global_norm, but there is something else in it. Convert the state of the recipe alone, "
            f"and put it into the wrapper's state. ({str(error).removeprefix(WHO + ': ')})"
        ) from error


def _source(slot: Slot, held: dict[Slot, Any]) -> Slot | None:
    """Which array of the state belongs there; a schedule that optax had not counts what else was counted."""
    if slot in held or not (slot.kind in (RATE, DECAY) or _is_new(slot)):
        return slot
    if _is_new(slot):
        return None
    return next((other for kind in COUNTS if (other := Slot(kind, slot.where)) in held), None)


def _is_new(slot: Slot) -> bool:
    """Whether optax has nothing of the kind: `tx` begins it anew."""
    return slot.kind.startswith(NEW)


def _scalars(tx: optax.GradientTransformation, params: PyTree) -> list[jax.Array | None]:
    """The counts and readings that `tx` begins with; None for arrays, which are never made."""

    def scalars():
        blank = jax.tree.map(lambda p: jnp.zeros(np.shape(p), jnp.result_type(p)), params)
        return [leaf if leaf.ndim == 0 else None for leaf in jax.tree.leaves(tx.init(blank))]

    return jax.jit(scalars)()


def _copy(array: Any, like: Any) -> jax.Array:
    """`array` in the dtype of `like`, and its own: what is donated may not be shared."""
    return jnp.array(cast_like(jnp.asarray(array), like))


def _optax_fields(node: Any, kind: str) -> dict[str, str] | None:
    """What the fields of one of optax's states hold; None if it is none that is known."""
    _, fields = OPTAX.get(type(node).__name__, ("", {}))
    return fields if fields and getattr(node, "_fields", ()) == tuple(fields) else None


def _own_fields(node: Any, kind: str) -> dict[str, str] | None:
    """What the fields of one of this library's states hold, an average that stands for `kind`; or None."""
    own = getattr(node, "roles", None)
    return own and {field: _name(role, kind) for field, role in own.items()}


def _name(role: roles.Role, kind: str) -> str:
    if role == roles.AVERAGE:
        return kind
    return role.name if role.tree or role.name in COUNTS else NEW


def _slots(node: Any, fields: Fields, kind: str = AVERAGE, part: Part = ()) -> Iterator[tuple[Slot, Any]]:
    """Every array of a state with what it is, in the order of the state's leaves."""
    if node is None or isinstance(node, optax.EmptyState | optax.MaskedNode):
        return
    known = fields(node, kind)
    if known is None:
        for child in _children(node, kind, part):
            yield from _slots(child[0], fields, *child[1:])
    else:
        yield from _fields_of(node, fields, known, kind, part)


def _fields_of(
    node: Any, fields: Fields, known: dict[str, str], kind: str, part: Part
) -> Iterator[tuple[Slot, Any]]:
    """Every array of one transform's state with what it is."""
    for field in node._fields:
        role, held = known.get(field), getattr(node, field)
        if role is None:  # the state of an inner transformation
            yield from _slots(held, fields, kind, part)
        elif role in (*COUNTS, NEW):
            name = role if role in COUNTS else f"{NEW} {type(node).__name__}.{field}"
            yield from ((Slot(name, part), count) for count in jax.tree.leaves(held))
        elif role != UNUSED:
            arrays = zip(leaf_paths(held), jax.tree.leaves(held), strict=True)
            yield from ((Slot(role, path), x) for path, x in arrays if is_trainable(x))


def _children(node: Any, kind: str, part: Part) -> list[tuple[Any, str, Part]]:
    """The states that a state is made of, and what an average means there."""
    if isinstance(node, DivideState):
        return [(node.signal, FIRST, part), (node.by, SECOND, part)]
    if isinstance(node, AddState):
        return [(term, MEAN if k else kind, part) for k, term in enumerate(node.terms)]
    if isinstance(node, MixState):
        return [(node.first, kind, part), (node.second, kind, part)]
    if isinstance(node, optax.MaskedState):
        return [(node.inner_state, kind, part)]
    if isinstance(node, optax.transforms.PartitionState):
        inner = node.inner_states
        return [(inner[name], kind, (*part, SAME.get(name, str(name)))) for name in sorted(inner, key=str)]
    if isinstance(node, OrderedDict):  # of optax.named_chain
        return [(child, kind, part) for child in node.values()]
    if type(node) in (tuple, list):
        return [(child, kind, part) for child in node]
    raise ValueError(_unknown(node))


def _unknown(node: Any) -> str:
    """That a state is none of those that are known, and what to do."""
    name = type(node).__name__
    if isinstance(node, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return (
            f"{WHO}: there is an array of shape {node.shape} where a state was expected, such as "
            "ScaleByAdamState. Restore a checkpoint into what optax's init makes: types are lost without it."
        )
    if isinstance(node, CompressedState):
        return (
            f"{WHO}: the moments of a CompressedState are in codes, which only its own transformation reads. "
            "Type tx.init(params) to begin with a new state, or go on with the same compress_state."
        )
    inner = [field for field in getattr(node, "_fields", ()) if field.startswith("inner")]
    fix = "Type tx.init(params) to begin with a new state"
    if inner:
        fix = f"If the optimizer inside is one of these, give its state: state.{inner[0]}"
    known = "adam, adamw, nadam, nadamw, sgd, rmsprop, adagrad, lion, contrib.ademamix and contrib.muon"
    return (
        f"{WHO}: {name} is no state that can be carried over; those of optax's {known} are, to the recipes "
        f"of this library. {fix}."
    )


def _repeated(slots: list[tuple[Slot, Any]]) -> Iterator[str]:
    """What the state holds more than once; but all counts of one kind are one."""
    for slot, times in Counter(slot for slot, _ in slots).items():
        if times > 1 and isinstance(slot.where, str):
            yield f"{slot}: the state has {times} of them, of which one was expected"


def _misfits(held: dict[Slot, Any], wanted: dict[Slot, Any]) -> Iterator[str]:
    """What one side has and the other lacks, or has in another shape."""
    for slot, leaf in wanted.items():
        source = _source(slot, held)
        if source is None:
            continue
        if source not in held:
            yield f"{slot}: tx wants it, the state has none{_advice(slot)}"
        elif np.shape(held[source]) != np.shape(leaf):
            yield f"{slot}: of shape {np.shape(held[source])} in the state, but tx wants {np.shape(leaf)}"
    for slot in held:
        if slot not in wanted and not _is_new(slot):
            yield f"{slot}: the state has it, tx has no place for it{_advice(slot)}"


def _advice(slot: Slot) -> str:
    """What would make the difference go away."""
    if slot.kind == AVERAGE:
        return f" (axes of muon: {{{slot.where!r}: 'io'}} or {{{slot.where!r}: None}})"
    return f" ({ADVICE[slot.kind]})" if slot.kind in ADVICE else ""


def _owners(state: PyTree) -> str:
    """What a state belongs to: the names in optax, or the types of this library's states."""

    def is_state(node: Any) -> bool:
        return type(node).__name__ in OPTAX or hasattr(node, "roles")

    names = [type(node).__name__ for node in jax.tree.leaves(state, is_leaf=is_state) if is_state(node)]
    theirs = dict.fromkeys(OPTAX[name][0] for name in names if name in OPTAX)
    own = [f"an optimizer of this library with {', '.join(dict.fromkeys(names))}"] if names else []
    return " and ".join(theirs) or next(iter(own), "sgd without momentum")
