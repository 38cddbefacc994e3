"""A run that changes in mid-training goes on as if it had not, or as if it had from the start."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import rounding
from flax import nnx

import optimorph as om
from optimorph.linalg import NewtonSchulz

pytestmark = pytest.mark.usefixtures("float64")
MASK = {"matrix": True, "vector": False, "scalar": True}


def schedule(count):
    return 0.1 / (1.0 + count.astype(float))


def tree(rng):
    shapes = {"matrix": (6, 4), "vector": (5,), "scalar": ()}
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def train(tx, params, state, rng, steps):
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(tree(rng), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def both_ways(theirs, ours, edit=lambda state: state):
    """Five steps in optax, then ten in each, the same gradients: two trees of parameters."""
    with jax.numpy_dtype_promotion("standard"):  # optax's own code does not run under strict promotion
        rng = np.random.default_rng(0)
        params = tree(rng)
        params, state = train(theirs, params, theirs.init(params), rng, 5)
        state = edit(state)
        converted = om.carry_state(state, ours, params, strict=True)[0]
        assert jax.tree.structure(converted) == jax.tree.structure(ours.init(params))
        ends = [train(theirs, params, state, np.random.default_rng(1), 10)]
        ends.append(train(ours, params, converted, np.random.default_rng(1), 10))
    return [end for end, _ in ends]


def same(theirs, ours, edit=lambda state: state):
    expected, found = both_ways(theirs, ours, edit)
    rounding.close(found, expected, condition=NewtonSchulz("jordan").table.slope)


ALIKE = {
    "sgd": {},
    "sgd-momentum": {"momentum": 0.9},
    "sgd-nesterov": {"momentum": 0.9, "nesterov": True},
    "adagrad": {},
    "rmsprop": {"initial_scale": 0.5},
    "rmsprop-momentum": {"momentum": 0.9, "bias_correction": True},
    "rmsprop-centered": {"centered": True, "eps": 1e-2},
    "rmsprop-centered-corrected": {"centered": True, "bias_correction": True, "eps": 1.0},
    "adam": {},
    "adam-numbers": {"b1": 0.8, "b2": 0.9, "eps_root": 1e-3},
    "nadam": {},
    "adamw": {"weight_decay": 0.1, "mask": MASK},
    "adamw-decay-schedule": {"weight_decay": schedule},
    "adamw-decay-schedule-mask": {"weight_decay": schedule, "mask": MASK},
    "nadamw": {"weight_decay": 0.1},
    "lion": {"weight_decay": 0.1},
    "ademamix": {"weight_decay": 0.1, "b3": 0.99},
    "ademamix-schedules": {"b3": lambda t: 0.9 + 0.001 * t, "alpha": lambda t: 0.1 * t},
}


@pytest.mark.examples("adamw-constant", "sgd-momentum-schedule")
@pytest.mark.parametrize("rate", [0.01, schedule], ids=["constant", "schedule"])
@pytest.mark.parametrize("name", ALIKE)
def test_the_run_goes_on(name, rate):
    recipe, arguments = name.split("-")[0], ALIKE[name]
    package = optax if hasattr(optax, recipe) else optax.contrib
    same(getattr(package, recipe)(rate, **arguments), getattr(om, recipe)(rate, **arguments))


def muons(nesterov, rate, **arguments):
    """optax's Muon and what is nearest to it here; optax adds its eps to the norms of matrices too."""
    others = (om.nadamw if nesterov else om.adamw)(rate, weight_decay=0.0, eps=1e-20)
    return (
        optax.contrib.muon(rate, nesterov=nesterov, eps=1e-20, **arguments),
        om.muon(
            rate,
            nesterov=nesterov,
            others=others,
            orthogonalizer=NewtonSchulz("jordan", iteration="standard"),
            scale="keller",
            axes={"matrix": "io"},
            **arguments,
        ),
    )


def test_muon_goes_on():
    """Without nesterov the polar factor ignores the bias correction, and the rules are the same."""
    same(*muons(False, 0.02, weight_decay=0.1))
    same(*muons(False, schedule))


def test_muon_with_nesterov_goes_on_once_the_bias_is_gone():
    def late(state):
        def aged(node):
            return node._replace(count=node.count + 10_000) if is_muon(node) else node

        def is_muon(node):
            return isinstance(node, optax.contrib.MuonState)

        return jax.tree.map(aged, state, is_leaf=is_muon)

    same(*muons(True, 0.02), edit=late)
    expected, found = both_ways(*muons(True, 0.02))
    assert np.max(np.abs(found["matrix"] - expected["matrix"])) > 1e-4  # the rule does differ before


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
        lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("optimizer", tx)),
        lambda tx: optax.masked(tx, MASK),
        lambda tx: optax.partition({"all": tx, "none": optax.set_to_zero()}, dict.fromkeys(MASK, "all")),
    ],
    ids=["chain", "named_chain", "masked", "partition"],
)
def test_inside_what_holds_nothing(around):
    same(around(optax.adamw(schedule)), around(om.adamw(schedule)))


@pytest.mark.parametrize(
    "front",
    [
        optax.zero_nans(),
        optax.snapshot("updates", lambda updates: updates),
        optax.snapshot("norm", lambda updates: {"norm": optax.tree.norm(updates)}),
        optax.monitor({"norm": optax.tree.norm}),
        optax.monitor({"average": optax.ema(0.9)}),
        optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, decay=0.9)}),
    ],
    ids=["zero_nans", "snapshot", "snapshot-number", "monitor", "monitor-average", "monitor-number"],
)
def test_behind_what_only_looks(front):
    """What is seen of gradients is no moment, so what comes after it still sees gradients."""
    plain, behind = (om.chain(before, om.lion(0.1)) for before in (optax.identity(), front))
    params = tree(np.random.default_rng(0))
    with jax.numpy_dtype_promotion("standard"):
        states = [tx.update(params, tx.init(params), params)[1] for tx in (plain, behind)]
        for state, tx in ((states[0], behind), (states[1], plain), (states[1], behind)):
            after = om.carry_state(state, tx, params, strict=True)[0]
            for a, b in zip(jax.tree.leaves(after[1]), jax.tree.leaves(states[1][1]), strict=True):
                np.testing.assert_array_equal(a, b)


def test_integers_of_a_foreign_state_are_no_moments():
    seen = collections.namedtuple("SeenState", "signs")
    front = optax.GradientTransformation(
        lambda params: seen(jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.int32), params)),
        lambda gs, state, params=None: (gs, seen(jax.tree.map(lambda g: jnp.sign(g).astype(int), gs))),
    )
    params, tx = tree(np.random.default_rng(0)), om.lion(0.1)
    _, state = tx.update(params, tx.init(params), params)
    behind = optax.chain(front, tx)
    after, _ = om.carry_state((front.init(params), state), tx, params, strict=True)
    again, _ = om.carry_state(state, behind, params)
    for a, b, c in zip(*map(jax.tree.leaves, (after, again[1], state)), strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)


def test_dtypes_are_those_of_tx():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(np.random.default_rng(0)))
    state = optax.adam(0.1).init(params)
    tx = om.adam(0.1, mu_dtype=jnp.bfloat16)
    converted = om.carry_state(state, tx, params, strict=True)[0]
    assert jax.tree.map(jnp.result_type, converted) == jax.tree.map(jnp.result_type, tx.init(params))


def test_nothing_is_shared():
    """Both states can be donated: neither the two counts nor the moments are one array under two names."""
    params = tree(np.random.default_rng(0))
    state = optax.adam(0.1).init(params)
    converted = om.carry_state(state, om.adam(0.1), params, strict=True)[0]
    jax.jit(om.adam(0.1).update, donate_argnums=1)(params, converted, params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_inside_jit_and_from_shapes():
    params, tx = tree(np.random.default_rng(0)), om.adamw(schedule)
    state = optax.adamw(schedule).init(params)
    inside = jax.jit(lambda s, p: om.carry_state(s, tx, p, strict=True)[0])(state, params)
    outside = om.carry_state(state, tx, jax.eval_shape(lambda: params), strict=True)[0]
    assert jax.tree.all(jax.tree.map(np.array_equal, inside, outside))


def test_from_an_nnx_optimizer():
    """Its state has boxes around its arrays; so has the one that they are put into."""
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0), param_dtype=float)
    theirs = nnx.Optimizer(model, optax.adamw(schedule), wrt=nnx.Param)
    gradient = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    with jax.numpy_dtype_promotion("standard"):
        theirs.update(model, gradient)
        ours = nnx.Optimizer(model, om.adamw(schedule), wrt=nnx.Param)
        converted = om.carry_state(theirs.opt_state, ours.tx, nnx.state(model, nnx.Param), strict=True)[0]
        structure = jax.tree.structure(ours.opt_state)
        ours.opt_state = nnx.data(jax.tree.unflatten(structure, jax.tree.leaves(converted)))
        other = nnx.clone(model)
        theirs.update(model, gradient)
        ours.update(other, gradient)
    rounding.close(other.kernel[...], model.kernel[...])


@pytest.mark.parametrize(
    ("theirs", "ours", "counts"),
    [
        (optax.adam(0.1), om.adam(schedule), {"count": 3}),
        (optax.adam(schedule), om.adam(0.1), {"count": 3}),
        (optax.adamw(0.1), om.adamw(0.1, weight_decay=schedule), {"count": 3, "decay_count": 3}),
        (optax.sgd(schedule), om.sgd(schedule, weight_decay=0.1), {"count": 3, "decay_count": 3}),
        (optax.sgd(0.1), om.sgd(schedule), {"count": 0}),
    ],
    ids=["a schedule now", "a schedule before", "of decay", "from the other", "nothing counted"],
)
def test_counts_of_schedules(theirs, ours, counts):
    """One that optax had as a constant counts all steps that optax counted."""
    params = tree(np.random.default_rng(0))
    state = theirs.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            _, state = theirs.update(params, state, params)
    state = om.carry_state(state, ours, params, strict=True)[0]
    for name, count in counts.items():
        assert int(optax.tree.get(state, name)) == count
        reading = {"count": "last_learning_rate", "decay_count": "last_weight_decay"}[name]
        assert optax.tree.get(state, reading) > 0  # of the first step until the next is taken


PARTLY = {
    "chain": lambda last: om.chain(om.muon(0.1), last),
    "sum": lambda last: om.add(last, om.muon(schedule)),
    "mixture": lambda last: om.mix(0.5, om.soap(schedule), last),
}


@pytest.mark.parametrize("around", PARTLY.values(), ids=[*PARTLY])
def test_counts_beside_parts_stay_where_they_are(around):
    """Where matrices have counts of their own, that of all leaves is another, of half the steps."""
    tx = around(om.multi_steps(om.scale_by_learning_rate(schedule), 2))
    params = {"hidden": {"kernel": jnp.eye(4)}, "head": {"kernel": jnp.ones((4, 2))}}
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(params, state, params)
    after, report = om.carry_state(state, tx, params, strict=True)
    assert {row.fate for row in report} == {"kept"}
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("wrap", [lambda tx: tx, om.skip_nonfinite], ids=["chain", "skip_nonfinite"])
def test_behind_clipping(wrap):
    """What optax has nothing of begins anew; of this library's own states it goes on."""
    params = tree(np.random.default_rng(0))
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    with jax.numpy_dtype_promotion("standard"):
        _, state = theirs.update(params, theirs.init(params), params)
    tx = wrap(optax.chain(om.clip_by_global_norm(1.0), om.adam(0.1)))
    after = om.carry_state(state, tx, params, strict=True)[0]
    assert jax.tree.structure(after) == jax.tree.structure(tx.init(params))
    assert float(optax.tree.get(after, "factor")) == 1
    _, moved = tx.update(params, after, params)
    again = om.carry_state(moved, tx, params, strict=True)[0]
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(a, b)


@rounding.in_float32
def test_eight_bits_with_scales_in_bfloat16():
    """As `in_bfloat16` around them stores them."""
    codecs = {"first/*": om.codecs.Signed8(), "second/*": om.codecs.Nonneg8()}
    params, tx = tree(np.random.default_rng(0)), om.in_bfloat16(om.adam(0.1, state=codecs))
    _, state = tx.update(params, tx.init(params), params)
    after, _ = om.carry_state(state, tx, params, written_by=tx, strict=True)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@rounding.in_float32
def test_second_moments_in_bfloat16():
    params, tx = tree(np.random.default_rng(0)), om.adam(0.1, nu_dtype="bfloat16")
    state = optax.adam(0.1).init(params)
    with jax.numpy_dtype_promotion("standard"):
        _, state = optax.adam(0.1).update(params, state, params)
    after = om.carry_state(state, tx, params, strict=True)[0]
    assert jax.tree.structure(after) == jax.tree.structure(tx.init(params))
    for key, moment in optax.tree.get(after, "inner").average.items():
        assert moment.dtype == (jnp.bfloat16 if moment.ndim else jnp.float32)
        np.testing.assert_allclose(np.asarray(moment, np.float32), state[0].nu[key], rtol=2**-8)


REFUSED = {
    "another optimizer": (
        lambda: (optax.adabelief(0.1), om.adam(0.1)),
        ["'matrix', second moment: tx wants it", "second moment of the surprise", "belongs to adabelief."],
    ),
    "an open window": (
        lambda: (started(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()), om.adam(0.1)),
        ["'matrix', mean of multi_steps: gradients of a window that is not full"],
    ),
    "a type that is not known": (
        lambda: (optax.adam(0.1), optax.novograd(0.1)),
        ["'matrix', ScaleByNovogradState.mu: tx wants it"],
    ),
    "one more transform": (
        lambda: (optax.adam(0.1), optax.chain(om.adam(0.1), optax.trace(0.9))),
        ["'matrix', velocity of updates: tx wants it"],
    ),
    "a velocity of other things": (
        lambda: (optax.sgd(0.1, 0.9), om.rmsprop(0.1, momentum=0.9)),
        ["'matrix', velocity: the state has it", "'matrix', velocity of updates: tx wants it"],
    ),
    "no moment": (
        lambda: (optax.rmsprop(0.1), om.adam(0.1)),
        ["'matrix', first moment: tx wants it", "belongs to rmsprop."],
    ),
    "no place": (
        lambda: (optax.adam(0.1), om.rmsprop(0.1)),
        ["'vector', first moment", "no place", "adam, adamw, nadam or nadamw"],
    ),
    "no velocity": (
        lambda: (optax.sgd(0.1), om.sgd(0.1, 0.9)),
        ["'matrix', velocity: tx wants it", "sgd without momentum"],
    ),
    "a velocity": (lambda: (optax.sgd(0.1, 0.9), om.sgd(0.1)), ["'scalar', velocity", "no place"]),
    "a mean": (
        lambda: (optax.rmsprop(0.1, centered=True), om.rmsprop(0.1)),
        ["'matrix', mean of a centered RMSprop", "no place", "rmsprop with centered"],
    ),
    "a sum": (lambda: (optax.adagrad(0.1), om.rmsprop(0.1)), ["'matrix', sum of squares", "adagrad"]),
    "a correction": (
        lambda: (optax.rmsprop(0.1, bias_correction=True), om.rmsprop(0.1)),
        ["count for bias correction: the state has it", "bias_correction"],
    ),
    "dampening": (
        lambda: (optax.sgd(0.1, 0.9), om.sgd(0.1, 0.9, dampening=0.1)),
        ["count for dampening: tx wants it", "optax has no dampening"],
    ),
    "two moments": (
        lambda: (optax.chain(optax.adam(0.1), optax.adam(0.1)), om.adam(0.1)),
        ["'matrix', first moment of updates: the state has it, tx has no place for it"],
    ),
    "other matrices": (
        lambda: (optax.contrib.muon(0.1), om.muon(0.1, axes={"*": None})),
        ["'matrix', average: the state has it", "{'matrix': 'io'}", "'matrix', second moment: tx wants it"],
    ),
}


@pytest.mark.parametrize(("pair", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(pair, words):
    params = tree(np.random.default_rng(0))
    theirs, ours = pair()
    with jax.numpy_dtype_promotion("standard"):
        refuse(theirs.init(params), ours, params, *words)


def started(tx):
    """It begins with the state after a step."""
    return optax.GradientTransformation(
        lambda params: tx.update(params, tx.init(params), params)[1], tx.update
    )


def refuse(state, tx, params, *words):
    with pytest.raises(ValueError) as caught:
        om.carry_state(state, tx, params, strict=True)
    for word in ("carry_state", *words):
        assert word in str(caught.value)


def test_other_trees_are_refused():
    params, tx = tree(np.random.default_rng(0)), om.adam(0.1)
    state = optax.adam(0.1).init(params)
    refuse(state, tx, params | {"new": jnp.ones(3)}, "'new', first moment: tx wants it")
    refuse(state, tx, {"matrix": params["matrix"]}, "'scalar', second moment", "no place")
    refuse(state, tx, params | {"matrix": jnp.ones((4, 6))}, "'matrix', first moment", "(6, 4)", "(4, 6)")
    refuse(
        optax.masked(optax.adam(0.1), MASK).init(params), tx, params, "'vector', first moment: tx wants it"
    )


def test_what_is_no_state_is_refused():
    """Without this all moments would be fresh, in silence."""
    refuse(None, om.adam(0.1), tree(np.random.default_rng(0)), "state is None", "tx.init(params)")


def test_a_checkpoint_without_its_types_is_refused():
    params = tree(np.random.default_rng(0))
    adam, _ = optax.adam(0.1).init(params)
    refuse([adam._asdict(), None], om.adam(0.1), params, "array of shape ()", "optax's")
    refuse([[*adam], None], om.adam(0.1), params, "array of shape ()", "Restore a checkpoint")


def test_leaves_of_small_integers_are_no_codes():
    """Moments of leaves that are not trained have their dtype, whichever codecs the state has."""
    params = {"w": jnp.ones((64, 128)), "n": jnp.zeros(3, jnp.uint8), "b": jnp.zeros(2, bool)}
    tx = om.compress_state(optax.sgd(0.1, 0.9))
    state = tx.init(params)
    carried, report = om.carry_state(state, tx, params, written_by=tx)
    assert report.lost == ()
    jax.tree.map(np.testing.assert_array_equal, carried, state)
