"""Which arrays of an old state belong where in a new one."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType

from optimorph._carry import slots as kinds
from optimorph._carry.leaves import Place
from optimorph._carry.report import CONVERTED, DROPPED, FRESH, KEPT, CarryRow
from optimorph._carry.slots import Part, Slot, is_known_zero, is_number
from optimorph._core.numbers import cast_like
from optimorph._core.types import Shape
from optimorph._storage.stored import Stored

ASKED = "as asked for"
NONE, NO_PLACE = "tx wants it, the state has none", "the state has it, tx has no place for it"

ALSO = {kinds.AVERAGE: kinds.FIRST}
"""Kinds of moments → another that is the same average of gradients. In the other direction the count of
steps is missing, by which Adam corrects it."""

SCHEDULES = (kinds.RATE, kinds.DECAY, kinds.SCHEDULE, kinds.INJECTED, kinds.WINDOWS)
"""Counts of all steps of the run."""

CORRECTIONS = (kinds.STEPS, kinds.DAMPED)
"""Counts of the steps that moments have seen."""

UNCOUNTED = np.int32(np.iinfo(np.int32).max)
"""A count of steps at which nothing is corrected."""


class Origin(NamedTuple):
    """Where an array of the new state comes from.

    Args:
      fate, why, matters: as in the report.
      make: what makes it of the array that `tx` begins with; without it, it is that array.
      begins: whether the array that `tx` begins with is needed.
      sources: which arrays of the old state it is made of.
    """

    fate: str
    why: str = ""
    matters: bool = False
    make: Callable[[Any], Any] | None = None
    begins: bool = True
    sources: tuple[Slot, ...] = ()


class Match:
    """Which arrays of the old state belong where in the new one.

    Args:
      fresh: the paths of leaves that begin anew.
      place: path, and the shape of the old part → where it is in the new one, as an index; None if nowhere.
      strict: whether a moment is no other kind of moment.
    """

    def __init__(self, held: list[Slot], wanted: list[Slot], fresh: set[str], place: Place, strict: bool):
        self.held, self.wanted, self.fresh, self.place, self.strict = held, wanted, fresh, place, strict
        self.moments = {_key(slot): slot for slot in held if not _is_of_part(slot)}
        self.scalars: dict[tuple[str, str], list[Slot]] = {}
        for slot in filter(_is_of_part, held):
            self.scalars.setdefault((slot.kind, slot.path), []).append(slot)
        found = self._moments()
        self.kept = [
            (slot, found[id(slot)].sources[0]) for slot in wanted if slot.moment and found[id(slot)].sources
        ]
        self.origins = [found.get(id(slot)) or self._scalar(slot) for slot in wanted]

    def rows(self) -> Iterator[CarryRow]:
        for slot, origin in zip(self.wanted, self.origins, strict=True):
            yield CarryRow(slot.where, slot.title, origin.fate, origin.why, origin.matters)

    def dropped(self) -> Iterator[CarryRow]:
        """Every array of the old state that the new one has not; one without a state around it is refused."""
        used = {id(slot) for origin in self.origins for slot in origin.sources}
        seen = {_key(slot) for slot in self.wanted if not _is_of_part(slot)}
        for slot in self.held:
            if id(slot) in used or (not _is_of_part(slot) and _key(slot) in seen):
                continue  # one that does not fit has its row
            if slot.kind == kinds.BARE:
                raise ValueError(_untyped(slot))
            yield CarryRow(slot.where, slot.title, DROPPED, *self._why_dropped(slot))

    def _moments(self) -> dict[int, Origin]:
        """Where each moment comes from. What is divided by a fresh one is fresh: it would have no bound."""
        found = {id(slot): self._moment(slot) for slot in self.wanted if not _is_of_part(slot)}
        moments = [slot for slot in self.wanted if slot.moment]
        fresh = [slot for slot in moments if slot.divides and found[id(slot)].fate == FRESH]
        divisors = {(slot.ratio, slot.path): slot.kind for slot in fresh}
        for slot in moments:
            divisor = divisors.get((slot.ratio, slot.path))
            if divisor and found[id(slot)].sources:
                found[id(slot)] = Origin(FRESH, f"divided by {divisor}, which is fresh", True)
        return found

    def _moment(self, slot: Slot) -> Origin:
        leaves = slot.leaves or (slot.path,)
        own = slot.moment or slot.kind == kinds.WINDOW_MEAN
        if own and (anew := self.fresh.intersection(leaves)):
            why = f"a stack in which {min(anew)!r} begins anew"
            return Origin(FRESH, ASKED) if len(anew) == len(leaves) else Origin(FRESH, why, True)
        source = self.moments.get(_key(slot))
        also = ALSO.get(slot.kind)
        if source is None and also and not self.strict:
            source = self.moments.get(_key(slot._replace(kind=also)))
        if source is None:
            window = slot.kind == kinds.WINDOW_MEAN
            return Origin(FRESH, "a window begins" if window else NONE + _advice(slot), slot.moment)
        if isinstance(source.array, Stored) and not source.array.readable:
            return Origin(
                FRESH, "the moment of the state is in codes, for which written_by has no codec", True
            )
        old, new = np.shape(source.array), np.shape(slot.array)
        matters = slot.moment or (slot.kind == kinds.WINDOW_MEAN and self._window_is_open())
        copy = functools.partial(_copy, source.array, slot.array)
        why = _change(source, slot)
        if _rows_differ(source, slot):
            return Origin(FRESH, "a stack of other leaves, or in another order", True)
        if old == new:
            return Origin(CONVERTED if why else KEPT, why, False, lambda start: copy(), False, (source,))
        larger = len(old) == len(new) and all(a <= b for a, b in zip(old, new, strict=True))
        larger = larger and len(slot.leaves) < 2  # of several nobody knows which of them grew
        place = self.place(slot.path, old) if larger else None
        if place is None:
            hint = ". Type grown=True to keep the old part" if larger else ""
            if slot.leaves and slot.leaves == source.leaves and old[1:] == new[1:]:
                hint += (
                    ". If only the mesh is another, leave out carry_state: tx.update takes the state, after "
                    "jax.device_put if it is on other devices"
                )
            return Origin(FRESH, f"of shape {old} in the state, but tx wants {new}{hint}", matters)
        if (found := _shape_at(place, new)) != old:
            has = "does not exist, or has an index twice" if found is None else f"has shape {found}"
            why = f"of shape {old} in the state, but its place in {new} {has}"
            return Origin(FRESH, why, matters)
        why = ", ".join([f"grown from {old} to {new}", *([why] if why else [])])
        grow = functools.partial(_grown, source.array, slot.array, place)
        return Origin(CONVERTED, why, False, grow, True, (source,))

    def _window_is_open(self) -> bool:
        """Whether there may be gradients in a window of the old state."""
        return not all(is_known_zero(count.array) for count in self.scalars.get((kinds.WINDOW, ""), []))

    def _scalar(self, slot: Slot) -> Origin:
        if slot.kind == kinds.PROBE:
            return Origin(FRESH, "measured at the next step")
        if slot.kind in CORRECTIONS:
            return self._correction(slot)
        parts = _parts(slot, (pair for pair in self.kept if _inside(pair[0].part, slot.part)))
        found = self._at(slot, slot.kind, parts)
        if not found and slot.kind == kinds.WEIGHT and (count := self._at(slot, kinds.WINDOW, parts)):
            return _of_counts(slot, count)._replace(fate=CONVERTED, why=f"of the {kinds.WINDOW}", sources=())
        if found or slot.kind not in SCHEDULES:
            return _of_counts(slot, found) if found else Origin(FRESH, "of tx")
        return self._other_count(slot, parts) or Origin(FRESH, "the state counts nothing")

    def _correction(self, slot: Slot) -> Origin:
        """Where a count comes from that belongs to moments."""

        def beside(new: Slot) -> bool:
            own = slot.kind == kinds.STEPS and slot.home
            return new.home == slot.home if own else _inside(new.part, slot.part)

        kept = [pair for pair in self.kept if beside(pair[0])]
        if not kept and any(new.moment and beside(new) for new in self.wanted):
            return Origin(FRESH, "begins with its moments")
        homes, parts = {source.home for _, source in kept}, _parts(slot, kept)
        found = [count for count in self.scalars.get((slot.kind, ""), []) if count.home in homes]
        if found := found or self._at(slot, slot.kind, parts):
            origin = _of_counts(slot, found)
            return origin if kept else origin._replace(matters=False)  # it corrects nothing
        if other := self._other_count(slot, parts):
            return other._replace(matters=True)
        if not kept:
            return Origin(FRESH, NONE)
        why = f"{NONE}{_advice(slot)}: no correction, as before"
        return Origin(FRESH, why, True, lambda start: jnp.asarray(UNCOUNTED, slot.array.dtype), False)

    def _at(self, slot: Slot, kind: str, parts: list[Part]) -> list[Slot]:
        """The scalars of a kind in these parts of the old state, or that hold for them; else in any."""
        there = self.scalars.get((kind, slot.path), [])
        found: list[Slot] = []
        for part in parts or [slot.part]:
            own = [each for each in there if each.part == part]
            around = [each for each in there if _inside(part, each.part)]
            inside = [each for each in there if _inside(each.part, part)]
            outer = max((len(each.part) for each in around), default=0)
            found += _alike(own, slot) or [each for each in around if len(each.part) == outer] or inside
        return found or there

    def _other_count(self, slot: Slot, parts: list[Part]) -> Origin | None:
        """A count of another kind. Counts of the same use, moments or all steps, are tried first."""
        of_moments = slot.kind in CORRECTIONS
        for kind in sorted(kinds.COUNTS, key=lambda kind: (kind in CORRECTIONS) != of_moments):
            if kind != slot.kind and (found := self._at(slot, kind, parts)):
                origin = _of_counts(slot, found)
                return origin._replace(fate=CONVERTED, why=f"of the {kind}", sources=())
        return None

    def _why_dropped(self, slot: Slot) -> tuple[str, bool]:
        """Why, and whether it matters."""
        if slot.moment:
            return NO_PLACE + _advice(slot), is_number(slot.array)
        if slot.kind in CORRECTIONS:
            used = any(source.home == slot.home for _, source in self.kept)
            own = slot.kind == kinds.STEPS and slot.home
            again = any(other.kind == slot.kind for other in self.wanted) and not own
            if again or (own and not used):
                return "its moments are not kept", False
            return NO_PLACE + _advice(slot), True
        if slot.kind == kinds.WEIGHT and any(other.kind == kinds.WINDOW for other in self.wanted):
            counts = [count.array for count in self.scalars[kinds.WINDOW, ""]]
            return "in tx the gradients have equal weights", not _all_equal([slot.array, *counts])
        if slot.kind in (kinds.WINDOW, kinds.WEIGHT, kinds.WINDOW_MEAN):
            full = self._window_is_open()
            why = "gradients of a window that is not full" if full else "the window is empty"
            return why, full and slot.kind == kinds.WINDOW_MEAN
        if slot.kind == kinds.HYPERPARAMETER:
            return f"an argument of tx; it was {_number(slot.array)}", False
        fewer = any(other.kind == slot.kind for other in self.wanted)
        return "tx has fewer of them" if fewer else "tx has none", False


def _key(slot: Slot) -> tuple[str, str, int, int]:
    return slot.kind, slot.path, slot.stage, slot.again


def _is_of_part(slot: Slot) -> bool:
    """Whether a part of a partition has one of it, which is found by the names of parts."""
    return slot.scalar or slot.kind == kinds.HYPERPARAMETER


def _rows_differ(source: Slot, slot: Slot) -> bool:
    """Whether a stack of as many matrices may have those of other leaves, or in another order.

    It cannot where leaves were only added or only removed: those were of other sizes.
    """
    old, new = source.leaves, slot.leaves
    moved = [path for path in old if path in new] != [path for path in new if path in old]
    return moved or bool({*old} - {*new} and {*new} - {*old})


def _inside(part: Part, around: Part) -> bool:
    return part[: len(around)] == around


def _parts(slot: Slot, kept: Iterable[tuple[Slot, Slot]]) -> list[Part]:
    """The parts of the old state that stand for a scalar's, by the moments in it, each with its source.

    A moment that is in a part of the scalar's part comes from a part of the old scalar's part.
    """
    depths = ((len(new.part) - len(slot.part), source.part) for new, source in kept)
    return list(dict.fromkeys(part[: max(len(part) - depth, 0)] for depth, part in depths))


def _alike(found: list[Slot], slot: Slot) -> list[Slot]:
    """Of several scalars of one kind in one part, the one in the same place, or the first."""
    return [each for each in found if each.again == slot.again] or found[:1]


def _of_counts(slot: Slot, found: list[Slot]) -> Origin:
    arrays = [each.array for each in found]
    if any(np.shape(array) != np.shape(slot.array) for array in arrays):
        return Origin(FRESH, f"of shape {np.shape(arrays[0])} in the state", slot.kind in CORRECTIONS)
    differ = len(found) > 1 and not _all_equal(arrays)
    if differ and slot.kind not in kinds.COUNTS:
        found, arrays, differ = found[:1], arrays[:1], False

    def make(start):
        return _copy(
            functools.reduce(jnp.maximum, map(jnp.asarray, arrays)) if differ else arrays[0], slot.array
        )

    why = f"the largest of {len(found)}" if differ else ""
    return Origin(CONVERTED if differ else KEPT, why, differ, make, False, tuple(found))


def _all_equal(arrays: Iterable[Any]) -> bool:
    """Whether counts are known to be one; tracers are not."""
    first, *rest = arrays
    if any(isinstance(x, Tracer) for x in (first, *rest)):
        return all(x is first for x in rest)
    return all(np.array_equal(first, x) for x in rest)


def _decoded(array: Any) -> jax.Array:
    return array.decoded() if isinstance(array, Stored) else jnp.asarray(array)


def _copy(array: Any, like: Any) -> Any:
    """`array` as `like` is stored, and its own: what is donated may not be shared."""
    if not isinstance(like, Stored):
        return jnp.array(cast_like(_decoded(array), like))
    if like.codec is not None and isinstance(array, Stored) and array.codec == like.codec:
        return Stored(jnp.array(array.codes), jnp.array(array.scales), like.codec, like.name)
    return like.encoding(jnp.array(cast_like(_decoded(array), like)))


def _grown(array: Any, like: Any, place: Any, start: Any) -> Any:
    whole, part = _decoded(start), _decoded(array)
    own = jax.typeof(whole).sharding
    explicit = AxisType.Explicit in own.mesh.axis_types
    return _copy(whole.at[place].set(cast_like(part, whole), out_sharding=own if explicit else None), like)


def _shape_at(place: Any, shape: Shape) -> Shape | None:
    """The shape of what is at a place in an array; None where there is no such place, or twice the same."""
    lists = [axis for axis in place if isinstance(axis, np.ndarray) and axis.dtype != bool]
    if any(np.unique(axis).size < axis.size for axis in lists):
        return None
    try:
        return np.broadcast_to(np.int8(0), shape)[place].shape
    except IndexError:
        return None


def _change(source: Slot, slot: Slot) -> str:
    """What is converted to what; "" if nothing is."""
    old, new = _forms(source.array, slot.array)
    changes = [f"the {source.kind} of the state"] if source.kind != slot.kind else []
    return ", ".join(changes + ([f"{old} to {new}"] if old != new else []))


def _forms(*arrays: Any) -> list[str]:
    """How arrays are stored: the names of codecs, or all of them where the names are one."""
    codecs = [array.codec if isinstance(array, Stored) else None for array in arrays]
    names = [type(codec).__name__ for codec in codecs]
    if codecs[0] != codecs[-1] and names[0] == names[-1]:
        names = [*map(repr, codecs)]
    dtypes = [str(getattr(array, "dtype", None) or jnp.result_type(array)) for array in arrays]
    return [d if codec is None else n for codec, n, d in zip(codecs, names, dtypes, strict=True)]


def _number(array: Any) -> str:
    return "traced" if isinstance(array, Tracer) else f"{np.asarray(array):.7g}"


def _advice(slot: Slot) -> str:
    if slot.kind == kinds.AVERAGE and slot.path and not slot.stage:
        return f" (axes of muon: {{{slot.path!r}: 'io'}} or {{{slot.path!r}: None}})"
    advice = {kinds.STEPS: "bias_correction must be as it was", kinds.DAMPED: "optax has no dampening"}
    return f" ({advice[slot.kind]})" if slot.kind in advice else ""


def _untyped(slot: Slot) -> str:
    return (
        f"carry_state: there is an array of shape {np.shape(slot.array)} where a state was expected, such as "
        "ScaleByAdamState. Restore a checkpoint into the state that init of its own optimizer returns, for "
        "example optax's: otherwise the types of its states are lost."
    )
