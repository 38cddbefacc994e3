"""A run that is interrupted, changed and continued, beside the run that had the change from the start."""

import itertools
import json
import re
from typing import Any, NamedTuple

import catalog
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import test_ecosystem as ecosystem

import optimorph as om
from optimorph import probes
from optimorph._core.paths import leaf_paths
from optimorph._core.rounding import leaf_key

pytestmark = pytest.mark.usefixtures("float64")
SHAPES = {"hidden": (6, 4), "head": (4, 3), "bias": (5,)}
LARGE = {"hidden": (64, 96), "bias": (5,)}


@pytest.fixture(autouse=True)
def _promotion():
    """As optax's wrappers need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def tree(seed, shapes=None):
    """Numbers that depend on the leaf's name and shape alone."""
    shapes = SHAPES if shapes is None else shapes
    return {
        name: jnp.asarray(np.random.default_rng([seed, *name.encode()]).standard_normal(shape))
        for name, shape in shapes.items()
    }


def train(tx, params, state, seeds, gradient=tree):
    """A step for each seed."""
    shapes = {name: w.shape for name, w in params.items()}
    update = jax.jit(tx.update)
    for seed in seeds:
        updates, state = update(gradient(seed, shapes), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def begun(tx, steps=3, shapes=None):
    """Parameters and state after some steps."""
    params = tree(0, shapes)
    return train(tx, params, tx.init(params), range(1, 1 + steps))


def alike(found, expected):
    """To the bit, in the same structure and dtypes."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_array_equal(x, y)


def fates(report, **fields):
    """What became of the rows with these fields."""
    return {row.fate for row in report if all(getattr(row, name) == x for name, x in fields.items())}


# Nothing changes


IDENTITIES = [
    *catalog.ENTRIES,
    catalog.Entry("int8", lambda om: om.adamw(0.1, state="int8"), None),
    catalog.Entry("muon-int8", lambda om: om.muon(0.1, axes={"*": "io"}, state="int8"), None),
    catalog.Entry("inject", lambda om: om.inject_hyperparams(om.adamw)(catalog.linear(0.1, 0.1)), None),
    catalog.Entry("adam-adam", lambda om: optax.chain(om.adam(0.1), optax.adam(0.1)), None),
    catalog.Entry("noise", lambda om: optax.chain(optax.add_noise(0.1, 0.5, 3), optax.amsgrad(0.1)), None),
    catalog.Entry("schedule_free", lambda om: optax.contrib.schedule_free_adamw(0.1), None),
]


@pytest.mark.examples("adamw", "muon", "int8", "multi_steps", "rmsprop-centered", "adam-adam", "noise")
@pytest.mark.parametrize("entry", IDENTITIES, ids=[entry.id for entry in IDENTITIES])
def test_a_state_carried_to_its_own_optimizer_is_itself(entry):
    tx, matrices = entry.build(), entry.matrices or "muon" in entry.id
    params = tree(0, {"kernel": (64, 96)} | ({} if matrices else {"bias": (5,)}))
    _, state = tx.update(params, tx.init(params), params)
    same, report = om.carry_state(state, tx, params, written_by=tx, strict=True)
    alike(same, state)
    assert {row.fate for row in report} <= {"kept"}


# Wrappers


WRAPPERS = {
    "skip_nonfinite": om.skip_nonfinite,
    "multi_steps": lambda tx: om.multi_steps(tx, lambda steps: 1),
    "probe": probes.probe,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, dict.fromkeys(SHAPES, True)),
    "partition": lambda tx: om.partition({"*": "all"}, {"all": tx}),
    "chain": lambda tx: optax.chain(om.clip_by_global_norm(1e9), optax.chain(tx), optax.identity()),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("tx", tx)),
    "two": lambda tx: om.skip_nonfinite(om.multi_steps(probes.probe(tx), lambda steps: 1)),
}
INSIDE = {
    "adamw": lambda: om.adamw(catalog.linear(0.1, 0.01), weight_decay=0.1),
    "muon": lambda: om.muon(0.02, axes={"bias": None, "*": "io"}),
    "compressed": lambda: om.compress_state(om.adam(0.1)),
    "optax": lambda: optax.adamw(0.1),
}


@pytest.mark.examples("skip_nonfinite-adamw", "multi_steps-muon", "partition-compressed", "chain-optax")
@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_added_and_removed(wrapper, name):
    """The arrays to the bit; and the run goes on as one that had the wrapper from the start."""
    plain = INSIDE[name]()
    wrapped = WRAPPERS[wrapper](plain)
    params, state = begun(plain)
    expected, full = begun(wrapped)
    rounding.close(params, expected, condition=ecosystem.CONDITION)
    carried, report = om.carry_state(state, wrapped, params, written_by=plain, strict=True)
    assert jax.tree.structure(carried) == jax.tree.structure(wrapped.init(params))
    assert not report.lost
    back, _ = om.carry_state(carried, plain, params, written_by=wrapped, strict=True)
    alike(back, state)
    found, _ = train(wrapped, params, carried, range(10, 13))
    again, _ = train(wrapped, expected, full, range(10, 13))
    rounding.close(found, again, condition=ecosystem.CONDITION)
    removed, _ = om.carry_state(full, plain, params, written_by=wrapped, strict=True)
    found, _ = train(plain, params, removed, range(10, 13))
    rounding.close(found, again, condition=ecosystem.CONDITION)


@pytest.mark.parametrize(
    "make", [om.soap, lambda _, axes: om.in_eigenbasis(optax.scale_by_adam(), decay=0.9, axes=axes)]
)
def test_steps_that_only_find_the_bases_are_counted(make):
    """The first step of SOAP, which its count for bias correction has not, is one of `multi_steps`."""
    plain = make(0.1, axes={"*": "io"})
    params, state = begun(plain, 3, {"kernel": (4, 6)})
    for wrapped in (om.multi_steps(plain, 2), optax.MultiSteps(plain, 2).gradient_transformation()):
        carried, report = om.carry_state(state, wrapped, params, written_by=plain, strict=True)
        assert not report.lost
        assert optax.tree.get(carried, "gradient_step", getattr(carried, "steps", None)) == 3
        back, _ = om.carry_state(carried, plain, params, written_by=wrapped, strict=True)
        alike(back, state)


def test_a_window_goes_on():
    """Of `multi_steps` in optax's `MultiSteps` and back; what is open is never lost in silence."""
    ours = om.multi_steps(om.adamw(0.1), 3)
    theirs = optax.MultiSteps(optax.adamw(0.1), 3).gradient_transformation()
    params, state = begun(ours, 4)
    there, report = om.carry_state(state, theirs, params, strict=True)
    assert not report.lost
    back, _ = om.carry_state(there, ours, params, strict=True)
    expected, _ = train(ours, params, state, range(5, 9))
    for tx, start in ((ours, back), (theirs, there)):
        found, _ = train(tx, params, start, range(5, 9))
        rounding.close(found, expected, dtype="float32")  # of optax's means
    _, report = om.carry_state(state, om.adamw(0.1), params)
    assert fates(report, kind="mean of multi_steps") == {"dropped"}
    assert "not full" in str(report)
    with pytest.raises(ValueError, match="'bias', mean of multi_steps: gradients of a window"):
        om.carry_state(state, om.adamw(0.1), params, strict=True)


def test_a_smaller_window_ends():
    """With more gradients in it than there should be now, it is full at the next one."""
    params, state = begun(om.multi_steps(om.sgd(0.1), 8), 5)
    tx = om.multi_steps(om.sgd(0.1), 2)
    state, _ = om.carry_state(state, tx, params)
    after, state = train(tx, params, state, [6])
    mean = jax.tree.map(lambda *g: sum(g) / 6, *[tree(seed) for seed in range(1, 7)])
    rounding.close(after, jax.tree.map(lambda w, g: w - 0.1 * g, params, mean))
    assert int(state.window_count) == 0


def test_hyperparameters():
    """Both have them: kept. Only tx: its own. Only the state: dropped, with their numbers."""
    injected, plain = om.inject_hyperparams(om.adamw)(0.1, weight_decay=0.2), om.adamw(0.3)
    params, state = begun(injected)
    state.hyperparams["learning_rate"] = jnp.float64(0.05)
    other = om.skip_nonfinite(om.inject_hyperparams(om.adamw)(0.7, weight_decay=0.9))
    carried, report = om.carry_state(state, other, params, strict=True)
    assert float(carried.inner.hyperparams["learning_rate"]) == 0.05
    assert fates(report, kind="hyperparameter") == {"kept"}
    carried, report = om.carry_state(state, plain, params, strict=True)
    assert fates(report, kind="hyperparameter") == {"dropped"}
    assert "an argument of tx; it was 0.05" in str(report)
    carried, report = om.carry_state(carried, injected, params, strict=True)
    assert float(carried.hyperparams["learning_rate"]) == 0.1
    assert int(carried.count) == 3
    theirs = optax.inject_hyperparams(optax.adamw)(learning_rate=catalog.linear(0.1, 0.1))
    ours = om.inject_hyperparams(om.adamw)(learning_rate=catalog.linear(0.1, 0.1))
    params, state = begun(theirs)
    carried, _ = om.carry_state(state, ours, params, strict=True)
    rounding.close(
        train(ours, params, carried, [5, 6])[0], train(theirs, params, state, [5, 6])[0], units=1e10
    )


def test_hyperparameters_of_parts():
    """Each part has its own, whatever the others are called; what was outside of parts is that of all."""
    tx = om.inject_hyperparams(om.sgd)(0.1)
    one, both, others = (om.partition({"head": x, "*": y}, {x: tx, y: tx}) for x, y in ("aa", "ab", "cb"))

    def rates(state):
        return {k: float(s.inner_state.hyperparams["learning_rate"]) for k, s in state.inner_states.items()}

    params, _ = begun(tx, 0)
    state = optax.tree.set(tx.init(params), learning_rate=0.5)
    found, _ = om.carry_state(state, both, params, strict=True)
    assert rates(found) == {"a": 0.5, "b": 0.5}
    found.inner_states["a"].inner_state.hyperparams["learning_rate"] = jnp.float64(0.25)
    again, report = om.carry_state(found, others, params, strict=True)
    assert rates(again)["b"] == 0.5
    _, report = om.carry_state(found, one, params)
    assert "it was 0.5" in str(report)


def test_an_open_window_of_another_shape():
    """It is lost, also where nothing else is; an empty one is not."""
    tx = om.multi_steps(om.sgd(0.1), 2)
    grown = tree(0, SHAPES | {"head": (4, 5)})
    for steps, lost in ((2, set()), (3, {"head"})):
        _, state = begun(tx, steps)
        _, report = om.carry_state(state, tx, grown)
        assert {row.path for row in report.lost} == lost


# Numbers


def test_numbers_of_a_plain_recipe():
    """They are not in the state: another recipe goes on with it, and a traced rate needs one program."""
    params, state = begun(om.adamw(0.1, weight_decay=0.1))
    assert jax.tree.structure(om.adamw(catalog.linear(0.1, 0.1)).init(params)) == jax.tree.structure(state)
    traces = []

    @jax.jit
    def step(params, state, g, rate, decay):
        traces.append(0)
        updates, state = om.adamw(rate, weight_decay=decay).update(g, state, params)
        return optax.apply_updates(params, updates), state

    found, there = params, state
    for seed, rate, decay in ((5, 0.03, 0.2), (6, 0.01, 0.0)):
        found, there = step(found, there, tree(seed), rate, decay)
        params, state = train(om.adamw(rate, weight_decay=decay), params, state, [seed])
    assert len(traces) == 1
    rounding.close((found, there), (params, state))


def test_schedules_restart_and_shift():
    """The count goes on, and the schedule is another function of it."""
    first = catalog.linear(0.1, 0.1)
    params, state = begun(om.muon(first, axes={"bias": None, "*": "io"}), 4)
    restarted = om.muon(lambda t: first(t - 4), axes={"bias": None, "*": "io"})
    joined = om.muon(optax.join_schedules([first, first], [4]), axes={"bias": None, "*": "io"})
    ends = [train(tx, params, state, [5, 6])[0] for tx in (restarted, joined)]
    rounding.close(ends[0], ends[1], condition=ecosystem.CONDITION)
    for k in range(2):
        params, state = train(om.muon(first(k), axes={"bias": None, "*": "io"}), params, state, [5 + k])
    rounding.close(ends[0], params, condition=ecosystem.CONDITION)


# Precision


def moments(state):
    return optax.tree.get(state, "signal")[0].average, optax.tree.get(state, "by")[1].average


@rounding.in_float32
def test_float32_becomes_8_bits_and_float32_again():
    """The codes are those of the moments, and what is decoded is what they stand for; training goes on."""
    wide, narrow = om.adamw(0.01), om.adamw(0.01, state="int8")
    params, state = begun(wide, 20, LARGE)
    there, report = om.carry_state(state, narrow, params, strict=True)
    assert "float32 to Signed8" in str(report)
    assert jax.tree.map(jnp.result_type, there) == jax.tree.map(jnp.result_type, narrow.init(params))
    kept = {"first": om.codecs.Signed8(), "second": om.codecs.Nonneg8()}
    sides = zip(moments(there.inner), there.scales, strict=True)
    for (kind, codec), moment, (codes, scales) in zip(kept.items(), moments(state), sides, strict=True):
        key = leaf_key(jax.random.key(0), f"{kind}/hidden")
        expected = codec.encode(moment["hidden"], key)
        np.testing.assert_array_equal(codes["hidden"], expected.codes)
        np.testing.assert_array_equal(scales["hidden"], expected.scales)
        np.testing.assert_array_equal(codes["bias"], moment["bias"])
    back, report = om.carry_state(there, wide, params, written_by=narrow, strict=True)
    assert "Nonneg8 to float32" in str(report)
    sides = zip(moments(there.inner), there.scales, strict=True)
    for codec, decoded, (codes, scales) in zip(kept.values(), moments(back), sides, strict=True):
        expected = codec.decode(om.codecs.Encoded(codes["hidden"], scales["hidden"]))
        np.testing.assert_array_equal(decoded["hidden"], expected)
    start = train(narrow, params, there, range(30, 40))[0]
    other = train(wide, params, state, range(30, 40))[0]
    # each of ten steps of 0.01 is off by the error of codes, a twentieth at most of an update
    assert np.max(np.abs(start["hidden"] - other["hidden"])) < 0.01 * 10 / 20
    np.testing.assert_array_equal(start["bias"], other["bias"])


def test_codes_need_what_wrote_them():
    narrow = om.adamw(0.1, state="int8")
    params, state = begun(narrow, 1, LARGE)
    with jax.enable_x64(False):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree(0, LARGE))
        state = narrow.init(params)
        with pytest.raises(ValueError, match=r"'hidden', first moment, is stored in codes\. .*written_by="):
            om.carry_state(state, om.adamw(0.1), params)
        with pytest.raises(
            ValueError, match=r"first/hidden' is stored in int8 with 2 scales a row, but the rules say"
        ):
            om.carry_state(state, narrow, params, written_by=om.adamw(0.1, state={"*": om.codecs.BFloat16()}))
        others = {"hidden": params["bias"], "new": params["hidden"]}
        _, report = om.carry_state(state, narrow, others, written_by=narrow)
        assert fates(report, path="hidden", kind="first moment") == {"fresh"}
        _, report = om.carry_state(state, narrow, {"new": params["hidden"]}, written_by=narrow)
        assert fates(report, path="hidden", kind="first moment") == {"dropped"}


@rounding.in_float32
@pytest.mark.parametrize(
    "old",
    [
        {"first/*": om.codecs.Signed8(mapping="linear"), "*": om.codecs.Nonneg8()},
        {"first/*": om.codecs.BFloat16(), "*": om.codecs.BFloat16(stochastic=True)},
        {"first/*": om.codecs.Float8(), "*": None},
    ],
    ids=["linear", "bfloat16", "float8"],
)
def test_codes_become_other_codes(old):
    """What the codecs of both have in common is copied to the bit."""
    old, new = om.adamw(0.1, state=old), om.adamw(0.1, state="int8")
    params, state = begun(old, 2, LARGE)
    there, _ = om.carry_state(state, new, params, written_by=old, strict=True)
    wide, _ = om.carry_state(state, om.adamw(0.1), params, written_by=old, strict=True)
    expected, _ = om.carry_state(wide, new, params, strict=True)
    for x, y in zip(
        jax.tree.leaves(moments(there.inner)), jax.tree.leaves(moments(expected.inner)), strict=True
    ):
        np.testing.assert_allclose(np.int32(x), np.int32(y), atol=1)
    train(new, params, there, [9])


@rounding.in_float32
def test_bfloat16_moments():
    """Rounded once, to the nearest; and widened exactly."""
    wide, half = om.adamw(0.1), om.adamw(0.1, mu_dtype="bfloat16", nu_dtype="bfloat16")
    params, state = begun(wide)
    there, report = om.carry_state(state, half, params, strict=True)
    assert fates(report, kind="first moment") == {"converted"}
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), moments(state)[0])
    alike(optax.tree.get(there, "signal")[0].average, expected)
    back, _ = om.carry_state(there, wide, params, strict=True)
    alike(moments(back)[0], jax.tree.map(lambda x: x.astype(jnp.float32), expected))


@rounding.in_float32
def test_inside_jit_and_donated():
    old, new = om.adamw(0.1, state="int8"), om.skip_nonfinite(om.adamw(0.1))
    params, state = begun(old, 2, LARGE)
    expected, report = om.carry_state(state, new, params, written_by=old)
    found, inside = jax.jit(lambda s, p: om.carry_state(s, new, p, written_by=old))(state, params)
    alike(found, expected)
    assert inside == report
    shapes = jax.eval_shape(lambda: state)
    _, before = jax.eval_shape(lambda s: om.carry_state(s, new, params, written_by=old), shapes)
    assert before == report
    with pytest.raises(ValueError, match="carry_state: the state has shapes and no arrays"):
        om.carry_state(shapes, new, params, written_by=old)
    same, _ = om.carry_state(state, old, params, written_by=old)
    jax.jit(old.update, donate_argnums=1)(params, same, params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


# Parameters


ELEMENTWISE = {
    "adamw": lambda: om.adamw(0.1),
    "nadam": lambda: om.nadam(0.1),
    "lion": lambda: om.lion(0.1),
    "sgd": lambda: om.sgd(0.1, 0.9),
    "rmsprop": lambda: om.rmsprop(0.1, centered=True, bias_correction=True),
    "adagrad": lambda: om.adagrad(0.1),
    "laprop": lambda: om.laprop(0.1),
    "optax": lambda: optax.amsgrad(0.1),
}


def wider(seed, shapes):
    """The gradients of `tree` in the first columns of a wider head, whatever is in the others."""
    return tree(seed, shapes) | {
        "head": with_columns(tree(seed)["head"], tree(seed, {"more": (4, 2)})["more"])
    }


def with_columns(x, more):
    return jnp.concatenate([x, more], axis=1)


@pytest.mark.examples("adamw", "optax")
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_old_columns_of_a_grown_head_go_on(name):
    """Their trajectory is that of a run whose head did not grow; the new columns begin where `tx` begins."""
    tx = ELEMENTWISE[name]()
    params, state = begun(tx)
    grown = params | {"head": with_columns(params["head"], jnp.ones((4, 2)))}
    there, report = om.carry_state(state, tx, grown, grown=True, strict=True)
    changed = [row for row in report if row.fate == "converted"]
    assert changed
    assert not report.lost
    assert all(row.path == "head" and "grown from (4, 3) to (4, 5)" in row.why for row in changed)
    blank = tx.init(grown)
    for x, start in zip(jax.tree.leaves(there), jax.tree.leaves(blank), strict=True):
        if x.shape == (4, 5):
            np.testing.assert_array_equal(x[:, 3:], start[:, 3:])
    expected, _ = train(tx, params, state, range(5, 9))
    found, _ = train(tx, grown, there, range(5, 9), wider)
    rounding.close(found | {"head": found["head"][:, :3]}, expected)
    with pytest.raises(ValueError, match=r"'bias', .*: of shape \(5,\) in the state, but tx wants \(2,\)"):
        om.carry_state(state, tx, grown | {"bias": jnp.ones((2,))}, grown=True, strict=True)
    _, report = om.carry_state(state, tx, grown)
    assert "Type grown=True" in str(report)
    assert {(row.path, row.fate) for row in report.lost} == {("head", "fresh")}
    _, report = om.carry_state(there, tx, params, grown=True)  # smaller
    assert {(row.path, row.fate) for row in report.lost} == {("head", "fresh")}


@rounding.in_float32
def test_a_leaf_in_codes_grows():
    tx, larger = om.adamw(0.1, state="int8"), LARGE | {"hidden": (64, 128)}
    params, state = begun(tx, 3, LARGE)
    wide, grown = om.adamw(0.1), tree(0, larger)
    there, _ = om.carry_state(state, tx, grown, written_by=tx, grown=True)
    old, _ = om.carry_state(state, wide, params, written_by=tx)
    new, _ = om.carry_state(there, wide, grown, written_by=tx)
    for before, after in zip(moments(old), moments(new), strict=True):
        np.testing.assert_allclose(
            after["hidden"][:, :96], before["hidden"], atol=np.max(before["hidden"]) / 50
        )


def test_a_new_leaf_beside_old_ones():
    """Its updates are longer than an Adam's of its own, by the documented factor; in a part they are not."""
    b1, b2 = 0.9, 0.99
    tx = om.adam(0.1, b1, b2, eps=0.0)
    old = {"hidden": (6, 4)}
    params, state = begun(tx, 30, old)
    both = params | {"head": tree(0)["head"]}
    state_of_both, report = om.carry_state(state, tx, both)
    assert {(row.path, row.fate) for row in report.lost} == {("head", "fresh")}
    parted = om.partition({"head": "new", "*": "old"}, {"new": tx, "old": tx})
    state_of_parts, report = om.carry_state(state, parted, both)
    assert fates(report, path="new", kind="count for bias correction") == {"fresh"}
    assert fates(report, path="old", kind="count for bias correction") == {"kept"}
    shared, own, alone = both, both, {"head": both["head"]}
    state_alone = tx.init(alone)
    for k in range(1, 6):
        g, t = tree(40 + k), 30 + k
        g.pop("bias")
        updates, state_of_both = tx.update(g, state_of_both, shared)
        in_parts, state_of_parts = parted.update(g, state_of_parts, own)
        expected, state_alone = tx.update({"head": g["head"]}, state_alone, alone)
        factor = (1 - b1**k) / (1 - b1**t) / np.sqrt((1 - b2**k) / (1 - b2**t))
        rounding.close(updates["head"], factor * expected["head"], condition=100)
        rounding.close(in_parts["head"], expected["head"])
        rounding.close(in_parts["hidden"], updates["hidden"])


def test_the_documented_factors():
    """Of β = 0.9 and 0.999: in the first step, the largest, and after 1000 steps."""
    factors = [(1 - 0.9**k) / np.sqrt(1 - 0.999**k) for k in range(1, 3000)]
    assert round(factors[0], 1) == 3.2
    assert (1 + int(np.argmax(factors)), round(max(factors), 1)) == (12, 6.6)
    assert round(factors[999], 1) == 1.3


def test_lora_is_merged():
    """Of the leaves that are gone and of those that are new each has its rows."""
    tx = optax.chain(om.clip_by_global_norm(1.0), om.adamw(0.1))
    params, state = begun(tx, 3, {"lora_a": (6, 2), "lora_b": (2, 4), "bias": (5,)})
    merged = {"kernel": params["lora_a"] @ params["lora_b"], "bias": params["bias"]}
    state, report = om.carry_state(state, tx, merged)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(merged))
    lost = {(row.path, row.kind, row.fate) for row in report.lost}
    kinds = "first moment", "second moment"
    assert lost == {
        *itertools.product(["kernel"], kinds, ["fresh"]),
        *itertools.product(["lora_a", "lora_b"], kinds, ["dropped"]),
    }
    assert fates(report, path="bias") == {"kept"}
    assert "Updates depend on 6 that did not stay what they were." in str(report)


def test_a_leaf_is_added():
    """A strict error says how to begin it anew, and that is enough. Where all are new, no advice is given."""
    tx = om.adamw(0.1)
    params, state = begun(tx)
    more = {**params, "new": jnp.ones(3)}
    with pytest.raises(ValueError, match=re.escape("type fresh={'new': True, '*': False}.")):
        om.carry_state(state, tx, more, strict=True)
    _, report = om.carry_state(state, tx, more, strict=True, fresh={"new": True, "*": False})
    assert not report.lost
    _, report = om.carry_state(state, tx, {"new": jnp.ones(3)})
    assert "bias_correction" not in str(report)


@rounding.in_float32
@pytest.mark.parametrize("parts", [{"*": "a"}, {"h*": "a", "*": "b"}], ids=["one part", "two parts"])
def test_leaves_are_removed(parts):
    """A strict error says how to drop them, and that is enough: the rest is kept, and the rows say so."""
    tx = om.multi_steps(om.adamw(0.1, state={"*": om.codecs.BFloat16()}), 2)
    old = om.partition(parts, dict.fromkeys(parts.values(), tx))
    params, state = begun(old)
    rest, names = {"bias": params["bias"]}, {"head": None, "hidden": None}
    with pytest.raises(ValueError, match=re.escape("type renamed={'head': None, 'hidden': None}.")):
        om.carry_state(state, tx, rest, written_by=old, strict=True)
    expected, _ = om.carry_state(state, tx, rest, written_by=old)
    for renamed in (names, lambda path: names.get(path, path)):
        found, report = om.carry_state(state, tx, rest, written_by=old, renamed=renamed, strict=True)
        alike(found, expected)
        assert {row.path for row in report if row.why == "as asked for"} == {*names}
        assert fates(report, path="bias") == {"kept"}


def test_frozen_leaves_are_unfrozen():
    """And counts of two parts that become one: the largest, unless they differ and nothing may be lost."""
    frozen = om.partition({"head": "on", "*": "off"}, {"on": om.adamw(0.1), "off": optax.set_to_zero()})
    params, state = begun(frozen)
    tx = om.adamw(0.1)
    carried, report = om.carry_state(state, tx, params)
    assert {row.path for row in report.lost} == {"hidden", "bias"}
    parts = om.partition({"head": "a", "*": "b"}, {"a": tx, "b": tx})
    uneven, _ = om.carry_state(carried, parts, params, strict=True)
    alike(om.carry_state(uneven, tx, params, strict=True)[0], carried)
    uneven.inner_states["a"] = jax.tree.map(
        lambda x: x + 2 if x.dtype == jnp.int32 else x, uneven.inner_states["a"]
    )
    merged, report = om.carry_state(uneven, tx, params)
    assert int(merged[0].signal[1].debias_count) == 5
    assert "the largest of" in str(report)
    with pytest.raises(ValueError, match="count for bias correction: the largest of"):
        om.carry_state(uneven, tx, params, strict=True)


def matrices(*names, head=3):
    """Of two sizes, those of which SOAP keeps in one stack."""
    return tree(0, dict.fromkeys(names, (4, 4)) | ({"head": (2, head)} if head else {}))


STACKS = {
    "new names": (matrices("x", "y"), {"renamed": {"a": "x", "b": "y"}}, {"kept"}),
    "another order": (matrices("x", "y"), {"renamed": {"a": "y", "b": "x"}}, {"fresh"}),
    "other leaves": (matrices("x", "b"), {}, {"fresh"}),
    "one more": (matrices("a", "aa", "b"), {"grown": True}, {"fresh"}),
    "one anew": (matrices("a", "b"), {"fresh": {"b": True, "*": False}}, {"fresh"}),
    "the head anew": (matrices("a", "b", head=5), {"fresh": {"head": True, "*": False}}, {"kept"}),
    "no head": (matrices("a", "b", head=0), {"renamed": {"head": None}}, {"kept"}),
}


@rounding.in_float32
@pytest.mark.parametrize(("params", "asked", "expected"), STACKS.values(), ids=STACKS)
def test_stacks_of_several_leaves(params, asked, expected):
    """They are kept if all their leaves are the same in the same order, and never mixed up in silence."""
    tx = om.soap(0.1, axes={"*": "io"})
    old = matrices("a", "b")
    state = jax.tree.map(lambda x: x + 1, tx.init(old))
    found, report = om.carry_state(state, tx, params, **asked)
    assert fates(report, path="stacks/4x4") == expected
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, tx.init(params))
    if expected == {"kept"}:
        assert not report.lost
        om.carry_state(state, tx, params, strict=True, **asked)
    else:
        with pytest.raises(ValueError, match="'stacks/4x4', first moment"):
            om.carry_state(state, tx, params, strict=True, **asked)


# Other optimizers


def test_an_average_of_gradients_is_one():
    """Adam's first moment becomes Lion's and Muon's average; the reverse lacks Adam's count."""
    params, state = begun(om.adam(0.1))
    for tx in (om.lion(0.1), om.muon(0.1, axes={"bias": None, "*": "io"})):
        carried, report = om.carry_state(state, tx, params)
        assert fates(report, kind="average") == {"converted"}
        averages = jax.tree.leaves(carried, is_leaf=lambda node: isinstance(node, om.EmaState))[0].average
        np.testing.assert_array_equal(averages["hidden"], state[1].signal[0].average["hidden"])
        with pytest.raises(ValueError, match="'hidden', average: tx wants it"):
            om.carry_state(state, tx, params, strict=True)
    params, state = begun(om.lion(0.1))
    carried, report = om.carry_state(state, om.adam(0.1), params)
    alike(carried[1], om.adam(0.1).init(params)[1])
    assert fates(report, kind="count for bias correction") == {"fresh"}
    assert int(carried[2].count) == 3  # of the schedule


def rank_one(learning_rate):
    """Adam, with second moments of rank one."""
    second = om.chain(om.square(), om.factored(0.9, {"bias": None, "*": "io"}), om.debias(0.9), om.root(1e-8))
    return om.chain(
        om.divide(om.chain(om.ema(0.9), om.debias(0.9)), by=second), om.scale_by_learning_rate(learning_rate)
    )


@pytest.mark.parametrize("make", [optax.adabelief, rank_one])
def test_nothing_is_divided_by_a_fresh_moment(make):
    """An average over the root of the square of one gradient would have no bound: a run begins anew."""
    params, state = begun(make(0.1))
    carried, report = om.carry_state(state, om.adam(0.1), params)
    alike(carried[1], om.adam(0.1).init(params)[1])
    assert {row.why for row in report if row.kind == "first moment"} == {
        "divided by second moment, which is fresh"
    }


def test_bases_are_kept_beside_fresh_moments():
    params, state = begun(om.shampoo(0.1, axes={"bias": None, "*": "io"}))
    tx = om.soap(0.1, axes={"bias": None, "*": "io"})
    report = om.carry_state(state, tx, params)[1]
    assert fates(report, kind="left basis") == {"kept"}
    assert fates(report, kind="second moment", path="stacks/6x4") == {"fresh"}
    assert fates(report, kind="first moment", path="stacks/6x4") == {"fresh"}


def test_counts_follow_their_moments():
    """Each average that is corrected has its own count: a fresh one begins at 0 beside one that goes on."""
    params, state = begun(om.rmsprop(0.1, decay=0.9, bias_correction=True))
    carried, report = om.carry_state(state, om.adam(0.1), params)
    divide = carried[1]
    assert (int(divide.signal[1].debias_count), int(divide.by[2].debias_count)) == (0, 3)
    alike(divide.by[1].average, state[1].by[0][1].average)
    assert fates(report, kind="first moment") == {"fresh"}


def test_moments_that_nobody_counted_are_used_as_they_are():
    theirs, ours = optax.rmsprop(0.1), om.rmsprop(0.1, bias_correction=True)
    params, state = begun(theirs)
    carried, report = om.carry_state(state, ours, params)
    assert "no correction, as before" in str(report)
    found, expected = train(ours, params, carried, [7, 8])[0], train(theirs, params, state, [7, 8])[0]
    rounding.close(found, expected)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_count_at_its_maximum_corrects_nothing(ahead):
    """Moments that nobody counted have such a count."""
    tx, g = om.debias(0.9, ahead=ahead), jnp.array([1.0, -2.0])
    state = jax.tree.map(lambda _: jnp.int32(2**31 - 1), tx.init(g))
    alike(tx.update(g, state)[0], g)


# What is asked for


def counts(state, name):
    return {int(count) for _, count in optax.tree.get_all_with_path(state, name)}


def test_some_leaves_begin_anew():
    """Their moments; the count of a part goes on if one of its leaves does, and begins anew if none does."""
    tx = om.adamw(0.1)
    params, state = begun(tx)
    rules = {"head": True, "*": False}
    reset, report = om.carry_state(state, tx, params, fresh=rules, strict=True)
    blank = tx.init(params)
    for found, old, start in zip(*map(jax.tree.leaves, (reset, state, blank)), strict=True):
        np.testing.assert_array_equal(found, start if found.shape == SHAPES["head"] else old)
    assert fates(report, path="head", why="as asked for") == {"fresh"}
    assert counts(reset, "debias_count") == {3}
    parts = om.partition({"head": "new", "*": "old"}, {"new": tx, "old": tx})
    params, state = begun(parts)
    reset, report = om.carry_state(state, parts, params, fresh=lambda path, shape: path == "head")
    part = reset.inner_states["new"].inner_state
    assert counts(part, "debias_count") == {0}
    assert counts(part, "count") == {3}  # of a schedule
    alike(reset.inner_states["old"], state.inner_states["old"])
    assert fates(report, path="head", kind="second moment") == {"fresh"}
    _, report = om.carry_state(state, tx, params, fresh=True)
    assert "no place" not in str(report)
    with pytest.warns(UserWarning, match="carry_state: no leaf matches the rule 'haed'"):
        om.carry_state(state, parts, params, fresh={"haed": True, "*": False})


@pytest.mark.parametrize("library", [om, optax])
@pytest.mark.parametrize("outputs", [1, 2])
def test_leaves_begin_anew_in_an_open_window(library, outputs):
    """A head that is initialised again, or has other outputs, has no gradients of the old one in its mean."""
    adam, params = om.adam(0.1), {"body": jnp.ones(3), "head": jnp.ones((3, 1))}
    around = {om: om.multi_steps(adam, 2), optax: optax.MultiSteps(adam, 2).gradient_transformation()}
    tx = around[library]
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    new = params | {"head": jnp.ones((3, outputs))}
    carried, report = om.carry_state(state, tx, new, fresh={"head": True, "*": False}, strict=True)
    mean = carried.mean if library is om else carried.acc_grads
    np.testing.assert_array_equal(mean["head"], jnp.zeros((3, outputs)))
    np.testing.assert_array_equal(mean["body"], params["body"])
    assert fates(report, path="head", why="as asked for") == {"fresh"}


NAMES = {"hidden": "backbone/0/hidden", "bias": "backbone/0/bias"}


@rounding.in_float32
@pytest.mark.parametrize("renamed", [NAMES, lambda path: NAMES.get(path, path)], ids=["mapping", "function"])
def test_leaves_have_new_names(renamed):
    """And moments in codes, whose rules are those of the old names."""
    old = om.adamw(0.1, state={"first/hidden": om.codecs.Signed8(mapping="linear"), "*": None})
    shapes = LARGE | {"head": (4, 3)}
    params, state = begun(old, 2, shapes)
    nested = {"backbone": {"0": {name: params[name] for name in ("hidden", "bias")}}, "head": params["head"]}
    tx = om.skip_nonfinite(om.adamw(0.1))
    found, report = om.carry_state(state, tx, nested, written_by=old, renamed=renamed, strict=True)
    expected, _ = om.carry_state(state, om.adamw(0.1), params, written_by=old, strict=True)
    assert fates(report, path="backbone/0/hidden", kind="first moment") == {"converted"}
    for new, before in zip(moments(found), moments(expected), strict=True):
        alike(new["backbone"]["0"] | {"head": new["head"]}, before)
    _, report = om.carry_state(state, tx, nested, written_by=old)
    assert fates(report, path="backbone/0/hidden", kind="second moment") == {"fresh"}


def test_new_names_that_are_none():
    tx = om.adam(0.1)
    params, state = begun(tx)
    with pytest.raises(ValueError, match=r"carry_state: renamed has 'hiden', .* Similar paths: 'hidden'"):
        om.carry_state(state, tx, params, renamed={"hiden": "new"})
    with pytest.raises(ValueError, match="carry_state: renamed gives both 'bias' and 'head' the path 'head'"):
        om.carry_state(state, tx, params, renamed={"bias": "head"})


def test_a_leaf_grows_anywhere():
    """New columns first, and new layers in between."""
    tx = om.adam(0.1)
    params, state = begun(tx)
    places = {"head": np.s_[:, 2:], "hid*": np.s_[[0, 1, 2, 4, 5, 7]]}
    grown = params | {"head": jnp.ones((4, 5)), "hidden": jnp.ones((8, 4))}
    there, report = om.carry_state(state, tx, grown, grown=places)
    for old, new in zip(moments(state), moments(there), strict=True):
        np.testing.assert_array_equal(new["head"], np.pad(old["head"], ((0, 0), (2, 0))))
        np.testing.assert_array_equal(np.delete(new["hidden"], [3, 6], axis=0), old["hidden"])
        assert not np.any(np.asarray(new["hidden"])[[3, 6]])
    assert fates(report, path="head", kind="first moment") == {"converted"}
    for place, words in (
        (np.s_[:, 3:], r"has shape \(4, 2\)"),
        (np.s_[[9]], "does not exist"),
        (np.s_[:, [0, 1, 1]], "has an index twice"),
    ):
        with pytest.raises(ValueError, match=rf"'head', .* its place in \(4, 5\) .*{words}"):
            om.carry_state(state, tx, grown, grown={"head": place}, strict=True)


def test_a_window_of_weights_goes_on():
    """optax's window gives all gradients one weight: what has others is not carried there in silence."""
    ours = om.multi_steps(om.sgd(0.1), 3)
    theirs = optax.MultiSteps(om.sgd(0.1), 3).gradient_transformation()
    params = tree(0)
    state = ours.init(params)
    for k in (1, 2):
        _, state = ours.update(tree(k), state, params, weight=float(k))
    with pytest.raises(
        ValueError, match="weight of the window of multi_steps: in tx the gradients have equal"
    ):
        om.carry_state(state, theirs, params, strict=True)
    there, _ = om.carry_state(state, theirs, params)
    back, report = om.carry_state(there, ours, params)
    assert fates(report, kind="weight of the window of multi_steps") == {"converted"}
    assert (float(state.weight), float(back.weight)) == (3, 2)
    without, _ = om.carry_state(state._replace(weight=None), ours, params, strict=True)
    alike(without._replace(mean=back.mean), back)


# Random trees


def grown_tree(rng, depth=0):
    """A small tree of dicts, lists, tuples and arrays, with None here and there."""
    if depth == 3 or (depth and rng.random() < 0.4):
        shape = tuple(rng.integers(1, 3, rng.integers(0, 3)))
        return None if rng.random() < 0.1 else jnp.asarray(rng.standard_normal(shape), jnp.float32)
    children = [grown_tree(rng, depth + 1) for _ in range(rng.integers(1, 4))]
    kind = rng.integers(3)
    return [dict(zip("abc", children, strict=False)), children, tuple(children)][kind]


CHAINS = [
    om.adam(0.1),
    optax.adamw(0.1),
    om.lion(0.1),
    om.multi_steps(om.sgd(0.1, 0.9), 2),
    optax.chain(om.clip_by_global_norm(1.0), om.skip_nonfinite(om.rmsprop(0.1, momentum=0.9))),
    optax.inject_hyperparams(optax.nadam)(0.1),
]


@pytest.mark.parametrize(
    "trees", [range(10), *np.split(np.arange(10, 200), 10)], ids=lambda r: f"{r[0]}-{r[-1]}"
)
@pytest.mark.examples("0-9")
@rounding.in_float32
def test_random_trees(trees):
    """Of any tree: a state as `tx` has it and a row for every array; the same optimizer has it to the bit.

    The first ten are alone, and of the others nineteen are together.
    """
    roots = [grown_tree(np.random.default_rng(seed)) for seed in trees]
    pairs = np.random.default_rng(trees[0])
    for k, params in enumerate([[root] for root in roots] if trees[0] == 0 else [roots]):
        old, new = (CHAINS[k] for k in pairs.permutation(len(CHAINS))[:2])
        state = jax.tree.map(lambda x: x + 1, old.init(params))
        there, report = om.carry_state(state, new, params)
        blank = jax.eval_shape(new.init, params)
        assert jax.tree.map(jnp.result_type, there) == jax.tree.map(jnp.result_type, blank), trees[k]
        assert {row.path for row in report} >= set(leaf_paths(params)) - {""}, trees[k]
        same, _ = om.carry_state(state, old, params, strict=True)
        alike(same, state)


# Pairs


RECIPES = {entry.id: entry for entry in catalog.RECIPES}
PAIRS = {
    **RECIPES,
    "int8": catalog.Entry("int8", lambda om: om.adamw(0.1, state={"*": om.codecs.BFloat16()}), None),
    "optax-adamw": catalog.Entry("optax-adamw", lambda om: optax.adamw(0.1), None),
    "optax-rmsprop": catalog.Entry("optax-rmsprop", lambda om: optax.rmsprop(0.1, momentum=0.9), None),
    "optax-muon": catalog.Entry("optax-muon", lambda om: optax.contrib.muon(0.1), None),
    "optax-adafactor": catalog.Entry("optax-adafactor", lambda om: optax.adafactor(0.1), None),
    "wrapped": catalog.Entry(
        "wrapped", lambda om: om.skip_nonfinite(om.multi_steps(probes.probe(om.adamw(0.1)), 2)), None
    ),
}
MATRICES = {"hidden": (3, 4), "head": (3, 4)}


def partners(name):
    """The optimizer itself, one of optax, and two more, others for each."""
    drawn = np.random.default_rng([*name.encode()]).permutation(list(PAIRS))[:2]
    return dict.fromkeys([name, "optax-adamw", *map(str, drawn)])


@pytest.mark.examples("adamw", "muon", "optax-rmsprop", "wrapped")
@rounding.in_float32
@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_carries_or_says_why_not(name):
    """The state is one of the other optimizer, which takes a step with it; every array has a row.

    Without losses `strict` carries the same over; with them it refuses, and names an array.
    """
    old = PAIRS[name].build()
    params = tree(0, MATRICES)
    _, state = old.update(params, old.init(params), params)
    for other in partners(name):
        tx = PAIRS[other].build()
        carried, report = om.carry_state(state, tx, params, written_by=old)
        blank = jax.eval_shape(tx.init, params)
        assert jax.tree.structure(carried) == jax.tree.structure(blank), other
        for x, y in zip(jax.tree.leaves(carried), jax.tree.leaves(blank), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype), other
        for row in report:
            assert row.why or row.fate == "kept", (other, row)
            assert not row.matters or row.path or "count" in row.kind, (other, row)
        jax.eval_shape(tx.update, params, carried, params)
        try:
            again, _ = om.carry_state(state, tx, params, written_by=old, strict=True)
        except ValueError as error:
            first = str(error).split("\n")[1]
            assert any(row.name in first for row in report), (other, first)
        else:
            assert not report.lost, other
            alike(again, carried)
        if other == name:
            assert not report.lost


# Earlier versions


class DebiasState(NamedTuple):
    """As 0.1.0 had it, and so the following."""

    count: Any


class DampenState(NamedTuple):
    count: Any


class DecayState(NamedTuple):
    count: Any
    weight_decay: Any


class LearningRateState(NamedTuple):
    count: Any
    learning_rate: Any


def as_first(state, kept):
    """A state of today in the types of 0.1.0, where constants had no state."""
    had = "".join(kept)

    def old(node):
        if isinstance(node, om.DebiasState | om.DampenState):
            return {om.DebiasState: DebiasState, om.DampenState: DampenState}[type(node)](*node)
        if isinstance(node, om.LearningRateState):
            return LearningRateState(*node) if ".learning_rate" in had else optax.EmptyState()
        if isinstance(node, om.DecayState):
            return DecayState(*node) if ".weight_decay" in had else optax.EmptyState()
        return node

    kinds = om.DebiasState | om.DampenState | om.LearningRateState | om.DecayState
    return jax.tree.map(old, state, is_leaf=lambda node: isinstance(node, kinds))


def without_rates(state):
    """Constants had no counts in 0.1.0."""
    rates = om.LearningRateState | om.DecayState
    return jax.tree.map(
        lambda node: None if isinstance(node, rates) else node,
        state,
        is_leaf=lambda node: isinstance(node, rates),
    )


@rounding.in_float32
@pytest.mark.examples("states-0.1.0")
@pytest.mark.parametrize("path", ecosystem.LAYOUTS, ids=[path.stem for path in ecosystem.LAYOUTS])
def test_states_of_earlier_versions(path):
    """In their own types, with nothing lost, into today's; and into another wrapper and back."""
    kept = json.loads(path.read_text())
    for name, arrays in kept["states"].items():
        tx = ecosystem.STORED[name]
        params = ecosystem.read(kept["params"][name], ecosystem.weights())
        state = ecosystem.read(arrays, tx.init(params))
        old = as_first(state, arrays) if path.stem == "states-0.1.0" else state
        carried, _ = om.carry_state(old, tx, params, written_by=tx, strict=True)
        alike(without_rates(carried), without_rates(state))
        wrapper = om.skip_nonfinite(om.partition({"*": "all"}, {"all": tx}))
        wrapped, _ = om.carry_state(old, wrapper, params, written_by=tx, strict=True)
        alike(om.carry_state(wrapped, tx, params, written_by=tx, strict=True)[0], carried)
