"""What optimizers say of leaves while `plan` makes their state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from optimorph._routing.leaf_spec import LeafSpec


@dataclasses.dataclass
class Readings:
    """How the leaves of a state that is being made are read; handed down as "readings".

    Where it is handed down, a leaf that would be refused is noted, and treated as no matrix.

    Args:
      routes: of each optimizer that routes leaves, in the order in which their states are made.
      routed: path → the index of the leaf's optimizer in `routes`, and how that one reads it.
      unresolved: path → how a leaf reads that would be refused.
      labels: path → the label of the innermost `partition`.
      stacked: path → size of matrix, such as "64x256" → how many of these matrices the leaf has.
      unused: the rules of all transformations that decide for no leaf.
    """

    routes: list[Any] = dataclasses.field(default_factory=list)
    routed: dict[str, tuple[int, LeafSpec]] = dataclasses.field(default_factory=dict)
    unresolved: dict[str, LeafSpec] = dataclasses.field(default_factory=dict)
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)
    stacked: dict[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    unused: list[str] = dataclasses.field(default_factory=list)

    def add(self, routes: Any, specs: Mapping[str, LeafSpec]) -> None:
        """Note the leaves of one more optimizer that routes; of nested ones the outer decides."""
        self.routed = {path: (len(self.routes), spec) for path, spec in specs.items()} | self.routed
        self.routes.append(routes)
