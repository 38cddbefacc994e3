"""Which leaf is a matrix, and how it reads: rules by path and shape."""

from collections.abc import Callable
from fnmatch import fnmatchcase

import optax

from optimorph.core.tree import map_paths, paths_and_shapes
from optimorph.core.types import AxesRules
from optimorph.linalg.axes import read

Shape = tuple[int, ...]

_NOT_MATRICES = (
    *("*embed*", "*wte*", "*wpe*"),  # looked up by row: no vector is multiplied by them
    *(
        "*lm_head*",
        "head/*",
        "*/head/*",
        "*classifier*",
        "*logits*",
    ),  # their outputs are scores, not features
    *("*norm*", "*scale", "*bias"),
)
"""Paths (in lower case) that the default rules keep from orthogonalization, whatever their shape."""

_AMBIGUOUS = "?"


def default_axes(path: str, shape: Shape) -> str | None:
    """The spec of a leaf that the user did not describe."""
    if len(shape) < 2 or any(fnmatchcase(path.lower(), pattern) for pattern in _NOT_MATRICES):
        return None
    if len(shape) == 3:  # stacked layers, attention or a one-dimensional convolution
        return _AMBIGUOUS
    inputs = "i" * (len(shape) - 1)
    return "o" + inputs if path.split("/")[-1] == "weight" else inputs + "o"


def leaf_axes(rules: AxesRules | None) -> Callable[[str, Shape], str | None]:
    """The rules as one function (path, shape) → spec; the first that matches decides.

    Args:
      rules: path pattern → spec (fnmatch, `*` crosses slashes; what no pattern matches falls to the default
        rules), or such a function already, or None for the default rules.
    """
    if rules is None:
        return default_axes
    if callable(rules):
        return rules
    if isinstance(rules, str):
        raise ValueError(f"muon: axes must say which leaves it means. Type axes={{'*': {rules!r}}} for all.")

    def spec(path: str, shape: Shape) -> str | None:
        for pattern, found in rules.items():
            if fnmatchcase(path, pattern):
                return found
        return default_axes(path, shape)

    return spec


def partition(
    who: str,
    axes: Callable[[str, Shape], str | None],
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """`optax.partition` into the leaves that read as matrices and all others.

    The parameters decide, where `update` is given them: a missing gradient has no shape to read.

    Raises:
      ValueError: at `init`, every leaf that no rule decides, with likely specs; a spec that does not fit.
    """

    def labels(tree):
        shapes = paths_and_shapes(tree)
        undecided = [path for path, shape in shapes.items() if axes(path, shape) == _AMBIGUOUS]
        if undecided:
            raise ValueError("\n".join(_question(who, path, shapes[path]) for path in undecided))
        return map_paths(
            lambda path, _: "other" if read(who, axes, path, shapes[path]) is None else "matrix", tree
        )

    def split(tree):
        found = labels(tree)  # handed over in a function, as a module of labels may itself be callable
        return optax.partition({"matrix": matrices, "other": others}, lambda _: found)

    def update(updates, state, params=None, **extra):
        return split(updates if params is None else params).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: split(params).init(params), update)


def _question(who: str, path: str, shape: Shape) -> str:
    answers = {
        f"{shape[0]} stacked layers?": "bio",
        f"One kernel of {shape[0]} x {shape[1]} inputs?": "iio",
        f"An attention kernel of {shape[1]} heads?": "ioo",
        "Not a matrix?": None,
    }
    lines = [f"  {question:<36} axes={{{path!r}: {spec!r}}}" for question, spec in answers.items()]
    head = f"{who}: {path!r} has shape {shape} and no rule says how it reads as matrices."
    return "\n".join([head, *lines])
