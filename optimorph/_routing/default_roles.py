"""The roles of leaves by the default rules, as rules for masks, partitions and factors."""

import difflib
from collections.abc import Callable

from optimorph._core.types import Shape
from optimorph._routing.name_rules import RULES
from optimorph._routing.names import by_name

ROLES = tuple(sorted({rule.role for rule in RULES} | {"vector"}))


def role_of(path: str, shape: Shape) -> str:
    """What the default rules take a leaf for, by its path and shape: "norm", "embedding", "dense", ...

        partition(lambda path, shape: "slow" if role_of(path, shape) == "embedding" else "fast", {...})

    Args:
      path: the leaf's keys, joined by slashes.
      shape: the leaf's shape.
    """
    return by_name(path, shape)[0]


def roles(*names: str) -> Callable[[str, Shape], bool]:
    """Rules that select the leaves of some roles, as `role_of` finds them.

        adamw(1e-3, weight_decay=0.1, mask=not_roles("norm", "bias", "vector", "embedding"))

    Args:
      names: roles, as the column "role" of `plan` shows them.

    Raises:
      ValueError: an unknown role.
    """
    _check("roles", names)
    return lambda path, shape: role_of(path, shape) in names


def not_roles(*names: str) -> Callable[[str, Shape], bool]:
    """Rules that select all other leaves than `roles(*names)`.

    Args:
      names: roles, as the column "role" of `plan` shows them.

    Raises:
      ValueError: an unknown role.
    """
    _check("not_roles", names)
    return lambda path, shape: role_of(path, shape) not in names


def _check(who: str, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in ROLES:
            similar = difflib.get_close_matches(str(name), ROLES, 1) or ROLES[:1]
            known = ", ".join(map(repr, ROLES))
            raise ValueError(f"{who}: {name!r} is not a role. Type {similar[0]!r}, or another of {known}.")
