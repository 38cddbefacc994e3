"""What the fields of a state hold: each state says so itself.

A state of arrays has an attribute `roles`, a `Role` for each field. A state of states may have an attribute
`averages`, which says for a field what the averages inside it are: second moments, or "" for no moments.
Second moments in a state with an attribute `may_be_variance` are none: their difference would be noise if
they were stored in fewer bytes.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

FIRST, SECOND, SLOW = "first", "second", "slow"


@dataclasses.dataclass(frozen=True)
class Role:
    """What a field of a state holds.

    Args:
      name: the name of the field in error messages.
      moment: the kind of moment that the field holds: "first", "second" or "slow"; "" if it holds none. A
        slow moment is an average over so many steps that one step is lost in fewer than 32 bits.
      tree: whether the field holds an array for each parameter. If not, it holds a scalar.
      shaped: whether these arrays have the shapes of the parameters, and the scalar has the shape ().
      reading: the name under which `probes.read` returns the scalar; "" if it does not return it.
    """

    name: str
    moment: str = ""
    tree: bool = False
    shaped: bool = True
    reading: str = ""


AVERAGE = Role("average", FIRST, tree=True)
"""The role of an average of gradients, (1 - β) g + β m."""
VELOCITY = Role("velocity", FIRST, tree=True)
"""The role of a decaying sum of gradients, g + β v."""
TOTAL = Role("sum of squares", SECOND, tree=True)
"""The role of a sum of squares. That of an average of squares is `Role("...", "second", tree=True)`."""


def holds(**fields: Any) -> Mapping[str, Any]:
    """The value of a state's attribute `roles`: a role for each field."""
    return MappingProxyType(fields)


def scalar(name: str, reading: str = "") -> Role:
    """The role of a scalar, such as a count or a seed."""
    return Role(name, reading=reading)


def roles_of(state: Any) -> Any:
    """The state of this type in which every field is its own role; the argument `state` of a `Rule`.

    Raises:
      ValueError: a field without a role, a role without a field, or an unknown kind of moment.
    """
    roles = getattr(state, "roles", {})
    if {*roles} != {*state._fields}:
        typed = ", ".join(f"{field}=..." for field in state._fields)
        raise ValueError(
            f"{state.__name__}: its fields are {state._fields}, but its roles {tuple(roles)}. Type roles = "
            f"holds({typed}) in it, each AVERAGE, VELOCITY, TOTAL, scalar(...) or a Role."
        )
    for field, role in roles.items():
        if role.moment not in ("", FIRST, SECOND, SLOW):
            raise ValueError(
                f"{state.__name__}.{field}: moment is {role.moment!r}. Type {FIRST!r}, {SECOND!r} or "
                f"{SLOW!r}."
            )
    return state(**roles)


def relabeled(state: Any) -> Any:
    """A state of roles after what its own `averages` says of them."""
    changed = {}
    for field, moment in getattr(state, "averages", {}).items():

        def other(role, moment=moment):
            if may_be_variance(role):
                return jax.tree.map(lambda term: dataclasses.replace(term, moment=""), role)
            average = role == AVERAGE or (role.moment and not moment)
            return dataclasses.replace(role, moment=moment) if average else role

        sums = may_be_variance if moment == SECOND else None
        changed[field] = jax.tree.map(other, getattr(state, field), is_leaf=sums)
    return state._replace(**changed) if changed else state


def may_be_variance(node: Any) -> bool:
    """Whether a state of second moments is of several terms."""
    return hasattr(node, "may_be_variance")
