"""The one registry of public transforms and recipes: what the contract and the formula tests run over."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import papers
import pytest
from float32 import float32_class

import optimorph

Factory = Callable[[Any], optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public object under some arguments.

    Args:
      id: what `pytest -k` selects by; it begins with the object's name.
      make: package → transformation (the package is an argument so that mutants can be tried).
      paper: makes the float64 rule of one leaf.
      matrices: the formula holds for matrices only.
      real: the formula holds for real leaves only.
      positive: the input should not be negative (roots).
      together: the rule is one of all leaves, as mappings.
      condition: how much more than others the formula magnifies rounding.
      stacks: its state has stacks of the matrices of several leaves.
    """

    id: str
    make: Factory
    paper: Callable[[], Callable[[Any, Any], Any]]
    matrices: bool = False
    real: bool = False
    positive: bool = False
    together: bool = False
    condition: float = 1.0
    stacks: bool = False

    @property
    def name(self) -> str:
        return self.id.split("-")[0]

    def build(self) -> optax.GradientTransformation:
        """The same object at every call, so that its programs are traced and compiled once."""
        return self._built

    @functools.cached_property
    def _built(self) -> optax.GradientTransformation:
        return self.make(optimorph)


def linear(start, slope):
    """A schedule that NumPy and JAX both compute."""
    return lambda count: start + slope * (count if type(count) is int else count.astype(float))


def with_a_nan(every):
    """Makes each `every`th gradient of the first leaf NaN."""

    def update(updates, count, params=None):
        leaves, tree = jax.tree.flatten(updates)
        for k, g in enumerate(leaves[:1]):
            leaves[k] = jnp.where((count + 1) % every == 0, jnp.nan, g).astype(jnp.result_type(g))
        return tree.unflatten(leaves), jnp.int32(count) + 1

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)


WEIGHTS = (2.0, 1.0, 0.0, 0.0, 3.0, 2.0, 1.0, 5.0)
FLUSHED = (3, 4)


def weighed(tx):
    """Gives every gradient a weight, and ends windows."""

    def update(updates, state, params=None):
        count, inner = state
        now = jnp.asarray(count) % len(WEIGHTS)
        weight = sum(jnp.where(now == k, w, 0.0) for k, w in enumerate(WEIGHTS))
        flush = functools.reduce(jnp.logical_or, [now == k for k in FLUSHED])
        updates, inner = tx.update(updates, inner, params, weight=weight, flush=flush)
        return updates, (jnp.asarray(count, jnp.int32) + 1, inner)

    return optax.GradientTransformation(lambda params: (jnp.zeros([], jnp.int32), tx.init(params)), update)


def of_four(path, shape):
    """A mask."""
    return shape[-1:] == (4,)


def of_matrices(params):
    """A mask."""
    return jax.tree.map(lambda w: jnp.ndim(w) == 2, params)


def in_blocks(path, shape):
    """Axes: of 4 columns each by itself, of 9 two unequal blocks."""
    return {4: "i(4o)", 9: "i(4+5o)"}.get(shape[-1], "io")


def by_last_axis(path, shape):
    """A factor."""
    return 0.5 if shape[-1:] == (4,) else 1.5


def _ends(columns):
    return {4: [1, 2, 3], 9: [4]}.get(columns, [])


def _muon_matrices(om, **kwargs):
    return om.muon(0.02, axes={"*": "io"}, **kwargs)


BESIDE_MUON = ("normuon", "adamuon", "muon2")
"""Optimizers with polar factors, by their names in `papers`."""

INDEPENDENT = {"weight_decay_form": "independent", "axes": {"*": "io"}}

TRANSFORMS = [
    Entry("momentum", lambda om: om.momentum(0.9), lambda: papers.momentum(0.9)),
    Entry(
        "momentum-nesterov", lambda om: om.momentum(0.8, nesterov=True), lambda: papers.momentum(0.8, True)
    ),
    Entry("dampen", lambda om: om.dampen(0.3), lambda: papers.dampen(0.3)),
    Entry("ema", lambda om: om.ema(0.9), lambda: papers.ema(0.9)),
    Entry("ema-nesterov", lambda om: om.ema(0.8, nesterov=True), lambda: papers.ema(0.8, True)),
    Entry("ema-initial", lambda om: om.ema(0.8, initial=0.5), lambda: papers.ema(0.8, initial=0.5)),
    *(
        Entry(
            f"clip_by_global_norm-{name}",
            lambda om, norm=norm: om.clip_by_global_norm(norm),
            lambda norm=norm: papers.clip_by_global_norm(norm),
            together=True,
        )
        for name, norm in (("always", 1.5), ("at-times", 5.0))
    ),
    Entry("skip_nonfinite", lambda om: om.skip_nonfinite(om.ema(0.9), 1), lambda: papers.ema(0.9)),
    Entry(
        "skip_nonfinite-each-third",
        lambda om: optax.chain(with_a_nan(3), om.skip_nonfinite(om.ema(0.9))),
        lambda: papers.with_a_nan(papers.skip_nonfinite(papers.ema(0.9)), 3),
    ),
    Entry("square", lambda om: om.square(), papers.square),
    Entry("sign", lambda om: om.sign(), papers.sign),
    Entry("ema-lookahead", lambda om: om.ema(0.8, lookahead=0.5), lambda: papers.ema(0.8, lookahead=0.5)),
    Entry("slow_ema", lambda om: om.slow_ema(0.9, 2.0), lambda: papers.slow_ema(0.9, 2.0)),
    Entry(
        "slow_ema-schedules",
        lambda om: om.slow_ema(linear(0.5, 0.02), linear(0.1, 0.2)),
        lambda: papers.slow_ema(linear(0.5, 0.02), linear(0.1, 0.2)),
    ),
    Entry("extrapolate", lambda om: om.extrapolate(0.3, 0.8), lambda: papers.extrapolate(0.3, 0.8)),
    Entry("clip_norm", lambda om: om.clip_norm(2.0), lambda: papers.clip_norm(2.0)),
    Entry("clip_rms", lambda om: om.clip_rms(0.8), lambda: papers.clip_rms(0.8)),
    Entry(
        "hyperball", lambda om: om.hyperball(0.1, {"*": None}), lambda: papers.hyperball(0.1), matrices=True
    ),
    Entry("hyperball-matrices", lambda om: om.hyperball(0.1), lambda: papers.hyperball(0.1), matrices=True),
    Entry(
        "hyperball-blocks",
        lambda om: om.hyperball(0.1, in_blocks),
        lambda: papers.by_columns(papers.hyperball(0.1), _ends),
        matrices=True,
    ),
    Entry("cautious", lambda om: om.cautious(om.ema(0.9)), lambda: papers.cautious(papers.ema(0.9))),
    Entry("clip_attention_logits", lambda om: om.clip_attention_logits(), lambda: lambda u, w: u),
    *(
        Entry(
            f"mean-{over}",
            lambda om, over=over: om.mean(over, om.ema(0.9)),
            lambda over=over: papers.mean(over, papers.ema(0.9)),
            matrices=True,
        )
        for over in ("i", "o", "io")
    ),
    Entry(
        "mean-blocks",
        lambda om: om.mean("o", axes=in_blocks),
        lambda: papers.by_columns(papers.mean("o"), _ends),
        matrices=True,
    ),
    Entry(
        "mean-blocks-out-in",
        lambda om: om.mean("o", axes=lambda path, shape: {4: "(4o)i", 9: "(4+5o)i"}.get(shape[0], "oi")),
        lambda: _transposed(papers.by_columns(papers.mean("o"), _ends)),
        matrices=True,
    ),
    Entry(
        "mean-where",
        lambda om: om.mean("i", om.ema(0.9), where=lambda inputs, outputs: inputs < outputs),
        lambda: _scaled(papers.mean("i", papers.ema(0.9)), lambda i, o: i < o),
        matrices=True,
    ),
    Entry(
        "keep_norm",
        lambda om: om.keep_norm(om.sign()),
        lambda: papers.keep_norm(papers.sign()),
        matrices=True,
    ),
    Entry(
        "keep_norm-blocks",
        lambda om: om.keep_norm(om.sign(), in_blocks),
        lambda: papers.by_columns(papers.keep_norm(papers.sign()), _ends),
        matrices=True,
    ),
    Entry(
        "factored",
        lambda om: om.factored(0.9),
        lambda: papers.factored(0.9),
        matrices=True,
        real=True,
        positive=True,
    ),
    Entry(
        "in_eigenbasis",
        lambda om: om.in_eigenbasis(
            om.divide(om.ema(0.8), by=om.chain(om.square(), om.ema(0.9), om.root(1e-2))),
            decay=0.95,
            every=3,
            refresh_warmup=2,
            max_dim=5,
            axes={"*": "io"},
        ),
        lambda: papers.soap(-1.0, 0.8, 0.9, 1e-2, every=3, beta=0.95, correct=False, max_dim=5, warmup=2),
        matrices=True,
        real=True,
        condition=10,
        stacks=True,
    ),
    Entry(
        "scale_by_rules",
        lambda om: om.scale_by_rules(by_last_axis),
        lambda: lambda g, w: by_last_axis(None, g.shape) * g,
    ),
    Entry("accumulate", lambda om: om.accumulate(), papers.accumulate),
    Entry("accumulate-initial", lambda om: om.accumulate(0.1), lambda: papers.accumulate(0.1)),
    Entry("debias", lambda om: om.debias(0.9), lambda: papers.debias(0.9)),
    Entry("debias-power", lambda om: om.debias(0.9, power=0.5), lambda: papers.debias(0.9, power=0.5)),
    Entry("debias-ahead", lambda om: om.debias(0.9, ahead=1), lambda: papers.debias(0.9, 1)),
    Entry("root", lambda om: om.root(1e-2, 1e-3), lambda: papers.root(1e-2, 1e-3), real=True, positive=True),
    Entry(
        "divide",
        lambda om: om.divide(om.ema(0.9), by=optax.chain(om.square(), om.root(0.1))),
        lambda: _quotient(papers.ema(0.9), lambda g, w: np_root(g, 0.1)),
    ),
    Entry(
        "add",
        lambda om: om.add(om.ema(0.9), optax.scale(2.0), om.momentum(0.5)),
        lambda: _sum(papers.ema(0.9), lambda g, w: 2.0 * g, papers.momentum(0.5)),
    ),
    Entry(
        "mix",
        lambda om: om.mix(0.8, om.ema(0.9), optax.identity()),
        lambda: _sum(_times(0.8, papers.ema(0.9)), lambda g, w: 0.2 * g),
    ),
    Entry(
        "divide-nothing-by-nothing",
        lambda om: om.divide(optax.scale(0.0), by=optax.scale(0.0)),
        lambda: lambda g, w: 0.0 * g,
    ),
    Entry("in_bfloat16", lambda om: om.in_bfloat16(om.dampen(0.3)), lambda: papers.dampen(0.3)),
    Entry(
        "multi_steps",
        lambda om: om.multi_steps(om.ema(0.9), 3),
        lambda: papers.multi_steps(papers.ema(0.9), 3),
    ),
    Entry(
        "multi_steps-schedule-with-a-nan",
        lambda om: optax.chain(with_a_nan(3), om.multi_steps(om.ema(0.9), lambda steps: 1 + steps % 2)),
        lambda: papers.with_a_nan(papers.multi_steps(papers.ema(0.9), lambda steps: 1 + steps % 2), 3),
    ),
    Entry(
        "compress_state",
        lambda om: om.compress_state(
            om.adam(0.1, eps=1e-2), {"*": float32_class(om.codecs)()}, elementwise=True
        ),
        lambda: papers.adam(0.1, 0.9, 0.999, 1e-2),
    ),
    Entry("compress_state-default", lambda om: om.compress_state(om.ema(0.9)), lambda: papers.ema(0.9)),
    Entry("multi_steps-each", lambda om: om.multi_steps(om.ema(0.9), 1), lambda: papers.ema(0.9)),
    Entry(
        "in_float32",
        lambda om: om.in_float32(optax.chain(om.ema(0.9), optax.scale(0.3), optax.scale(0.3))),
        lambda: papers.chain(papers.ema(0.9), lambda g, w: 0.09 * g),
    ),
    Entry(
        "partition",
        lambda om: om.partition({"*": "all"}, {"all": om.ema(0.9)}),
        lambda: papers.ema(0.9),
    ),
    Entry(
        "chain",
        lambda om: om.chain(om.ema(0.9), optax.scale(2.0), om.dampen(0.3), om.scale_by_learning_rate(0.1)),
        lambda: papers.chain(
            papers.ema(0.9), lambda g, w: 2.0 * g, papers.dampen(0.3), papers.scale_by_learning_rate(0.1)
        ),
    ),
    Entry(
        "route_matrices",
        lambda om: om.route_matrices(
            om.chain(om.ema(0.9), om.orthogonalize(), om.scale_by_shape("keller")),
            om.ema(0.8),
            axes={"*": "io"},
        ),
        lambda: papers.chain(papers.ema(0.9), papers.orthogonalize(), papers.scale_by_shape("keller")),
        matrices=True,
        real=True,
    ),
    Entry("orthogonalize", lambda om: om.orthogonalize(), papers.orthogonalize, matrices=True, real=True),
    Entry(
        "orthogonalize-gram",
        lambda om: om.orthogonalize(om.linalg.NewtonSchulz(iteration="gram")),
        papers.orthogonalize,
        matrices=True,
        real=True,
    ),
    Entry(
        "orthogonalize-jordan",
        lambda om: om.orthogonalize(om.linalg.NewtonSchulz("jordan")),
        lambda: papers.orthogonalize(papers.JORDAN),
        matrices=True,
        real=True,
    ),
    Entry(
        "orthogonalize-cubics",
        lambda om: om.orthogonalize(
            om.linalg.NewtonSchulz(om.linalg.polar_express(1e-3, 6, degree=3, cushion=0.0), 6)
        ),
        lambda: papers.orthogonalize(papers.cubics(1e-3, 6)),
        matrices=True,
        real=True,
    ),
    Entry(
        "orthogonalize-blocks",
        lambda om: om.orthogonalize(axes=in_blocks),
        lambda: papers.by_columns(papers.orthogonalize(), _ends),
        matrices=True,
        real=True,
    ),
    Entry(
        "scale_by_shape-blocks",
        lambda om: om.scale_by_shape(axes=in_blocks),
        lambda: papers.by_columns(papers.scale_by_shape("rms_to_rms"), _ends),
        matrices=True,
    ),
    *(
        Entry(
            f"scale_by_shape-{name}",
            lambda om, name=name: om.scale_by_shape(name),
            lambda name=name: papers.scale_by_shape(name),
            matrices=True,
        )
        for name in ("rms_to_rms", "keller", "adamw_rms", None)
    ),
    Entry(
        "add_decayed_weights",
        lambda om: om.add_decayed_weights(0.1),
        lambda: papers.add_decayed_weights(0.1),
    ),
    Entry(
        "add_decayed_weights-schedule",
        lambda om: om.add_decayed_weights(linear(0.1, 0.02)),
        lambda: papers.add_decayed_weights(linear(0.1, 0.02)),
    ),
    Entry(
        "add_decayed_weights-cautious",
        lambda om: om.add_decayed_weights(0.1, cautious=True),
        lambda: papers.add_decayed_weights(0.1, cautious=True),
    ),
    Entry(
        "add_decayed_weights-mask",
        lambda om: om.add_decayed_weights(0.1, of_matrices),
        lambda: lambda g, w: g + 0.1 * w * (np.ndim(w) == 2),
    ),
    Entry(
        "scale_by_learning_rate",
        lambda om: om.scale_by_learning_rate(0.1),
        lambda: papers.scale_by_learning_rate(0.1),
    ),
    Entry(
        "scale_by_learning_rate-schedule",
        lambda om: om.scale_by_learning_rate(linear(0.1, 0.02)),
        lambda: papers.scale_by_learning_rate(linear(0.1, 0.02)),
    ),
]

RECIPES = [
    Entry("sgd", lambda om: om.sgd(0.1), lambda: papers.sgd(0.1)),
    Entry("sgd-momentum", lambda om: om.sgd(0.1, 0.9), lambda: papers.sgd(0.1, 0.9)),
    Entry("sgd-nesterov", lambda om: om.sgd(0.1, 0.9, True), lambda: papers.sgd(0.1, 0.9, True)),
    Entry(
        "sgd-dampening-l2",
        lambda om: om.sgd(0.1, 0.9, dampening=0.4, weight_decay=0.2),
        lambda: papers.sgd(0.1, 0.9, tau=0.4, l2=0.2),
    ),
    Entry("adagrad", lambda om: om.adagrad(0.1, eps=1e-3), lambda: papers.adagrad(0.1, 0.1, 1e-3)),
    Entry(
        "adagrad-outside-l2",
        lambda om: om.adagrad(0.1, 0.2, 1e-2, eps_in_sqrt=False, weight_decay=0.2),
        lambda: papers.adagrad(0.1, 0.2, 1e-2, inside=False, l2=0.2),
    ),
    Entry("rmsprop", lambda om: om.rmsprop(0.1, eps=1e-3), lambda: papers.rmsprop(0.1, 0.9, 1e-3)),
    Entry(
        "rmsprop-outside-initial-l2",
        lambda om: om.rmsprop(0.1, 0.8, 1e-2, 0.5, eps_in_sqrt=False, weight_decay=0.2),
        lambda: papers.rmsprop(0.1, 0.8, 1e-2, 0.5, inside=False, l2=0.2),
    ),
    Entry(
        "rmsprop-centered",
        lambda om: om.rmsprop(0.1, 0.8, 1e-2, centered=True),
        lambda: papers.rmsprop(0.1, 0.8, 1e-2, centered=True),
    ),
    Entry(
        "rmsprop-centered-corrected",
        lambda om: om.rmsprop(0.1, 0.8, 1e-1, centered=True, bias_correction=True),
        lambda: papers.rmsprop(0.1, 0.8, 1e-1, centered=True, correct=True),
    ),
    Entry(
        "rmsprop-momentum",
        lambda om: om.rmsprop(0.1, 0.8, 1e-2, momentum=0.9, bias_correction=True),
        lambda: papers.rmsprop(0.1, 0.8, 1e-2, mu=0.9, correct=True),
    ),
    Entry(
        "rmsprop-nesterov",
        lambda om: om.rmsprop(0.1, 0.8, 1e-2, momentum=0.9, nesterov=True),
        lambda: papers.rmsprop(0.1, 0.8, 1e-2, mu=0.9, nesterov=True),
    ),
    Entry("adam", lambda om: om.adam(0.1, eps=1e-2), lambda: papers.adam(0.1, 0.9, 0.999, 1e-2)),
    Entry(
        "adam-eps_root-l2",
        lambda om: om.adam(0.1, 0.8, 0.9, 1e-2, 1e-2, weight_decay=0.2),
        lambda: papers.adam(0.1, 0.8, 0.9, 1e-2, 1e-2, l2=0.2),
    ),
    Entry(
        "nadam",
        lambda om: om.nadam(0.1, eps=1e-2, eps_root=1e-2),
        lambda: papers.adam(0.1, 0.9, 0.999, 1e-2, 1e-2, nesterov=True),
    ),
    Entry(
        "nadam-l2",
        lambda om: om.nadam(0.1, 0.8, 0.9, 1e-2, weight_decay=0.2),
        lambda: papers.adam(0.1, 0.8, 0.9, 1e-2, l2=0.2, nesterov=True),
    ),
    Entry(
        "adamw",
        lambda om: om.adamw(0.1, eps=1e-2, eps_root=1e-2, weight_decay=0.2),
        lambda: papers.adam(0.1, 0.9, 0.999, 1e-2, 1e-2, decay=0.2),
    ),
    *(
        Entry(
            f"{name}-{form}",
            lambda om, name=name, form=form: getattr(om, name)(
                0.1, eps=1e-2, weight_decay=0.2, weight_decay_form=form
            ),
            lambda name=name, form=form: papers.adam(
                0.1, 0.9, 0.999, 1e-2, decay=0.2, nesterov=name == "nadamw", form=form
            ),
        )
        for name in ("adamw", "nadamw")
        for form in ("independent", "cautious", "corrected")
    ),
    Entry(
        "nadamw",
        lambda om: om.nadamw(0.1, eps=1e-2, eps_root=1e-2, weight_decay=0.2),
        lambda: papers.adam(0.1, 0.9, 0.999, 1e-2, 1e-2, decay=0.2, nesterov=True),
    ),
    Entry(
        "lion",
        lambda om: om.lion(0.01, weight_decay=0.2),
        lambda: papers.lion(0.01, 0.9, 0.99, 0.2),
    ),
    Entry(
        "laprop",
        lambda om: om.laprop(0.1, eps=1e-2, weight_decay=0.2),
        lambda: papers.laprop(0.1, 0.9, 0.999, 1e-2, decay=0.2),
    ),
    Entry(
        "ademamix",
        lambda om: om.ademamix(0.1, b3=0.99, alpha=2.0, eps=1e-2, weight_decay=0.2),
        lambda: papers.ademamix(0.1, 0.9, 0.999, 0.99, 2.0, 1e-2, decay=0.2),
    ),
    Entry(
        "mars_adamw",
        lambda om: om.mars_adamw(0.1, eps=1e-2, weight_decay=0.2),
        lambda: papers.mars_adamw(0.1, eps=1e-2, decay=0.2),
    ),
    Entry(
        "adamh",
        lambda om: om.adamh(0.1, eps=1e-2, axes={"*": None}),
        lambda: papers.adamh(0.1, eps=1e-2),
        matrices=True,
    ),
    Entry(
        "muonh",
        lambda om: om.muonh(0.02, axes={"*": "io"}),
        lambda: papers.muonh(0.02),
        matrices=True,
        real=True,
    ),
    Entry(
        "soap",
        lambda om: om.soap(0.1, eps=1e-2, every=4, max_dim=5, axes={"*": "io"}),
        lambda: papers.soap(0.1, eps=1e-2, every=4, decay=0.01, max_dim=5),
        matrices=True,
        real=True,
        condition=10,
        stacks=True,
    ),
    Entry(
        "muon",
        lambda om: _muon_matrices(om, weight_decay=0.2),
        lambda: papers.muon(0.02, decay=0.2),
        matrices=True,
        real=True,
    ),
    *(
        Entry(
            f"muon-{form}",
            lambda om, form=form: _muon_matrices(om, weight_decay=0.2, weight_decay_form=form),
            lambda form=form: papers.muon(0.02, decay=0.2, form=form),
            matrices=True,
            real=True,
        )
        for form in ("independent", "cautious", "corrected")
    ),
    *(
        Entry(
            name,
            lambda om, name=name: getattr(om, name)(0.02, axes={"*": "io"}, weight_decay=0.2),
            lambda name=name: getattr(papers, name)(0.02, decay=0.2),
            matrices=True,
            real=True,
        )
        for name in BESIDE_MUON
    ),
    Entry(
        "normuon-shorter",
        lambda om: om.normuon(0.02, axes={"*": "io"}, average="shorter"),
        lambda: papers.normuon(0.02, shorter=True),
        matrices=True,
        real=True,
    ),
    Entry(
        "scion",
        lambda om: om.scion(0.01, axes={"*": "io"}),
        lambda: papers.scion(0.01),
        matrices=True,
        real=True,
    ),
    Entry(
        "scion-rms",
        lambda om: om.scion(0.01, 0.8, axes={"*": None}, weight_decay=0.2, weight_decay_form="independent"),
        lambda: papers.scion(0.01, 0.8, "rms", decay=0.2, form="independent"),
        real=True,
    ),
    Entry(
        "muon-jordan-keller",
        lambda om: _muon_matrices(
            om, nesterov=False, orthogonalizer=om.linalg.NewtonSchulz("jordan"), scale="keller"
        ),
        lambda: papers.muon(0.02, nesterov=False, rows=papers.JORDAN, scale="keller"),
        matrices=True,
        real=True,
    ),
    Entry(
        "muon-adamw_rms",
        lambda om: _muon_matrices(om, momentum=0.8, scale="adamw_rms"),
        lambda: papers.muon(0.02, 0.8, scale="adamw_rms"),
        matrices=True,
        real=True,
    ),
    Entry(
        "muon-out-in",
        lambda om: om.muon(0.02, axes={"*": "oi"}),
        lambda: _transposed(papers.muon(0.02)),
        matrices=True,
        real=True,
    ),
    Entry(
        "muon-others-cautious",
        lambda om: om.muon(0.1, axes={"*": None}, weight_decay=0.2, weight_decay_form="cautious"),
        lambda: papers.adam(0.1, 0.9, 0.999, 1e-8, decay=0.2, form="cautious"),
    ),
    Entry(
        "muon-others",
        lambda om: om.muon(0.02, axes={"*": None}, others_learning_rate=0.1, weight_decay=0.2),
        lambda: papers.adam(0.1, 0.9, 0.999, 1e-8, decay=0.2),
    ),
]

LIKE_SOAP = {"matrices": True, "real": True, "condition": 10, "stacks": True}

MORE = [  # recipes under other arguments, which have no other states
    Entry(
        "multi_steps-weights",
        lambda om: optax.chain(with_a_nan(3), weighed(om.multi_steps(om.ema(0.9), 3, maximum=of_four))),
        lambda: papers.with_a_nan(
            papers.multi_steps(papers.ema(0.9), 3, WEIGHTS, FLUSHED, lambda g: g.shape[-1:] == (4,)), 3
        ),
    ),
    Entry(
        "adamw-corrected-schedule",
        lambda om: om.adamw(linear(0.1, -0.004), eps=1e-2, weight_decay=0.2, weight_decay_form="corrected"),
        lambda: papers.adam(linear(0.1, -0.004), 0.9, 0.999, 1e-2, decay=0.2, form="corrected"),
    ),
    *(
        Entry(
            f"{name}-out-in",
            lambda om, name=name: getattr(om, name)(
                0.02,
                0.8,
                0.9,
                1e-2,
                nesterov=False,
                scale="rms_to_rms",
                axes={"*": "oi"},
                weight_decay=0.2,
                weight_decay_form="independent",
            ),
            lambda name=name: _transposed(
                getattr(papers, name)(
                    0.02, 0.8, 0.9, 1e-2, nesterov=False, scale="rms_to_rms", decay=0.2, form="independent"
                )
            ),
            matrices=True,
            real=True,
        )
        for name in BESIDE_MUON
    ),
    *(
        Entry(
            f"scion-{norm}",
            lambda om, norm=norm: om.scion(0.01, 0.83, norms={"*": norm}, radius=10.0, axes={"*": "oi"}),
            lambda norm=norm: _transposed(papers.scion(0.01, 0.83, norm=norm, radius=10.0)),
            matrices=True,
            real=True,
        )
        for norm in ("spectral", "sign", "row", "column")
    ),
    Entry(
        "normuon-shorter-least",
        lambda om: om.normuon(0.02, b2=0.8, eps=0.1, axes={"*": "oi"}, average="shorter"),
        lambda: _transposed(papers.normuon(0.02, b2=0.8, eps=0.1, shorter=True)),
        matrices=True,
        real=True,
    ),
    Entry(
        "muon-scale-of-my-own",
        lambda om: om.muon(0.02, axes={"*": "io"}, scale=lambda inputs, outputs: inputs / outputs),
        lambda: _scaled(papers.muon(0.02, scale=None), lambda i, o: i / o),
        matrices=True,
        real=True,
    ),
    Entry(
        "adamw-betas",
        lambda om: om.adamw(0.1, 0.8, 0.9, 1e-2, weight_decay=0.2),
        lambda: papers.adam(0.1, 0.8, 0.9, 1e-2, decay=0.2),
    ),
    Entry(
        "nadamw-betas",
        lambda om: om.nadamw(0.1, 0.8, 0.9, 1e-2, weight_decay=0.2),
        lambda: papers.adam(0.1, 0.8, 0.9, 1e-2, decay=0.2, nesterov=True),
    ),
    Entry(
        "muon-others-rmsprop",
        lambda om: om.muon(0.02, axes={"*": None}, others=om.rmsprop(0.1, eps=1e-3)),
        lambda: papers.rmsprop(0.1, 0.9, 1e-3),
    ),
    Entry(
        "laprop-betas",
        lambda om: om.laprop(0.1, 0.8, 0.9, 1e-2, 1e-2, weight_decay=0.2, weight_decay_form="independent"),
        lambda: papers.laprop(0.1, 0.8, 0.9, 1e-2, 1e-2, 0.2, "independent"),
    ),
    Entry(
        "ademamix-schedules",
        lambda om: om.ademamix(
            0.1,
            0.8,
            0.9,
            linear(0.8, 0.005),
            linear(0.5, 0.5),
            1e-2,
            1e-2,
            weight_decay=0.2,
            weight_decay_form="independent",
        ),
        lambda: papers.ademamix(
            0.1, 0.8, 0.9, linear(0.8, 0.005), linear(0.5, 0.5), 1e-2, 1e-2, 0.2, "independent"
        ),
    ),
    Entry(
        "mars_adamw-numbers",
        lambda om: om.mars_adamw(
            0.1,
            0.8,
            0.9,
            1e-2,
            1e-2,
            weight_decay=0.2,
            gamma=0.2,
            max_norm=3.0,
            weight_decay_form="independent",
        ),
        lambda: papers.mars_adamw(0.1, 0.8, 0.9, 1e-2, 1e-2, 0.2, 0.2, 3.0, "independent"),
    ),
    Entry(
        "lion-betas",
        lambda om: om.lion(0.01, 0.8, 0.95, weight_decay=0.2, weight_decay_form="independent"),
        lambda: papers.lion(0.01, 0.8, 0.95, 0.2, "independent"),
    ),
    Entry(
        "adamh-betas",
        lambda om: om.adamh(0.1, 0.8, 0.9, 1e-2, 1e-2, axes={"*": None}),
        lambda: papers.adamh(0.1, 0.8, 0.9, 1e-2, 1e-2),
        matrices=True,
    ),
    Entry(
        "muonh-out-in",
        lambda om: om.muonh(0.02, 0.8, nesterov=False, axes={"*": "oi"}),
        lambda: papers.muonh(0.02, 0.8, False),
        matrices=True,
        real=True,
    ),
    Entry(
        "muonh-others",
        lambda om: om.muonh(0.1, axes={"*": None}, weight_decay=0.2, weight_decay_form="cautious"),
        lambda: papers.adam(0.1, 0.9, 0.999, 1e-8, decay=0.2, form="cautious"),
    ),
    Entry(
        "muonh-others-rate",
        lambda om: om.muonh(0.02, axes={"*": None}, others_learning_rate=0.1),
        lambda: papers.adam(0.1, 0.9, 0.999, 1e-8),
    ),
    Entry(
        "muonh-others-rmsprop",
        lambda om: om.muonh(0.02, axes={"*": None}, others=om.rmsprop(0.1, eps=1e-3)),
        lambda: papers.rmsprop(0.1, 0.9, 1e-3),
    ),
    Entry(
        "in_eigenbasis-kl",
        lambda om: om.in_eigenbasis(
            om.divide(om.ema(0.8), by=om.chain(om.square(), om.ema(0.9), om.root(1e-2))),
            decay=0.9,
            every=1,
            kl=True,
            whole_first=True,
            largest_inverse_root=0.8,
            max_dim=5,
            axes={"*": "io"},
        ),
        lambda: papers.soap(
            -1.0, 0.8, 0.9, 1e-2, every=1, correct=False, max_dim=5, kl=True, whole_first=True, clamp=0.8
        ),
        **LIKE_SOAP,
    ),
    Entry(
        "soap-numbers",
        lambda om: om.soap(0.1, 0.8, 0.85, 1e-2, 0.02, every=4, refresh_warmup=2, max_dim=5, **INDEPENDENT),
        lambda: papers.soap(0.1, 0.8, 0.85, 1e-2, 0.2, every=4, max_dim=5, warmup=2),
        **LIKE_SOAP,
    ),
    Entry(
        "klsoap",
        lambda om: om.klsoap(0.1, 0.8, 0.85, 1e-2, 0.02, every=1, max_dim=5, factor_decay=0.9, **INDEPENDENT),
        lambda: papers.soap(0.1, 0.8, 0.85, 1e-2, 0.2, every=1, beta=0.9, kl=True, correct=False, max_dim=5),
        **LIKE_SOAP,
    ),
    Entry(
        "shampoo",
        lambda om: om.shampoo(0.1, 0.8, 0.85, 1e-2, 0.02, every=2, max_dim=5, **INDEPENDENT),
        lambda: papers.soap(0.1, 0.8, 0.85, 1e-2, 0.2, every=2, sort=False, shampoo=0.25, max_dim=5),
        **LIKE_SOAP,
    ),
    Entry(
        "shampoo-half",
        lambda om: om.shampoo(0.1, eps=1e-2, power=0.5, every=2, max_dim=5, axes={"*": "io"}),
        lambda: papers.soap(0.1, 0.9, eps=1e-2, every=2, decay=0.01, sort=False, shampoo=0.5, max_dim=5),
        **LIKE_SOAP,
    ),
    Entry(
        "soap_muon",
        lambda om: om.soap_muon(
            0.1, 0.8, 0.85, 1e-2, every=2, max_dim=5, weight_decay=0.02, scale="adamw_rms", **INDEPENDENT
        ),
        lambda: papers.soap_muon(0.1, 0.8, 0.85, 1e-2, every=2, decay=0.2, scale="adamw_rms", max_dim=5),
        **LIKE_SOAP,
    ),
]

LIKE = {
    **dict.fromkeys(["in_eigenbasis-kl", "soap-numbers", "klsoap"], "soap"),
    **dict.fromkeys(["shampoo", "shampoo-half", "soap_muon"], "soap"),
    "adamuon-out-in": "normuon-out-in",
    "adamh-betas": "adamh",
    "ema-initial": "ema",
    "hyperball-blocks": "hyperball-matrices",
    "laprop-betas": "laprop",
    "lion-betas": "lion",
    "mars_adamw-numbers": "mars_adamw",
    "mean-blocks-out-in": "mean-blocks",
    "mean-o": "mean-i",
    "muon-adamw_rms": "muon",
    "muon-corrected": "adamw-corrected",
    "muon-independent": "adamw-independent",
    "muon-jordan-keller": "muon",
    "muon-others-rmsprop": "muon-others",
    "muon-scale-of-my-own": "muon",
    "muon2-out-in": "normuon-out-in",
    "muonh-others-rate": "muonh-others",
    "muonh-others-rmsprop": "muonh-others",
    "muonh-out-in": "normuon-out-in",
    "nadamw-betas": "adamw-betas",
    "nadamw-cautious": "adamw-cautious",
    "nadamw-corrected": "adamw-corrected",
    "nadamw-independent": "adamw-independent",
    "normuon-shorter-least": "normuon-shorter",
    "orthogonalize-cubics": "orthogonalize",
    "orthogonalize-jordan": "orthogonalize",
    "rmsprop-nesterov": "rmsprop-momentum",
    "rmsprop-outside-initial-l2": "rmsprop-centered-corrected",
    "scale_by_shape-adamw_rms": "scale_by_shape-blocks",
    "scale_by_shape-keller": "scale_by_shape-blocks",
    "scale_by_shape-rms_to_rms": "scale_by_shape-blocks",
    "scion-column": "scion-row",
    "scion-rms": "scion",
    "scion-sign": "scion-spectral",
}
"""Entry → another one whose contract is that of this entry, of which only the formula is tested."""

ENTRIES = TRANSFORMS + RECIPES + MORE
IDS = [entry.id for entry in ENTRIES]
NAMES = list(dict.fromkeys(entry.name for entry in ENTRIES))


def each(entries=ENTRIES):
    """A test of every entry, quick for the first of each name: the others differ in arguments only."""
    entries = [entry for entry in entries if entry.id not in LIKE]
    first = {entry.name: entry for entry in reversed(entries)}
    marks = {entry.id: () if first[entry.name] is entry else pytest.mark.slow for entry in entries}
    return pytest.mark.parametrize("entry", [pytest.param(e, id=e.id, marks=marks[e.id]) for e in entries])


def _transposed(rule):
    return lambda g, w: rule(g.T, w.T).T


def _scaled(rule, factor):
    return lambda g, w: rule(g, w) * factor(*g.shape)


def np_root(g, eps):
    return abs(g) + eps


def _quotient(signal, by):
    return lambda g, w: signal(g, w) / by(g, w)


def _times(factor, term):
    return lambda g, w: factor * term(g, w)


def _sum(*terms):
    return lambda g, w: sum(term(g, w) for term in terms)


def recipes_with(*arguments):
    """The names of the recipes that have these arguments."""
    names = dict.fromkeys(entry.name for entry in RECIPES)
    return [
        name for name in names if {*arguments} <= {*inspect.signature(getattr(optimorph, name)).parameters}
    ]
