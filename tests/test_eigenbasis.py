"""In the eigenbasis of the gradient's factors: what does not matter, what it is good for, what it costs."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from jax.sharding import AbstractMesh

import optimorph as om
from optimorph._distributed.balance import balanced
from optimorph.linalg import Axes
from optimorph.linalg._kronecker import orthogonal_iteration

ADAM = om.divide(om.ema(0.9), by=om.chain(om.square(), om.ema(0.95), om.root(1e-2)))


def drawn(seed, shape=(5, 5), dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def trained(tx, shapes, count=6, state=None, first=0):
    """The updates of some steps, and the state."""
    params = {name: drawn(99, shape) for name, shape in shapes.items()}
    state = tx.init(params) if state is None else state
    update, found = jax.jit(tx.update), []
    for step in range(first, first + count):
        gs = {name: drawn((step, k), shape) for k, (name, shape) in enumerate(shapes.items())}
        updates, state = update(gs, state, params)
        found.append(updates)
    return found, state


def with_bases(state, change):
    """A state of `in_eigenbasis` in other bases."""
    bases = (jax.tree.map(change, basis) for basis in (state.left_basis, state.right_basis))
    return state._replace(**dict(zip(("left_basis", "right_basis"), bases, strict=True)))


@pytest.mark.parametrize("kl", [False, True])
@rounding.in_float64
def test_signs_and_order_of_eigenvectors_do_not_matter(kl):
    """Of signs at any step; of the order before second moments know one."""
    tx = om.in_eigenbasis(ADAM, decay=0.9, every=20, kl=kl, axes={"*": "io"})
    _, state = trained(tx, {"w": (5, 5)}, 1)
    want, _ = trained(tx, {"w": (5, 5)}, 4, state, 1)
    for change in (lambda q: -q, lambda q: q * jnp.array([1.0, -1, 1, 1, -1]), lambda q: q[..., ::-1]):
        got, _ = trained(tx, {"w": (5, 5)}, 4, with_bases(state, change), 1)
        rounding.close(got, want, condition=1e3)


@rounding.in_float64
def test_first_moments_stay_in_the_parameters_basis():
    """Whatever the bases are, the average is that of the gradients but for the first."""
    tx = om.in_eigenbasis(ADAM, decay=0.9, every=1, axes={"*": "io"})
    _, state = trained(tx, {"w": (5, 5)}, 6)
    average = 0.0
    for step in range(1, 6):
        average = 0.9 * average + 0.1 * drawn((step, 0))
    rounding.close(state.inner.signal.average["stacks"]["5x5"][0], average, condition=10)


@rounding.in_float64
def test_bases_are_those_of_the_factors():
    """Orthogonal, and after many iterations eigenvectors, also of a singular matrix and of zero."""
    full, half = drawn(0, (1, 6, 6)), drawn(1, (1, 6, 3))
    for x in (full, half, jnp.zeros((1, 6, 6))):
        p = x @ x.mT
        q, _ = orthogonal_iteration(p, jnp.eye(6)[None], 2000, sort=True)
        rounding.close(q.mT @ q, jnp.eye(6)[None], condition=10)
        values = (q.mT @ p @ q)[0]
        rounding.close(jnp.diag(values), jnp.linalg.eigvalsh(p)[0, ::-1], condition=1e3)
        assert bool(jnp.all(jnp.abs(values - jnp.diag(jnp.diag(values))) <= 1e-9 * jnp.trace(p[0]) + 1e-30))


@rounding.in_float64
def test_order_of_columns_comes_with_the_bases():
    p = jnp.diag(jnp.array([1.0, 3.0, 2.0]))[None]
    q, order = orthogonal_iteration(p, jnp.eye(3)[None], sort=True)
    assert order.tolist() == [[1, 2, 0]]
    rounding.close(jnp.abs(q[0]), jnp.eye(3)[:, jnp.array([1, 2, 0])])


@rounding.in_float64
def test_blocks_are_matrices_of_their_own():
    """Of equal sizes and of others: as if each were a leaf."""
    tx = om.in_eigenbasis(ADAM, decay=0.9, every=2, block_size=4, max_dim=4, axes={"*": "io"})
    plain = om.in_eigenbasis(ADAM, decay=0.9, every=2, max_dim=4, axes={"*": "io"})
    for width, ends in ((8, [4]), (7, [4])):
        params = {"w": drawn(0, (3, width))}
        parts = dict(enumerate(jnp.split(params["w"], ends, axis=1)))
        state, alone = tx.init(params), plain.init(parts)
        blocked, separate = jax.jit(tx.update), jax.jit(plain.update)
        for step in range(5):
            g = drawn((1, step), (3, width))
            u, state = blocked({"w": g}, state, params)
            v, alone = separate(dict(enumerate(jnp.split(g, ends, axis=1))), alone, parts)
            rounding.close(u["w"][:, :3], jnp.concatenate([*v.values()], axis=1)[:, :3], condition=1e6)


def test_blocks_of_axes():
    for spec, shape, size, want in (
        ("io", (8, 12), 4, "(2i)(3o)"),
        ("io", (7, 12), 4, "(4+3 i)(3o)"),
        ("io", (4, 4), 4, "io"),
        ("bio", (3, 8, 4), 4, "b(2i)o"),
        ("i(3o)", (4, 24), 4, "i(3o)"),
        ("ioo", (4, 4, 2), 4, "i(2o)o"),
    ):
        assert Axes(spec).in_blocks(shape, size) == Axes(want)


@rounding.in_float64
def test_other_orientation_and_stacks():
    """`oi` is the transpose of `io`, and a stack is several matrices."""
    txs = [om.in_eigenbasis(ADAM, decay=0.9, every=2, axes={"*": spec}) for spec in ("io", "oi", "bio")]
    upright, turned, stacked = (jax.jit(tx.update) for tx in txs)
    params = {"w": drawn(0)}
    many = {"w": jnp.stack([drawn(0)] * 2)}
    transposed = {"w": params["w"].T}
    states = [tx.init(p) for tx, p in zip(txs, (params, transposed, many), strict=True)]
    for step in range(5):
        g = drawn((2, step))
        u, a = upright({"w": g}, states[0], params)
        v, b = turned({"w": g.T}, states[1], transposed)
        w, c = stacked({"w": jnp.stack([g, 2 * g])}, states[2], many)
        states = a, b, c
        rounding.close(v["w"].T, u["w"], condition=1e6)
        rounding.close(w["w"][0], u["w"], condition=1e6)


@rounding.in_float64
def test_a_spread_refresh():
    """Every factor once in `every` steps; all in the first."""
    params = {f"w{k}": drawn((99, k), (4, 4)) for k in range(3)}
    txs = [om.soap(0.1, every=4, spread=spread, axes={"*": "io"}) for spread in (True, False)]
    update, whole = (jax.jit(tx.update) for tx in txs)
    state = txs[0].init(params)
    _, other = whole(params, state, params)
    changes = []
    for step in range(9):
        gs = {f"w{k}": drawn((step, k), (4, 4)) for k in range(3)} if step else params
        _, after = update(gs, state, params)
        if step == 0:
            rounding.close(after, other, condition=1e3)
        changes.append([not np.array_equal(a, b) for a, b in zip(_bases(after), _bases(state), strict=True)])
        state = after
    assert changes[0] == [True] * 6
    assert np.sum(changes[1:], axis=0).tolist() == [2] * 6


@pytest.mark.parametrize("spread", [False, True])
@rounding.in_float64
def test_refreshes_in_the_first_steps(spread):
    """As with `every=1` so long, and then in every third step, all factors or in turn."""
    shapes = {f"w{k}": (4, 4) for k in range(3)}
    make = functools.partial(om.soap, 0.1, spread=spread, axes={"*": "io"})
    got, state = trained(make(every=3, refresh_warmup=4), shapes, 4)
    want, other = trained(make(every=1), shapes, 4)
    rounding.close((got, state), (want, other), condition=1e3)
    changed = []
    for step in range(4, 10):
        _, after = trained(make(every=3, refresh_warmup=4), shapes, 1, state, step)
        changed.append(
            sum(not np.array_equal(a, b) for a, b in zip(_bases(after), _bases(state), strict=True))
        )
        state = after
    assert changed == ([2] * 6 if spread else [0, 0, 6] * 2)


BALANCED = (  # devices, for each size a cost and how many matrices each stack has; turns → work, exchanges
    (2, ((1.0, (1, 1, 1)),), {1: (2.0, [1]), 2: (1.0, [1])}),
    (2, ((10.0, (2,)), (1.0, (1, 1))), {1: None, 3: (10.0, [0, 1])}),
    (4, ((1.0, (3,)),), {1: None, 10: (1.0, [0])}),
    (3, ((1.0, (4,)), (8.0, (1,))), {1: (8.0, [2, 0])}),
    (8, ((4.0, (12, 12)), (2.0, (12,)), (1.0, (60,))), {1: (24.0, [3, 0, 0]), 3: (9.0, [2, 0, 0])}),
    (4, ((9.0, (1,)), (8.0, (1, 1)), (1.0, (3,))), {1: (9.0, [0, 2, 1]), 2: (9.0, [0, 1, 1])}),
    (
        4,
        ((4.0, (5,)), (3.0, (1,)), (2.0, (1,)), (1.5, (1,))),
        {1: (8.0, [0, 1, 1, 1]), 2: (4.0, [0, 1, 1, 1])},
    ),
    (4, ((2.0, (1, 2)), (1.0, (2,)), (4.0, (6,))), {3: (4.0, [2, 1, 0])}),
    (3, ((3.0, (6,)), (4.0, (1,)), (8.0, (2,))), {1: None}),
    (3, ((9.0, (5,)), (8.0, (6, 6)), (4.0, (4,))), {3: (25.0, [0, 2, 1])}),
)


def balance_is_wrong(package):
    """Whether a device computes more than it should, or anything but each matrix once, in its turn."""
    try:
        turns, every = package._distributed.bases._turns, ((4, 3), (1, 1))
        spans = [
            [[*range(*turns(jnp.asarray(n), jnp.asarray(n < 2), *each))] for n in range(6)] for each in every
        ]
        if spans != [[[0, 1, 2], [0, 1, 2], [2], [], [0], [1]], [[0]] * 6]:
            return True
        bases = {"4x9": (jnp.zeros((80, 4, 4)), None), "6x6": (jnp.zeros((16, 6, 6)),) * 2}
        mesh = AbstractMesh((8,), ("d",))
        for every in (1, 5):
            plans = package._distributed.bases._plans(mesh, bases, {"4x9": 80, "6x6": 12}, every)
            wanted = balanced([4.0**3, 6.0**3], [_numbers(8, 80), _numbers(8, 12, 12)], every)
            if not all(np.array_equal(x.chosen, y.chosen) for x, y in zip(plans, wanted, strict=True)):
                return True
        return not all(
            _balances(package._distributed.balance.balanced, devices, sizes, every, wanted)
            for devices, sizes, each in BALANCED
            for every, wanted in each.items()
        )
    except Exception:
        return True


def _balances(divide, devices, sizes, every, wanted):
    numbers, costs = [_numbers(devices, *counts) for _, counts in sizes], [cost for cost, _ in sizes]
    plans, work, first = divide(costs, numbers, every), 0.0, 0
    if plans is None or wanted is None:
        return plans is wanted
    turns = min(every, sum(np.sum(x >= 0) for x in numbers))
    if any(len(plan.chosen) != turns for plan in plans):
        return False
    for (cost, _), number, plan in sorted(zip(sizes, numbers, plans, strict=True), key=lambda x: -x[0][0]):
        x = jnp.arange(1.0, 1 + number.size).reshape(number.shape)
        for turn in (*range(turns), slice(0, turns)):
            span = (turn, turn + 1) if isinstance(turn, int) else (turn.start, turn.stop)

            def device(x, y, z, plan=plan, span=span):
                return plan.map(lambda x, y: (x + y, 3 * x), ("d",), span, x, y, z)

            with mock.patch.object(jax.lax, "ppermute", _sent):
                got = jax.vmap(device, axis_name="d")(x, -0.5 * x, -x)
            due = np.isin((first + number) % turns, range(*span)) & (number >= 0)
            want = np.where(due, 0.5 * x, -0.5 * x), np.where(due, 3 * x, -x)
            if not all(map(np.array_equal, got, want)):
                return False
        first += np.sum(number >= 0)
        work += cost * plan.chosen.shape[2] * (plan.chosen[..., 0] < number.shape[1] + len(plan.rounds))
    return (np.max(work), [len(plan.rounds) for plan in plans]) == wanted


def _numbers(devices, *counts):
    """Which matrix a slot of stacks has; -1 for none."""
    ends, found = np.cumsum([0, *counts]), []
    for first, count in zip(ends, counts, strict=False):
        number = np.arange(-(-count // devices) * devices)
        found.append(np.where(number < count, first + number, -1).reshape(devices, -1))
    return np.hstack(found)


def _sent(x, axis_name, perm):
    """`ppermute`, which `jax.vmap` has for permutations of all devices only."""
    sources = dict(pair[::-1] for pair in perm)
    assert len({*sources.values()}) == len(sources) == len(perm)
    me, every = jax.lax.axis_index(axis_name), jax.lax.all_gather(x, axis_name)
    source = jnp.asarray([sources.get(d, -1) for d in range(len(every))])[me]
    return jnp.where(source < 0, jnp.zeros_like(x), every[source])


def test_work_is_divided():
    """Over turns and a mesh."""
    assert not balance_is_wrong(om)


def _bases(state):
    sides = (optax.tree.get(state, name) for name in ("left_basis", "right_basis"))
    return [q for side in sides for stack in side.values() for q in stack]


@pytest.mark.parametrize("every", [1, 10])
@rounding.in_float64
def test_resumed(every):
    """From any step, as if nothing had been in between."""
    tx = om.soap(0.1, every=every, axes={"*": "io"})
    want, _ = trained(tx, {"w": (5, 5)}, 13)
    _, state = trained(tx, {"w": (5, 5)}, 7)
    state = jax.tree.map(np.asarray, state)
    got, _ = trained(tx, {"w": (5, 5)}, 6, state, 7)
    rounding.close(got, want[7:])


def quadratic(n=12):
    """⟨W, A W B⟩ / 2: its curvature is the Kronecker product of A and B, in bases of their own."""
    rng = np.random.default_rng(0)
    qa, qb = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    values = np.logspace(0, -2, n)
    a, b = (jnp.asarray(q @ np.diag(values) @ q.T) for q in (qa, qb))
    return jax.jit(jax.value_and_grad(lambda w: jnp.sum(w * (a @ w @ b)) / 2))


@rounding.in_float64
def test_a_quadratic_whose_curvature_is_a_kronecker_product():
    """SOAP and Shampoo come to a hundredth of the loss that Adam leaves at the best of three rates."""
    loss, start = quadratic(), {"w": drawn(3, (12, 12))}

    def last(make):
        found = []
        for rate in (1.0, 0.3, 0.1):
            tx = make(optax.linear_schedule(rate, 0.0, 200))

            @jax.jit
            def train(w, tx=tx):
                def step(carry, _):
                    w, state = carry
                    updates, state = tx.update({"w": loss(w["w"])[1]}, state, w)
                    return (optax.apply_updates(w, updates), state), None

                (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), None, 200)
                return loss(w["w"])[0]

            found.append(float(train(start)))
        return min(found)

    with jax.numpy_dtype_promotion("standard"):
        adam = last(lambda rate: om.adam(rate, 0.9, 0.95))
        axes = {"*": "io"}
        soap = last(lambda rate: om.soap(rate, 0.9, every=5, weight_decay=0.0, axes=axes))
        shampoo = last(lambda rate: om.shampoo(rate, every=5, weight_decay=0.0, axes=axes))
    assert max(soap, shampoo) < adam / 100, (soap, shampoo, adam)


@pytest.mark.parametrize("name", ["soap", "klsoap", "shampoo", "soap_muon"])
def test_bfloat16(name):
    """Parameters, gradients, factors and moments in bfloat16: updates near those in float32."""
    make, found = getattr(om, name), []
    for kind, more in (
        (np.float32, {}),
        (jnp.bfloat16, {"factor_dtype": "bfloat16", "mu_dtype": "bfloat16"}),
    ):
        tx, params = make(0.1, every=2, axes={"*": "io"}, **more), {"w": drawn(0, (6, 6), kind)}
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(4):
            updates, state = update({"w": drawn((4, step), (6, 6), kind)}, state, params)
        assert updates["w"].dtype == kind
        found.append(np.asarray(updates["w"], np.float32))
    full, half = found
    assert np.sum(full * half) > 0.5 * np.linalg.norm(full) * np.linalg.norm(half)


def test_leaves_of_several_dtypes():
    """Real matrices of one size are one stack in the widest dtype; the same as complex ones have the same."""
    tx = om.klsoap(0.1, every=2**40, axes={"*": "io"})
    kinds = {"half": jnp.bfloat16, "short": jnp.float16, "single": np.float32, "complex": np.complex64}
    params = {name: jnp.ones((3, 3), kind) for name, kind in kinds.items()}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        g = drawn((8, step), (3, 3), jnp.bfloat16)
        updates, state = update({name: g.astype(kind) for name, kind in kinds.items()}, state, params)
    assert [x.shape[0] for x in optax.tree.get(state, "left").values()] == [3, 1]
    for name, x in updates.items():
        assert x.dtype == kinds[name]
        np.testing.assert_allclose(np.asarray(x, complex), np.asarray(updates["single"]), atol=1e-3)


def test_bytes_in_the_plan():
    """Two moments, two factors and two bases of each side."""
    shapes = {"layer": {"kernel": jax.ShapeDtypeStruct((16, 32), jnp.float32)}}
    axes = {"*": "io"}
    row = om.plan(shapes, om.soap(0.1, axes=axes))["layer/kernel"]
    assert row.transform == "soap"
    assert row.state_bytes == 4 * (2 * 16 * 32 + 2 * 16**2 + 2 * 32**2)
    row = om.plan(shapes, om.soap(0.1, axes=axes, max_dim=16))["layer/kernel"]
    assert row.state_bytes == 4 * (2 * 16 * 32 + 2 * 16**2)
    row = om.plan(shapes, om.soap(0.1, axes=axes, factor_dtype="bfloat16", block_size=16))["layer/kernel"]
    assert row.state_bytes == 4 * 2 * 16 * 32 + 2 * (2 * 2 * 16**2 + 2 * 2 * 16**2)


def test_parameters_of_numpy():
    """Their float64 is float32 where JAX has no float64, without a warning."""
    tx, params = om.soap(0.1, axes={"*": "io"}), {"w": np.ones((4, 3))}
    with jax.enable_x64(False):
        assert {x.dtype.name for x in jax.tree.leaves(tx.init(params))} == {"float32", "int32"}


def test_refusals():
    params = {"w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match=r"inner must not contain in_eigenbasis.*8 bits are too few"):
        om.compress_state(om.soap(0.1, axes={"*": "io"})).init(params)
    with pytest.raises(ValueError, match=r"soap_muon: state must be None.*8 bits are too few"):
        om.soap_muon(0.1, state="int8")
    for name in ("every", "refresh_warmup", "max_dim", "block_size"):
        with pytest.raises(ValueError, match=f"in_eigenbasis: {name} must be an integer of at least 1"):
            om.in_eigenbasis(ADAM, **{"decay": 0.9, name: 0})
    tx = om.in_eigenbasis(ADAM, decay=0.9, axes={"*": "io"})
    with pytest.raises(ValueError, match="in_eigenbasis: the optimizer state does not match"):
        tx.update({"w": jnp.ones((4, 3))}, tx.init(params), {"w": jnp.ones((4, 3))})
    with pytest.raises(ValueError, match="in_eigenbasis: the state must be a EigenbasisState"):
        tx.update(params, (), params)


@pytest.mark.parametrize("name", ["soap", "klsoap", "shampoo", "soap_muon"])
@pytest.mark.parametrize("sides", [(8, None), (None, 8), (100, 8), (8, 2), (2, None)])
def test_factors_of_other_sides_are_refused(name, sides):
    """A state with another `max_dim` would go on with the factors that it has."""
    params = {"w": jnp.ones((12, 5))}
    old, new = (getattr(om, name)(0.1, max_dim=n, axes={"*": "io"}) for n in sides)
    with pytest.raises(ValueError, match="the optimizer state does not match"):
        new.update(params, old.init(params), params)
    carried, _ = om.carry_state(old.init(params), new, params, written_by=old)
    new.update(params, carried, params)


def test_a_step_that_is_not_finite_is_left_out():
    tx = om.skip_nonfinite(om.soap(0.1, axes={"*": "io"}))
    params = {"w": drawn(0, dtype=np.float32)}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        _, state = update({"w": drawn((5, step), dtype=np.float32)}, state, params)
    updates, after = update({"w": jnp.full((5, 5), 1e30)}, state, params)
    assert after.skipped == 1
    assert not np.any(updates["w"])
    for a, b in zip(jax.tree.leaves(after.inner), jax.tree.leaves(state.inner), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [om.soap, om.klsoap, om.shampoo, om.soap_muon], ids=lambda f: f.__name__)
@rounding.in_float64
def test_derivatives_through_several_steps(make):
    """As in meta-learning: reverse-mode derivatives are those of forward mode, and of differences."""
    target = drawn(1, (4, 3))

    def loss(rate):
        tx, w = make(rate, every=2, eps=1e-2, axes={"*": "io"}), drawn(0, (4, 3))
        state = tx.init(w)
        for _ in range(4):
            updates, state = tx.update(w - target, state, w)
            w = w + updates
        return jnp.sum((w - target) ** 2)

    found, step = jax.jit(jax.grad(loss))(0.01), 1e-5
    rounding.close(found, jax.jvp(loss, (0.01,), (1.0,))[1], condition=1e4)
    np.testing.assert_allclose(found, (loss(0.01 + step) - loss(0.01 - step)) / (2 * step), rtol=1e-6)


def test_one_decomposition_for_each_size():
    """However many leaves there are."""
    params = {f"w{k}": jnp.ones((8, 16)) for k in range(5)}
    tx = om.soap(0.1, axes={"*": "io"})
    text = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    assert text.count("geqrf") + text.count(" qr[") in (0, 2)
    program = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    assert program.count("lapack_sgeqrf") == 2
