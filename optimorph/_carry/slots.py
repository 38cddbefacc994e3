"""What every array of an optimizer's state is, of this library or of optax: its kind and its leaf."""

import collections
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from optimorph._core import roles
from optimorph._core.moments import nodes_with
from optimorph._core.numbers import is_absent
from optimorph._core.paths import leaf_paths
from optimorph._storage.stored import Stored
from optimorph._transforms.combine import AddState, DivideState, MixState

Part = tuple[str, ...]

FIRST, SECOND, MEAN = "first moment", "second moment", "mean of a centered RMSprop"
SURPRISE = "second moment of the surprise"
AVERAGE, VELOCITY, TOTAL = roles.AVERAGE.name, roles.VELOCITY.name, roles.TOTAL.name
STEPS, DAMPED = "count for bias correction", "count for dampening"
RATE, DECAY = "count of a learning rate schedule", "count of a decay schedule"
WINDOW_MEAN, WINDOW, WEIGHT, WINDOWS = (
    "mean of multi_steps",
    "gradients in the window of multi_steps",
    "weight of the window of multi_steps",
    "steps of multi_steps",
)
SKIPPED, IN_A_ROW = "skipped steps", "consecutive skipped steps"
INJECTED, HYPERPARAMETER, SCHEDULE = (
    "count of inject_hyperparams",
    "hyperparameter",
    "count of an injected schedule",
)
BASES = "count of in_eigenbasis"
SLOW, SLOW_STEPS = "slow average", "count of a slow average"
PROBE, SEEN, UNUSED, BARE = "numbers of probe", "what was seen of the latest step", "not used", "array"

COUNTS = (STEPS, RATE, DECAY, DAMPED, SLOW_STEPS, WINDOWS, SCHEDULE, INJECTED, BASES)
"""What counts steps, those first that others are taken from."""

OTHERS: dict[str, tuple[str, dict[str, str]]] = {
    "ScaleByAdamState": ("adam, adamw, nadam or nadamw", {"count": STEPS, "mu": FIRST, "nu": SECOND}),
    "ScaleByAmsgradState": (
        "amsgrad",
        {"count": STEPS, "mu": FIRST, "nu": SECOND, "nu_max": "largest second moment"},
    ),
    "ScaleByBeliefState": ("adabelief", {"count": STEPS, "mu": FIRST, "nu": SURPRISE}),
    "EmaState": ("ema", {"count": STEPS, "ema": AVERAGE}),
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
    "MultiStepsState": (
        "MultiSteps",
        {"mini_step": WINDOW, "gradient_step": WINDOWS, "acc_grads": WINDOW_MEAN, "skip_state": UNUSED},
    ),
    "ApplyIfFiniteState": (
        "apply_if_finite",
        {"notfinite_count": IN_A_ROW, "last_finite": UNUSED, "total_notfinite": SKIPPED},
    ),
    "MonitorState": ("monitor", {"measurements": SEEN, "measure_states": SEEN}),
    "SnapshotState": ("snapshot", {"measurement": SEEN}),
    "ZeroNansState": ("zero_nans", {"found_nan": SEEN}),
    "DebiasState": ("optimorph 0.1.0", {"count": STEPS}),
    "DampenState": ("optimorph 0.1.0", {"count": DAMPED}),
    "DecayState": ("optimorph 0.1.0", {"count": DECAY, "weight_decay": UNUSED}),
    "LearningRateState": ("optimorph 0.1.0", {"count": RATE, "learning_rate": UNUSED}),
}
"""States without roles, by the names of their types: whose they are, and what each field holds.
Fields that hold the state of an inner transformation are not here."""

SCALARS = {*COUNTS, WINDOW, SKIPPED, IN_A_ROW}
"""Kinds of which a part of a partition has one, and not each leaf."""


class Slot(NamedTuple):
    """One array of a state.

    Args:
      kind: what it is.
      path: of its leaf, or the name of a hyperparameter; "" of scalars.
      part: of the partition that it is in.
      scalar: whether it belongs to all leaves of its part.
      stage: how many transforms with moments a chain has before it: a velocity of gradients has 0, one of
        updates that were divided has 1.
      home: the number of the state whose moments it corrects, if it is a count, or to which it belongs.
      again: how many slots before it are alike.
      array: itself, `Stored`, or its shape and dtype.
      leaves: the paths of the leaves that are stacked in it, those of other sizes too; () if it is no stack.
      ratio: the number of the division that it is in, or else its home.
      divides: whether the other moments of its leaf in this division are divided by it.
    """

    kind: str
    path: str
    part: Part
    scalar: bool
    stage: int
    home: int
    again: int
    array: Any
    leaves: tuple[str, ...] = ()
    ratio: int = 0
    divides: bool = False

    @property
    def moment(self) -> bool:
        """Whether it is one leaf's, and part of what the optimizer knows of past gradients."""
        known = self.path or "." not in self.kind  # what an unknown state has for no leaf may be anything
        return not self.scalar and bool(known) and self.kind not in (WINDOW_MEAN, HYPERPARAMETER, SEEN, BARE)

    @property
    def title(self) -> str:
        return self.kind + (" of updates" if self.stage and self.moment else "")

    @property
    def where(self) -> str:
        return self.path or "/".join(self.part)


def slots(state: Any) -> list[Slot]:
    walk = _Walk()
    walk.visit(state, AVERAGE, (), 0)
    return walk.found


class _Walk:
    """A walk over a state: `visit` returns whether there are moments in a node."""

    def __init__(self):
        self.found: list[Slot] = []
        self.homes, self.last = 0, {}
        self.stacked: tuple[str, ...] = ()
        self.ratio, self.divides = 0, False
        self.alike: collections.Counter[Any] = collections.Counter()

    def visit(self, node: Any, kind: str, part: Part, stage: int) -> bool:
        """Note every array of a node, whose averages stand for `kind`."""
        if node is None or isinstance(node, optax.EmptyState | optax.MaskedNode):
            return False
        if isinstance(node, optax.transforms.PartitionState):
            inner = _children(node.inner_states)
            return max(
                [self.visit(child, kind, (*part, name), stage) for name, child in inner], default=False
            )
        if hasattr(node, "_fields"):
            around, self.stacked = self.stacked, self.stacked or stacked_leaves(node)
            moments = self._state(node, kind, part, stage)
            self.stacked = around
            return moments
        if not nodes_with(node, "_fields"):
            self._note(BARE, node, part, stage, False, 0)
            return False
        if type(node) in (tuple, list, OrderedDict):
            return self._chain(node, kind, part, stage)
        return max([self.visit(child, kind, part, stage) for _, child in _children(node)], default=False)

    def _chain(self, node: Any, kind: str, part: Part, stage: int) -> bool:
        """What comes after a transform with moments sees no gradients, but that transform's updates."""
        start = stage
        for _, child in _children(node):
            stage += self.visit(child, kind, part, stage)
        return stage > start

    def _state(self, node: Any, kind: str, part: Part, stage: int) -> bool:
        if isinstance(node, DivideState):
            around = self.ratio, self.divides
            self.homes += 1
            self.ratio, self.divides = self.homes, False
            signal = self.visit(node.signal, FIRST if kind == AVERAGE else kind, part, stage)
            self.divides = True
            by = self.visit(node.by, SECOND, part, stage)
            self.ratio, self.divides = around
            return by or signal
        if isinstance(node, AddState):
            meant = [MEAN if k and kind == SECOND else kind for k in range(len(node.terms))]
            found = [
                self.visit(term, kind, part, stage) for term, kind in zip(node.terms, meant, strict=True)
            ]
            return max(found, default=False)
        known = _fields(node, kind)
        own = any(not scalar and name != HYPERPARAMETER for name, scalar in known.values())
        if own:
            self.homes += 1
        home = self.homes if own else self.last.get(part, 0)
        moments = False
        for field in node._fields:
            if field in known:
                name, scalar = known[field]
                moments |= self._note(name, getattr(node, field), part, stage, scalar, home)
            else:
                moments |= self.visit(getattr(node, field), kind, part, stage)
        if own and moments:
            self.last[part] = home
        return moments

    def _note(self, kind: str, tree: Any, part: Part, stage: int, scalar: bool, home: int) -> bool:
        """Every array of one field; whether they are moments, which no integers or booleans are."""
        moments = False
        for path, array in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
            alike = (kind, part) if scalar else (kind, path, stage)
            leaves = () if scalar or path.startswith("others/") else self.stacked
            own = "" if scalar else path.removeprefix("others/") if self.stacked else path
            divides = kind in (SECOND, SURPRISE) or (self.divides and kind != MEAN)
            ratio = self.ratio or home
            again = self.alike[alike]
            slot = Slot(kind, own, part, scalar, stage, home, again, array, leaves, ratio, divides)
            self.alike[alike] += 1
            self.found.append(slot)
            moments |= slot.moment and is_number(array)
        return moments


def _fields(node: Any, kind: str) -> dict[str, tuple[str, bool]]:
    """What the fields of a state hold, and whether it is a scalar; but not those that hold inner states."""
    name = type(node).__name__
    if hasattr(node, "hyperparams"):
        return {
            "count": (INJECTED, True),
            "hyperparams": (HYPERPARAMETER, False),
            "hyperparams_states": (SCHEDULE, True),
        }
    if own := getattr(node, "roles", None):
        return {field: (_name(name, field, role, kind), not role.tree) for field, role in own.items()}
    if hasattr(node, "averages") or isinstance(node, MixState):
        return {}
    _, known = OTHERS.get(name, ("", {}))
    if known and {*known} == {field for field in node._fields if not _is_inner(field, known)}:
        return {
            field: (f"{name}.{field}", True) if found == UNUSED else (found, found in SCALARS)
            for field, found in known.items()
        }
    return {field: (f"{name}.{field}", False) for field in node._fields if not _is_inner(field, {})}


def _name(name: str, field: str, role: roles.Role, kind: str) -> str:
    named = role.name or (f"last {role.reading}" if role.reading else f"{name}.{field}")
    return kind if role == roles.AVERAGE else named


def _is_inner(field: str, known: dict[str, str]) -> bool:
    """Whether a field of a wrapper's state, of optax or its like, holds the state of what is inside."""
    return field not in known and (field.startswith("inner") or "state" in field)


def stacked_leaves(node: Any) -> tuple[str, ...]:
    """The leaves whose matrices are in the stacks of a state: None in its trees of other leaves."""

    def is_joined(tree: Any) -> bool:
        return isinstance(tree, dict) and {*tree} == {"others", "stacks"}

    if not getattr(node, "stacked", False):
        return ()
    trees = [x["others"] for x in jax.tree.leaves(node, is_leaf=is_joined) if is_joined(x)]
    where = jax.tree.map(lambda x: 0 if x is None else None, trees[:1], is_leaf=is_absent)
    return tuple(leaf_paths(where[0])) if where else ()


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    """What a container holds, in the order of its leaves."""
    for path, child in jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node):
        yield jax.tree_util.keystr(path, simple=True), child


def owners(state: Any) -> str:
    """What a state belongs to: the names in optax, or the types of this library's states."""

    def is_known(node: Any) -> bool:
        return type(node).__name__ in OTHERS or hasattr(node, "roles")

    nodes = [node for node in jax.tree.leaves(state, is_leaf=is_known) if is_known(node)]
    names = dict.fromkeys(type(node).__name__ for node in nodes)
    theirs = dict.fromkeys(OTHERS[type(node).__name__][0] for node in nodes if not hasattr(node, "roles"))
    own = [f"an optimizer of this library with {', '.join(names)}"] if names else []
    return " and ".join(theirs) or next(iter(own), "sgd without momentum")


def is_number(array: Any) -> bool:
    return isinstance(array, Stored) or jnp.issubdtype(jnp.result_type(array), jnp.inexact)


def is_known_zero(array: Any) -> bool:
    return not isinstance(array, Tracer | jax.ShapeDtypeStruct) and not np.any(np.asarray(array))
