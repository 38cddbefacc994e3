"""Any transformation's state in fewer bytes."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph.codecs import Encoded
from optimorph.core.checks import is_integer
from optimorph.core.count import increment
from optimorph.core.rounding import leaf_key
from optimorph.core.slabs import slab_shape
from optimorph.core.tree import by_path, distinct_paths, is_missing, leaf_paths, map_paths
from optimorph.core.types import PyTree, Rules
from optimorph.routing.rules import unused
from optimorph.storage.choice import SMALL, Choice, choice, named, stored_by
from optimorph.storage.compressed import CompressedState
from optimorph.storage.encoding import begin, codes_of, encoded, scales_of
from optimorph.storage.moments import FIELDS, Fields, map_moments, moments_of, unknown, with_moments
from optimorph.storage.parts import Leaf, in_parts


def compress_state(
    inner: optax.GradientTransformation,
    rules: Rules | None = None,
    *,
    elementwise: bool = False,
    seed: int = 0,
    fields: Fields = FIELDS,
) -> optax.GradientTransformationExtraArgs:
    """Keep a transformation's moments in codes of one byte or two, and take them out for the update alone.

        u, s' = inner(g, decode(s))        (1)
        s ← encode(s')                     (2)

        tx = compress_state(optimorph.adamw(1e-3), elementwise=True)      # 2.06 bytes a parameter, not 8

    Updates are those of s', before it is encoded. By default first moments and velocities become `Signed8`
    and second moments `Nonneg8`, of leaves of at least two axes and 4096 numbers; embeddings, biases, norms
    and vectors stay as they are, and so does all else that a state has. Rules say otherwise:

        rules={"first/*": Signed8(mapping="linear"), "second/*": BFloat16(stochastic=True)}
        rules={"first/*embed*": Signed8(), "second/*embed*": Nonneg8()}      # embeddings too

    Memory: with `elementwise` large leaves go slab by slab, in place, and there is never more of a decoded
    moment than a slab. That is right for transformations that make every number of an update of the
    gradient, parameter and moments at the same place: of the recipes here all but `muon`, and optax's `adam`
    and its like, but no clipping by a norm: put that outside. It is checked when the update is traced.
    Without, all moments are decoded, and updated, and encoded again.

    The noise of codecs that round by chance is that of the seed, the step, the leaf's path and the place in
    the leaf: a run that is resumed repeats to the bit, and one on another mesh but for how its compiler
    rounds. Codes and scales lie as the parameters do; where blocks are not cut no device sends anything.
    Moments of complex numbers and of float64 stay as they are. Where a gradient is missing so does the state.
    What is not finite makes its block NaN, and so do gradients above 1.8e19, whose squares are infinite: clip
    in front, or put `skip_nonfinite` around.

    Args:
      inner: any transformation, of this library or of optax, whose moments begin as one number everywhere.
      rules: which codec, or None for as it is, by the moment's kind and the leaf's path, "first/..." or
        "second/...": an ordered mapping from pattern, as that of `labels`, or a function (path, shape). What
        they do not say, or say `...` of, is as by default.
      elementwise: whether the inner transformation works place by place.
      seed: of the noise, an integer in [0, 2³²); that of a state which is restored goes on.
      fields: which fields of which states are moments, and of what kind; `moments.FIELDS` without it. Add
        your own, `FIELDS | {"MyState": {"average": "first"}}`.

    Raises:
      ValueError: another seed; at `init`, rules that say what is no codec, a codec without signs of first
        moments or with a zero of second ones, and two leaves of one path; at `update`, a state of other
        rules, and, naming the primitive, a transformation that is said to be element-wise and is not.

    References:
      Dettmers et al. 2021, "8-bit optimizers via block-wise quantization", arXiv:2110.02861; the codecs'.
    """
    if not is_integer(seed, 0, 2**32):
        raise ValueError(
            f"compress_state: seed must be an integer in [0, 2**32), but is {seed!r}. Type seed=0."
        )
    inner = optax.with_extra_args_support(inner)
    chosen = choice(rules)

    def init(params):
        distinct_paths("compress_state", params)
        scales, paths = [], []

        def narrow(kind, moment):
            both = map_paths(lambda path, x: begin(chosen(kind, path, np.shape(x)), x), moment)
            paths.extend(named(kind, path) for path in by_path(moment))
            scales.append(scales_of(both))
            return codes_of(both)

        state = map_moments(narrow, inner.init(params), fields)
        for rule in unused(rules, paths) if rules is not None and paths else ():
            warnings.warn(f"compress_state: no moment matches the rule {rule!r}.", stacklevel=2)
        for name in unknown(state, SMALL, fields):
            warnings.warn(
                f"compress_state: {name} stays as it is: it is not known to be a moment, or it is one of a "
                "difference, of which codes would leave noise. If codes are right for it, say of which kind "
                "it is in `fields`, as FIELDS of optimorph.storage.moments does.",
                stacklevel=2,
            )
        return CompressedState(state, tuple(scales), jnp.uint32(seed), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra):
        if not isinstance(state, CompressedState):
            raise ValueError(
                f"compress_state: the state must be one that its init made, but is a {type(state).__name__}. "
                "Type state = tx.init(params); moments in float32 are not taken over."
            )
        key = jax.random.fold_in(jax.random.key(state.seed), state.count)
        leaves = _leaves(updates, state, params, chosen, fields)
        large = [path for path, leaf in leaves.items() if elementwise and _is_large(leaf)]

        def step(wide):
            gradients, before, weights = _trees(wide, updates, state, params, fields)
            out, after = inner.update(gradients, before.inner, weights, **extra)  # (1)
            steps, moments = by_path(out), [by_path(moment) for _, moment in moments_of(after, fields)]
            done = {path: _after(path, leaf, steps, moments) for path, leaf in wide.items()}
            return done, with_moments(after, [None] * len(moments), fields)

        if large:
            done, after = in_parts(step, leaves, large, key)
        else:
            done, after = step({path: leaf.wide() for path, leaf in leaves.items()})
        for path in done.keys() - large:
            done[path] = _stored(path, leaves[path], done[path], key)  # (2)
        out, full, _ = _trees(done, updates, state, None, fields)
        codes = [moment for _, moment in moments_of(full.inner, fields)]
        held = with_moments(after, codes, fields)
        return out, CompressedState(held, full.scales, state.seed, increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_large(leaf: Leaf) -> bool:
    """Whether a leaf is to go slab by slab."""
    held = [moment for moment in leaf.moments if moment is not None]
    return (
        leaf.gradient is not None
        and any(codec is not None for codec in leaf.codecs)
        and all(np.shape(moment.codes) == np.shape(leaf.gradient) for moment in held)
        and slab_shape(np.shape(leaf.gradient)) is not None
    )


def _after(path: str, leaf: Leaf, steps: dict[str, Any], moments: list[dict[str, Any]]) -> Leaf:
    """A leaf's update and its new moments; without a gradient the old ones."""
    held = [
        old if old is None or leaf.missing else Encoded(new[path], None)
        for old, new in zip(leaf.moments, moments, strict=True)
    ]
    return dataclasses.replace(leaf, gradient=steps.get(path), weight=None, moments=tuple(held))


def _stored(path: str, before: Leaf, after: Leaf, key: jax.Array) -> Leaf:
    """A leaf with its new moments encoded; those that stay as they were, bit by bit."""

    def stored(kind, codec, old, new):
        if old is None or before.missing:
            return old
        return encoded(codec, new.codes, leaf_key(key, named(kind, path)), None, old)

    moments = map(stored, before.kinds, before.codecs, before.moments, after.moments)
    return dataclasses.replace(after, moments=tuple(moments))


def _leaves(
    updates: PyTree, state: CompressedState, params: PyTree, chosen: Choice, fields: Fields
) -> dict[str, Leaf]:
    """What there is at every path."""
    gradients, weights = by_path(updates), by_path(params)
    everywhere = set(leaf_paths(jax.tree.map(lambda g: 0, updates, is_leaf=lambda x: x is None)))
    moments = moments_of(state.inner, fields)
    kinds, codes = tuple(kind for kind, _ in moments), [by_path(moment) for _, moment in moments]
    scales = [by_path(each) for each in state.scales]

    def leaf(path):
        held = [Encoded(c[path], s[path]) if path in c else None for c, s in zip(codes, scales, strict=True)]
        codecs = [
            None if each is None else stored_by(chosen, kind, path, each)
            for kind, each in zip(kinds, held, strict=True)
        ]
        gradient = None if is_missing(gradients.get(path)) else gradients[path]
        missing = gradient is None and path in everywhere
        return Leaf(gradient, weights.get(path), tuple(held), tuple(codecs), kinds, missing)

    return {
        path: leaf(path) for path in dict.fromkeys(p for tree in (gradients, weights, *codes) for p in tree)
    }


def _trees(
    leaves: dict[str, Leaf], updates: PyTree, state: CompressedState, params: PyTree, fields: Fields
) -> tuple[PyTree, CompressedState, PyTree]:
    """The gradients, the state and the parameters with these leaves, and None for all others."""

    def filled(tree, of):
        return map_paths(lambda path, _: of(leaves[path]) if path in leaves else None, tree)

    moments = enumerate(moment for _, moment in moments_of(state.inner, fields))
    codes = [filled(each, lambda leaf, k=k: leaf.moments[k].codes) for k, each in moments]
    scales = [filled(each, lambda leaf, k=k: leaf.moments[k].scales) for k, each in enumerate(state.scales)]
    return (
        filled(updates, lambda leaf: leaf.gradient),
        state._replace(inner=with_moments(state.inner, codes, fields), scales=tuple(scales)),
        filled(params, lambda leaf: leaf.weight),
    )
