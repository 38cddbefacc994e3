"""How leaves read as matrices: by the user's rules, and where they say nothing by the default ones."""

from collections.abc import Callable
from typing import NamedTuple

from optimorph.core.types import AxesRules, Shape
from optimorph.linalg.axes import Axes
from optimorph.routing.names import UNDECIDED, by_name
from optimorph.routing.rules import UNSAID, LeafError, by_pattern, lookup, matches


class Reading(NamedTuple):
    """What a leaf is: its axes, or None if it is no matrix; why; and what must be asked, if anything."""

    axes: Axes | None
    role: str
    question: str | None = None


def reader(who: str, rules: AxesRules | None) -> Callable[[str, Shape], Reading]:
    """The rules as one function (path, shape) → reading; what they leave unsaid falls to the names.

    Args:
      rules: pattern → spec, or (path, shape) → spec, or a tree of specs, as `labels` takes them; None, as a
        spec, is "not a matrix", and as rules, none.

    Raises:
      ValueError: a bare spec, which does not say what leaves it means.
    """
    if isinstance(rules, str | Axes):
        raise ValueError(f"{who}: axes must say which leaves it means. Type axes={{'*': {rules!r}}} for all.")
    say = lookup({} if rules is None else rules)

    def read(path: str, shape: Shape) -> Reading:
        said = say(path, shape)
        if said is not UNSAID:
            return _by_rule(said, _why(rules, path), path, shape)
        role, spec = by_name(path, shape)
        if spec == UNDECIDED:
            return Reading(None, "undecided", _question(path, shape))
        return Reading(None if spec is None else Axes(spec), role)

    return read


def leaf_axes(who: str, rules: AxesRules | None) -> Callable[[str, Shape], Axes | None]:
    """(path, shape) → how the leaf reads, None for no matrix.

    Raises:
      LeafError: when called, naming `who` and the leaf: undecided, or a spec that does not fit.
    """
    read = reader(who, rules)

    def found(path: str, shape: Shape) -> Axes | None:
        reading = read(path, shape)
        if reading.question is not None:
            raise LeafError(f"{who}: {reading.question}")
        return reading.axes

    return found


def _by_rule(said: str | Axes | None, role: str, path: str, shape: Shape) -> Reading:
    if said is None:
        return Reading(None, role)
    try:
        axes = said if isinstance(said, Axes) else Axes(said)
    except ValueError as error:
        return Reading(None, role, f"{path!r} has shape {shape}. {error}")
    wrong = axes.misfit(shape)
    if wrong is None:
        return Reading(axes, role)
    return Reading(None, role, f"{path!r} has shape {shape}, but {wrong}. {_answers(path, shape)}")


def _why(rules: AxesRules | None, path: str) -> str:
    found = [key for key in rules if matches(key, path)] if by_pattern(rules) else []
    return f"rule {getattr(found[0], 'pattern', found[0])}" if found else "rule"


def _question(path: str, shape: Shape) -> str:
    return f"{path!r} has shape {shape} and no rule says how it reads as matrices. {_answers(path, shape)}"


def _answers(path: str, shape: Shape) -> str:
    """What to type, for each thing that the leaf may be."""
    last = path.split("/")[-1]
    answers = {**_LIKELY[last == "weight"].get(len(shape), {}), None: "not a matrix"}
    lines = [f"  axes={{{path!r}: {spec!r}}}  # {what}" for spec, what in answers.items()]
    return "\n".join(["Type one of", *lines])


_LIKELY = (
    {
        2: {"io": "inputs x outputs", "oi": "outputs x inputs"},
        3: {
            "bio": "stacked layers or experts, inputs x outputs",
            "ioo": "attention's query, key or value: width, heads, size",
            "iio": "attention's output: heads, size, width; or a convolution over one axis",
        },
        4: {
            "iiio": "a convolution over two axes",
            "bbio": "stacked layers of experts",
            "bioo": "stacked layers of attention's query, key or value",
            "biio": "stacked layers of attention's output, or of convolutions over one axis",
        },
        5: {"iiiio": "a convolution over three axes", "biiio": "stacked convolutions over two axes"},
    },
    {
        2: {"oi": "outputs x inputs", "io": "inputs x outputs", "(3o)i": "three gates or projections"},
        3: {
            "boi": "stacked layers or experts, outputs x inputs",
            "oii": "a convolution over one axis; or attention's output: width, heads, size",
            "ooi": "attention's query, key or value: heads, size, width",
        },
        4: {
            "oiii": "a convolution over two axes",
            "bboi": "stacked layers of experts",
            "booi": "stacked layers of attention's query, key or value",
        },
        5: {"oiiii": "a convolution over three axes", "boiii": "stacked convolutions over two axes"},
    },
)
"""Number of axes → spec → what the leaf would be, for kernels and for weights."""
