"""Plans, from shapes alone: no device is asked."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh
from sharding import least_sent

from optimorph._distributed.groups import Leaf
from optimorph._distributed.hardware import HARDWARE, Hardware, hardware_for
from optimorph._distributed.placement import place
from optimorph._distributed.roles import cost_of, division_of
from optimorph.linalg import Axes, NewtonSchulz

F32 = np.dtype(np.float32)
MESH = {"x": 4, "y": 2}


def leaf(shape, spec="io", over=None):
    return Leaf(shape, Axes(spec), ((),) * len(shape) if over is None else over, F32)


def one(plan):
    (exchange,) = plan.exchanges
    (group,) = exchange.groups
    return exchange, group


@pytest.mark.parametrize(
    ("over", "spec", "roles", "matrices", "slots"),
    [
        (((), (), ()), "bio", ((), (), ("x", "y")), 16, 2),
        (((), ("x",), ()), "bio", ((), ("x",), ("y",)), 16, 2),
        (((), ("y",), ("x",)), "bio", ((), ("x", "y"), ()), 16, 2),
        ((("x",), (), ()), "bio", (("x",), (), ("y",)), 4, 2),
        ((("x",), (), ("y",)), "bio", (("x",), ("y",), ()), 4, 2),
        ((("x", "y"), (), ()), "bio", (("x", "y"), (), ()), 2, 2),
    ],
)
def test_roles_of_mesh_axes(over, spec, roles, matrices, slots):
    exchange, group = one(place(MESH, [leaf((16, 8, 24), spec, over)]))
    assert (exchange.batch_axes, exchange.roles.all_to_all, exchange.roles.replica) == roles
    assert (group.matrices, group.slots) == (matrices, slots)


def test_blocks_that_no_shard_cuts_are_matrices_of_their_own():
    _, group = one(place(MESH, [leaf((8, 48), "i(3o)", (("x",), ()))]))
    assert (group.matrices, group.form.spec, group.whole(MESH)) == (3, "bio", (8, 16))
    exchange, group = one(place(MESH, [leaf((8, 48), "i(12o)", ((), ("x",)))]))
    assert (exchange.batch_axes, exchange.roles.all_to_all, group.matrices) == (("x",), (), 3)
    exchange, group = one(place(MESH, [leaf((8, 48), "i(2o)", ((), ("y", "x")))]))
    assert (exchange.batch_axes, exchange.roles.all_gather, group.whole(MESH)) == (("y",), ("x",), (8, 24))


def test_blocks_that_shards_cut_come_whole():
    _, group = one(place(MESH, [leaf((8, 48), "i(3o)", ((), ("x",)))]))
    assert (group.matrices, group.form.spec, group.local_shape) == (1, "bi(3o)", (8, 12))
    assert group.whole(MESH) == (8, 48)


def test_high_and_wide_and_squares_that_lie_alike_go_together():
    leaves = [leaf((8, 24), over=((), ("x",))), leaf((24, 8), over=(("x",), ()))]
    leaves += [leaf((24, 8), "oi", ((), ())), leaf((8, 24), "oi", ((), ()))]
    assert [[g.matrices for g in e.groups] for e in place(MESH, leaves).exchanges] == [[2], [2]]
    squares = [leaf((8, 8), over=(("x",), ("y",))), leaf((8, 8), over=(("y",), ("x",)))]
    assert one(place(MESH, squares))[1].matrices == 2


def test_what_is_empty_is_not_sent():
    _, group = one(place(MESH, [leaf((0, 8, 24), "bio"), leaf((8, 24))]))
    assert [shard.leaf for shard in group.shards] == [1]


def test_functions_that_are_not_equivariant_get_matrices_unchanged():
    leaves = [leaf((8, 24), over=((), ("x",))), leaf((24, 8), over=(("x",), ()))]
    groups = [
        group for exchange in place(MESH, leaves, equivariant=False).exchanges for group in exchange.groups
    ]
    assert [group.whole(MESH) for group in groups] == [(8, 24), (24, 8)]


def test_work_is_shared_over_no_more_than_it_needs():
    """Four matrices are one each on four devices: eight would only be sent more."""
    exchange, _ = one(place(MESH, [leaf((4, 8, 24), "bio")]))
    assert exchange.roles.replica == ("x",)
    exchange, _ = one(place(MESH, [leaf((8, 24))]))
    assert exchange.roles.replica == ()


def test_a_lone_matrix_is_gathered():
    exchange, group = one(place(MESH, [leaf((8, 24), over=(("x",), ()))]))
    assert (exchange.roles.all_to_all, exchange.roles.all_gather, group.slots) == ((), ("x",), 1)


def test_few_matrices_move_over_few_axes():
    """Four on eight devices: four owners, whose neighbours are told the same, and have their part at hand."""
    exchange, group = one(place(MESH, [leaf((4, 8, 24), "bio", ((), ("y",), ("x",)))]))
    assert (exchange.roles.all_to_all, exchange.roles.all_gather, group.slots) == (("x",), ("y",), 1)
    assert place(MESH, [leaf((4, 8, 24), "bio", ((), ("y",), ("x",)))]).sent == (7 + 3) * 4 * 8 * 24 / 8


def test_shapes_that_occur_once_divide_the_work():
    """Eight lone matrices of nearly one shape are one each for eight owners, sharded or replicated."""
    for over in (((), ("x", "y")), ((), ())):
        plan = place(MESH, [leaf((64, 72 + 8 * k), over=over) for k in range(8)], cost=lambda n, m: n * n * m)
        assert one(plan)[1].slots == 1
        assert plan.flops <= 1.4 * plan.least_flops


def test_near_shapes_go_together_where_slots_would_stay_empty():
    few = [leaf((8, 24), over=(("x",), ())), leaf((8, 20), over=(("x",), ()))]
    groups = place(MESH, few * 2).exchanges[0].groups
    assert [(group.matrices, group.slots, group.local_shape) for group in groups] == [(4, 1, (2, 24))]
    full = [leaf((4, 8, 24), "bio", ((), ("x",), ())), leaf((4, 8, 20), "bio", ((), ("x",), ()))]
    assert len(place(MESH | {"y": 1}, full).exchanges[0].groups) == 2


def test_flops_and_bytes():
    """Two slots of 8 x 24 on each of eight owners; seven eighths of the pieces go out, and come back."""
    leaves = [leaf((16, 8, 24), "bio", ((), ("y",), ("x",)))]
    plan = place(MESH, leaves, cost=lambda n, m: n * n * m)
    assert plan.flops == plan.least_flops == 2 * 8 * 8 * 24
    assert plan.sent == least_sent(MESH, leaves) == 2 * (7 / 8) * 4 * (16 * 8 * 24) / 8
    half = place(MESH, [leaf((16, 8, 24), "bio", ((), ("y",), ("x",)))], comm_dtype=np.dtype(np.float16))
    assert half.sent == plan.sent / 2


def test_a_tree_of_thousands_of_matrices_on_thousands_of_devices_is_planned_at_once():
    leaves = [leaf((60, 384, 7168, 2048), "bbio", ((), ("e",), ("d",), ()))] * 2 + [
        leaf((7168 + 64 * k, 2048), over=(("d",), ())) for k in range(500)
    ]
    plan = place({"d": 8, "e": 128}, leaves, cost=NewtonSchulz().flops)
    assert plan.exchanges[0].batch_axes == ("e",)


def on(hardware, mesh, leaves, divide=True):
    polar = NewtonSchulz()
    return place(mesh, leaves, cost=cost_of(polar, hardware), division=division_of(polar, hardware, divide))


@pytest.mark.parametrize(
    ("model", "devices", "most"), [("8B", 64, 1.1), ("405B", 1024, 1.3), ("405B", 4096, 1.6)]
)
def test_large_models_on_many_devices(model, devices, most):
    """On v5p the busiest device computes little more than an even share; the bytes are worth it."""
    width, hidden, keys, layers = {"8B": (4096, 14336, 1024, 32), "405B": (16384, 53248, 1024, 126)}[model]
    columns, rows = ((), ("data",), ("model",)), ((), ("model",), ("data",))
    shapes = [(width, width), (width, keys), (width, keys), (width, hidden), (width, hidden)]
    leaves = [leaf((layers, *shape), "bio", columns) for shape in shapes]
    leaves += [leaf((layers, *shape), "bio", rows) for shape in [(width, width), (hidden, width)]]
    mesh = {"data": devices // 8, "model": 8}
    whole, found = (on(HARDWARE["v5p"], mesh, leaves, divide) for divide in (False, True))
    assert found.flops <= most * found.least_flops
    assert whole.divided == 0 < found.divided
    assert sum(found.seconds) < 0.9 * sum(whole.seconds)


def test_nothing_is_divided_where_sending_costs_more():
    """Small matrices; also large ones, between nodes whose network is slow; and the plan is that without."""
    few = [leaf((4, 4096, 14336), "bio", ((), ("y",), ("x",)))]
    slow = Hardware("tpu", 459e12, 1e9, 1e9, 8)
    medium = Hardware("tpu", 459e12, 2e10, 2e10, 8)  # on which dividing saves less than a tenth
    for hardware, leaves in ((HARDWARE["v5p"], [leaf((4, 64, 256), "bio")]), (slow, few), (medium, few)):
        found = on(hardware, MESH, leaves)
        assert found.exchanges == place(MESH, leaves, cost=cost_of(NewtonSchulz(), hardware)).exchanges
        assert (found.divided, found.collectives, found.inside) == (0, 0, 0.0)
    assert on(HARDWARE["v5p"], MESH, few).divided == 4


def test_whole_rounds_come_first():
    """96 matrices for 64 owners: one round whole, and the rest in halves, each neighbours'."""
    mesh, leaves = {"d": 8, "m": 8}, [leaf((96, 4096, 14336), "bio", ((), ("d",), ("m",)))]
    plan = on(HARDWARE["v5p"], mesh, leaves)
    _, group = one(plan)
    assert (group.slots, group.parts, group.part_slots) == (1, 2, 1)
    assert plan.divided == 32
    assert plan.sent == least_sent(mesh, leaves)
    assert plan.inside == 5 * 3 * 4096**2 / 2 * 2  # R scattered, R and Z gathered, in five steps, bfloat16


def test_bytes_within_a_node_and_between():
    """A lone matrix is gathered from other nodes; neighbours that share a matrix are in one node."""
    hardware, mesh = Hardware("tpu", 1.0, 100.0, 1.0, 8, 1e-9), {"node": 4, "d": 8}
    lone = on(hardware, mesh, [leaf((8, 24), over=(("node",), ()))], divide=False)
    assert lone.seconds[1] == lone.sent > 0
    shared = on(hardware, mesh, [leaf((16, 64, 64), "bio")])
    assert shared.divided == 16
    assert shared.seconds[1] == pytest.approx(shared.sent + shared.inside / 100)
    stacked = on(hardware, mesh, [leaf((16, 64, 64), "bio", (("node",), (), ()))])
    assert stacked.divided == 16
    assert (hardware.bytes_over(8), hardware.bytes_over(9)) == (100.0, 1.0)


def test_rounds_have_room_for_gram_matrices():
    """Two matrices in thirds: 64 x 22 numbers each, and 64 x 64 of R and of Z."""
    polar, hardware = NewtonSchulz(), Hardware("tpu", 1.0, 100.0, 1.0, 8, 1e-9)
    division = division_of(polar, hardware)
    leaves = [leaf((2, 64, 64), "bio")]
    for at_once, rounds in ((4 * (64 * 22 + 2 * 64 * 64), 2), (8 * (64 * 22 + 2 * 64 * 64), 1)):
        plan = place({"d": 3}, leaves, cost=polar.flops, division=division, bytes_at_once=at_once)
        assert (one(plan)[1].parts, len(one(plan)[0].rounds)) == (3, rounds)


def test_uneven_columns_are_padded_to_be_cut():
    """A shard of 1,791 columns is cut into halves of 896."""
    mesh, shape = {"d": 8, "m": 8}, (96, 4096, 8 * 1791)
    plan = on(HARDWARE["v5p"], mesh, [leaf(shape, "bio", ((), ("d",), ("m",)))])
    _, group = one(plan)
    assert (group.parts, group.local_shape, plan.divided) == (2, (512, 1792), 32)


def test_a_hundred_shapes_are_planned_with_few_trials():
    """Most pairs of shapes are known not to be worth merging without a trial of all divisions."""
    trials, polar = [], NewtonSchulz()

    def cost(n, m):
        trials.append((n, m))
        return polar.flops(n, m)

    leaves = [leaf((7168 + 64 * k, 2048), over=(("d",), ())) for k in range(100)]
    place({"d": 8, "e": 128}, leaves, cost=cost, division=division_of(polar, HARDWARE["v5p"]))
    assert len(trials) < 200 * len(leaves)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5", "v5p"),
        ("TPU v5 lite", "v5e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_devices_are_known_by_their_kind(kind, name):
    mesh = AbstractMesh((8,), ("d",), abstract_device=AbstractDevice(kind, None, "any"))
    assert hardware_for("auto", mesh) == HARDWARE.get(name)


NAMES = ("x", "y", "z")


@st.composite
def problems(draw):
    sizes = draw(st.sampled_from([(2,), (8,), (4, 2), (2, 3), (2, 2, 2)]))
    mesh = dict(zip(NAMES, sizes, strict=False))
    leaves = []
    for _ in range(draw(st.integers(1, 6))):
        batch = draw(st.integers(1, 9))
        names = draw(st.permutations(list(mesh)))
        cuts = sorted(draw(st.tuples(st.integers(0, len(names)), st.integers(0, len(names)))))
        over = ((), tuple(names[: cuts[0]]), tuple(names[cuts[0] : cuts[1]]))
        shape = (batch, *(8 * math.prod(mesh[n] for n in o) for o in over[1:]))
        leaves.append((shape, over))
    return mesh, leaves


@settings(deadline=None, max_examples=100)
@given(
    problem=problems(),
    at_once=st.sampled_from([1, 2**14, 2**28]),
    equivariant=st.booleans(),
    sent=st.sampled_from([None, 1e6, 1e30]),
)
def test_every_matrix_has_one_place(problem, at_once, equivariant, sent):
    """Whole or in parts, whatever sending costs."""
    mesh, kinds = problem
    leaves = [leaf(shape, "bio", over) for shape, over in kinds]
    hardware = None if sent is None else Hardware("cpu", 1e9, sent, sent, 8, 1e-30)
    polar = NewtonSchulz()
    plan = place(
        mesh,
        leaves,
        cost=polar.flops,
        bytes_at_once=at_once,
        equivariant=equivariant,
        division=division_of(polar, hardware),
    )
    shards = [shard for exchange in plan.exchanges for group in exchange.groups for shard in group.shards]
    assert sorted(shard.leaf for shard in shards) == list(range(len(leaves)))
    assert all(shard.matrices == leaves[shard.leaf].shape[0] for shard in shards)
    assert plan.flops >= plan.least_flops * (1 - 1e-9)
    for exchange in plan.exchanges:
        owners = math.prod(mesh[name] for name in (*exchange.roles.all_to_all, *exchange.roles.replica))
        seen = {k: [] for k in range(len(exchange.groups))}
        for span in itertools.chain.from_iterable(exchange.rounds):
            group = exchange.groups[span.group]
            seen[span.group] += range(*group.matrices_of(span, owners))
            assert owners % span.parts == 0 == group.local_shape[-1] % span.parts
        for k, group in enumerate(exchange.groups):
            assert seen[k] == list(range(group.room(owners)))
            assert group.matrices <= group.room(owners) < group.matrices + owners
