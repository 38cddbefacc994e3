"""An element-wise transformation of large leaves, slab by slab."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from optimorph.codecs import Codec, Encoded
from optimorph.core.elementwise import NotElementwise, inlined, mixes, on_part
from optimorph.core.rounding import leaf_keys
from optimorph.core.slabs import in_slabs
from optimorph.core.types import PyTree
from optimorph.storage.choice import named
from optimorph.storage.encoding import decoded, encoded


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What there is at one path; a tree of arrays.

    Args:
      gradient: or the update; None if it is missing.
      weight: None without parameters.
      moments: codes and scales of each moment of the state; None where the leaf has none.
      codecs: of each moment, None for as it is.
      kinds: of each moment.
      missing: whether there is a parameter here, and no gradient of it.
    """

    gradient: Any
    weight: Any
    moments: tuple[Encoded | None, ...]
    codecs: tuple[Codec | None, ...] = dataclasses.field(metadata={"static": True})
    kinds: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    missing: bool = dataclasses.field(metadata={"static": True})

    def wide(self) -> "Leaf":
        """The leaf with decoded moments."""
        moments = [
            None if moment is None else Encoded(decoded(codec, moment), None)
            for codec, moment in zip(self.codecs, self.moments, strict=True)
        ]
        return dataclasses.replace(self, moments=tuple(moments))


jax.tree_util.register_dataclass(Leaf)

Step = Callable[[dict[str, Leaf]], tuple[dict[str, Leaf], PyTree]]
"""Gradients, weights and decoded moments → updates and moments, and the rest of the state."""


class Traced:
    """A step as a program of which parts can be taken: what makes some of its results, and nothing else."""

    def __init__(self, step: Step, leaves: dict[str, Leaf]):
        """Trace the step of all leaves at once, of arrays or of their shapes."""
        paths = list(leaves)

        def function(*each):
            done, rest = step(dict(zip(paths, each, strict=True)))
            return [done[path] for path in paths], rest

        closed, (done, self.rest) = jax.make_jaxpr(function, return_shape=True)(*leaves.values())
        self.closed = inlined(closed)
        self.done = dict(zip(paths, done, strict=True))
        given, made = iter(self.closed.jaxpr.invars), iter(self.closed.jaxpr.outvars)
        self.given = {path: [next(given) for _ in jax.tree.leaves(leaf)] for path, leaf in leaves.items()}
        self.made = {path: [next(made) for _ in jax.tree.leaves(leaf)] for path, leaf in self.done.items()}
        self.others = list(made)
        self.maker = {v: k for k, eqn in enumerate(self.closed.jaxpr.eqns) for v in eqn.outvars}

    def part(self, wanted: list[Any], given: list[Any]) -> ClosedJaxpr:
        """The program that makes these variables of those.

        Raises:
          NotElementwise: they are made of others too.
        """
        jaxpr = self.closed.jaxpr
        consts = dict(zip(jaxpr.constvars, self.closed.consts, strict=True))
        eqns, used, left, known = set(), {}, list(wanted), set(given)
        while left:
            v = left.pop()
            if isinstance(v, Literal) or v in known:
                continue
            if v in consts:
                used[v] = consts[v]
            elif v not in self.maker:
                raise NotElementwise(mixes(self.part(wanted, jaxpr.invars).jaxpr))
            elif (k := self.maker[v]) not in eqns:
                eqns.add(k)
                left += jaxpr.eqns[k].invars
        used = {v: x for v, x in consts.items() if v in used}
        found = jaxpr.replace(
            constvars=list(used),
            invars=given,
            outvars=wanted,
            eqns=[jaxpr.eqns[k] for k in sorted(eqns)],
        )
        return ClosedJaxpr(found, list(used.values()))


def in_parts(step: Step, leaves: dict[str, Leaf], large: Iterable[str], key: jax.Array) -> Any:
    """(path → the leaf's update and moments, the rest of the state) after a step, slab by slab if large.

    Moments of large leaves come back encoded, and others decoded. Large leaves that are treated alike are
    compiled once.

    Raises:
      ValueError: the transformation is not element-wise; naming the primitive that shows it.
    """
    large = dict.fromkeys(large)
    names = [named(kind, path) for path in large for kind in leaves[path].kinds]
    keys = leaf_keys(key, names).reshape(len(large), -1, 2)
    wide = {
        path: jax.eval_shape(leaf.wide) if path in large else leaf.wide() for path, leaf in leaves.items()
    }
    traced = Traced(step, wide)
    known: dict[Any, Callable[..., Leaf]] = {}
    small = [path for path in leaves if path not in large]
    given, made = ([v for path in small for v in each[path]] for each in (traced.given, traced.made))
    path, done = "", {}
    try:
        for path, each in zip(large, keys, strict=True):
            done[path] = _alone(traced, path, leaves[path], each, known)
        program = traced.part(made + traced.others, given)
    except NotElementwise as found:
        raise ValueError(
            f"compress_state: the transformation is said to be element-wise, but there is {found} in its "
            f"update of {path!r}, which mixes places or asks where they are. Type elementwise=False; or put "
            "what does so, clipping by a norm for example, outside: "
            "optax.chain(clip_by_global_norm(1.0), compress_state(...))."
        ) from None
    found = jaxpr_as_fun(program)(*jax.tree.leaves([wide[path] for path in small]))
    structure = jax.tree.structure(([traced.done[path] for path in small], traced.rest))
    others, rest = jax.tree.unflatten(structure, found)
    return done | dict(zip(small, others, strict=True)), rest


def _alone(
    traced: Traced, path: str, leaf: Leaf, keys: jax.Array, known: dict[Any, Callable[..., Leaf]]
) -> Leaf:
    """The update of one large leaf; by the program of another one, if that is the same."""
    program = traced.part(traced.made[path], traced.given[path])
    shapes = str(jax.tree.map(jnp.shape, leaf))
    same = str(program.jaxpr), tuple(map(id, program.consts)), shapes, leaf.codecs
    return known.setdefault(same, jax.jit(_slabs(program, traced.done[path])))(keys, leaf)


def _slabs(program: ClosedJaxpr, done: Leaf) -> Callable[..., Leaf]:
    """(keys, leaf) → the leaf with its update and its new moments, slab by slab."""
    made = jax.tree.structure(done)

    def run(keys, leaf):
        shape = leaf.gradient.shape
        in_place = done.gradient.dtype == leaf.gradient.dtype  # the update takes the gradient's place

        def make(written, read):
            update, moments = written
            gradient, weight = read
            now = dataclasses.replace(
                leaf, gradient=update if in_place else gradient, weight=weight, moments=moments
            )
            arrays = jax.tree.leaves(now.wide())
            after = jax.tree.unflatten(made, on_part(program, arrays, shape, now.gradient.shape))
            return after.gradient, after.moments

        def store(place, made, before):
            (update, moments), (_, old) = made, before
            each = zip(leaf.codecs, moments, keys, old, strict=True)
            return update, tuple(
                None if old is None else encoded(codec, new.codes, key, place, old)
                for codec, new, key, old in each
            )

        update = leaf.gradient if in_place else jnp.zeros_like(leaf.gradient, dtype=done.gradient.dtype)
        read = None if in_place else leaf.gradient, leaf.weight
        update, moments = in_slabs(make, store, shape, (update, leaf.moments), read)
        return dataclasses.replace(leaf, gradient=update, weight=None, moments=moments)

    return run
