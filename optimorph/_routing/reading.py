"""How leaves read as matrices: by the user's rules, and where they say nothing by the default ones."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from optimorph._core.checks import LeafError
from optimorph._core.types import AxesRules, Shape
from optimorph._routing.names import UNDECIDED, by_name
from optimorph._routing.question import question
from optimorph._routing.rules import UNSAID, by_pattern, finder, lookup
from optimorph.linalg import Axes

_axes = functools.cache(Axes)


class Reading(NamedTuple):
    """What a leaf is: its axes, or None if it is no matrix; why; and what must be asked, if anything."""

    axes: Axes | None
    role: str
    question: str | None = None


def reader(who: str, rules: AxesRules | None) -> Callable[[str, Shape], Reading]:
    """The rules as one function (path, shape) → reading; what they leave unsaid falls to the names.

    Args:
      who: whose error it is.
      rules: pattern → spec, or (path, shape) → spec, or a tree of specs, as `labels` takes them; None, as a
        spec, is "not a matrix", and as rules, none.

    Raises:
      ValueError: a bare spec, which does not say what leaves it means.
    """
    if isinstance(rules, str | Axes):
        raise ValueError(f"{who}: axes must say which leaves it means. Type axes={{'*': {rules!r}}} for all.")
    rules = {} if rules is None else rules
    say, why = lookup(rules), _reasons(rules)

    def read(path: str, shape: Shape) -> Reading:
        said = say(path, shape)
        if said is not UNSAID:
            return _by_rule(said, why(path), path, shape)
        role, spec = by_name(path, shape)
        if spec == UNDECIDED:
            return Reading(None, "undecided", question(path, shape, "no rule says how it reads as matrices"))
        return Reading(None if spec is None else _axes(spec), role)

    return read


def leaf_axes(who: str, rules: AxesRules | None) -> Callable[[str, Shape], Axes | None]:
    """(path, shape) → how the leaf reads, None for no matrix.

    Raises:
      LeafError: when called, naming `who` and the leaf: undecided, or a spec that does not fit.
    """
    return axes_of(who, reader(who, rules))


def axes_of(who: str, read: Callable[[str, Shape], Reading]) -> Callable[[str, Shape], Axes | None]:
    """The axes that a reader finds; a question is an error."""

    def axes(path: str, shape: Shape) -> Axes | None:
        reading = read(path, shape)
        if reading.question is not None:
            raise LeafError(f"{who}: {reading.question}")
        return reading.axes

    return axes


def _by_rule(said: Any, role: str, path: str, shape: Shape) -> Reading:
    if said is None:
        return Reading(None, role)
    if not isinstance(said, str | Axes):
        return Reading(None, role, question(path, shape, f"{said!r} is no spec"))
    try:
        axes = said if isinstance(said, Axes) else _axes(said)
    except ValueError as error:
        return Reading(None, role, question(path, shape, str(error).rstrip(".")))
    wrong = axes.misfit(shape)
    return Reading(axes, role) if wrong is None else Reading(None, role, question(path, shape, wrong))


def _reasons(rules: AxesRules) -> Callable[[str], str]:
    """Path → which rule it is that decides."""
    if not by_pattern(rules):
        return lambda path: "rule"
    patterns, find = list(rules), finder(rules)

    def why(path: str) -> str:
        k = find(path)
        return "rule" if k is None else f"rule {getattr(patterns[k], 'pattern', patterns[k])}"

    return why
