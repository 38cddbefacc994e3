"""A transform that works leaf by leaf is a rule for one leaf; `transform` lifts a rule to trees."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType

from optimorph._core.checks import not_an_array
from optimorph._core.differences import difference, is_container, other_state, shapes_of_state
from optimorph._core.numbers import (
    ABSENT,
    NotScalarError,
    as_made,
    cast_like,
    copied,
    is_absent,
    is_array,
    is_missing,
    is_trainable,
    kind,
    restored,
    upcast,
    varying,
    with_type_of,
)
from optimorph._core.paths import structure_paths
from optimorph._core.roles import Role
from optimorph._core.types import PyTree, Shape

_HANDED: ContextVar[Mapping[str, Any]] = ContextVar("handed", default={})  # noqa: B039


@contextlib.contextmanager
def handed_down(**facts: Any) -> Iterator[None]:
    """What is known of the leaves, for the transformations that run inside: `handed(name)` finds it."""
    token = _HANDED.set({**_HANDED.get(), **facts})
    try:
        yield
    finally:
        _HANDED.reset(token)


def handed(name: str) -> Any:
    """A fact about the leaves that a transformation around this one provides; None if none provides it.

    Args:
      name: such as "matrix_axes", the `linalg.Axes` of each leaf (None for a leaf that is not a matrix).
    """
    return _HANDED.get().get(name)


def called(name: str) -> str:
    """What errors call a transform: the optimizer that is being made of it, or else its own name."""
    return handed("optimizer") or name


class Shapes(dict[str, Shape]):
    """Path → shape; a key of caches by its identity."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def not_in_parts(who: str, why: str) -> ValueError:
    """The error of a transform that cannot update a leaf in parts."""
    return ValueError(
        f"compress_state: put {who} outside of compress_state, which updates large leaves in parts: {why}."
    )


class Leaves:
    """What a rule knows about all leaves at once: their `values`, `paths`, `shapes` and `tree`."""

    def __init__(self, structure: Any, values: Sequence[Any]):
        """Of parameters, or without them of gradients."""
        self.structure, self.values = structure, values

    @classmethod
    def of(cls, tree: PyTree) -> "Leaves":
        values, structure = jax.tree.flatten(tree, is_leaf=is_absent)
        return cls(structure, values)

    @functools.cached_property
    def tree(self) -> PyTree:
        """The arrays as a tree, with None where there is none."""
        return self.structure.unflatten(x if is_array(x) else None for x in self.values)

    @functools.cached_property
    def paths(self) -> list[str]:
        """The path of every leaf, also where there is no array."""
        return structure_paths(self.structure)

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The shapes of the leaves that train, by path."""
        pairs = zip(self.paths, self.values, strict=True)
        return Shapes((path, np.shape(x)) for path, x in pairs if is_trainable(x))


class Leaf(NamedTuple):
    """What a rule knows about a leaf besides its gradient.

    Args:
      weight: the parameter, in its own dtype; None if `update` was called without parameters.
      index: the position of the leaf in the tree.
      leaves: all leaves.
      part: whether the rule gets only a slab of the leaf, as inside `compress_state`.
    """

    weight: Any
    index: int
    leaves: Leaves
    part: bool = False

    @property
    def path(self) -> str:
        """The keys of the leaf, joined by slashes."""
        return self.leaves.paths[self.index]


def _nothing(*_: Any) -> Any:
    return None


def _unchanged(shared: Any, leaves: Leaves) -> tuple[None, Any]:
    return None, shared


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one leaf is updated.

        now, shared = advance(shared, leaves)           once in a step, for all leaves
        u, s        = update(g, s, leaf, now)           for each leaf

    `shared` holds the scalars of the state, such as counts and seeds. `s` holds the arrays of one leaf, such
    as moments. Both have the structure of `state`: `shared` has None for the arrays, and `s` has None for the
    scalars. Gradients and updates are in float32 or wider.

    Args:
      state: the state's structure, with a `Role` for each field, as `roles_of` returns it.
      update: (g, s, leaf, now) → (update, next s).
      init: leaf → s. It is required if a role has `tree`.
      begin: leaves → shared. It is required if a role has no `tree`.
      advance: (shared, leaves) → (now, next shared).
      narrow: whether gradients and updates keep their own dtypes instead.
    """

    state: Any
    update: Callable[[jax.Array, Any, Leaf, Any], tuple[jax.Array, Any]]
    init: Callable[[Leaf], Any] = _nothing
    begin: Callable[[Leaves], Any] = _nothing
    advance: Callable[[Any, Leaves], tuple[Any, Any]] = _unchanged
    narrow: bool = False

    def __post_init__(self):
        if wrong := [role for role in self.roles if not isinstance(role, Role)]:
            raise ValueError(f"Rule: {wrong[0]!r} in its state is not a Role. Type roles_of(MyState).")
        for role in self.roles:
            name = "init" if role.tree else "begin"
            if getattr(self, name) is _nothing:
                raise ValueError(f"Rule: the role {role.name!r} needs {name}. Type Rule(..., {name}=...).")

    @functools.cached_property
    def structure(self) -> Any:
        return jax.tree.structure(self.state)

    @functools.cached_property
    def roles(self) -> list[Role]:
        return jax.tree.leaves(self.state)

    def pick(self, slots: Sequence[Any], k: int | None = None) -> Any:
        """Of the state's slots, the arrays of leaf `k`; without `k`, the shared scalars."""
        if k is None:
            own = [None if role.tree else slot for role, slot in zip(self.roles, slots, strict=True)]
        else:
            own = [slot[k] if role.tree else None for role, slot in zip(self.roles, slots, strict=True)]
        return self.structure.unflatten(own)

    def filled(self, state: Any) -> Any:
        """The state, with None in every slot if it is None."""
        return self.structure.unflatten(self.slots(state))

    def slots(self, state: Any) -> list[Any]:
        """What stands in the place of each role; Nones of a rule without arrays."""
        return [None] * len(self.roles) if state is None else self.structure.flatten_up_to(state)


class Transform(optax.GradientTransformationExtraArgs):
    """An optax transformation that may say more of itself.

    Attributes:
      rule: the rule for one leaf by which it works.
      routes: which leaves it routes where.
    """

    rule: Rule | None = None
    routes: Any = None

    def with_init(self, init: Any) -> "Transform":
        tx = Transform(init, self.update)
        tx.rule, tx.routes = self.rule, self.routes
        return tx


def rule_of(tx: Any) -> Rule | None:
    return getattr(tx, "rule", None)


def pointwise(update: Callable[..., jax.Array]) -> Rule:
    return Rule(optax.EmptyState(), lambda g, s, leaf, now: (update(g), s))


def transform(who: str, rule: Rule, *, strict: bool = False) -> Transform:
    """Make an optax transformation that updates each leaf by `rule`, as `own_rule.transform` says."""
    who = called(who)

    def init(params):
        leaves = arrays(who, params)
        tree = leaves.structure
        try:
            shared = rule.slots(rule.begin(leaves))
        except NotScalarError as error:
            raise ValueError(f"{who}: {error}") from error
        own = [
            rule.slots(rule.init(Leaf(w, k, leaves)))
            if is_trainable(w)
            else (w if isinstance(w, ABSENT) else None)
            for k, w in enumerate(leaves.values)
        ]
        return rule.structure.unflatten(
            tree.unflatten([s[j] if isinstance(s, list) else s for s in own]) if role.tree else shared[j]
            for j, role in enumerate(rule.roles)
        )

    def update(updates, state, params=None, **extra):
        gs, tree, ws = aligned(who, updates, params, strict)
        slots = _columns(who, rule, tree, as_made(init, state, params), updates, params)
        _check_moments(who, rule, gs, slots, updates, params)
        leaves, out = Leaves(tree, gs if params is None else ws), []
        try:
            now, shared = rule.advance(rule.pick(slots), leaves)
            for k, (g, w) in enumerate(zip(gs, ws, strict=True)):
                if isinstance(g, ABSENT):
                    out.append(g)
                    continue
                x = jnp.asarray(g) if rule.narrow else upcast(g)
                u, s = rule.update(x, rule.pick(slots, k), Leaf(w, k, leaves), now)
                out.append(u if rule.narrow else cast_like(u, g))
                for slot, role, new in zip(slots, rule.roles, rule.slots(s), strict=True):
                    if role.tree:
                        old = slot[k]
                        if isinstance(old, jax.Array) and jax.typeof(new) != jax.typeof(old):
                            new = with_type_of(new, old)
                        if new is out[k] and not isinstance(new, Tracer):  # one may be donated
                            out[k] = copied(new)
                        slot[k] = new
        except NotScalarError as error:
            raise ValueError(f"{who}: {error}") from error
        after, mesh = [], jax.sharding.get_abstract_mesh()
        for slot, role, new in zip(slots, rule.roles, rule.slots(shared), strict=True):
            if not role.tree and jax.typeof(new) != jax.typeof(slot):
                new = varying(new, slot)
            if not role.tree and AxisType.Explicit in mesh.axis_types:
                new = jnp.where(slot == slot, new, new)  # so that `vmap` divides both alike
            after.append(tree.unflatten(slot) if role.tree else new)
        return tree.unflatten(out), rule.structure.unflatten(after)

    tx = Transform(init, update)
    tx.rule = rule
    return tx


def arrays(who: str, params: PyTree) -> Leaves:
    """The leaves of the parameters, those that are absent too; what is no array is refused."""
    leaves = Leaves.of(params)
    for path, leaf in zip(leaves.paths, leaves.values, strict=True):
        if not isinstance(leaf, ABSENT) and not is_array(leaf):
            raise ValueError(not_an_array(who, path, leaf))
    return leaves


def aligned(who: str, updates: PyTree, params: PyTree | None, strict: bool = True) -> tuple[list, Any, list]:
    """The gradients as a list with None for missing ones, their tree's structure, and the parameters' list.

    Of a tree from `optax.masked` the leaves that are masked are in the list too. Gradients that are not those
    of the parameters are refused.
    """
    gs, tree = jax.tree.flatten(updates, is_leaf=is_absent)
    try:
        ws = [None] * len(gs) if params is None else tree.flatten_up_to(params)
    except (ValueError, TypeError, KeyError) as error:
        raise difference(who, updates, params) from error
    for k, (g, w) in enumerate(zip(gs, ws, strict=True)):
        if g is None and is_container(w):
            raise difference(who, updates, params)
        if isinstance(g, ABSENT):
            ws[k] = w if hasattr(w, "dtype") or isinstance(w, ABSENT) else None  # not functions
            continue
        if is_missing(g):
            gs[k] = None
        elif not (is_trainable(g) if params is None else _alike(g, w, strict)):
            raise difference(who, updates, params)
    return gs, tree, ws


def map_updates(who: str, f: Callable[..., Any], updates: PyTree, *rest: PyTree) -> PyTree:
    """`f(g, *others)` on every leaf that has a gradient; None where it is missing."""
    gs, tree, _ = aligned(who, updates, None)
    others = [tree.flatten_up_to(other) for other in rest]
    return tree.unflatten(
        g if isinstance(g, ABSENT) else f(g, *each) for g, *each in zip(gs, *others, strict=True)
    )


def _alike(g: Any, w: Any, strict: bool) -> bool:
    own = kind(g)
    of_kind = own == kind(w) or (own == "real" and not strict)
    return of_kind and own in ("real", "complex") and np.shape(g) == np.shape(w)


def _columns(who: str, rule: Rule, tree: Any, state: Any, updates: Any, params: Any) -> list[Any]:
    """The slots of a state, of trees as lists of leaves; a state of another optimizer is refused."""
    try:
        slots = rule.slots(state)
    except (ValueError, TypeError, KeyError) as error:
        raise other_state(who) from error
    for j, role in enumerate(rule.roles):
        if not role.tree:
            x = slots[j]
            if not hasattr(x, "dtype") and not isinstance(x, int | float):
                raise other_state(who)
            if role.shaped and getattr(x, "shape", ()) != ():
                raise other_state(who)
            own = [x]
        else:
            try:
                own = tree.flatten_up_to(slots[j])
            except (ValueError, TypeError, KeyError) as error:
                raise (difference(who, updates, slots[j]) if params is None else other_state(who)) from error
        for k, x in enumerate(own):
            if not isinstance(x, (jax.Array, *ABSENT)) or getattr(x, "weak_type", False):
                if isinstance(x, jax.ShapeDtypeStruct):
                    raise shapes_of_state(who)
                own[k] = restored(x)
        slots[j] = own if role.tree else own[0]
    return slots


def _check_moments(who: str, rule: Rule, gs: list, slots: list, updates: Any, params: Any) -> None:
    """Refuse moments whose shapes are not those of the gradients, and real ones of complex gradients."""
    for slot, role in zip(slots, rule.roles, strict=True):
        for g, m in zip(gs, slot if role.tree and role.shaped else (), strict=False):
            if isinstance(g, ABSENT) or isinstance(m, optax.MaskedNode):
                continue
            same = getattr(m, "shape", None) == np.shape(g)
            if same and (jnp.iscomplexobj(m) or not jnp.iscomplexobj(g)):
                continue
            tree = jax.tree.structure(updates, is_leaf=is_absent)
            raise difference(who, updates, tree.unflatten(slot)) if params is None else other_state(who)
