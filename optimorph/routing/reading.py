"""How leaves read as matrices: by the user's rules, and where they say nothing by the default ones."""

from collections.abc import Callable
from typing import Any, NamedTuple

from optimorph.core.types import AxesRules, Shape
from optimorph.linalg.axes import Axes
from optimorph.routing.names import UNDECIDED, by_name
from optimorph.routing.rules import UNSAID, LeafError, by_pattern, finder, lookup


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
            return Reading(None, "undecided", _ask(path, shape, "no rule says how it reads as matrices"))
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


def _by_rule(said: Any, role: str, path: str, shape: Shape) -> Reading:
    if said is None:
        return Reading(None, role)
    if not isinstance(said, str | Axes):
        return Reading(None, role, _ask(path, shape, f"{said!r} is no spec"))
    try:
        axes = said if isinstance(said, Axes) else Axes(said)
    except ValueError as error:
        return Reading(None, role, _ask(path, shape, str(error).rstrip(".")))
    wrong = axes.misfit(shape)
    return Reading(axes, role) if wrong is None else Reading(None, role, _ask(path, shape, wrong))


def _reasons(rules: AxesRules) -> Callable[[str], str]:
    """Path → which rule it is that decides."""
    if not by_pattern(rules):
        return lambda path: "rule"
    patterns, find = list(rules), finder(rules)

    def why(path: str) -> str:
        k = find(path)
        return "rule" if k is None else f"rule {getattr(patterns[k], 'pattern', patterns[k])}"

    return why


def _ask(path: str, shape: Shape, cause: str) -> str:
    """What is wrong, and what to type for each thing that the leaf may be."""
    last = path.split("/")[-1]
    likely = _LIKELY[last.startswith("weight") or last.endswith("weight")].get(len(shape), {})
    answers = {spec: what for spec, what in likely.items() if Axes(spec).misfit(shape) is None}
    lines = [
        f"  axes={{{path!r}: {spec!r}}}  # {what}" for spec, what in {**answers, None: "not a matrix"}.items()
    ]
    return "\n".join([f"{path!r} has shape {shape}, and {cause}. Type one of", *lines])


_LIKELY = (
    {
        2: {
            "io": "inputs x outputs",
            "oi": "outputs x inputs",
            "i(3o)": "three projections side by side: query, key and value",
            "i(32+8+8 o)": "the same, where 32 heads of queries share 8 of keys and values",
        },
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
        2: {
            "oi": "outputs x inputs",
            "io": "inputs x outputs",
            "(3o)i": "the gates of a GRU, or query, key and value",
            "(4o)i": "the gates of an LSTM",
        },
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
