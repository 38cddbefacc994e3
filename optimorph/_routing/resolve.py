"""How the leaves of a tree read as matrices: by the user's rules, by names, by siblings, by widths."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optimorph._core.checks import LeafError
from optimorph._core.numbers import is_trainable
from optimorph._core.rule import Leaf, Leaves, handed
from optimorph._core.shown import shown
from optimorph._core.types import AxesRules, Rules, Shape
from optimorph._core.warn import warn
from optimorph._distributed.shardings import Match, whole_shapes
from optimorph._routing.by_siblings import by_default, by_siblings
from optimorph._routing.fused import with_fused_layers
from optimorph._routing.leaf_spec import HEAD, LeafSpec, axes_of, unresolved
from optimorph._routing.names import by_name, unwrapped
from optimorph._routing.output_layer import with_output_layer
from optimorph._routing.questions import questions
from optimorph._routing.rules import NO_MATCH, lookup, match_shardings, matching_pattern, warn_unused
from optimorph.linalg import Axes

NOTHING = LeafSpec(None, "none")
"""How a leaf reads that has no array."""

Resolve = Callable[[Sequence[str], Sequence[Shape]], list[LeafSpec]]
"""(paths, shapes) of a tree → how each leaf reads as matrices."""


def resolve_leaves(who: str, rules: AxesRules | None, *, find_output: bool = False) -> Resolve:
    """How all leaves of a tree read as matrices, by `rules`, or by default where none of these matches.

    Args:
      who: the function that errors name.
      find_output: whether an output layer without a telling name is inferred or asked for.
      rules: pattern → spec, or (path, shape) → spec, or a tree of specs, as in `labels`. The spec None
        means "not a matrix", "head" the output layer.

    Raises:
      ValueError: a spec in place of rules.
    """
    by_rule = _by_rules(who, rules)

    def resolve(paths: Sequence[str], shapes: Sequence[Shape]) -> list[LeafSpec]:
        own, leaves = dict(zip(paths, shapes, strict=True)), handed("all_leaves")
        around = own if leaves is None else leaves.shapes
        if not around.items() > own.items():
            return of_all(paths, shapes)
        specs = dict(zip(around, of_all([*around], [*around.values()]), strict=True))
        return [specs[path] for path in paths]

    def of_all(paths: Sequence[str], shapes: Sequence[Shape]) -> list[LeafSpec]:
        ruled = [
            by_rule(path, shape) or (NOTHING if 0 in shape else None)
            for path, shape in zip(paths, shapes, strict=True)
        ]
        decided = [spec for spec in ruled if spec is not None]
        if len(decided) == len(ruled):
            return decided
        names = [*map(unwrapped, paths)]
        default = by_siblings(names, shapes)
        specs = [default[k] if spec is None else spec for k, spec in enumerate(ruled)]
        specs = with_output_layer(names, shapes, specs) if find_output else specs
        return with_fused_layers(names, shapes, specs)

    return resolve


def leaf_axes(who: str, rules: AxesRules | None) -> Callable[[str, Shape], Axes | None]:
    """(path, shape) → the leaf's spec by its name alone; a `LeafError` if that does not tell."""
    by_rule = _by_rules(who, rules)

    def axes(path: str, shape: Shape) -> Axes | None:
        spec = by_rule(path, shape) or by_default(path, shape, None, *by_name(path, shape))
        if spec.unresolved is not None:
            raise LeafError(f"{who}: {spec.question(path)}")
        return spec.axes

    return axes


class AxesOfLeaves:
    """How a transform finds the axes of leaves: from `route_matrices` around it, or from its own rules."""

    def __init__(self, who: str, axes: AxesRules | None, shardings: Rules | None):
        self.who, self.axes, self.shardings = who, axes, shardings
        self.match = match_shardings(who, shardings)
        self.resolve = resolve_leaves(who, axes)
        self.known: weakref.WeakKeyDictionary[Leaves, Sequence[Axes | None]]
        self.known = weakref.WeakKeyDictionary()

    def __reduce__(self):
        """What it knows of leaves in this process is not pickled."""
        return AxesOfLeaves, (self.who, self.axes, self.shardings)

    def check(self, leaves: Leaves, without: str = "") -> None:
        """Refuse leaves that no rule decides. If `without` says what it means, warn if none is a matrix."""
        warn_unused(self.who, "shardings", self.shardings, leaves.paths)
        if self.axes is not None:
            warn_unused(self.who, "axes", self.axes, leaves.paths)
        forms, _ = self.axes_and_shardings(leaves)
        unasked = self.axes is None and handed("matrix_axes") is None
        if without and unasked and leaves.shapes and not any(forms):
            warn(f"{self.who}: no leaf is a matrix, so {without}. See optimorph.plan.", stacklevel=3)

    def axes_and_shardings(self, leaves: Leaves) -> tuple[Sequence[Axes | None], Any]:
        """The axes of every leaf, None for no matrix; and the function from leaves to shardings, or None."""
        if self.axes is None and handed("matrix_axes") is not None:
            return handed("matrix_axes"), handed("shardings")
        if leaves not in self.known:  # a tree is read once
            self.known[leaves] = resolved_axes(self.who, self.resolve, self.match, leaves)
        return self.known[leaves], self.match

    def of(self, leaf: Leaf) -> tuple[Axes | None, Any]:
        """Those of one leaf, for `init`."""
        forms, match = self.axes_and_shardings(leaf.leaves)
        return forms[leaf.index], match


def resolved(who: str, resolve: Resolve, match: Match | None, leaves: Leaves) -> list[LeafSpec]:
    """How all leaves read as matrices; those without an array, and integers, do not.

    Raises:
      ValueError: naming `who`, with a question for each kind of unresolved leaves. `plan` gets them in its
        "readings" instead.
    """

    def all_or_none(paths: Sequence[str], shapes: Sequence[Shape]) -> list[LeafSpec]:
        specs = resolve(paths, whole_shapes(who, match, paths, shapes))
        pairs = zip(paths, specs, strict=True)
        refused = {path: spec for path, spec in pairs if spec.unresolved is not None}
        if refused and (readings := handed("readings")) is not None:
            readings.unresolved |= refused
        elif refused:
            asked = {path: (spec.question(path) or "", spec.answers) for path, spec in refused.items()}
            raise ValueError("\n".join(questions(asked, paths, who)))
        return specs

    return resolve_trained(all_or_none, leaves.paths, leaves.values, NOTHING)


def resolve_trained(
    resolve: Resolve, paths: Sequence[str], leaves: Sequence[Any], other: LeafSpec
) -> list[LeafSpec]:
    """How all leaves of real or complex numbers read as matrices; `other` of what is not trained."""
    trained = [k for k, leaf in enumerate(leaves) if is_trainable(leaf)]
    specs = resolve([paths[k] for k in trained], [np.shape(leaves[k]) for k in trained])
    known = dict(zip(trained, specs, strict=True))
    return [known.get(k, other) for k in range(len(leaves))]


def resolved_axes(who: str, resolve: Resolve, match: Match | None, leaves: Leaves) -> list[Axes | None]:
    """The axes of all leaves, as `resolved` finds them."""
    return [spec.axes for spec in resolved(who, resolve, match, leaves)]


def _by_rules(who: str, rules: AxesRules | None) -> Callable[[str, Shape], LeafSpec | None]:
    """(path, shape) → how a leaf reads by the user's rules; None if none of these matches."""
    if isinstance(rules, str | Axes):
        raise ValueError(
            f"{who}: axes must map patterns of paths to specs, but is {shown(rules)}. "
            f"Type axes={{'*': {shown(rules)}}} for all leaves."
        )
    rules = {} if rules is None else rules
    match, pattern_of = lookup(rules, who, "axes"), matching_pattern(rules)

    def by_rule(path: str, shape: Shape) -> LeafSpec | None:
        spec = match(path, shape)
        if spec is NO_MATCH:
            return None
        pattern = pattern_of(path, shape)
        role = "rule" if pattern is None else f"rule {pattern}"
        if spec is None:
            return LeafSpec(None, role)
        if not isinstance(spec, str | Axes):
            return unresolved(path, shape, f"{shown(spec)} is not a spec", role)
        if spec == HEAD:
            return LeafSpec(None, HEAD)
        try:
            axes = spec if isinstance(spec, Axes) else axes_of(spec)
        except ValueError as error:
            return unresolved(path, shape, str(error).rstrip("."), role)
        cause = axes.misfit(shape)
        return LeafSpec(axes, role) if cause is None else unresolved(path, shape, cause, role)

    return by_rule
