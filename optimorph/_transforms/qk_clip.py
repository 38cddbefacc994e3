"""QK-clip: attention logits kept below a threshold, by the weights that make them."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_numbers, check_params
from optimorph._core.differences import checked_state
from optimorph._core.numbers import as_made, as_scalar, cast_like, copied, is_absent, upcast, upcast_dtype
from optimorph._core.paths import leaf_paths
from optimorph._core.rule import Leaves, aligned, arrays
from optimorph._core.types import AxesRules, Numeric, PyTree
from optimorph._core.warn import warn
from optimorph._distributed.shardings import undivided
from optimorph._routing.attention import attention_modules, attention_of
from optimorph._routing.rules import warn_unused


class QKClipState(NamedTuple):
    """For the path of each attention module, its largest logits `(*layers, heads)` since the last step.

    They are 0 at least: a smaller logit is not clipped. Of no parameters it is an empty array.
    """

    maxima: Any

    def observe(self, sound: Any = True, attention_logits: PyTree | None = None, **_: Any) -> "QKClipState":
        """With the logits of a gradient for which no step is taken; `sound` if that gradient counts."""
        maxima = dict(self.maxima)
        for module, logits in _by_module("clip_attention_logits", [*maxima], attention_logits).items():
            before = maxima[module]
            if logits.shape != before.shape:
                raise ValueError(
                    f"clip_attention_logits: the logits of {module!r} have shape {logits.shape}, but "
                    f"{before.shape} was expected, (*layers, heads). Type axes that show the heads, such as "
                    "'ioo', 'i(12o)', of stacked layers 'bi(12o)', or of a fused kernel 'i(12+12+12 o)'."
                )
            logits = logits.astype(before.dtype)
            counts = sound & ~jnp.isnan(logits)
            maxima[module] = jnp.where(counts, jnp.maximum(before, logits), before)
        return QKClipState(maxima) if maxima else self


def qk_clip(
    params: PyTree, max_logits: PyTree, axes: AxesRules | None = None, threshold: Numeric = 100.0
) -> PyTree:
    """Multiply the weights of queries and keys so that no attention logit exceeds a threshold.

        γ = min(1, τ / S)                          (1)  for each head; 1 if S is not above 0 or not finite
        W_q ← √γ W_q,  W_k ← √γ W_k                (2)
        q^C, k^C: √γ,  q^R: γ,  k^R and v: 1       (3)  latent attention (MLA)

        params = qk_clip(optax.apply_updates(params, updates), {"blocks/0/attn": maxima})

    If several query heads share a key (GQA), the key has the smallest γ of its group. A bias is multiplied by
    the same factor as its kernel. Queries and keys are found by the names of the leaves: `query`, `q_proj`,
    `wq` and the like; `qkv`, `c_attn` and the like for a fused kernel; for latent attention `wq_b` and
    `wkv_b`, or `q_b_proj` and `kv_b_proj`. Other leaves do not change. Attention that normalizes queries and
    keys needs no clipping, and is not affected by it.

    Each weight is only multiplied by a number, so a float32 copy and a copy in fewer bits stay consistent.

    Args:
      params: the parameters.
      max_logits: S `(*layers, heads)` for each module: the largest logit q·k/√d before the softmax, over the
        batch, all positions and all devices. It is a mapping from the path of the module, or a tree with the
        nesting of the modules, as Flax sows it. Modules that it does not contain do not change.
      axes: how leaves read as matrices, as in `muon`. If a leaf has None, its module does not change. The
        heads are the first output axis of `ioo`, or the batch axis of `ibo`, or equal blocks of the outputs,
        as many as S has. A fused kernel of query, key and value is `i(3o)` or `i(36o)` if the queries of all
        heads come first, `i(12~3 o)` if it is ordered by heads, and `i(8~(4+1+1) o)` if it is ordered by
        groups. In latent attention the two parts of a head are blocks: `io(128+64 o)` for queries and
        `io(128+128 o)` for keys and values.
      threshold: τ above 0, in units of logits.

    Returns:
      The parameters in their own dtypes. Where γ = 1 they are unchanged bit by bit.

    Raises:
      ValueError: logits of a module without queries and keys, or logits of a shape that does not fit.

    References:
      Kimi Team 2025, "Kimi K2: open agentic intelligence", arXiv:2507.20534, algorithm 1.
    """
    who = "qk_clip"
    check_numbers(who, threshold=threshold)
    known = arrays(who, params)
    leaves, paths = [*known.values], known.paths
    warn_unused(who, "axes", axes, paths)
    logits = _by_module(who, [*attention_modules(paths, leaves)], max_logits)
    for k, factor in _factors(who, axes, threshold, paths, leaves, logits).items():
        w = upcast(leaves[k])
        leaves[k] = cast_like(factor.astype(w.dtype) * w, leaves[k])  # (2), (3)
    return known.structure.unflatten(map(copied, leaves))


def clip_attention_logits(
    threshold: Numeric = 100.0, axes: AxesRules | None = None
) -> optax.GradientTransformationExtraArgs:
    """Apply `qk_clip` in an optimizer, as the last transform. `update` gets the logits as an extra argument.

        u ← f(w + u) - w        (1)  with f = qk_clip

        tx = chain(muon(0.02), clip_attention_logits(100.0))
        updates, state = tx.update(gradients, state, params, attention_logits={"blocks/0/attn": maxima})

    Without `attention_logits` the updates do not change. Inside `multi_steps` the largest logits of all
    gradients of a step are used. The state holds them, so `init` must know the number of heads: if it does
    not follow from the shapes, give `axes` as `ioo`, `ibo`, or `i(12o)` for 12 heads in one axis, `bi(12o)`
    for those of stacked layers, because the batch axis of `bio` is taken for the heads; of a fused kernel as
    `i(12+12+12 o)` or `i(32+8+8 o)`. A single head needs an axis of its own, as in `ioo`; otherwise use
    `qk_clip`. A leaf without a gradient does not change. `optax.tree.map_params` gives all the logits in the
    state to `transform_non_params` as one mapping.

    Args:
      threshold: τ above 0, in units of logits.
      axes: as in `qk_clip`.

    Raises:
      ValueError: at `init`, a module whose number of heads is not known; at `update`, params missing, logits
        of a module without queries and keys, or logits of a shape that does not fit.

    References:
      Kimi Team 2025, "Kimi K2: open agentic intelligence", arXiv:2507.20534, algorithm 1.
    """
    who = "clip_attention_logits"
    check_numbers(who, threshold=threshold)

    def init(params):
        known, maxima = arrays(who, params), {}
        leaves, paths = known.values, known.paths
        warn_unused(who, "axes", axes, paths)
        modules = attention_modules(paths, leaves)
        if known.shapes and not modules:
            warn(f"{who}: no module has both queries and keys, so no weight is clipped. Leave it out.")
        for module, members in modules.items():
            if attention := attention_of(who, axes, members, paths, leaves):
                dtype = upcast_dtype(jnp.result_type(leaves[min(members)]))
                maxima[module] = jnp.zeros(attention.logits_shape(who), jnp.finfo(dtype).dtype)
        # of no parameters one array: optax.tree.map_params calls init so, and has it match what is there
        return QKClipState(maxima if leaves else jnp.zeros(0))

    def update(updates, state, params=None, *, attention_logits=None, sound=True, **extra):
        check_params(who, params, "it multiplies some of them")
        state = as_made(init, checked_state(who, state, QKClipState), params)
        us, tree, ws = aligned(who, updates, params, strict=False)
        largest = dict(state.observe(sound, attention_logits).maxima)
        for k, factor in _factors(who, axes, threshold, Leaves(tree, ws).paths, ws, largest).items():
            if is_absent(us[k]):
                continue
            u = upcast(us[k])
            f = factor.astype(u.dtype)
            us[k] = cast_like((f - 1) * upcast(ws[k]).astype(u.dtype) + f * u, us[k])  # (1)
        return tree.unflatten(us), jax.tree.map(jnp.zeros_like, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_module(who: str, modules: Sequence[str], logits: PyTree | None) -> dict[str, Any]:
    """The logits of each module, whose path is the beginning of theirs."""
    if logits is None:
        return {}
    out = {}
    for path, x in zip(leaf_paths(logits), jax.tree.leaves(logits), strict=True):
        within = [module for module in modules if f"{path}/".startswith(f"{module}/" if module else "")]
        if not within:
            raise ValueError(
                f"{who}: there are logits of {path!r}, but no query and key in it. The modules with both are "
                f"{', '.join(map(repr, modules[:8])) or 'none'}{', ...' * (len(modules) > 8)}."
            )
        module = max(within, key=len)
        if module in out:
            raise ValueError(
                f"{who}: there are logits of {module!r} twice. Give one array, with the largest of each head."
            )
        out[module] = undivided(upcast(x))
    return out


def _factors(
    who: str,
    axes: AxesRules | None,
    threshold: Numeric,
    paths: Sequence[str],
    leaves: Sequence[Any],
    logits: Mapping[str, Any],
) -> dict[int, jax.Array]:
    """Index of a leaf → what multiplies it."""
    out = {}
    for module, members in attention_modules(paths, leaves).items():
        if module not in logits:
            continue
        attention = attention_of(who, axes, members, paths, leaves)
        s = logits[module]
        if attention is None or s.ndim == 0:
            one = "they are one number. Give one for each head"
            no_matrix = "by its axes a query or key is no matrix. Leave out these logits, or change axes"
            raise ValueError(f"{who}: there are logits of {module!r}, but {one if attention else no_matrix}.")
        tau = as_scalar(threshold, s)
        above = (s > tau) & jnp.isfinite(s)
        gamma = jnp.where(above, tau / jnp.where(above, s, 1), 1)  # (1)
        try:
            out |= attention.factors(gamma)
        except ValueError as error:
            raise ValueError(f"{who}: {error}") from error
    return out
