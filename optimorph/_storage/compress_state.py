"""Any transformation's state in fewer bytes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_flags, check_seed
from optimorph._core.differences import TreeError, checked_state, other_state
from optimorph._core.moments import (
    Fields,
    check_fields,
    map_moments,
    moments_of,
    nodes_with,
    unknown,
    warn_unused_fields,
    with_moments,
)
from optimorph._core.numbers import as_made, cast_like, increment, is_missing, is_trainable, traced, upcast
from optimorph._core.paths import by_path, distinct_paths, leaf_paths, map_paths
from optimorph._core.roles import Role
from optimorph._core.rounding import leaf_key, leaf_keys, step_key
from optimorph._core.rule import Leaves, Rule, aligned, called, handed, rule_of, transform
from optimorph._core.types import PyTree, Rules
from optimorph._core.warn import warn
from optimorph._core.wrapped import OF_TREES, wrapped
from optimorph._routing.rules import warn_unused
from optimorph._storage.codec_rules import SMALL, argument_of, codec_rule, warn_nothing
from optimorph._storage.elementwise import NotElementwiseError
from optimorph._storage.encoding import (
    CodecRule,
    decode,
    decoded,
    encode,
    encoded,
    initial,
    is_large,
    may_be_in_slabs,
    named,
    split,
    stored_by,
    update_large,
)
from optimorph._storage.one_leaf import one_leaf_rule
from optimorph._storage.stored import CompressedState
from optimorph.codecs import Codec, Encoded

WHO, CODES = "compress_state", "codes"


def compress_state(
    inner: optax.GradientTransformation,
    rules: Rules | None = None,
    *,
    elementwise: bool = False,
    seed: int = 0,
    fields: Fields | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Store the moments of a transformation in one or two bytes each, and decode them only for the update.

        u, s' = inner(g, decode(s))        (1)
        s ← encode(s')                     (2)

        tx = compress_state(optimorph.adamw(1e-3))                  # 2.06 bytes a parameter instead of 8
        tx = compress_state(optax.adamw(1e-3), elementwise=True)

    The updates are computed from s' before it is encoded. By default first moments and velocities become
    `codecs.Signed8` and second moments become `codecs.Nonneg8`, if the leaf has at least two axes and 4096
    numbers. Embeddings, biases, norms and vectors are not compressed. Slow averages and everything else in a
    state are not compressed either. Rules change that:

        rules={"first/*": Signed8(mapping="linear"), "second/*": BFloat16(stochastic=True)}
        rules={"first/*embed*": Signed8(), "second/*embed*": Nonneg8()}      # embeddings too

    Large leaves are updated in place and in slabs, so at most one slab of a moment is decoded at a time.
    Chains of this library's elementwise transforms do this without an argument. Other transformations need
    `elementwise=True`. It is valid if each number of the update depends only on the gradient, the parameter
    and the moments at the same position, as in optax's `adam`. It is not valid for clipping by a norm, which
    must be in front of `compress_state`. This is checked when the update is traced. Without
    `elementwise=True` all moments of such a transformation are decoded at once.

    The noise of stochastic codecs depends on the seed, the step, the leaf's path and the position in the
    leaf. So a resumed run repeats bit by bit; on another mesh it does so up to the compiler's rounding. Codes
    and scales have the shardings of the parameters, and encoding needs no communication if shards hold whole
    blocks. Moments in float64 or of complex numbers are not compressed. A leaf without a gradient keeps its
    state. A number that is not finite makes its block NaN. A gradient above 1.8e19 does so too, because its
    square is infinite: put `clip_by_global_norm` in front, or `skip_nonfinite` around the optimizer.

    Args:
      inner: any transformation, of this library or of optax, which runs in float32 or wider. Each of its
        moments must start with the same number everywhere, such as 0.
      rules: the codec of each moment, or None for no compression. It is an ordered mapping from pattern, as
        in `labels`, or a function (path, shape). The paths are those of the leaves after "first/", "second/"
        or "slow/". If no rule matches, or the value is `...`, the default is used.
      elementwise: whether a transformation of another library works element by element.
      seed: the seed of the noise, an integer in [0, 2³²). A restored state keeps its own seed.
      fields: the moments in states of other libraries: type → field → kind, such as
        `{"MyState": {"average": "first"}}`. Known are the states of this library, and of optax those of
        `adam` and its like, `amsgrad`, `adabelief`, `adagrad`, `rmsprop`, `lion`, `contrib.muon`, momentum
        and `ema`.

    Raises:
      ValueError: a seed outside its range; at `init`, a rule whose value is not a codec, a codec without
        signs for first moments, a codec with a zero for second moments, two leaves with the same path; at
        `update`, a state that was made with other rules, or a transformation that is not elementwise (the
        error names the primitive).

    References:
      Dettmers et al. 2021, "8-bit optimizers via block-wise quantization", arXiv:2110.02861. The codecs have
      references of their own.
    """
    who = called(WHO)
    inner = wrapped(who, inner, wide=True)
    check_seed(who, seed)
    check_flags(who, elementwise=elementwise)
    check_fields(who, fields, rules)
    codecs_for = codec_rule(who, rules)
    if rule := rule_of(inner):
        return transform(who, _compressed(who, rule, codecs_for, rules, seed, fields))
    return _of_trees(who, inner, codecs_for, rules, elementwise, seed, fields)


def _compressed(
    who: str,
    rule: Rule,
    codecs_for: Callable[[Leaves], CodecRule],
    rules: Rules | None,
    seed: int,
    fields: Fields | None = None,
) -> Rule:
    kinds = ["" if role.moment == CODES else role.moment for role in rule.roles]
    moments = [j for j, kind in enumerate(kinds) if kind]

    def state(slots, scales, seed=None, count=None):
        return CompressedState(rule.structure.unflatten(slots), tuple(scales), seed, count)

    def begin(leaves):
        known = [kind for kind in kinds if kind]
        _announce(who, codecs_for(leaves), rules, fields, known, leaves.tree, rule.state)
        if any(np.ndim(x) > 1 and np.size(x) >= SMALL for x in leaves.values):
            for role in rule.roles:
                if role.tree and role.shaped and not role.moment:
                    _warn_unknown(who, role.name)
        shared, none = rule.slots(rule.begin(leaves)), [None] * len(moments)
        return state(shared, none, jnp.uint32(seed), jnp.zeros([], jnp.int32))

    def init(leaf):
        slots, scales, codec_of = rule.slots(rule.init(leaf)), [], codecs_for(leaf.leaves)
        for j in moments:
            slots[j], own = initial(codec_of(kinds[j], leaf.path, np.shape(slots[j])), slots[j])
            scales.append(own)
        return state(slots, scales)

    def advance(shared, leaves):
        now, inner = rule.advance(shared.inner, leaves)
        seed, count = jnp.uint32(shared.seed), increment(shared.noise_count)
        after = state(rule.slots(inner), [None] * len(moments), seed, count)
        names = [named(kinds[j], path) for path in leaves.paths for j in moments]
        keys = leaf_keys(step_key(shared), names)
        return (now, keys.reshape(len(leaves.paths), len(moments), keys.shape[-1])), after

    def update(g, s, leaf, now):
        told, own_keys = now
        held, codec_of = rule.slots(s.inner), codecs_for(leaf.leaves)
        codecs: list[Codec | None] = [None] * len(kinds)
        for j, scales in zip(moments, s.scales, strict=True):
            if isinstance(held[j], jax.Array | np.ndarray):
                if not hasattr(scales, "dtype"):
                    raise other_state(who)
                stored = Encoded(held[j], scales)
                codecs[j], held[j] = stored_by(who, codec_of, kinds[j], leaf.path, stored)
        keys: list[Any] = [None] * len(kinds)
        for j, own in zip(moments, own_keys[leaf.index], strict=True):
            keys[j] = own

        def step(g, weight, held, part=True):
            own = leaf._replace(weight=weight, part=part)
            u, new = rule.update(g if rule.narrow else upcast(g), rule.structure.unflatten(held), own, told)
            return u if rule.narrow else cast_like(u, g), rule.slots(new)

        try:
            if is_large(g, held, codecs):
                u, held = update_large(step, g, leaf.weight, held, codecs, keys, rule.narrow)
            else:
                u, new = step(g, leaf.weight, decode(held, codecs), part=False)  # (1)
                held = encode(new, held, codecs, keys)  # (2)
        except NotElementwiseError as error:
            raise _not_elementwise(who, error, leaf.path) from error.__cause__
        coded = [isinstance(x, Encoded) for x in held]
        scales = [held[j].scales if coded[j] else old for j, old in zip(moments, s.scales, strict=True)]
        return u, state([x.codes if own else x for x, own in zip(held, coded, strict=True)], scales)

    template = CompressedState(
        jax.tree.map(lambda role: Role(CODES, CODES, tree=True) if role.moment else role, rule.state),
        tuple(Role("scales", tree=True, shaped=False) for _ in moments),
        **CompressedState.roles,
    )
    return Rule(template, update, init, begin, advance, narrow=True)


def _of_trees(
    who: str,
    inner: optax.GradientTransformationExtraArgs,
    codecs_for: Callable[[Leaves], CodecRule],
    rules: Rules | None,
    elementwise: bool,
    seed: int,
    fields: Fields | None,
) -> optax.GradientTransformationExtraArgs:
    def init(params):
        state, scales, codec_of = inner.init(params), [], codecs_for(Leaves.of(params))
        _check_codes(who, state)
        kinds = [kind for kind, _ in moments_of(state, fields)]
        _announce(who, codec_of, rules, fields, kinds, params, state)
        for name in unknown(state, SMALL, fields):
            _warn_unknown(who, name)

        def stored(kind, moment):
            codes, own = split(map_paths(lambda p, x: initial(codec_of(kind, p, np.shape(x)), x), moment))
            scales.append(own)
            return codes

        state = map_moments(stored, state, fields)
        return CompressedState(state, tuple(scales), jnp.uint32(seed), jnp.zeros([], jnp.int32))

    def update(updates, state, params=None, **extra):
        state = as_made(init, checked_state(who, state, CompressedState), params)
        if not elementwise or is_unchecked(updates, state, params):
            return whole(updates, state, params, extra)
        rule = one_leaf_rule(inner, state.inner, fields, extra)
        tx = transform(who, _compressed(who, rule, codecs_for, rules, seed))
        try:
            return tx.update(updates, state, params)
        except TreeError as error:
            aligned(who, updates, params)
            if traced(whole, updates, state, params, extra) is None:
                raise
            raise ValueError(
                f"{who}: elementwise=True, but the moments are not trees like the parameters. Type "
                "elementwise=False."
            ) from error
        except ValueError as error:
            if isinstance(error.__cause__, OF_TREES):  # which may be the inner one's own
                jax.eval_shape(lambda: whole(updates, state, params, extra))
            raise

    def is_unchecked(updates, state, params):
        """Whether no leaf is updated in slabs. Only there a transformation that mixes elements is found."""
        tree = updates if params is None else params
        codec_of, structure = codecs_for(Leaves.of(tree)), jax.tree.structure(tree)
        return all(
            jax.tree.structure(moment) == structure
            and not (may_be_in_slabs(x) and codec_of(kind, path, np.shape(x)))
            for kind, moment in moments_of(state.inner, fields)
            for path, x in by_path(moment).items()
        )

    def whole(updates, state, params, extra):
        """All moments are decoded, updated and encoded again."""
        key, missing, moments = step_key(state), _missing(updates), moments_of(state.inner, fields)
        codec_of = codecs_for(Leaves.of(updates if params is None else params))
        before, after_codes, after_scales = [], [], []
        untrained = {path for path, w in by_path(params).items() if not is_trainable(w)}

        def held(kind, path, c, s):
            stored = Encoded(c, s)
            return (None, stored) if path in untrained else stored_by(who, codec_of, kind, path, stored)

        for (kind, codes), scales in zip(moments, state.scales, strict=True):

            def decode_leaf(path, c, s, kind=kind):
                return decoded(*held(kind, path, c, s))

            before.append(map_paths(decode_leaf, codes, scales))
        out, after = inner.update(updates, with_moments(state.inner, before, fields), params, **extra)  # (1)
        new = moments_of(after, fields)
        for (kind, codes), scales, (_, moment) in zip(moments, state.scales, new, strict=True):

            def encode_leaf(path, c, s, x, kind=kind):
                codec, before = held(kind, path, c, s)
                own = leaf_key(key, named(kind, path))
                return before if path in missing else encoded(codec, x, own, None, before)

            c, s = split(map_paths(encode_leaf, codes, scales, moment))
            after_codes.append(c)
            after_scales.append(s)
        after, seed = with_moments(after, after_codes, fields), jnp.uint32(state.seed)  # (2)
        return out, CompressedState(after, tuple(after_scales), seed, increment(state.noise_count))

    return optax.GradientTransformationExtraArgs(init, update)


def _announce(
    who: str,
    codec_of: CodecRule,
    rules: Rules | None,
    fields: Fields | None,
    kinds: Sequence[str],
    params: PyTree,
    state: PyTree,
) -> None:
    """Tell `carry_state`, if it asks, how moments are stored. Warn of what the arguments do not change."""
    argument, paths = argument_of(who), distinct_paths(who, params)
    moments = {named(kind, path): (kind, path) for kind in kinds for path in paths}
    warn_unused(who, argument, rules, [*moments], "moment")
    if (codecs := handed("codecs")) is not None:
        codecs.rules |= dict.fromkeys(moments.values(), codec_of)
        codecs.fields |= fields or {}
    sizes = ((kind, path, np.shape(x)) for kind in kinds for path, x in by_path(params).items())
    if paths and handed("matrix_axes") is None:  # the other part of a partition may have moments to compress
        if not kinds:
            what = "it" if who == "compress_state" else argument
            warn(f"{who}: no moment is compressed, because the state has no known moment. Leave {what} out.")
        elif rules is None and not any(codec_of(*x) for x in sizes):
            warn_nothing(who, argument)
    warn_unused_fields(who, state, fields)


def _missing(updates: PyTree) -> set[str]:
    flags = jax.tree.map(is_missing, updates, is_leaf=lambda x: x is None)
    return {path for path, gone in zip(leaf_paths(flags), jax.tree.leaves(flags), strict=True) if gone}


def _check_codes(who: str, state: PyTree) -> None:
    for node in nodes_with(state, "not_in_8_bits"):
        raise ValueError(
            f"{who}: inner must not contain in_eigenbasis, which soap uses: {node.not_in_8_bits}"
        )


def _warn_unknown(who: str, name: str) -> None:
    warn(
        f"{who}: {name} is not compressed, because it is not known to be a moment, or it is a term of a "
        "difference, which quantization would turn into noise. If codes are right for a field of a state, "
        "type fields={'MyState': {'my_field': 'first'}}.",
        stacklevel=2,
    )


def _not_elementwise(who: str, error: NotElementwiseError, path: str) -> ValueError:
    return ValueError(
        f"{who}: elementwise=True, but the update of {path!r} uses {error}, which mixes elements or "
        "depends on their position. Type elementwise=False, or move that transform outside, for example "
        "optax.chain(clip_by_global_norm(1.0), compress_state(...)), or if the state has moments that are "
        "not known, type fields={'MyState': {'my_field': 'first'}}."
    )
