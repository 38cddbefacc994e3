"""Attention logits are kept below a threshold, by weights that are multiplied alike wherever they lie."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding

import optimorph as om

TAU, MODEL, HEADS, SIZE, LAYERS = 3.0, 8, 4, 7, 2
pytestmark = pytest.mark.usefixtures("float64")


def drawn(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def logits(queries, keys):
    """The largest of each head, of (..., token, head, size); a key may serve several heads."""
    keys = jnp.repeat(keys, queries.shape[-2] // keys.shape[-2], axis=-2)
    return jnp.einsum("...qhk,...thk->...hqt", queries, keys).max((-2, -1))


X = np.random.default_rng(9).standard_normal((7, MODEL))


def dense(kernel, bias=None):
    """Of a kernel (model, heads, size)."""
    out = jnp.einsum("td,dhk->thk", X, kernel)
    return out if bias is None else out + bias


def by_heads(kernel, heads=HEADS):
    return kernel.reshape(kernel.shape[0], heads, -1)


D3, D2 = (MODEL, HEADS, SIZE), (MODEL, HEADS * SIZE)
LAYOUTS = {
    "Flax": (
        {"query/kernel": D3, "key/kernel": D3, "query/bias": D3[1:], "key/bias": D3[1:]},
        None,
        lambda p: (
            dense(p["query/kernel"], p["query/bias"]),
            dense(p["key/kernel"], p["key/bias"]),
        ),
    ),
    "per head": (
        {"query/kernel": D3, "key/kernel": D3},
        {"*": "ibo"},
        lambda p: (dense(p["query/kernel"]), dense(p["key/kernel"])),
    ),
    "heads first": (
        {"wq": (HEADS, MODEL, SIZE), "wk": (HEADS, MODEL, SIZE)},
        {"*": "bio"},
        lambda p: [dense(p[name].swapaxes(0, 1)) for name in ("wq", "wk")],
    ),
    "heads last": (
        {"wq": (MODEL, SIZE, HEADS), "wk": (MODEL, SIZE, HEADS)},
        {"*": "iob"},
        lambda p: [dense(p[name].swapaxes(1, 2)) for name in ("wq", "wk")],
    ),
    "heads in one axis": (
        {"q_proj/kernel": D2, "k_proj/kernel": D2, "q_proj/bias": D2[1:]},
        {"*kernel": "i(4o)"},
        lambda p: (
            dense(by_heads(p["q_proj/kernel"]), p["q_proj/bias"].reshape(HEADS, SIZE)),
            dense(by_heads(p["k_proj/kernel"])),
        ),
    ),
    "Equinox": (
        {"query_proj/weight": D2[::-1], "key_proj/weight": D2[::-1]},
        {"*": "(4o)i"},
        lambda p: [dense(by_heads(p[f"{name}_proj/weight"].T)) for name in ("query", "key")],
    ),
    "grouped": (
        {"query/kernel": D3, "key/kernel": (MODEL, 2, SIZE)},
        None,
        lambda p: (dense(p["query/kernel"]), dense(p["key/kernel"])),
    ),
    "grouped, heads in one axis": (
        {"q_proj/kernel": D2, "k_proj/kernel": (MODEL, 2 * SIZE)},
        {"*q_proj*": "i(4o)", "*": "io"},
        lambda p: (dense(by_heads(p["q_proj/kernel"])), dense(by_heads(p["k_proj/kernel"], 2))),
    ),
    "Levanter": (
        {"q_proj/weight": (2, 2, SIZE, MODEL), "k_proj/weight": (2, SIZE, MODEL)},
        {"*q_proj*": "oooi", "*": "ooi"},
        lambda p: (
            dense(p["q_proj/weight"].reshape(HEADS, SIZE, MODEL).transpose(2, 0, 1)),
            dense(p["k_proj/weight"].transpose(2, 0, 1)),
        ),
    ),
    "all in one": (
        {"qkv/kernel": (MODEL, 3 * HEADS * SIZE), "qkv/bias": (3 * HEADS * SIZE,)},
        {"*": "i(12o)"},
        lambda p: [
            dense(by_heads(k), b.reshape(HEADS, SIZE))
            for k, b in zip(
                jnp.split(p["qkv/kernel"], 3, axis=1)[:2], jnp.split(p["qkv/bias"], 3)[:2], strict=True
            )
        ],
    ),
    "grouped, all in one": (
        {"qkv/kernel": (MODEL, 2 * HEADS * SIZE), "qkv/bias": (2 * HEADS * SIZE,)},
        {"*": "i(4+2+2 o)"},
        lambda p: [
            dense(by_heads(p["qkv/kernel"][:, part], heads), p["qkv/bias"][part].reshape(heads, SIZE))
            for part, heads in ((slice(4 * SIZE), 4), (slice(4 * SIZE, 6 * SIZE), 2))
        ],
    ),
    "all in one, of whole matrices": (
        {"qkv/weight": (3 * HEADS * SIZE, MODEL)},
        {"*": "(4+4+4 o)i"},
        lambda p: [dense(by_heads(w.T)) for w in jnp.split(p["qkv/weight"], 3)[:2]],
    ),
    "all in one, three times the heads": (
        {"qkv/kernel": (MODEL, 3 * HEADS * SIZE)},
        {"*": "i(3*4 o)"},
        lambda p: [dense(by_heads(k)) for k in jnp.split(p["qkv/kernel"], 3, axis=1)[:2]],
    ),
    "head by head, each a matrix": (
        {"qkv/kernel": (MODEL, HEADS * 3 * SIZE)},
        {"*": "i(4*3 o)"},
        lambda p: [dense(p["qkv/kernel"].reshape(MODEL, HEADS, 3, SIZE)[:, :, k]) for k in (0, 1)],
    ),
    "group by group, each a matrix": (
        {"wqkv": (MODEL, 2 * 4 * SIZE)},
        {"*": "i(2*(2+1+1) o)"},
        lambda p: [
            dense(by_heads(group[:, :, part].reshape(MODEL, -1), heads))
            for group in [p["wqkv"].reshape(MODEL, 2, 4, SIZE)]
            for part, heads in ((slice(2), 4), (slice(2, 3), 2))
        ],
    ),
    "head by head": (
        {"query_key_value/kernel": (MODEL, HEADS * 3 * SIZE), "query_key_value/bias": (HEADS * 3 * SIZE,)},
        {"*": "i(4~3 o)"},
        lambda p: [
            dense(
                p["query_key_value/kernel"].reshape(MODEL, HEADS, 3, SIZE)[:, :, k],
                p["query_key_value/bias"].reshape(HEADS, 3, SIZE)[:, k],
            )
            for k in (0, 1)
        ],
    ),
    "group by group": (
        {"wqkv/weight": (2 * 4 * SIZE, MODEL)},
        {"*": f"(~({2 * SIZE}+{SIZE}+{SIZE}) o)i"},
        lambda p: [
            dense(by_heads(group[:, :, part].reshape(MODEL, -1), heads))
            for group in [p["wqkv/weight"].T.reshape(MODEL, 2, 4, SIZE)]
            for part, heads in ((slice(2), 4), (slice(2, 3), 2))
        ],
    ),
    "all in one, an axis of three": (
        {"qkv/kernel": (MODEL, 3, HEADS, SIZE)},
        None,
        lambda p: [dense(p["qkv/kernel"][:, k]) for k in (0, 1)],
    ),
    "layers": (
        {"query/kernel": (LAYERS, *D3), "key/kernel": (LAYERS, *D3)},
        {"*": "bioo"},
        lambda p: [jax.vmap(dense)(p[f"{name}/kernel"]) for name in ("query", "key")],
    ),
    "layers second": (
        {"query/kernel": (MODEL, LAYERS, HEADS, SIZE), "key/kernel": (MODEL, LAYERS, 2, SIZE)},
        {"*": "iboo"},
        lambda p: [jax.vmap(dense, 1)(p[f"{name}/kernel"]) for name in ("query", "key")],
    ),
}
every = pytest.mark.parametrize("layout", LAYOUTS)
SHARED = {name for name in LAYOUTS if "group" in name} | {"Levanter", "layers second"}
"""Whose keys serve two heads."""


def attention(layout):
    """Parameters, in a module beside a leaf that is none of its own; axes; and the logits as a function."""
    shapes, axes, project = LAYOUTS[layout]
    params = {f"block/attn/{name}": w for name, w in drawn(shapes).items()} | drawn(
        {"block/mlp/up/kernel": (3, 3)}
    )

    def largest(params):
        own = {name.removeprefix("block/attn/"): w for name, w in params.items()}
        return logits(*project(own))

    return params, axes, largest


@pytest.mark.examples("Flax", "grouped", "all in one", "Equinox", "layers second", "group by group")
@every
def test_logits_are_at_most_the_threshold(layout):
    """Those above are the threshold, to the last digits, unless a key that heads share makes them less."""
    params, axes, largest = attention(layout)
    before = largest(params)
    tau = float(jnp.median(before))
    after_params = om.qk_clip(params, {"block/attn": before}, axes, tau)
    after = largest(after_params)
    if layout not in SHARED:
        rounding.close(after, jnp.minimum(before, tau), units=256)
    else:
        gamma = jnp.minimum(1, tau / before)
        least = jnp.repeat(gamma.reshape(*gamma.shape[:-1], 2, 2).min(-1), 2, axis=-1)
        rounding.close(after, before * jnp.sqrt(gamma * least), units=256)
        assert bool(jnp.all(after <= tau * (1 + 1e-12)))
    np.testing.assert_array_equal(after_params["block/mlp/up/kernel"], params["block/mlp/up/kernel"])
    assert jax.tree.map(jnp.shape, after_params) == jax.tree.map(jnp.shape, params)


@pytest.mark.examples("Flax", "grouped", "all in one")
@every
def test_as_the_last_transform(layout):
    """f(w + u) - w; without logits and below the threshold the updates to the bit."""
    params, axes, largest = attention(layout)
    gradients = jax.tree.map(lambda w: w[::-1], params)
    plain, tx = om.adamw(0.1), om.chain(om.adamw(0.1), om.clip_attention_logits(TAU, axes))
    state = tx.init(params)
    maxima = largest(params)
    update = jax.jit(lambda s, g: tx.update(g, state, params, attention_logits={"block/attn": s}))
    expected, _ = plain.update(gradients, plain.init(params), params)
    stepped = optax.apply_updates(params, expected)
    clipped = om.qk_clip(stepped, {"block/attn": maxima}, axes, TAU)
    updates, after = update(maxima, gradients)
    rounding.close(optax.apply_updates(params, updates), clipped, units=64)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    whole = jnp.full_like(maxima, TAU), -maxima - 50, jnp.full_like(maxima, jnp.nan), None
    for small in whole:
        given = {} if small is None else {"attention_logits": {"block/attn": small}}
        updates, _ = tx.update(gradients, state, params, **given)
        for name, u in expected.items():
            np.testing.assert_array_equal(updates[name], u)


def test_numbers():
    """Of logits 150 and 80 the first head's weights by the root of 2/3."""
    params = {"query": jnp.ones((1, 2, 1)), "key": jnp.ones((1, 2, 1)), "value": jnp.ones((1, 2, 1))}
    after = om.qk_clip(params, {"": jnp.array([150.0, 80.0])}, {"*": "ioo"})
    for name in ("query", "key"):
        np.testing.assert_allclose(after[name].ravel(), [0.816496580927726, 1.0], rtol=1e-15)
    np.testing.assert_array_equal(after["value"], 1)


@pytest.mark.parametrize(("queries", "keys"), [(2, 2), (4, 2), (4, 4)])
def test_stacked_layers_are_clipped_as_each_by_itself(queries, keys):
    """Also if they have two heads, whose weights are no two parts of one head."""
    rng = np.random.default_rng(0)
    stacked = {
        name: jnp.asarray(rng.standard_normal((3, MODEL, heads * SIZE)))
        for name, heads in (("wq", queries), ("wk", keys))
    }
    maxima = jnp.asarray(rng.uniform(1.0, 9.0, (3, queries)))

    def axes(layers):
        return {"wq": f"{layers}i({queries}o)", "wk": f"{layers}i({keys}o)"}

    each = [
        om.qk_clip(jax.tree.map(lambda w, k=k: w[k], stacked), {"": maxima[k]}, axes(""), 2.0)
        for k in range(3)
    ]
    expected = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
    chex.assert_trees_all_equal(om.qk_clip(stacked, {"": maxima}, axes("b"), 2.0), expected)
    tx, zeros = om.clip_attention_logits(2.0, axes("b")), jax.tree.map(jnp.zeros_like, stacked)
    updates, _ = tx.update(zeros, tx.init(stacked), stacked, attention_logits={"": maxima})
    rounding.close(om.apply_updates(stacked, updates), expected)


@pytest.mark.parametrize("flat", [False, True])
def test_latent_attention(flat):
    """Four parts: by √γ, γ and √γ; the rotated key, which all heads share, and the value stay."""
    content, rotated, value, latent = 3, 2, 4, 5
    shapes = {
        "wq_b/kernel": (latent, HEADS, content + rotated),
        "wkv_b/kernel": (latent, HEADS, content + value),
        "wkv_a/kernel": (MODEL, latent + rotated),
    }
    params = drawn(shapes)
    s = jnp.array([10.0, 1.0, 4.0, -2.0])
    axes = {"wq_b*": "io(3+2 o)", "wkv_b*": "io(3+4 o)"}
    given = params
    if flat:
        axes = {"wq_b*": "i(3+2 o)", "wkv_b*": "i(3+4 o)"}
        given = {name: w.reshape(w.shape[0], -1) for name, w in params.items()}
    after = om.qk_clip(given, {"": s}, axes, 2.0)
    after = {name: w.reshape(params[name].shape) for name, w in after.items()}
    gamma = np.array([0.2, 1.0, 0.5, 1.0])[:, None]
    ratio = {name: after[name] / params[name] for name in params}
    rounding.close(
        ratio["wq_b/kernel"][..., :content], np.broadcast_to(gamma**0.5, (latent, HEADS, content)), units=8
    )
    rounding.close(
        ratio["wq_b/kernel"][..., content:], np.broadcast_to(gamma, (latent, HEADS, rotated)), units=8
    )
    rounding.close(
        ratio["wkv_b/kernel"][..., :content], np.broadcast_to(gamma**0.5, (latent, HEADS, content)), units=8
    )
    np.testing.assert_array_equal(ratio["wkv_b/kernel"][..., content:], 1)
    np.testing.assert_array_equal(ratio["wkv_a/kernel"], 1)


def test_logits_that_are_no_reason_to_clip():
    """Not above 0, and not finite: nothing is clipped, and nothing becomes NaN."""
    params, axes, _ = attention("Flax")
    with jax.debug_infs(True):
        after = om.qk_clip(params, {"block/attn": jnp.array([-5.0, 0.0, 1.0, 2.0])}, axes)
    unknown = om.qk_clip(params, {"block/attn": jnp.array([-5.0, 0.0, jnp.nan, jnp.inf])}, axes)
    for name, w in params.items():
        np.testing.assert_array_equal(after[name], w)
        np.testing.assert_array_equal(unknown[name], w)


def test_master_weights_and_their_copies():
    """A copy in bfloat16 is multiplied as the master weight, and is the next number to it."""
    params, axes, largest = attention("Flax")
    maxima = {"block/attn": largest(params)}
    master = om.qk_clip(params, maxima, axes, TAU)
    copy = om.qk_clip(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), maxima, axes, TAU)
    for name, w in master.items():
        assert copy[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(copy[name], np.float64), w, rtol=2.0**-7)
    split = om.split_weights(jax.tree.map(lambda w: w.astype(jnp.float32), params))
    joined = om.qk_clip(om.join_weights(*split), maxima, axes, TAU)
    for name, w in master.items():
        np.testing.assert_allclose(np.asarray(joined[name], np.float64), w, rtol=2.0**-14)


def test_as_flax_sows_them():
    """A tree with the nesting of the modules: the path of the logits begins with the module's."""
    params, axes, largest = attention("Flax")
    maxima = largest(params)
    sown = {"block": {"attn": {"max_logits": (maxima,)}}}
    for got, want in zip(
        jax.tree.leaves(om.qk_clip(params, sown, axes, TAU)),
        jax.tree.leaves(om.qk_clip(params, {"block/attn": maxima}, axes, TAU)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_layers_without_attention_and_without_logits():
    params = {
        f"{block}/{name}": w
        for block in "ab"
        for name, w in drawn({"query": (3, 2, 2), "key": (3, 2, 2)}).items()
    }
    params |= drawn({"c/kernel": (3, 3), "queries": (2, 3), "d/query": (3, 2, 2)})
    after = om.qk_clip(params, {"b": jnp.array([200.0, 400.0])}, {"*": "ioo"})
    changed = [name for name in params if np.any(after[name] != params[name])]
    assert changed == ["b/query", "b/key"]
    state = om.clip_attention_logits(axes={"*": "ioo"}).init(params)
    assert jax.tree.map(jnp.shape, dict(state.maxima)) == {"a": (2,), "b": (2,)}
    state = om.clip_attention_logits(axes={"a/*": None, "*": "ioo"}).init(params)
    assert [*state.maxima] == ["b"]
    with pytest.raises(
        ValueError, match="qk_clip: there are logits of 'b', but by its axes a query or key is no"
    ):
        om.qk_clip(params, {"b": jnp.ones(2)}, {"b/query": None, "*": "ioo"})
    params |= {f"b/cross/{name}": params[f"b/{name}"] for name in ("query", "key")}
    after = om.qk_clip(params, {"b/cross": jnp.array([200.0, 400.0])}, {"*": "ioo"})
    changed = [name for name in params if np.any(after[name] != params[name])]
    assert changed == ["b/cross/query", "b/cross/key"]


@pytest.mark.parametrize("fault", [None, 1])
def test_a_running_maximum_over_the_gradients_of_a_step(fault):
    """Of those that count: a gradient with a NaN is as if it had never come."""
    params, axes, _ = attention("Flax")
    own = [2.0, 9.0, 3.0, 1.0], [8.0, 1.0, 2.0, 1.0], [1.0, np.nan, 30.0, 1.0]
    tx = om.multi_steps(om.chain(om.sgd(0.0), om.clip_attention_logits(TAU, axes)), 3 if fault is None else 2)
    state, w = tx.init(params), params
    update = jax.jit(lambda g, state, w, s: tx.update(g, state, w, attention_logits={"block/attn": s}))
    for k, s in enumerate(own):
        g = jax.tree.map(lambda w, k=k: jnp.full_like(w, jnp.nan if k == fault else 1.0), params)
        updates, state = update(g, state, w, jnp.array(s))
        if k < 2:
            assert not any(map(np.any, jax.tree.leaves(updates)))
        w = optax.apply_updates(w, updates)
    seen = [s for k, s in enumerate(own) if k != fault]
    want = om.qk_clip(params, {"block/attn": jnp.nanmax(jnp.array(seen), 0)}, axes, TAU)
    rounding.close(w, want, units=8)
    for _ in range(3 if fault is None else 2):  # what was seen counts once
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, w)
    rounding.close(optax.apply_updates(w, updates), want, units=8)


AROUND = {
    "optax.named_chain": lambda clip: optax.named_chain(("step", om.sgd(0.0)), ("clip", clip())),
    "skip_nonfinite": lambda clip: om.skip_nonfinite(clip()),
    "inject_hyperparams": lambda clip: om.inject_hyperparams(clip)(threshold=lambda count: TAU),
    "compress_state": lambda clip: om.compress_state(om.chain(om.momentum(0.9), clip())),
    "in_bfloat16": lambda clip: om.in_bfloat16(clip()),
    "partition": lambda clip: om.partition({"*attn*": "a", "*": "b"}, {"a": clip(), "b": om.sgd(0.0)}),
    "optax.masked": lambda clip: optax.masked(
        clip(), lambda params: {name: "attn" in name for name in params}
    ),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_running_maximum_inside_other_transforms(around):
    """In units of float32, in which in_bfloat16 hands a state to what is inside it."""
    params, axes, _ = attention("Flax")
    tx = om.multi_steps(around(lambda threshold=TAU: om.clip_attention_logits(threshold, axes)), 2)
    state, w = tx.init(params), params
    update = jax.jit(lambda g, state, w, s: tx.update(g, state, w, attention_logits={"block/attn": s}))
    for s in ([2.0, 9.0, 3.0, 1.0], [8.0, 1.0, 2.0, 1.0]):
        updates, state = update(jax.tree.map(jnp.zeros_like, w), state, w, jnp.array(s))
        w = optax.apply_updates(w, updates)
    want = om.qk_clip(params, {"block/attn": jnp.array([8.0, 9, 3, 1])}, axes, TAU)
    rounding.close(w, want, units=8, dtype="float32")


@pytest.mark.parametrize("unused", [{"weight": 0.0}, {"weight": np.nan}, {}], ids=str)
def test_the_logits_of_a_gradient_that_only_ends_a_window(unused):
    """Of weight 0, or not finite: they do not count in the step that it makes."""
    params, axes, _ = attention("Flax")
    tx = om.multi_steps(om.chain(om.sgd(0.0), om.clip_attention_logits(TAU, axes)), 4)
    g = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(
        g, tx.init(params), params, attention_logits={"block/attn": jnp.array([9.0, 2, 1, 1])}
    )
    bad = g if unused else jax.tree.map(lambda x: x * jnp.nan, g)
    end = jax.jit(
        lambda state, weight: tx.update(
            bad, state, params, weight=weight, flush=True, attention_logits={"block/attn": jnp.full(4, 1e9)}
        )
    )
    updates, _ = end(state, unused.get("weight", 1.0))
    want = om.qk_clip(params, {"block/attn": jnp.array([9.0, 2, 1, 1])}, axes, TAU)
    rounding.close(optax.apply_updates(params, updates), want, units=8)


def test_narrow_weights_and_missing_gradients():
    params, axes, _ = attention("Flax")
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    tx = om.clip_attention_logits(TAU, axes)
    g = jax.tree.map(jnp.zeros_like, half) | {"block/attn/query/bias": None}
    updates, _ = tx.update(g, tx.init(half), half, attention_logits={"block/attn": 1e3 * jnp.ones(HEADS)})
    assert updates.pop("block/attn/query/bias") is None
    assert {u.dtype for u in updates.values()} == {jnp.dtype(jnp.bfloat16)}
    shrunk = (half["block/attn/query/kernel"] + updates["block/attn/query/kernel"]) / half[
        "block/attn/query/kernel"
    ]
    np.testing.assert_allclose(np.asarray(shrunk, float), np.sqrt(TAU / 1e3), rtol=0.3)


REFUSED = {
    "another module": (
        {"block": {"mlp": jnp.ones(4)}},
        "'block/mlp', but no query and key in it.*'block/attn'",
    ),
    "too few heads": ({"block/attn": jnp.ones(3)}, "'block/attn/query/kernel' has shape.*do not fit logits"),
    "one number": ({"block/attn": jnp.ones(())}, "they are one number"),
    "twice": ({"block/attn": {"a": jnp.ones(4), "b": jnp.ones(4)}}, "'block/attn' twice"),
}


@pytest.mark.parametrize(("maxima", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(maxima, words):
    params, axes, _ = attention("Flax")
    with pytest.raises(ValueError, match="qk_clip: .*" + words):
        om.qk_clip(params, maxima, axes)
    tx = om.clip_attention_logits(axes=axes)
    state = tx.init(params)
    with pytest.raises(ValueError, match="clip_attention_logits: "):
        tx.update(params, state, params, attention_logits=maxima)


def test_axes_that_do_not_tell_the_heads():
    fused = drawn({"qkv": (MODEL, 8 * SIZE)})
    with pytest.raises(ValueError, match=r"clip_attention_logits: .*'io' do not tell .* 'i\(12\+12\+12 o\)'"):
        om.clip_attention_logits(axes={"*": f"i({4 * SIZE}+{2 * SIZE}+{2 * SIZE} o)"}).init(fused)
    with pytest.raises(
        ValueError, match=r"qk_clip: a part of 'qkv' has shape .* 'i\(4o\)', which do not fit"
    ):
        om.qk_clip(fused, {"": jnp.ones(2)}, {"*": "i(4+2+2 o)"})
    with pytest.raises(ValueError, match=r"qk_clip: 'qkv' has .* do not tell query, key and value"):
        om.qk_clip(fused, {"": jnp.ones(2)}, {"*": "i(2*2 o)"})
    params = drawn({"q_proj/kernel": D2, "k_proj/kernel": D2})
    with pytest.raises(ValueError, match=r"'q_proj/kernel' has shape .* 'i\(12o\)'"):
        om.clip_attention_logits().init(params)
    om.qk_clip(params, {"": jnp.ones(HEADS)})  # which are told by the logits
    latent = drawn({"wq_b/kernel": D3, "wkv_b/kernel": D3})
    with pytest.raises(ValueError, match=r"two parts.* axes=\{'wkv_b/kernel': 'io\(128\+128 o\)'\}"):
        om.qk_clip(latent, {"": jnp.ones(HEADS)}, {"*": "ioo"})
    tx = om.clip_attention_logits(axes={"*": "i(4o)"})
    state = tx.init(params)
    with pytest.raises(ValueError, match="clip_attention_logits: update was called without params"):
        tx.update(params, state)
    half = latent | {"wq/kernel": latent["wq_b/kernel"]}
    half.pop("wq_b/kernel")
    with pytest.raises(ValueError, match="of 'wq/kernel' and 'wkv_b/kernel' only one has two parts"):
        om.qk_clip(half, {"": jnp.ones(HEADS)}, {"wkv_b*": "io(3+4 o)", "*": "ioo"})
    three = drawn({"query": (3, 4, 2), "key": (3, 3, 2)})
    with pytest.raises(ValueError, match="'key' has 3 heads, which 4 heads of queries cannot share"):
        om.qk_clip(three, {"": jnp.ones(4)}, {"*": "ioo"})


LATENT = (
    ({"a/wq_b": (3, 4, 6), "a/wkv_b": (2, 4, 7)}, {"*wq_b": "io(4+2 o)", "*": "io(3+4 o)"}),
    ({"a/wq_b": (3, 24), "a/wkv_b": (2, 28)}, {"*wq_b": "i(4*(4+2) o)", "*": "i(4*(3+4) o)"}),
)


BY_SHAPE = "layers second", "grouped, heads in one axis", "all in one"
GROUPED = "group by group", "grouped, all in one", "all in one, three times the heads"


def clipped(package):
    """What a package makes of a few layouts, of latent attention, and of gradients between steps."""
    found = []
    for layout in (*BY_SHAPE, *GROUPED, "heads first", "all in one, an axis of three"):
        params, axes, largest = attention(layout)
        before = largest(params)
        tau = float(jnp.median(before))
        found.append(package.qk_clip(params, {"block/attn": before}, axes, tau))
        found.append([*package.clip_attention_logits(tau, axes).init(params).maxima.values()])
    tx = package.clip_attention_logits(tau, axes)
    state = tx.init(params)
    for sound, logits in ((True, before), (True, before / 2), (False, 9 * before), (True, before * jnp.nan)):
        state = state.observe(sound, {"block/attn": logits})
        found.append(state.maxima["block/attn"])
    gradients = params | {"block/mlp/up/kernel": None}
    odd = before.at[..., :2].set([jnp.inf, -5.0])
    for logits in (odd, jnp.full_like(before, tau)):
        updates, after = tx.update(gradients, state, params, attention_logits={"block/attn": logits})
        found += [updates, jnp.exp(after.maxima["block/attn"])]
    without = {name: None if "qkv" in name else w for name, w in params.items()}
    found.append(tx.update(without, state, params)[0])
    maxima = jnp.array([1.0, 5.0, 9.0, 2.0])
    try:  # three heads, or query, key and value
        found.append(package.qk_clip({"qkv": jnp.ones((2, 3, 4))}, {"": maxima[:2]}, {"*": "ioo"}, 3.0))
    except ValueError:
        found.append(0.0)
    return found + [package.qk_clip(drawn(shapes), {"a": maxima}, axes, 3.0) for shapes, axes in LATENT]


def is_wrong(package):
    """Whether a package clips otherwise than it should, or not at all."""
    with jax.enable_x64(True):
        try:
            found, wanted = jax.tree.leaves(clipped(package)), jax.tree.leaves(clipped(om))
            alike = [
                x.shape == y.shape and np.allclose(x, y, 1e-9) for x, y in zip(found, wanted, strict=True)
            ]
        except Exception:
            return True
        return not all(alike)


def test_its_state_is_plain():
    """Without infinities, and known to optax: what is beside the parameters passes `map_params`."""
    params = {"attn": {"query": {"kernel": jnp.ones((4, 2, 2))}, "key": {"kernel": jnp.ones((4, 2, 2))}}}
    tx = om.multi_steps(om.chain(om.ema(0.9), om.clip_attention_logits()), 2)
    with jax.debug_infs(True):
        state = tx.init(params)
        _, state = tx.update(params, state, params, attention_logits={"attn": jnp.array([3.0, -1.0])})
    marked = optax.tree.map_params(tx, lambda leaf, p: leaf + 1, state, params)
    np.testing.assert_array_equal(marked.inner[1].maxima["attn"], [3.0, 0.0])
    np.testing.assert_array_equal(marked.inner[0].average["attn"]["key"]["kernel"], 1.0)
    assert jax.tree.structure(marked) == jax.tree.structure(state)
