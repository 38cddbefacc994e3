"""A rule of the default routing: parameter names, a shape, and what such a leaf is."""

from collections.abc import Callable
from typing import NamedTuple

from optimorph._core.types import Shape

UNDECIDED = "?"
"""The spec of a leaf whose name and shape allow several specs or none."""


class NameRule(NamedTuple):
    """A rule for leaves of one role.

    Args:
      role: the role that `plan` shows.
      pattern: a regular expression for the last names of the lower-case path, in which every number is 0.
      specs: the possible specs, one for each number of axes; empty if the leaf is not a matrix. After
        `UNDECIDED` they are answers that a question offers.
      when: a condition on the shape; if it is false, the rule does not match.
      shape_ok: a condition on the shape without batch axes; if it is false, the spec does not fit.
      batch_axes: whether `specs` include the batch axes; otherwise these are put in front.
      not_in: a regular expression; if the path contains a match, the rule does not match.
      layout: of `layouts`, what decides leaves that the rule leaves `UNDECIDED`.
    """

    role: str
    pattern: str
    specs: tuple[str | None, ...] = ()
    when: Callable[[Shape], bool] = lambda shape: True
    shape_ok: Callable[[Shape], bool] = lambda shape: True
    batch_axes: bool = False
    not_in: str = "(?!)"
    layout: str = ""
