"""Bad input is refused where it is given, in words that say what to type instead."""

import inspect
import subprocess
import sys

import catalog
import chex
import jax
import jax.numpy as jnp
import mutants
import numpy as np
import optax
import pytest
from test_contract import NUMBERS, required

import optimorph as om
from optimorph import schedules, theory
from optimorph._core.checks import SCHEDULED, check_matrices, check_transforms
from optimorph._core.rounding import check_key
from optimorph.linalg import Axes, Coefficients, NewtonSchulz, polar_express

PAIR = np.array([1.0, 2.0])
W = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}


def updated(tx, params):
    return tx.update(params, tx.init(params), params)


PAIRS = {"a": {"w": jnp.ones(3), "b": jnp.ones(3)}}


def accumulated(every_k, **extra):
    tx = om.multi_steps(om.sgd(0.1), every_k)
    return tx.update(W, tx.init(W), W, **extra)


def with_hyperparameter(name, value):
    tx = om.inject_hyperparams(om.adamw)(learning_rate=0.1)
    state = tx.init(W)
    return tx.update(W, state._replace(hyperparams=state.hyperparams | {name: value}), W)


REFUSED = {
    "negative learning rate": (
        lambda: om.adamw(-1.0),
        ["adamw", "learning_rate", "-1.0", "at least 0", "1e-3"],
    ),
    "infinite learning rate": (lambda: om.sgd(float("inf")), ["sgd", "learning_rate", "inf"]),
    "nan learning rate": (lambda: om.muon(float("nan")), ["muon", "learning_rate", "nan"]),
    "dampening alone": (lambda: om.sgd(0.1, dampening=0.1), ["sgd", "dampening", "momentum=0.9"]),
    "array learning rate": (lambda: om.adam(jnp.ones(3)), ["adam", "learning_rate", "(3,)", "vmap"]),
    "boolean learning rate": (lambda: om.adam(True), ["adam", "learning_rate", "True"]),
    "an integer beyond all floats": (lambda: om.sgd(10**400), ["sgd", "learning_rate must be a number"]),
    "complex number": (lambda: om.momentum(np.array(0.5j)), ["momentum", "decay", "0.5j"]),
    "no number": (lambda: om.root(eps=np.array("x")), ["root", "eps", "x"]),
    "b1 of 1": (lambda: om.adam(0.1, b1=1.0), ["adam", "b1", "1.0", "[0, 1)"]),
    "b2 above 1": (lambda: om.nadamw(0.1, b2=1.5), ["nadamw", "b2", "1.5"]),
    "negative decay": (lambda: om.rmsprop(0.1, decay=-0.1), ["rmsprop", "decay", "-0.1"]),
    "momentum of 1": (lambda: om.sgd(0.1, 1.0), ["sgd", "momentum", "[0, 1)"]),
    "negative eps": (lambda: om.adagrad(0.1, eps=-1e-8), ["adagrad", "eps", "-1e-08", "at least 0"]),
    "negative eps_root": (lambda: om.root(0.0, -1.0), ["root", "eps_root", "-1.0"]),
    "negative weight decay": (lambda: om.muon(0.1, weight_decay=-0.1), ["muon", "weight_decay", "-0.1"]),
    "atom's decay": (lambda: om.ema(1.0), ["ema", "decay", "1.0", "decay=0.9"]),
    "max_norm of 0": (
        lambda: om.clip_by_global_norm(0.0),
        ["clip_by_global_norm", "max_norm", "0.0", "above 0", "max_norm=1.0"],
    ),
    "max_norm NaN": (
        lambda: om.clip_by_global_norm(float("nan")),
        ["clip_by_global_norm", "max_norm", "nan"],
    ),
    "negative limit": (
        lambda: om.skip_nonfinite(om.ema(0.9), -1),
        ["skip_nonfinite", "max_consecutive", "-1", "at least 0", "max_consecutive=10"],
    ),
    "boolean limit": (lambda: om.skip_nonfinite(om.ema(0.9), True), ["skip_nonfinite", "True"]),
    "array number": (lambda: om.momentum(jnp.float32(2.0)), ["momentum", "decay", "2.0"]),
    "lookahead as an array": (lambda: om.ema(0.9, lookahead=jnp.float32(2)), ["ema", "lookahead", "[0, 1)"]),
    "negative ahead": (lambda: om.debias(0.9, ahead=-1), ["debias", "ahead", "-1", "ahead=1"]),
    "divide by no device": (
        lambda: om.muon(0.1, divide="v99"),
        ["muon: divide", "'v99'", "'v5p'", "Hardware"],
    ),
    "hardware that does nothing": (
        lambda: om.Hardware("tpu", flops=0.0, bytes_near=1e9, bytes_far=1e9, node=8),
        ["Hardware", "flops", "0.0"],
    ),
    "hardware of no platform": (
        lambda: om.Hardware("TPU", 1e12, bytes_near=1e9, bytes_far=1e9, node=8),
        ["Hardware", "platform", "'TPU'", "'cpu', 'gpu', 'tpu'"],
    ),
    "comm_dtype of no dtype": (
        lambda: om.orthogonalize(comm_dtype="half a byte"),
        ["orthogonalize", "comm_dtype", "'half a byte'", "comm_dtype='bfloat16'"],
    ),
    "k beyond all counts": (lambda: om.multi_steps(om.ema(0.9), 10**20), ["multi_steps", "every_k"]),
    "limit beyond all counts": (
        lambda: om.skip_nonfinite(om.ema(0.9), 10**20),
        ["skip_nonfinite", "max_consecutive"],
    ),
    "nothing to add": (lambda: om.add(), ["add", "add(first, second)"]),
    "unknown preset": (
        lambda: NewtonSchulz("muon"),
        ["NewtonSchulz", "'muon'", "'jordan'", "'polar_express'"],
    ),
    "no steps": (lambda: NewtonSchulz(steps=0), ["NewtonSchulz", "steps", "0"]),
    "no such iteration": (lambda: NewtonSchulz(iteration="fast"), ["'fast'", "'auto', 'standard', 'gram'"]),
    "no bytes": (lambda: NewtonSchulz(max_stack_bytes=0), ["NewtonSchulz", "max_stack_bytes", "0"]),
    "a dtype's nickname": (
        lambda: NewtonSchulz(dtype="bf16"),
        ["NewtonSchulz: dtype", "'bf16'", "'bfloat16'"],
    ),
    "no such precision": (
        lambda: NewtonSchulz(precision="hi"),
        ["NewtonSchulz: precision", "'hi'", "'high'"],
    ),
    "a warmup to nothing": (
        lambda: schedules.linear_warmup(float("nan"), 10),
        ["linear_warmup: final_value", "nan", "at least 0"],
    ),
    "heads of no arrays": (
        lambda: om.layouts.per_head(om.adamw),
        ["per_head: params has no arrays", "adamw"],
    ),
    "shapes that are split": (
        lambda: om.split_weights({"w": jax.ShapeDtypeStruct((3,), jnp.float32)}),
        ["split_weights", "'w'", "not an array"],
    ),
    "a factory of nothing": (
        lambda: om.inject_hyperparams(lambda learning_rate: None)(0.1).init(jnp.ones(3)),
        ["inject_hyperparams", "init and update", "None has not"],
    ),
    "unsafe in bfloat16": (
        lambda: NewtonSchulz("cans", dtype="bfloat16"),
        ["cushion=0", "rounding in bfloat16. The table is made for float32", "coefficients='polar_express'"],
    ),
    "a table that flips signs": (
        lambda: NewtonSchulz(((3.0, -6.0, 2.9),)),
        ["step 1", "flips signs", "σ = 1"],
    ),
    "a table that diverges": (lambda: NewtonSchulz(((3.0, 0.0, 0.0),)), ["step 1", "diverges", "σ = 1"]),
    "lower": (lambda: polar_express(0.0), ["polar_express", "lower", "(0, 1)", "1e-3"]),
    "degree": (lambda: polar_express(degree=7), ["polar_express", "degree", "3 or 5"]),
    "table's steps": (lambda: polar_express(steps=0), ["polar_express", "steps", "at least 1"]),
    "safety": (lambda: polar_express(safety=-0.1), ["polar_express", "safety", "0.01"]),
    "cushion": (lambda: polar_express(cushion=1.0), ["polar_express", "cushion", "0.02"]),
    "empty table": (lambda: NewtonSchulz(()), ["Coefficients", "rows"]),
    "a table's dtype": (
        lambda: Coefficients(((1.5, -0.5, 0.0),), dtype="int8"),
        ["Coefficients", "dtype", "'int8'", "'bfloat16', 'float16', 'float32', 'float64'"],
    ),
    "a table that only exact arithmetic keeps in bounds": (
        lambda: NewtonSchulz(polar_express(1e-10, 12, safety=0.0, cushion=0.0), dtype="float64"),
        ["rounding in float64. The table is made for exact arithmetic", "polar_express"],
    ),
    "short row": (lambda: NewtonSchulz(((1.0, 2.0),)), ["NewtonSchulz: a row", "(1.0, 2.0)"]),
    "unknown scale": (lambda: om.muon(0.1, scale="spectral"), ["muon: scale must", "'spectral'", "'keller'"]),
    "both others": (
        lambda: om.muon(0.1, others=om.sgd(0.1), others_learning_rate=0.1),
        ["muon", "others_learning_rate", "others"],
    ),
    "bad axes": (lambda: Axes("ix"), ["'ix'", "'io'"]),
    "no output": (lambda: Axes("ii"), ["'ii'"]),
    "another alphabet's digits": (lambda: Axes("i(٣o)"), ["'i(٣o)'", "'i(3o)'"]),
    "exponent": (lambda: schedules.robbins_monro(0.1, 0.5), ["robbins_monro", "exponent", "0.5", "(1/2, 1]"]),
    "exponent above": (lambda: schedules.robbins_monro(0.1, 1.01), ["robbins_monro", "exponent", "1.01"]),
    "swapped eigenvalues": (lambda: theory.polyak(0.1, 1.0), ["polyak", "strong_convexity", "largest"]),
    "a function as a pattern": (
        lambda: om.scale_by_rules({lambda tree: True: 0.1}),
        ["scale_by_rules: a function that is a key of rules", "roles('norm')", "lambda path, shape"],
    ),
    "one rule for all": (lambda: om.scale_by_rules("fast"), ["scale_by_rules", "'fast'", "{'*': ...}"]),
    "one codec's name": (lambda: om.compress_state(om.sgd(0.1), "int4"), ["compress_state", "'int4'"]),
    "a rule of one argument": (
        lambda: om.partition(lambda path: "a", {"a": om.sgd(0.1)}),
        ["partition", "lambda path, shape"],
    ),
    "a function of the tree": (
        lambda: om.partition(om.labels({"*": "a"}), {"a": om.sgd(0.1)}),
        ["partition", "of the parameters", "the tree that it returns"],
    ),
    "no parameters": (lambda: om.carry_state(om.sgd(0.1).init(W), om.sgd(0.1), None), ["params is None"]),
    "no role": (lambda: om.not_roles(), ["not_roles('norm', 'bias')"]),
    "never a new basis": (lambda: om.soap(0.1, every=0), ["soap: every", "at least 1", "0"]),
    "factors that grow": (lambda: om.klsoap(0.1, factor_decay=2), ["klsoap: factor_decay", "[0, 1)"]),
    "factors of bytes": (
        lambda: om.soap_muon(0.1, factor_dtype="int8"),
        ["soap_muon: factor_dtype", "'int8'"],
    ),
    "a word for a flag": (lambda: om.shampoo(0.1, spread="no"), ["shampoo: spread", "True or False", "'no'"]),
    "no bound": (
        lambda: om.in_eigenbasis(om.ema(0.9), decay=0.9, largest_inverse_root=0.0),
        ["in_eigenbasis: largest_inverse_root", "above 0"],
    ),
    "no norm": (
        lambda: om.scion(0.1, norms={"*": "max"}).init({"hidden": {"kernel": jnp.ones((3, 3))}}),
        ["scion: the norm of 'hidden/kernel'", "'spectral'", "'max'"],
    ),
    "no radius": (lambda: om.scion(0.1, radius="large").init(W), ["scion: the radius of 'w'", "'large'"]),
    "a radius of zero": (lambda: om.scion(0.1, radius=0.0).init(W), ["radius of 'w'", "above 0", "0.0"]),
    "one radius below zero": (
        lambda: om.scion(0.1, radius={"w": np.array([1.0, -1.0])}).init({"w": jnp.ones((2, 3))}),
        ["radius of 'w'", "above 0"],
    ),
    "no gradients": (
        lambda: om.multi_steps(om.sgd(0.1), lambda steps: 0).init(W),
        ["multi_steps: every_k", "at least 1", "returned 0"],
    ),
    "the shape of a rate": (
        lambda: om.adamw(jax.ShapeDtypeStruct((), jnp.float32)),
        ["adamw: learning_rate must be a number", "ShapeDtypeStruct"],
    ),
    "no float to inject": (
        lambda: om.inject_hyperparams(om.adamw)(10**400).init(W),
        ["adamw: learning_rate must be a number"],
    ),
    "a schedule of keys": (
        lambda: om.adamw(lambda count: jax.random.key(0)).init(W),
        ["adamw", "a schedule must return one number"],
    ),
    "a class for a schedule": (lambda: om.adamw(int), ["adamw: learning_rate", "not a function"]),
    "a class for a mask": (lambda: om.adamw(0.1, mask=bool).init(W), ["the mask is", "bool"]),
    "a mask of nothing": (lambda: om.adamw(0.1, mask=lambda: True).init(W), ["the mask is"]),
    "a class for rules": (lambda: om.muon(0.1, axes=dict), ["muon: a function of axes", "not a function"]),
    "an array for a word": (lambda: om.adamw(0.1, state=PAIR), ["adamw: state must be 'int8'"]),
    "an array for norms": (lambda: om.scion(0.1, norms=PAIR), ["scion: norms must be", "shape (2,)"]),
    "a word for a radius": (
        lambda: om.scion(0.1, radius=np.array("large")).init(W),
        ["the radius of 'w' must be a real number"],
    ),
    "where of one": (lambda: om.mean("i", where=abs), ["mean: where must be a function", "outputs"]),
    "a scale of one": (lambda: om.scale_by_shape(lambda n: n), ["scale_by_shape: scale must be one of"]),
    "a scale of words": (
        lambda: om.muon(0.1, scale=lambda n, m: "large", axes={"w": "io", "b": None}).update(
            W, om.muon(0.1, axes={"w": "io", "b": None}).init(W), W
        ),
        ["muon: scale must return a real number", "'w'", "'large'"],
    ),
    "a scale of several": (
        lambda: om.scale_by_shape(lambda n, m: [n, m], axes={"w": "io", "b": None}).update(
            W, optax.EmptyState()
        ),
        ["scale_by_shape: scale must return a real number", "'w'", "[4, 3]"],
    ),
    "a polar factor of two": (
        lambda: om.orthogonalize(lambda x, y: x),
        ["orthogonalize: orthogonalizer must be a function of stacks"],
    ),
    "shapes of words": (lambda: om.role_of("w", ("a",)), ["role_of: it takes a path and a shape"]),
    "no dtype to inject": (
        lambda: om.inject_hyperparams(om.adamw, hyperparam_dtype="real"),
        ["hyperparam_dtype must be float32 or float64", "'real'"],
    ),
    "a class to inject": (lambda: om.inject_hyperparams(int), ["inner_factory must be a function"]),
    "new names of two": (
        lambda: om.carry_state(om.sgd(0.1).init(W), om.sgd(0.1), W, renamed=lambda x, y: x),
        ["carry_state: renamed must be a function of paths"],
    ),
    "a function among parameters": (
        lambda: om.carry_state(om.sgd(0.1).init(W), om.sgd(0.1), W | {"f": abs}),
        ["carry_state: 'f' is", "not an array"],
    ),
    "labels of another partition": (
        lambda: om.partition({"*": "all"}, {"all": om.sgd(0.1)}).update(
            W, om.partition({"*": "body"}, {"body": om.sgd(0.1)}).init(W), W
        ),
        ["partition: the optimizer state does not match", "tx.init"],
    ),
    "a word for gradients": (
        lambda: om.multi_steps(om.sgd(0.1), 2).update("w", om.multi_steps(om.sgd(0.1), 2).init(W)),
        ["multi_steps: "],
    ),
    **{
        f"another's state in {name}": (
            lambda tx=tx: tx.update(W, om.adamw(0.1).init(W), W),
            [name, "tx.init"],
        )
        for name, tx in {
            "partition": om.partition({"*": "all"}, {"all": om.sgd(0.1)}),
            "inject_hyperparams": om.inject_hyperparams(om.sgd)(0.1),
            "divide": om.divide(optax.ema(0.9), by=om.ema(0.9)),
            "add": om.add(optax.ema(0.9), om.ema(0.9)),
            "mix": om.mix(0.5, optax.ema(0.9), om.ema(0.9)),
        }.items()
    },
    "a whole optimizer that is cautious": (
        lambda: om.cautious(om.skip_nonfinite(om.adamw(0.1))).init(W),
        ["cautious: inner has a learning rate", "scale_by_learning_rate(1e-3)"],
    ),
    "an infinite factor": (
        lambda: om.scale_by_rules({"*": [1.0, 2.0, np.inf]}).init({"b": jnp.ones(3)}),
        ["scale_by_rules: the factor of 'b'", "finite", "inf"],
    ),
    "no gradients at all": (
        lambda: om.adamw(0.1).update(None, om.adamw(0.1).init(PAIRS), PAIRS),
        ["adamw: the gradients do not match", "'a/w': a parameter of shape (3,), but no gradient"],
    ),
    "no gradients of one leaf": (
        lambda: om.adamw(0.1).update(None, om.adamw(0.1).init({"w": W["w"]}), {"w": W["w"]}),
        ["adamw: the gradients do not match", "'w': a parameter", "but no gradient"],
    ),
    "no updates of one leaf": (
        lambda: om.apply_updates({"w": W["w"]}, None),
        ["apply_updates: the updates do not match", "'w': a parameter", "but no update"],
    ),
    "no gradients of a module": (
        lambda: om.sgd(0.1).update({"a": None}, om.sgd(0.1).init(PAIRS), PAIRS),
        ["sgd: the gradients do not match", "'a/w': a parameter of shape (3,), but no gradient"],
    ),
    "no updates at all": (
        lambda: om.apply_updates(PAIRS, None),
        ["apply_updates: the updates do not match", "'a/w': a parameter of shape (3,), but no update"],
    ),
    "what update returned for updates": (
        lambda: om.apply_updates(PAIRS, om.sgd(0.1).update(PAIRS, om.sgd(0.1).init(PAIRS), PAIRS)),
        ["'0/a/w': an update of shape (3,), but no parameter", "updates, state = tx.update(gradients"],
    ),
    "updates of integers": (
        lambda: om.apply_updates({"n": jnp.ones(3, int)}, {"n": jnp.ones(3)}),
        ["apply_updates: some updates cannot be used", "an update of float32", "integers of integers"],
    ),
    "complex updates": (
        lambda: om.apply_updates({"n": jnp.ones(3)}, {"n": jnp.ones(3, complex)}),
        [
            "apply_updates: some updates cannot be used",
            "an update of complex",
            "Give real",
        ],
    ),
    "a hyperparameter that is not there": (
        lambda: with_hyperparameter("learning_rat", 0.5),
        ["inject_hyperparams: the state has", "'learning_rat'", "of adamw", "one of ['b1', 'b2'"],
    ),
    "a hyperparameter with an axis": (
        lambda: with_hyperparameter("learning_rate", jnp.ones(1)),
        ["inject_hyperparams: in the state", "'learning_rate' is Array([1.]", "Set one number"],
    ),
    "a hyperparameter that is None": (
        lambda: with_hyperparameter("learning_rate", None),
        ["inject_hyperparams: in the state", "'learning_rate' is None", "Set one number"],
    ),
    "a state that is traced": (
        lambda: jax.jit(om.probes.read)(om.sgd(0.1).init(W)),
        ["read: the state is traced", "that the compiled function returned"],
    ),
    "an optimizer for its state": (
        lambda: om.probes.read(om.sgd(0.1)),
        ["read: the state has <function", "no arrays", "tx.init or tx.update"],
    ),
    "parameters for axes": (
        lambda: om.muon(0.1, axes={"w": jnp.ones((3, 4))}).init({"w": jnp.ones((3, 4))}),
        ["muon: 'w' has shape (3, 4), and float32[3, 4] is not a spec"],
    ),
    "a tree of arrays for axes": (
        lambda: om.muon(0.1, axes=[jnp.ones((3, 4))]).init([jnp.ones((3, 4))]),
        ["muon: '0' has shape (3, 4), and float32[3, 4] is not a spec"],
    ),
    "decay in a basis": (
        lambda: updated(om.in_eigenbasis(om.adamw(0.1), decay=0.9, axes={"w": "io", "b": None}), W),
        ["in_eigenbasis: inner has a transform that needs the parameters", "add_decayed_weights"],
    ),
    "a vector for a matrix": (
        lambda: check_matrices("linalg", jnp.ones(3), jnp.number),
        ["linalg: matrices are an array", "[1., 1., 1.]"],
    ),
    "integers for a matrix": (
        lambda: check_matrices("Exact", jnp.ones((3, 4), jnp.int32)),
        ["Exact: matrices are an array of floating-point numbers", "int32[3, 4]"],
    ),
    "a maximum of 2": (
        lambda: om.multi_steps(om.sgd(0.1), 2, maximum=2).init(W),
        ["multi_steps: the mask maximum is 2"],
    ),
    "fresh of 2": (
        lambda: om.carry_state(om.sgd(0.1).init(W), om.sgd(0.1), W, fresh=2),
        ["carry_state: the mask fresh is 2"],
    ),
    "shapes of a state": (
        lambda: om.probes.read(jax.eval_shape(om.probes.probe(om.sgd(0.1)).init, W)),
        ["read: ", "shapes", "tx.init"],
    ),
    "flush of 3": (lambda: accumulated(3, flush=3), ["multi_steps: flush", "one boolean", "3"]),
    "flush of several": (lambda: accumulated(3, flush=np.zeros(2, bool)), ["multi_steps: flush"]),
    "two gradients and a half": (
        lambda: accumulated(optax.constant_schedule(2.5)),
        ["multi_steps: every_k", "integer", "float32", "jnp.round(schedule(steps)).astype(int)"],
    ),
    "zero eigenvalue": (lambda: theory.nesterov(1.0, 0.0), ["nesterov", "strong_convexity", "0.0"]),
}


TREE = {f"layer_{k}": {"kernel": np.ones((64, 64)), "b": jnp.ones(64)} for k in range(100)}


@pytest.mark.parametrize(
    "call",
    [
        lambda: om.adamw(TREE),
        lambda: om.role_of("a", TREE),
        lambda: check_transforms("chain", om.adamw(0.1).init(TREE)),
        lambda: om.partition({"*": TREE}, {"a": om.sgd(0.1)}).init(W),
        lambda: check_key("apply_updates", TREE),
    ],
)
def test_no_error_is_as_long_as_a_model(call):
    """A tree in the place of something else is named by its first leaves."""
    with pytest.raises(ValueError, match=r"float(32|64)\[64, 64\]|EmaState|DivideState") as caught:
        call()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


OF_OTHER_TYPES = {
    "bytes as text": (
        lambda om: om.linalg.NewtonSchulz(max_stack_bytes="1"),
        ["NewtonSchulz", "max_stack_bytes", "'1'"],
    ),
    "no table": (
        lambda om: om.linalg.NewtonSchulz(None),
        ["NewtonSchulz: a table has rows", "None", "((a, b, c),)"],
    ),
    "a row for a table": (
        lambda om: om.linalg.NewtonSchulz((3.4445, -4.775, 2.0315)),
        ["NewtonSchulz: a table has rows of three numbers", "3.4445", "((a, b, c),)"],
    ),
    "codes rounded by a word": (
        lambda om: om.codecs.BFloat16(stochastic="no"),
        ["BFloat16: stochastic must be True or False", "'no'"],
    ),
    "differences rounded by a word": (
        lambda om: om.codecs.Split8(stochastic="no"),
        ["Split8: stochastic must be True or False", "'no'"],
    ),
    "a number that is an array": (
        lambda om: om.linalg.top_energy(jnp.ones((3, 3)), jnp.int32(1)),
        ["top_energy: k", "Type k=1", "If optax.inject_hyperparams made this array"],
    ),
    "an array for sides": (lambda om: om.mean(PAIR), ["mean: over must be 'i', 'o' or 'io'"]),
    "an array for an average": (lambda om: om.normuon(0.1, average=PAIR), ["normuon: average must be"]),
    "an array for bits": (lambda om: om.split_weights(W, PAIR), ["split_weights: bits must be 8 or 16"]),
    "where no function": (lambda om: om.mean("i", where="all"), ["mean: where must be a function"]),
    "a metric of 3": (lambda om: om.probes.probe(om.ema(0.9), 3), ["probe: 3 is not a metric"]),
    "one static number": (
        lambda om: om.inject_hyperparams(om.adamw, 3),
        ["inject_hyperparams: static_args has [3]", "adamw"],
    ),
    "numbers without names": (
        lambda om: om.inject_hyperparams(lambda **numbers: om.adamw(**numbers))(learning_rate=0.1),
        ["inject_hyperparams: <lambda> has no name for {'learning_rate': 0.1}", "lambda learning_rate"],
    ),
    "a number without a name": (
        lambda om: om.inject_hyperparams(lambda *numbers: om.adamw(*numbers))(0.1),
        ["inject_hyperparams: <lambda> has no name for (0.1,)", "lambda learning_rate"],
    ),
    "bytes of None": (
        lambda om: om.orthogonalize(bytes_at_once=None),
        ["orthogonalize: bytes_at_once", "None"],
    ),
}


@pytest.fixture(scope="module")
def unchecked():
    """The package as users have it, whose types nobody checks."""
    with mutants.package() as package:
        return package


@pytest.mark.parametrize(("call", "words"), OF_OTHER_TYPES.values(), ids=OF_OTHER_TYPES)
def test_other_types(call, words, unchecked):
    refused(lambda: call(unchecked), *words)


def refused(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("who", "first", "name"),
    [
        ("soap", 0.1, "every"),
        ("soap_muon", 0.1, "refresh_warmup"),
        ("shampoo", 0.1, "power"),
        ("multi_steps", optax.adam(0.1), "every_k"),
        ("skip_nonfinite", optax.adam(0.1), "max_consecutive"),
        ("in_bfloat16", optax.adam(0.1), "seed"),
        ("compress_state", optax.adam(0.1), "seed"),
        ("probe", optax.adam(0.1), "every"),
    ],
)
def test_what_optax_makes_an_array_of(who, first, name, unchecked):
    """What the error says to type is accepted."""
    make = getattr(unchecked.probes if who == "probe" else unchecked, who)
    others = {*inspect.signature(make).parameters} - {"learning_rate", name}
    number, params = 0.5 if name == "power" else 3, {"kernel": jnp.ones((64, 64))}

    def own(*args, **kwargs):
        return make(*args, **kwargs)

    own.__signature__ = inspect.signature(make)
    with jax.numpy_dtype_promotion("standard"):
        theirs = optax.inject_hyperparams(make, static_args=others)(first, **{name: number})
        words = f"Type {name}=", "optimorph.inject_hyperparams", f"static_args=('{name}',)"
        refused(lambda: theirs.init(params), *words)
        for inject in (
            unchecked.inject_hyperparams(make),
            unchecked.inject_hyperparams(own, (*others, name)),
        ):
            inject(first, **{name: number}).init(params)


def test_an_argument_that_is_none():
    with pytest.raises(TypeError, match="soap: got an unexpected keyword argument 'b4'"):
        om.soap(0.1, b4=0.9)


@pytest.mark.parametrize(
    "make",
    [
        lambda rules: om.scion(0.1, norms=rules),
        lambda rules: om.scion(0.1, radius=rules),
        lambda rules: om.scion(0.1, axes=rules),
        lambda rules: om.orthogonalize(axes=rules),
        lambda rules: om.muon(0.1, shardings=rules),
        lambda rules: om.orthogonalize(shardings=rules),
        lambda rules: om.adamh(0.1, shardings=rules),
        lambda rules: om.mars_adamw(0.1, shardings=rules),
        lambda rules: om.cautious(om.ema(0.9), rules),
        lambda rules: om.hyperball(0.1, rules),
        lambda rules: om.clip_attention_logits(axes=rules),
        lambda rules: om.factored(0.9, axes=rules),
        lambda rules: om.factored(0.9, shardings=rules),
    ],
)
def test_rules_of_no_leaf(make):
    with pytest.warns(UserWarning, match="no leaf matches the rule 'hiden/.' of .* Similar: 'hidden/kernel'"):
        make({"hiden/*": None}).init({"hidden": {"kernel": jnp.ones((3, 3))}})


@pytest.mark.parametrize("name", [*catalog.recipes_with("weight_decay", "mask"), "add_decayed_weights"])
def test_missing_params(name):
    tx = getattr(om, name)(weight_decay=0.1, **required(getattr(om, name)))
    refused(
        lambda: tx.update(W, tx.init(W)),
        name,
        "params",
        "tx.update(gradients, state, params)",
    )


def test_no_decay_needs_no_params():
    for tx in (om.muon(0.1), om.sgd(0.1), om.adam(0.1), om.adamw(0.1, weight_decay=0)):
        tx.update(W, tx.init(W))


WRONG = {
    "learning_rate": lambda count: "large",
    "weight_decay": lambda count: "large",
    "others_learning_rate": lambda count: "large",
    "mask": {"w": 1.5, "b": 1.5},
    "axes": {"*": "xy"},
    "shardings": 0.5,
    "orthogonalizer": lambda x, y: x,
    "comm_dtype": "int8",
    "divide": "v99",
    "scale": "spectral",
}
ARGUMENTS = [
    (name, argument) for argument in WRONG for name in catalog.recipes_with("learning_rate", argument)
]


@pytest.mark.examples("muon-*", "muonh-*", "mars_adamw-*", "sgd-*")
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS, ids=["-".join(pair) for pair in ARGUMENTS])
def test_an_optimizer_is_named_for_its_parts(name, argument):
    """Errors about its arguments name it, and no transform of which it is made."""

    def step():
        tx = getattr(om, name)(**{"learning_rate": 0.1, argument: WRONG[argument]})
        return tx.update(W, tx.init(W), W)

    with pytest.raises(ValueError, match=f"^{name}: "):
        jax.eval_shape(step)


def test_an_optimizer_that_the_user_made_names_itself():
    others = om.adamw(0.1, mask={"w": 1.5, "b": 1.5})
    refused(lambda: om.muon(0.1, others=others).init(W), "adamw: the mask is 1.5")


@pytest.mark.parametrize("name", catalog.recipes_with("learning_rate"))
def test_trees_that_differ(name):
    """Gradients that are not those of the parameters are refused under the recipe's own name."""
    tx = getattr(om, name)(0.1)
    state = tx.init(W)
    refused(lambda: tx.update({"w": W["w"]}, state, W), name, "'b'", "(3,)", "no gradient")
    refused(lambda: tx.update(W | {"c": W["b"]}, state, W), name, "'c'", "(3,)", "no parameter")
    refused(lambda: tx.update(W | {"b": jnp.ones(())}, state, W), name, "'b'", "()", "(3,)")
    refused(lambda: tx.update(W, state, {"w": W["w"]}), name, "'b'", "(3,)", "no parameter")
    tx.update(W | {"b": None}, state, W)
    with pytest.raises(ValueError) as caught:
        tx.update({"w": jnp.ones((3, 4)), "b": None}, state, W)
    assert "'w'" in str(caught.value)
    assert "'b'" not in str(caught.value)


def test_the_same_leaves_in_other_containers():
    tx, params = om.sgd(0.1, weight_decay=0.1), (W["w"], W["b"])
    refused(lambda: tx.update([W["w"], W["b"]], tx.init(params), params), "sgd", "their containers differ")


def test_complex_gradients_of_a_real_state():
    tx = om.ema(0.9)
    refused(lambda: tx.update(W | {"b": W["b"].astype(jnp.complex64)}, tx.init(W)), "ema", "'b'", "complex")


def test_what_is_no_array_has_no_state():
    refused(lambda: om.ema(0.9).init(W | {"f": jnp.tanh}), "'f'", "not an array", "eqx.filter")


@pytest.mark.parametrize(
    "tx", [om.ema(0.9), om.momentum(0.9), om.accumulate()], ids=["ema", "momentum", "accumulate"]
)
def test_gradients_that_are_not_the_states(tx):
    refused(lambda: tx.update({"w": W["w"]}, tx.init(W)), "'b'", "(3,)", "no gradient")
    with pytest.raises(ValueError, match="'w'"):
        jax.jit(tx.update)(W | {"w": jnp.ones((3, 4))}, tx.init(W))


SCHEDULES = [(name, argument) for name, argument in NUMBERS if argument in SCHEDULED]


@pytest.mark.examples("adamw-*", "muon-*", "ema-*", "scale_by_learning_rate-*", "hyperball-*")
@pytest.mark.parametrize(("name", "argument"), SCHEDULES, ids=["-".join(pair) for pair in SCHEDULES])
def test_schedules_that_are_none(name, argument):
    """The function that makes a schedule, and functions of the count that return no number."""
    factory = getattr(om, name)
    needed = {key: value for key, value in required(factory).items() if key != argument}

    def step(value):
        tx, params = factory(**needed, **{argument: value}), {"w": jnp.ones((4, 3))}
        jax.eval_shape(tx.update, params, tx.init(params), params)

    refused(lambda: step(optax.cosine_decay_schedule), argument, "cosine_decay_schedule", "count alone")
    refused(lambda: step(lambda: 0.1), argument, "count alone")
    returned = [lambda count, value=value: value for value in ("0.1", None, 1j)]
    for value in (optax.constant_schedule, om.adamw, *returned):
        refused(lambda value=value: step(value), "must return one number", "Type a schedule")
    refused(lambda: step(lambda count: jnp.ones(2)), "must return one number", "(2,)")
    step(optax.constant_schedule(0.1))


def test_numbers_of_microbatches_that_are_none():
    refused(
        lambda: om.multi_steps(om.ema(0.9), optax.linear_schedule), "multi_steps", "every_k", "count alone"
    )
    tx = om.multi_steps(om.ema(0.9), lambda steps: "2")
    refused(lambda: tx.update(W, tx.init(W)), "multi_steps: every_k", "one number")


WRAPPERS = {
    "compress_state": lambda: om.compress_state(optax.adam(0.1)),
    "in_bfloat16": lambda: om.in_bfloat16(optax.adam(0.1)),
    "multi_steps": lambda: om.multi_steps(optax.adam(0.1), 2),
    "skip_nonfinite": lambda: om.skip_nonfinite(optax.adam(0.1)),
    "probe": lambda: om.probes.probe(optax.adam(0.1)),
}


@pytest.mark.parametrize("who", WRAPPERS)
def test_the_state_of_what_is_wrapped(who):
    tx = WRAPPERS[who]()
    with pytest.raises(ValueError, match=rf"{who}: the state must be a .*State, but is a tuple"):
        tx.update(W, optax.adam(0.1).init(W), W)


AROUND = WRAPPERS | {
    "in_float32": lambda: om.in_float32(optax.adam(0.1)),
    "chain": lambda: om.chain(optax.adam(0.1), om.sign()),
    "add": lambda: om.add(optax.adam(0.1), om.sign()),
    "divide": lambda: om.divide(optax.adam(0.1), by=om.root(1.0)),
    "mix": lambda: om.mix(0.5, optax.adam(0.1), om.sign()),
    "cautious": lambda: om.cautious(optax.adam(0.1)),
    "keep_norm": lambda: om.keep_norm(optax.adam(0.1)),
    "partition": lambda: om.partition({"*": "all"}, {"all": optax.adam(0.1)}),
    "route_matrices": lambda: om.route_matrices(optax.adam(0.1), optax.sgd(0.1), axes={"w": "io", "*": None}),
    "in_eigenbasis": lambda: om.in_eigenbasis(optax.adam(0.1), decay=0.9, axes={"w": "io", "*": None}),
    "inject_hyperparams": lambda: om.inject_hyperparams(optax.adam)(learning_rate=0.1),
}


@pytest.mark.parametrize("who", AROUND)
def test_gradients_for_optax_are_those_of_the_parameters(who):
    tx = AROUND[who]()
    state = tx.init(W)
    with pytest.raises(ValueError, match=rf"{who}: .*\n  'w': a gradient of shape \(3, 4\) for .* \(4, 3\)"):
        tx.update(W | {"w": jnp.ones((3, 4))}, state, W)
    refused(lambda: tx.update({"w": W["w"]}, state, W), f"{who}: ", "'b': a parameter", "no gradient")
    refused(lambda: tx.update(W | {"c": W["b"]}, state, W), f"{who}: ", "'c': a gradient", "no parameter")
    refused(lambda: tx.update({"w": W["w"]}, tx.init({"w": W["w"]}), W), f"{who}: ", "'b': a parameter")
    of_examples = {name: jnp.ones((5, *w.shape)) for name, w in W.items()}
    refused(lambda: tx.update(of_examples, state, W), f"{who}: ", "single examples", "optax.chain")
    several = of_examples | {"b": jnp.ones((7, *W["b"].shape))}
    refused(lambda: tx.update(several, state, W), f"{who}: ", "Take the gradient of the same tree")


OF_MATRICES = {
    "mean": lambda spec: om.mean("i", om.ema(0.9), axes={"w": spec, "*": None}),
    "normuon": lambda spec: om.normuon(0.1, axes={"w": spec, "*": None}),
    "factored": lambda spec: om.factored(0.9, axes={"w": spec, "*": None}),
}


@pytest.mark.parametrize("who", OF_MATRICES)
@pytest.mark.parametrize("changed", [lambda x: x[None], lambda x: None, lambda x: "x"])
def test_a_state_of_rows_is_that_of_the_parameters(who, changed):
    tx = OF_MATRICES[who]("io")
    refused(lambda: tx.update(W, jax.tree.map(changed, tx.init(W)), W), "the optimizer state does not match")


@pytest.mark.parametrize("who", OF_MATRICES)
def test_a_state_of_rows_is_not_one_of_columns(who):
    state = OF_MATRICES[who]("io").init(W)
    refused(lambda: OF_MATRICES[who]("oi").update(W, state, W), f"{who}: the optimizer state does not match")


STATES = WRAPPERS | {
    "sgd": lambda: om.sgd(optax.linear_schedule(0.1, 0.0, 9)),
    "adagrad": lambda: om.adagrad(optax.linear_schedule(0.1, 0.0, 9)),
    "debias": lambda: om.debias(0.9),
    "slow_ema": lambda: om.slow_ema(0.9),
}


@pytest.mark.parametrize("who", STATES)
def test_counts_are_single_numbers(who):
    """A state for several devices or runs, used for one."""
    tx = STATES[who]()
    state = jax.tree.map(lambda x: jnp.asarray(x)[None] if jnp.ndim(x) == 0 else x, tx.init(W))
    refused(lambda: tx.update(W, state, W), "the optimizer state does not match")
    refused(lambda: tx.update(W, jax.eval_shape(tx.init, W), W), "the state has shapes in place of arrays")


@pytest.mark.parametrize("who", AROUND)
def test_a_state_of_optax_is_that_of_the_parameters(who):
    tx = AROUND[who]()
    with pytest.raises(ValueError, match=rf"{who}: the (optimizer state|gradients)"):
        tx.update(W, tx.init({"w": W["w"]}), W)


@pytest.mark.parametrize("who", AROUND)
@pytest.mark.parametrize("leaf", ["silu", jnp.tanh], ids=["text", "function"])
def test_what_is_no_array_has_no_state_of_optax(who, leaf):
    with pytest.raises(ValueError, match=rf"{who}: 'f' is .*, which is not an array.*eqx.filter"):
        AROUND[who]().init(W | {"f": leaf})


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("who", AROUND)
def test_parameters_that_are_python_numbers(who):
    tx, params = AROUND[who](), W | {"b": 1.0}
    updates, _ = tx.update(params, tx.init(params), params)
    arrays, _ = tx.update(as_arrays := jax.tree.map(jnp.asarray, params), tx.init(as_arrays), as_arrays)
    chex.assert_trees_all_equal(updates, arrays)


def test_another_tree_beside_the_gradients():
    """What is wrapped may take another tree than the parameters, such as two copies of them."""
    tx = om.skip_nonfinite(optax.lookahead(optax.adam(0.1), 2, 0.5))
    pair = optax.LookaheadParams.init_synced(W)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = tx.update(W, tx.init(pair), pair)
    assert jax.tree.structure(updates) == jax.tree.structure(pair)
    refused(lambda: tx.update({"w": W["w"]}, state, pair), "skip_nonfinite: the gradients do not match")


@pytest.mark.parametrize(("eps_root", "finite"), [(0.0, False), (1e-8, True)])
def test_gradients_through_a_dead_unit(eps_root, finite):
    """As the docstring of `root` has it."""
    params = {"w": jnp.zeros(2)}

    def loss(rate):
        tx = om.adam(rate, eps_root=eps_root)
        updates, _ = tx.update({"w": jnp.array([1.0, 0.0]) * rate}, tx.init(params), params)
        return jnp.sum(updates["w"] ** 2)

    assert bool(jnp.isfinite(jax.grad(loss)(0.1))) == finite


def test_updates_that_are_not_the_parameters():
    refused(lambda: om.apply_updates(W, {"w": W["w"]}), "apply_updates", "'b'", "(3,)")
    refused(
        lambda: om.apply_updates(W, W | {"b": jnp.ones(4)}, jax.random.key(0)), "apply_updates", "'b'", "(4,)"
    )


def test_ambiguous_leaves_are_refused_together():
    params = {"parts": {"q": jnp.ones((12, 8, 8)), "k": jnp.ones((12, 8, 8))}, "w": W["w"]}
    refused(
        lambda: om.muon(0.1).init(params),
        "muon: 'parts/q' has shape (12, 8, 8)",
        "muon: 'parts/k' has shape (12, 8, 8)",
        "axes={'parts/q': 'bio'}",
        "axes={'parts/q': 'iio'}",
        "axes={'parts/q': None}",
    )
    om.muon(0.1, axes={"parts/*": "bio"}).init(params)


def test_specs_that_do_not_fit():
    refused(lambda: om.muon(0.1, axes={"w": "bio"}).init(W), "muon", "'w'", "(4, 3)", "'bio'", "{'w': 'io'}")
    refused(lambda: om.orthogonalize(axes={"*": "io"}).init(W), "orthogonalize", "'b'", "(3,)", "None")
    refused(lambda: om.scale_by_shape(axes={"*": "io"}).init(W), "scale_by_shape", "'b'", "(3,)")


def test_bfloat16_numbers_are_numbers():
    om.ema(jnp.bfloat16(0.5))
    with pytest.raises(ValueError, match=r"ema: decay .* is 1"):
        om.ema(jnp.bfloat16(0.999))


def test_dampening_one_and_weight_decay_above_one_are_allowed():
    om.dampen(1.0)
    om.adamw(1e-4, weight_decay=2.0)


RACE = """
def race(**changed):
    batch = {"x": 1.0}
    data = dict(batches=[batch], held_out=[batch], steps=1)
    model = dict(loss=lambda p, b: (p * b["x"]) ** 2, params=1.0)
    om.race(**({"optimizers": {"a": om.sgd(0.1)}} | model | data | changed))
"""
RACES = {
    "optimizers=om.sgd(0.1)": ["optimizers must be a mapping", "optimizers={'adamw': om.adamw(1e-3)}"],
    "optimizers={'a': 3}": ["optimizers['a'] must be an optimizer"],
    "optimizers={'a': lambda rate: rate}, learning_rates=[0.1]": ["must return an optimizer"],
    "optimizers={'a': om.sgd}, learning_rates=0.1": ["learning_rates=[1e-3, 3e-3]"],
    "optimizers={'a': om.sgd}, learning_rates={'a': 0.1}": ["learning_rates=[1e-3, 3e-3]"],
    "optimizers={'a': om.sgd}, learning_rates=[lambda step: 0.1]": ["a list of numbers", "[1e-3]"],
    "optimizers={'a': optax.scale_by_zoom_linesearch(5)}": ["optimizers['a']", "missing", "Leave it out"],
    "sweep_bytes='1GB'": ["sweep_bytes=2**30"],
    "steps=1.5": ["steps=100"],
    "seeds='x'": ["seeds=3"],
    "batches=3": ["batches=[batch]"],
    "held_out=3": ["held_out=[batch]"],
    "loss=3": ["loss=lambda params, batch: ..."],
}


TAKERS = {
    "chain": "om.chain(om.ema(0.9), {})",
    "add": "om.add({}, om.ema(0.9))",
    "mix": "om.mix(0.5, om.ema(0.9), {})",
    "divide": "om.divide(om.ema(0.9), by={})",
    "compress_state": "om.compress_state({})",
    "in_bfloat16": "om.in_bfloat16({})",
    "in_float32": "om.in_float32({})",
    "multi_steps": "om.multi_steps({}, 2)",
    "skip_nonfinite": "om.skip_nonfinite({})",
    "probe": "om.probes.probe({})",
}
"""Functions of transformations: `chain(clip, adamw)` is refused, which has not called the recipe."""


def flags():
    """Every boolean argument of every public factory: the name, the argument, and values for those before."""
    factories = {name: getattr(om, name) for name in om.__all__} | {"probes.probe": om.probes.probe}
    for name, factory in factories.items():
        if callable(factory) and not inspect.isclass(factory) and name != "carry_state":  # which runs
            for argument, parameter in inspect.signature(factory).parameters.items():
                if isinstance(parameter.default, bool):
                    yield name, argument, "".join(f"{key}=NEEDED[{key!r}], " for key in required(factory))


CALLS = {
    "om.muon(0.1, axes=lambda: 3)": ["path and the shape", "lambda path, shape"],
    "om.muon(0.1, axes=lambda path: 'io')": ["path and the shape", "lambda path, shape"],
    "om.muon(0.1, axes=np.ones(2))": ["array of shape (2,)", "{'*': ...}"],
    "om.muon(0.1, shardings=np.ones(3))": ["array of shape (3,)", "{'*': ...}"],
    "om.muon(0.1, others=om.adamw)": ["muon", "init and update", "adamw(...)"],
    "om.route_matrices(om.sgd, om.sgd(0.1))": ["route_matrices", "init and update", "sgd(...)"],
    "om.partition({'a': om.sgd(0.1)}, {'*': 'a'})": ["partition: the values of rules", "rules first"],
    "om.partition({'*': 'a'}, None)": ["partition", "map labels to transformations"],
    "om.partition({'*': 'a'}, {'a': om.adamw})": ["partition", "init and update", "adamw(...)"],
    "om.partition({'a': 'a'}, {'a': om.sgd(0.1)}).init({'b': np.ones(2)})": [
        "partition",
        "no rule matches 'b'",
    ],
    "om.sgd(0.1, mask={'a*': True}).init({'b': np.ones(2)})": ["sgd: no rule matches 'b'"],
    "om.plan({}, om.adamw)": ["plan", "init and update", "adamw(...)"],
    "om.layouts.maxtext('scan')": ["maxtext", "scan_axis=1"],
    "om.layouts.t5x(1.0)": ["t5x", "scan_axis=1"],
    "om.layouts.maxtext(scan_axis=3)": ["maxtext", "scan_axis is 3", "0, 1 or 2"],
    "om.layouts.gpt_neox(None)": ["gpt_neox", "heads=12"],
    "om.sgd(None)": ["sgd", "learning_rate", "1e-3"],
    **{
        take.format("om.adamw"): [who, "init and update", "but adamw has not", "adamw(...)"]
        for who, take in TAKERS.items()
    },
    **{take.format("None"): [who, "init and update", "but None has not"] for who, take in TAKERS.items()},
    **{
        take.format("[om.ema(0.9)]"): [who, "init and update", "optimorph.adamw(1e-3)"]
        for who, take in TAKERS.items()
    },
    **{
        f"om.{name}({needed}{argument}={value})": [name.split(".")[-1], f"{argument} must be True or False"]
        for name, argument, needed in flags()
        for value in ("0.5", "'no'", "None")
    },
    "om.ema(0.9, lookahead='0.9')": ["ema", "lookahead", "'0.9'", "lookahead=0.9"],
    "om.curvature.extremes(np.sum, np.ones(2), key=0)": ["extremes: key must be one key", "key(0)"],
    "om.linalg.polar_express(np.array(0.1))": ["not refused"],
    "om.ema(np.str_('float32'))": ["ema: decay must be a number", "decay=0.9"],
    "om.apply_updates([np.ones(2)], [np.ones(2)], key=[[0], [0, 1]])": ["key must be one key", "key(0)"],
    **{
        f"om.curvature.extremes(np.sum, np.ones(2), steps={steps})": ["extremes", "steps must be an integer"]
        for steps in ("None", "'a'", "np.nan", "[2]", "0")
    },
    "om.debias(0.9, ahead='1')": ["debias", "ahead", "'1'", "ahead=1"],
    "om.adam(0.1, mu_dtype={'*': 'bfloat16'})": ["adam", "mu_dtype", "mu_dtype='bfloat16'"],
    "om.orthogonalize('jordan')": ["orthogonalize", "orthogonalizer", "'jordan'", "NewtonSchulz()"],
    "om.scale_by_shape({'*': 'keller'})": ["scale_by_shape", "scale", "'rms_to_rms'"],
    "om.adamw(0.1, weight_decay_form=['cautious'])": ["adamw", "weight_decay_form", "'coupled'"],
    **{
        f"om.compress_state(om.ema(0.9), fields={fields})": ["fields must say", "fields={'MyState': {"]
        for fields in ("'first'", "{'A': 'first'}", "{'A': {'b': 'third'}}", "{int: {'b': 'first'}}")
    },
    "om.muon(0.1, axes='io')": ["muon", "axes={'*': 'io'}"],
    **{f"race({changed})": ["race", *words] for changed, words in RACES.items()},
}
EACH_CALL = """
for call in CALLS:
    try:
        exec(call)
    except ValueError as error:
        print(str(error).splitlines()[-1])
    else:
        print("not refused")
"""


def test_refused_without_the_type_checker():
    """What the type checker of these tests would refuse first, as a user's process meets it."""
    needed = "NEEDED = {'learning_rate': 0.1, 'decay': 0.9, 'inner': om.ema(0.5)}"
    imports = "import numpy as np\nimport optax\nimport optimorph as om"
    code = f"{imports}\n{needed}\n{RACE}\nCALLS = {[*CALLS]}\n{EACH_CALL}"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for line, (call, words) in zip(process.stdout.splitlines(), CALLS.items(), strict=True):
        assert all(word in line for word in words), (call, line)
