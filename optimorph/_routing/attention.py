"""Which leaves make the queries and keys of attention, and where in them the heads are."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.numbers import is_trainable
from optimorph._core.types import AxesRules, Shape
from optimorph._routing.resolve import leaf_axes
from optimorph.linalg._axes import Axes, Axis

_ROLES = {
    "query": "query|query_proj|q|q_proj|wq|w_q|to_q",
    "key": "key|key_proj|k|k_proj|wk|w_k|to_k",
    "fused": "qkv|wqkv|w_qkv|qkv_proj|to_qkv|c_attn|query_key_value",
    "latent_query": "wq_b|q_b_proj",
    "latent_key": "wkv_b|kv_b_proj",
}
_LEAF = re.compile(
    r"(?:(?P<module>.*)/)?(?:"
    + "|".join(f"(?P<{role}>{names})" for role, names in _ROLES.items())
    + r")(?:/(?:kernel|weight|w|(?P<bias>bias|b)))?",
)

Members = Mapping[int, tuple[str, bool]]
"""Index of a leaf → its role, a name of `_ROLES`, and whether it is a bias."""

Power = Callable[[jax.Array], jax.Array]
_WHOLE: Sequence[Power] = (jnp.sqrt,)
_PARTS: Mapping[str, Sequence[Power]] = {"query": (jnp.sqrt, lambda x: x), "key": (jnp.sqrt, jnp.ones_like)}
"""By what power of γ each part of a head is multiplied: the part without positions and the rotated one of a
query, the part without positions and the value of a key."""


class Part(NamedTuple):
    """A leaf that makes queries or keys, or the part of one that does.

    Args:
      path: of the leaf.
      shape: of the part; repeated blocks are an axis of repetitions and one of blocks.
      axes: its axes; those of a bias are the outputs.
      leaf: the shape of the leaf.
      latent: whether each head has two parts.
    """

    path: str
    shape: Shape
    axes: tuple[Axis, ...]
    leaf: Shape
    latent: bool = False

    @property
    def spec(self) -> str:
        """The axes as written."""
        return "".join(map(str, self.axes))

    def __str__(self) -> str:
        """What it is, with its shape."""
        some = "a part of " * (math.prod(self.shape) < math.prod(self.leaf))
        return f"{some}{self.path!r} has shape {self.shape}"

    def positions(self, lead: int) -> tuple[list[int], list[int], int]:
        """The axes of the layers, those of the heads, and the one of a head's numbers."""
        batch, outputs = ([k for k, axis in enumerate(self.axes) if axis.letter == x] for x in "bo")
        return batch[:lead], sorted(batch[lead:] + outputs[:-1]), outputs[-1]

    def heads(self, lead: int) -> int | None:
        """How many heads it has; None if its axes do not tell."""
        _, own, last = self.positions(lead)
        blocks = 1 if self.latent else len(self.axes[last].blocks)
        return math.prod(self.shape[k] for k in own) * blocks if own or blocks > 1 else None

    def of_leaf(self, factor: jax.Array) -> jax.Array:
        """A factor of all of the leaf, so that it broadcasts against the leaf."""
        whole = self.shape == self.leaf
        return factor if whole else jnp.broadcast_to(factor, self.shape).reshape(self.leaf)

    def without(self, axis: int, size: int | None = None, blocks: int = 1) -> "Part":
        """Without an axis, or with `size` of it in `blocks` blocks."""
        axes, shape = list(self.axes), list(self.shape)
        axes[axis : axis + 1] = [] if size is None else [Axis(axes[axis].letter, (1,) * blocks)]
        shape[axis : axis + 1] = [] if size is None else [size]
        return self._replace(axes=tuple(axes), shape=tuple(shape))

    def check(self, gamma: jax.Array) -> None:
        """Refuse γ of other layers or heads."""
        layers, own, last = self.positions(gamma.ndim - 1)
        heads = gamma.shape[-1]
        fits = tuple(self.shape[k] for k in layers) == gamma.shape[:-1]
        if (
            not fits
            or self.heads(gamma.ndim - 1) not in (None, heads)
            or (not own and self.shape[last] % heads)
        ):
            raise ValueError(
                f"{self} with the axes {self.spec!r}, which do not fit logits of shape {gamma.shape}, "
                "(*layers, heads)."
            )

    def spread(self, gamma: jax.Array, role: str) -> jax.Array:
        """γ `(*layers, heads)` to the power of each number, in a shape that broadcasts against the part."""
        layers, own, last = self.positions(gamma.ndim - 1)
        heads, size, blocks = gamma.shape[-1], self.shape[last], self.axes[last].blocks
        self.check(gamma)
        powers, blocks = (_PARTS[role], blocks) if self.latent else (_WHOLE, (1,))
        in_last = heads // math.prod(self.shape[k] for k in own)
        width = size // in_last if self.latent or in_last > 1 else 1
        pieces = [
            jnp.broadcast_to(power(gamma)[..., None], (*gamma.shape, width * n // sum(blocks)))
            for power, n in zip(powers, blocks, strict=True)
        ]
        factor, places = jnp.concatenate(pieces, axis=-1), [*layers, *own, last]
        sizes = [self.shape[k] for k in places[:-1]] + [-1]
        factor = factor.reshape(sizes).transpose(np.argsort(places))
        return jnp.expand_dims(factor, [k for k in range(len(self.shape)) if k not in places])


class Attention(NamedTuple):
    """The leaves of one module that make queries and keys.

    Args:
      leaves: index of the leaf → its role, "query", "key" or "fused", and the leaf.
    """

    leaves: Mapping[int, tuple[str, Part]]

    def parts(self) -> tuple[Part, Part]:
        """A part that makes queries and one that makes keys."""
        found = dict(sorted(self.leaves.values(), key=lambda leaf: len(leaf[1].axes)))  # not biases
        if "fused" in found:
            query, key, _ = _thirds(found["fused"])[1]
            return query, key
        return found["query"], found["key"]

    def logits_shape(self, who: str) -> Shape:
        """`(*layers, heads)`.

        Raises:
          ValueError: naming `who`, if the axes do not tell how many heads there are.
        """
        query, _ = self.parts()
        letters = [axis.letter for axis in query.axes]
        lead = letters.count("b")
        if letters.count("o") == 1 and query.heads(lead) is None:
            lead -= 1  # of the batch axes the last is the heads
        heads = query.heads(lead) if lead >= 0 else None
        if heads is None:
            spec = "i(12+12+12 o)" if "fused" in dict(self.leaves.values()) else "i(12o)"
            raise ValueError(
                f"{who}: {query}, and its axes {query.spec!r} do not tell how many heads there are. Type "
                f"axes={{{query.path!r}: {spec!r}}} for 12 heads, or axes with the heads by themselves, "
                "such as 'ioo'."
            )
        return (*(query.shape[k] for k in query.positions(lead)[0]), heads)

    def factors(self, gamma: jax.Array) -> dict[int, jax.Array]:
        """Index of a leaf → what multiplies it, if γ `(*layers, heads)` is to multiply the logits."""
        self.parts()[0].check(gamma)
        gammas = {"query": gamma, "key": self._of_keys(gamma)}
        return {
            k: part.of_leaf(_fused(part, gammas) if role == "fused" else part.spread(gammas[role], role))
            for k, (role, part) in self.leaves.items()
        }

    def _of_keys(self, gamma: jax.Array) -> jax.Array:
        """The least γ of the queries that share a key."""
        query, key = self.parts()
        lead, heads = gamma.ndim - 1, gamma.shape[-1]
        count = key.heads(lead)
        if count is None:
            size = query.shape[query.positions(lead)[2]] // (1 if query.positions(lead)[1] else heads)
            count = heads if key.latent else key.shape[key.positions(lead)[2]] // max(size, 1)
        if not count or heads % count:
            raise ValueError(f"{key.path!r} has {count} heads, which {heads} heads of queries cannot share.")
        return jnp.min(gamma.reshape(*gamma.shape[:-1], count, heads // count), axis=-1)


def attention_modules(paths: Sequence[str], leaves: Sequence[Any]) -> dict[str, Members]:
    """The modules with leaves that make queries and keys, by the names of these."""
    modules: dict[str, dict[int, tuple[str, bool]]] = {}
    for k, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        if (found := _LEAF.fullmatch(path)) and is_trainable(leaf):
            role = next(role for role in _ROLES if found[role])
            modules.setdefault(found["module"] or "", {})[k] = (role, bool(found["bias"]))

    def complete(members: Members) -> bool:
        roles = {role.removeprefix("latent_") for role, bias in members.values() if not bias}
        return "fused" in roles or {"query", "key"} <= roles

    return {module: members for module, members in modules.items() if complete(members)}


def attention_of(
    who: str, axes: AxesRules | None, members: Members, paths: Sequence[str], leaves: Sequence[Any]
) -> Attention | None:
    """One of these modules; None if it has a leaf that is not a matrix.

    Raises:
      ValueError: naming `who` and a leaf whose axes do not tell query, key and value from each other, or the
        two parts of latent attention.
    """
    form, kernels, found = leaf_axes(who, axes), {}, {}
    for k, (role, bias) in sorted(members.items(), key=lambda leaf: leaf[1][1]):  # biases come last
        path, shape = paths[k], np.shape(leaves[k])
        spec = None if bias else form(path, shape)
        if spec is None and not bias:
            return None
        part = _bias(kernels.get(role), path, shape) if spec is None else _part(who, role, path, shape, spec)
        kernels.setdefault(role, part)
        if part is not None:
            found[k] = (role.removeprefix("latent_"), part)
    attention = Attention(found)
    try:
        query, key = attention.parts()
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
    if query.latent != key.latent:
        one = query if key.latent else key
        raise ValueError(
            f"{who}: of {query.path!r} and {key.path!r} only one has two parts in each head. Type their "
            f"sizes as blocks, such as axes={{{one.path!r}: 'io(128+64 o)'}}."
        )
    return attention


def _part(who: str, role: str, path: str, shape: Shape, axes: Axes) -> Part:
    if role == "fused":  # a head is one, whether or not it is a matrix of its own
        axes = Axes(axes.spec.replace("*", "~"))
    parts, longer = axes.laid_out(shape)
    part = Part(path, longer, parts, shape)
    *_, own, last = part.positions(0)
    sizes = part.axes[last].written
    two = len(sizes) == 2
    if role.startswith("latent") and not two:
        parts, spec = ("key and value", "128+128") if "key" in role else ("unrotated and rotated", "128+64")
        raise ValueError(
            f"{who}: each head of {path!r} {shape} has two parts, {parts}. Type their sizes as blocks, such "
            f"as axes={{{path!r}: 'io({spec} o)'}}."
        )
    letters = {part.axes[k].letter for k in own}
    in_heads = "o" in letters or ("b" in letters and sizes != [1, 1])  # the blocks of bi(2o) are heads
    return part._replace(latent=role.startswith("latent") or (role != "fused" and two and in_heads))


def _bias(kernel: Part | None, path: str, shape: Shape) -> Part | None:
    """Of the outputs of a kernel; None without one."""
    if kernel is None:
        return None
    kept = [k for k, axis in enumerate(kernel.axes) if axis.letter != "i"]
    axes, sizes = (tuple(of[k] for k in kept) for of in (kernel.axes, kernel.shape))
    same = math.prod(sizes) == math.prod(shape)
    return kernel._replace(path=path, shape=sizes, axes=axes, leaf=shape) if same else None


def _thirds(part: Part) -> tuple[int, list[Part], bool]:
    """The axis along which query, key and value lie, these, and whether the axis counts them alone."""
    for k, axis in enumerate(part.axes):
        n, within = len(axis.blocks), "o" in [other.letter for other in part.axes[:k]]
        if axis.letter == "o" and (n == 3 or (n % 3 == 0 and not within)):
            sizes = [
                part.shape[k] * sum(axis.blocks[j * n // 3 : (j + 1) * n // 3]) // sum(axis.blocks)
                for j in range(3)
            ]
            heads = [n // 3] * 3
            if not axis.equal and within:
                heads = [block // min(axis.blocks) for block in axis.blocks]  # of a group
            elif n == 3 and sum(axis.written) < part.shape[k]:  # otherwise the numbers count elements
                heads = axis.written
            return k, [part.without(k, *each) for each in zip(sizes, heads, strict=True)], False
    counting = "bo" if any(len(axis.blocks) > 1 for axis in part.axes) else "b"
    for k in reversed(range(len(part.axes))):
        if part.axes[k].letter in counting and part.shape[k] == 3:
            return k, [part.without(k)] * 3, True
    raise ValueError(
        f"{part.path!r} has shape {part.shape}, and its axes {part.spec!r} do not tell query, key and value "
        f"from each other. Type axes={{{part.path!r}: 'i(3o)'}} if they lie side by side."
    )


def _fused(part: Part, gammas: Mapping[str, jax.Array]) -> jax.Array:
    """The factors of query, key and value side by side."""
    axis, (query, key, value), counted = _thirds(part)
    factors = [query.spread(gammas["query"], "query"), key.spread(gammas["key"], "key")]
    factors.append(jnp.ones_like(factors[0], shape=[1] * len(value.shape)))
    sizes = [1] * 3 if counted else [third.shape[axis] for third in (query, key, value)]
    factors = [jnp.expand_dims(x, axis) for x in factors] if counted else factors
    rest = list(np.broadcast_shapes(*((*x.shape[:axis], 1, *x.shape[axis + 1 :]) for x in factors)))
    whole = [[*rest[:axis], size, *rest[axis + 1 :]] for size in sizes]
    return jnp.concatenate(
        [jnp.broadcast_to(x, shape) for x, shape in zip(factors, whole, strict=True)], axis
    )
