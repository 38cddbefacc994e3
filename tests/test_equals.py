"""Every `Equals:` line of every docstring is a test: the line is the key, the trajectory the proof."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import papers
import pytest
import rounding

import optimorph as om
from optimorph.linalg import NewtonSchulz

STEPS = 100
CONDITION = NewtonSchulz("jordan").table.slope
"""Also 1 - 0.999 has one of about as much."""


def equals_lines(obj):
    """The entries under `Equals:`, continuation lines joined."""
    doc = inspect.getdoc(obj) or ""
    if "Equals:\n" not in doc:
        return []
    entries = []
    for line in doc.split("Equals:\n", 1)[1].split("\n"):
        if line.startswith("  ") and not line.startswith("   "):
            entries.append(line.strip())
        elif line.startswith("    "):
            entries[-1] += " " + line.strip()
        else:
            break
    return entries


def tree(rng):
    shapes = {"matrix": (6, 4), "vector": (5,), "scalar": ()}
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def updates_of(transform):
    """All updates of a run in float64, whose parameters follow them, and those parameters."""
    rng = np.random.default_rng(3)
    params = tree(rng)
    state = transform.init(params)
    update = jax.jit(transform.update)
    trail = []
    for _ in range(STEPS):
        updates, state = update(tree(rng), state, params)
        params = optax.apply_updates(params, updates)
        trail.append((updates, params))
    return trail


def same_as_optax(ours, theirs):
    """Every update and every parameter of 100 steps."""
    a, b = (jax.tree.leaves(jax.tree.map(lambda *x: np.stack(x), *updates_of(tx))) for tx in (ours, theirs))
    rounding.close(a, b, condition=CONDITION)


def same_as_published(ours, rule, *, transpose=False, atol=1e-11):
    """The weights of 40 steps; `transpose` for rules on (out, in)."""
    rng = np.random.default_rng(5)
    w = rng.standard_normal((6, 4))
    params = {"w": jnp.asarray(w.T if transpose else w)}
    state = ours.init(params)
    update = jax.jit(ours.update)
    for _ in range(40):
        g = rng.standard_normal(w.shape)
        updates, state = update({"w": jnp.asarray(g.T if transpose else g)}, state, params)
        params = optax.apply_updates(params, updates)
        w = rule(g, w)
        np.testing.assert_allclose(params["w"].T if transpose else params["w"], w, rtol=0, atol=atol)


def first_bias_correction():
    """optax.tree.bias_correction at every t, as a transformation."""

    def update(updates, state, params=None):
        count = state + 1
        return optax.tree.bias_correction(updates, 0.9, count.astype(float)), count

    return optax.GradientTransformation(lambda params: jnp.zeros([], jnp.int32), update)


def keyed_schedule(count):
    return 0.1 / (1.0 + count.astype(float))


def optax_rmsprop():
    for kwargs in (
        {},
        {"eps_in_sqrt": False},
        {"initial_scale": 1.0},
        {"centered": True, "eps": 1e-2},
        {"centered": True, "eps": 1e-2, "eps_in_sqrt": False},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "bias_correction": True},
        {"bias_correction": True},
        {"centered": True, "bias_correction": True, "eps": 1.0},
    ):
        same_as_optax(om.rmsprop(0.01, **kwargs), optax.rmsprop(0.01, **kwargs))


def torch_rmsprop():
    for kwargs in ({}, {"centered": True}, {"momentum": 0.9}, {"centered": True, "momentum": 0.9}):
        same_as_published(
            om.rmsprop(0.01, 0.9, 1e-3, eps_in_sqrt=False, weight_decay=0.1, **kwargs),
            papers.torch_rmsprop(0.01, 0.9, 1e-3, weight_decay=0.1, **kwargs),
        )


def optax_sgd():
    for args in ((), (0.9,), (0.9, True)):
        same_as_optax(om.sgd(0.1, *args), optax.sgd(0.1, *args))


def torch_sgd():
    for nesterov in (False, True):
        same_as_published(
            om.sgd(0.1, 0.9, nesterov, weight_decay=0.1),
            papers.torch_sgd(0.1, 0.9, nesterov=nesterov, weight_decay=0.1),
        )
    same_as_published(om.sgd(0.1, weight_decay=0.1), papers.torch_sgd(0.1, weight_decay=0.1))


def optax_adamw():
    mask = {"matrix": True, "vector": False, "scalar": True}
    for kwargs in ({}, {"eps_root": 1e-3, "weight_decay": 0.1}, {"weight_decay": 0.1, "mask": mask}):
        same_as_optax(om.adamw(0.01, **kwargs), optax.adamw(0.01, **kwargs))


def torch_muon():
    for adjust, scale in (("original", "keller"), ("match_rms_adamw", "adamw_rms")):
        for transpose, spec in ((True, "io"), (False, "oi")):
            same_as_published(
                om.muon(
                    0.02,
                    weight_decay=0.1,
                    orthogonalizer=NewtonSchulz("jordan"),
                    scale=scale,
                    axes={"w": spec},
                ),
                papers.torch_muon(0.02, 0.1, adjust_lr_fn=adjust),
                transpose=transpose,
            )


def keller_muon():
    for transpose, spec in ((True, "io"), (False, "oi")):
        same_as_published(
            om.muon(
                0.02,
                weight_decay=0.1,
                orthogonalizer=NewtonSchulz("jordan"),
                scale="keller",
                axes={"w": spec},
            ),
            papers.keller_muon(0.02, 0.1),
            transpose=transpose,
            atol=1e-7,  # the rule adds 1e-7 to the norm, which makes it depend on the gradient's scale
        )


def as_published_of_matrices(recipe, published):
    """In both orientations; the programs add 1e-10 or 1e-8 to norms."""
    for transpose, spec in ((True, "io"), (False, "oi")):
        ours = recipe(0.02, weight_decay=0.1, axes={"w": spec})
        same_as_published(ours, published(0.02, 0.1), transpose=transpose, atol=1e-9)


def published_scion():
    """A row or column that is added 1e-8 to its norm, and not to its root mean square."""
    names = {"spectral": "Spectral", "sign": "Sign", "row": "RowNorm", "column": "ColNorm", None: "BiasRMS"}
    for norm, theirs in names.items():
        for transpose, spec in ((True, "io"), (False, "oi")):
            ours = om.scion(0.02, radius=10.0, norms={"w": norm}, axes={"w": spec if norm else None})
            rule = papers.published_scion(0.02, theirs, scale=10.0)
            same_as_published(ours, rule, transpose=transpose, atol=1e-6)


def applied_as_by_optax():
    rng = np.random.default_rng(0)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64, jnp.int32):
        params = {name: (5 * rng.standard_normal(9)).astype(dtype) for name in "ab"} | {"none": None}
        updates = jax.tree.map(lambda w: rng.standard_normal(9).astype(w.dtype), params)
        ours, theirs = (apply(params, updates) for apply in (om.apply_updates, optax.apply_updates))
        for name in "ab":
            assert ours[name].dtype == dtype
            np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours["none"] is None


def optax_ademamix():
    same_as_optax(om.ademamix(0.01), optax.contrib.ademamix(0.01))
    arguments = (0.8, 0.9, lambda t: 0.9 + t * 1e-4, lambda t: 0.1 * t, 1e-3, 1e-3)
    same_as_optax(
        om.ademamix(0.01, *arguments, weight_decay=0.1),
        optax.contrib.ademamix(0.01, *arguments, weight_decay=0.1),
    )


def published_ademamix():
    warm = {
        "b3": om.schedules.decay_warmup(0.9, 0.9999, 20),
        "alpha": om.schedules.linear_warmup(8.0, 30),
    }
    same_as_published(
        om.ademamix(0.01, **warm, weight_decay=0.1),
        papers.published_ademamix(0.01, alpha=8.0, beta3_warmup=20, alpha_warmup=30, weight_decay=0.1),
    )
    same_as_published(om.ademamix(0.01, alpha=2.0), papers.published_ademamix(0.01))


def published_bases(recipe):
    """From the same first basis; square matrices, whose first factors have full rank."""
    rules = (
        ("soap", {}, papers.soap(0.01)),
        ("soap", {"every": 1}, papers.soap(0.01, every=1)),
        ("klsoap", {}, papers.soap(0.01, 0.9, kl=True, correct=False)),
        ("klsoap", {"every": 1}, papers.soap(0.01, 0.9, every=1, kl=True, correct=False)),
        ("shampoo", {"every": 2, "power": 0.5}, papers.soap(0.01, 0.9, every=2, sort=False, shampoo=0.5)),
        ("soap_muon", {}, papers.soap_muon(0.01)),
    )
    for name, more, rule in [each for each in rules if each[0] == recipe]:
        tx = getattr(om, name)(0.01, weight_decay=0.0, axes={"w": "io"}, **more)
        rng = np.random.default_rng(8)
        w = rng.standard_normal((5, 5))
        params = {"w": jnp.asarray(w)}
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(40):
            g = rng.standard_normal(w.shape)
            updates, state = update({"w": jnp.asarray(g)}, state, params)
            params = optax.apply_updates(params, updates)
            w = w + rule(g, w)
            np.testing.assert_allclose(params["w"], w, rtol=0, atol=1e-10)


PROOFS = {
    "optax.contrib.ademamix(learning_rate, b1, b2, b3, alpha, eps, eps_root, weight_decay=weight_decay, "
    "mask=mask)": optax_ademamix,
    "AdEMAMix(lr=learning_rate, betas=(b1, b2, b3), alpha=alpha, beta3_warmup=S, alpha_warmup=T, "
    "eps=eps, weight_decay=weight_decay) of apple/ml-ademamix, pytorch/ademamix.py at c3d73c0, with "
    "decay_warmup(b1, b3, S) for b3 and linear_warmup(alpha, T) for alpha": published_ademamix,
    "MARS(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=weight_decay, gamma=gamma) of "
    "AGI-Arena/MARS, MARS/optimizers/mars.py at 4831e28, for matrices": lambda: same_as_published(
        om.mars_adamw(0.01, weight_decay=0.1), papers.published_mars(0.01, weight_decay=0.1)
    ),
    "optax.clip_by_block_rms(max_rms)": lambda: [
        same_as_optax(om.clip_rms(rms), optax.clip_by_block_rms(rms)) for rms in (1.0, 0.5)
    ],
    "optax.trace(decay, nesterov)": lambda: [
        same_as_optax(om.momentum(0.9, nesterov=look), optax.trace(0.9, look)) for look in (False, True)
    ],
    "optax.ema(decay, debias=False)": lambda: same_as_optax(om.ema(0.9), optax.ema(0.9, debias=False)),
    "optax.tree.bias_correction(updates, decay, t)": lambda: same_as_optax(
        om.debias(0.9), first_bias_correction()
    ),
    "optax.clip_by_global_norm(max_norm)": lambda: [
        same_as_optax(om.clip_by_global_norm(norm), optax.clip_by_global_norm(norm)) for norm in (1.0, 5.5)
    ],
    "optax.apply_updates(params, updates)": applied_as_by_optax,
    "optax.add_decayed_weights(weight_decay, mask)": lambda: [
        same_as_optax(om.add_decayed_weights(*args), optax.add_decayed_weights(*args))
        for args in ((0.1,), (0.1, {"matrix": True, "vector": False, "scalar": False}), (keyed_schedule,))
    ],
    "optax.scale_by_learning_rate(learning_rate)": lambda: [
        same_as_optax(om.scale_by_learning_rate(rate), optax.scale_by_learning_rate(rate))
        for rate in (0.1, keyed_schedule)
    ],
    "optax.sgd(learning_rate, momentum, nesterov)": optax_sgd,
    "torch.optim.SGD(lr=learning_rate, momentum=momentum, nesterov=nesterov, "
    "weight_decay=weight_decay) of PyTorch 2.14": torch_sgd,
    "torch.optim.SGD(lr=learning_rate, momentum=momentum, dampening=dampening) of PyTorch 2.14": lambda: (
        same_as_published(om.sgd(0.1, 0.9, dampening=0.3), papers.torch_sgd(0.1, 0.9, 0.3))
    ),
    "optax.adagrad(learning_rate, initial_accumulator_value, eps)": lambda: [
        same_as_optax(om.adagrad(0.1, *args), optax.adagrad(0.1, *args)) for args in ((), (0.0, 1e-3))
    ],
    "torch.optim.Adagrad(lr=learning_rate, initial_accumulator_value=initial_accumulator_value, "
    "eps=eps, weight_decay=weight_decay) of PyTorch 2.14, with eps_in_sqrt=False": lambda: same_as_published(
        om.adagrad(0.1, 0.2, 1e-10, eps_in_sqrt=False, weight_decay=0.1),
        papers.torch_adagrad(0.1, 0.1, 0.2, 1e-10),
    ),
    "optax.rmsprop(learning_rate, decay, eps, initial_scale, eps_in_sqrt, centered, momentum, nesterov, "
    "bias_correction)": optax_rmsprop,
    "torch.optim.RMSprop(lr=learning_rate, alpha=decay, eps=eps, centered=centered, "
    "momentum=momentum, weight_decay=weight_decay) of PyTorch 2.14, with eps_in_sqrt=False": torch_rmsprop,
    "optax.adam(learning_rate, b1, b2, eps, eps_root)": lambda: [
        same_as_optax(om.adam(0.01, *args), optax.adam(0.01, *args)) for args in ((), (0.8, 0.9, 1e-3, 1e-3))
    ],
    "torch.optim.Adam(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=weight_decay) of "
    "PyTorch 2.14": lambda: same_as_published(
        om.adam(0.01, weight_decay=0.1), papers.torch_adam(0.01, weight_decay=0.1)
    ),
    "optax.nadam(learning_rate, b1, b2, eps, eps_root)": lambda: [
        same_as_optax(om.nadam(0.01, *args), optax.nadam(0.01, *args))
        for args in ((), (0.8, 0.9, 1e-3, 1e-3))
    ],
    "optax.adamw(learning_rate, b1, b2, eps, eps_root, weight_decay=weight_decay, mask=mask)": optax_adamw,
    "torch.optim.AdamW(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=weight_decay) of "
    "PyTorch 2.14": lambda: same_as_published(
        om.adamw(0.01, weight_decay=0.1), papers.torch_adam(0.01, weight_decay=0.1, decoupled=True)
    ),
    "optax.MultiSteps(inner, every_k)": lambda: same_as_optax(
        om.multi_steps(om.adam(0.01), 4), optax.MultiSteps(om.adam(0.01), 4, accumulator_dtype=float)
    ),
    "optax.inject_hyperparams(inner_factory, static_args, hyperparam_dtype=jnp.float32)": lambda: (
        same_as_optax(
            om.inject_hyperparams(om.adamw)(keyed_schedule, b1=0.8),
            optax.inject_hyperparams(om.adamw, hyperparam_dtype=float)(keyed_schedule, b1=0.8),
        )
    ),
    "optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=mask)": lambda: same_as_optax(
        om.lion(0.01, 0.8, 0.95, weight_decay=0.1), optax.lion(0.01, 0.8, 0.95, weight_decay=0.1)
    ),
    "Lion(lr=learning_rate, betas=(b1, b2), weight_decay=weight_decay) of google/automl, "
    "lion/lion_pytorch.py at 6a54c87": lambda: same_as_published(
        om.lion(0.01, weight_decay=0.1), papers.published_lion(0.01, weight_decay=0.1)
    ),
    "LaProp(lr=learning_rate, betas=(b1, b2), eps=eps) of Z-T-WANG/LaProp-Optimizer, laprop.py at "
    "a419916, for a constant learning rate": lambda: same_as_published(
        om.laprop(0.01), papers.published_laprop(0.01)
    ),
    "LaProp(lr=lr, weight_decay=weight_decay) of Z-T-WANG/LaProp-Optimizer, laprop.py at a419916, "
    "which decays after the step, with learning_rate=(1 - weight_decay) * lr and "
    'weight_decay_form="independent"': lambda: same_as_published(
        om.laprop(0.9 * 0.01, weight_decay=0.1, weight_decay_form="independent"),
        papers.published_laprop(0.01, weight_decay=0.1),
    ),
    "AdamHConfig(learning_rate=learning_rate, beta1=b1, beta2=b2, epsilon=eps) of marin-levanter, "
    "levanter/optim/adamh.py at 0.2.227.dev40316220070": lambda: same_as_published(
        om.adamh(0.02, axes={"w": "io"}),
        papers.levanter_hyperball(papers.adam(-1.0, 0.9, 0.95, 1e-8), 0.02),
    ),
    "MuonHConfig(learning_rate=learning_rate, momentum=momentum, nesterov=nesterov) of "
    "marin-levanter, levanter/optim/muonh.py at 0.2.227.dev40316220070, with the polar factor "
    "computed alike": lambda: [
        same_as_published(om.muonh(0.02, axes={"w": spec}), papers.levanter_muonh(0.02), transpose=transpose)
        for transpose, spec in ((True, "io"), (False, "oi"))
    ],
    "SingleDeviceNorMuon(lr=learning_rate, weight_decay=weight_decay, momentum=momentum, beta2=b2) of "
    "zichongli5/NorMuon, normuon.py at d45c9a4, with the polar factor computed alike": lambda: (
        as_published_of_matrices(om.normuon, papers.published_normuon)
    ),
    "NorMuon(lr=learning_rate, weight_decay=weight_decay, mu=momentum) of "
    "KellerJordan/modded-nanogpt, "
    "records/track_3_optimization/results/20260503_normuon/08ffadff-3576-496b-9795-2dc5cf8f4f46.txt "
    'at a584325, with average="shorter" and the polar factor computed alike': lambda: (
        as_published_of_matrices(
            functools.partial(om.normuon, average="shorter"),
            functools.partial(papers.published_normuon, shorter=True),
        )
    ),
    "AdaMuon(lr=learning_rate, weight_decay=weight_decay, momentum=momentum, eps=eps) of "
    "Chongjie-Si/AdaMuon, gpt2/models/optimizers/adamuon.py at 369f0b3, for b2=momentum, with the "
    "polar factor computed alike": lambda: as_published_of_matrices(om.adamuon, papers.published_adamuon),
    "MuonSq(lr=learning_rate, weight_decay=weight_decay, mu=momentum, beta2=b2, eps=eps) of "
    "KellerJordan/modded-nanogpt, "
    "records/track_3_optimization/results/20260501_muonsq/train_gpt_simple_muonsq.py at c855482, with "
    "the polar factor computed alike": lambda: as_published_of_matrices(om.muon2, papers.published_muon2),
    "Scion(lr=learning_rate, momentum=1 - momentum, scale=radius) of LIONS-EPFL/scion, scion.py at "
    'f58a393, with norm="Spectral", "Sign", "RowNorm", "BiasRMS" or normalized "ColNorm", and the '
    "polar factor computed alike": published_scion,
    "SOAP(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=0, precondition_frequency=every) of "
    "nikhilvyas/SOAP, soap.py at a1e5535, from the same first basis": lambda: published_bases("soap"),
    "Adafactor in the eigenbasis of Shampoo, arXiv:2409.11321, claim 1, with power=0.5, from the same "
    "first basis": lambda: published_bases("shampoo"),
    "Muon(lr=learning_rate, mu=momentum) of KellerJordan/modded-nanogpt, "
    "records/track_3_optimization/results/20260609_soap_f1_auxb2_clean/train_gpt_clean_SOTA.py at "
    "5f2f59c, without its extras, from the same first basis, with the polar factor computed alike": lambda: (
        published_bases("soap_muon")
    ),
    "KLOpt(lr=learning_rate, betas=(b1, b2), eps=eps, weight_decay=0, using_klsoap=True, "
    "precondition_frequency=every) of yorkerlin/KL-Methods, optim/kl_opt.py at a02e622, from the same "
    "first basis": lambda: published_bases("klsoap"),
    "optax.nadamw(learning_rate, b1, b2, eps, eps_root, weight_decay=weight_decay, mask=mask)": lambda: (
        same_as_optax(om.nadamw(0.01, weight_decay=0.1), optax.nadamw(0.01, weight_decay=0.1))
    ),
    "torch.optim.Muon(lr=learning_rate, momentum=momentum, nesterov=nesterov, "
    'weight_decay=weight_decay) of PyTorch 2.14, with NewtonSchulz("jordan") and scale="keller"; '
    'adjust_lr_fn="match_rms_adamw", with "adamw_rms"; but for the bfloat16 that PyTorch forces upon '
    "the iteration": torch_muon,
    "Muon(lr=learning_rate, momentum=momentum, weight_decay=weight_decay) of KellerJordan/Muon, "
    'muon.py at 00ba60d, with NewtonSchulz("jordan") and scale="keller", but for its bfloat16': keller_muon,
}


@pytest.mark.parametrize("line", PROOFS, ids=[line.split("(")[0] for line in PROOFS])
@rounding.in_float64
def test_equals(line):
    with jax.numpy_dtype_promotion("standard"):  # optax's own code does not run under strict promotion
        PROOFS[line]()


def test_every_line_has_a_proof():
    claimed = [line for name in om.__all__ for line in equals_lines(getattr(om, name))]
    assert sorted(claimed) == sorted(PROOFS)


NAMED = re.compile(
    r"optax\.|torch\.optim\.\w+\(.*\) of PyTorch \d|, [\w/-]+\.(py|txt) at [\w.]+(,|$)|arXiv:\d{4}\.\d{5}"
)
"""optax, which the tests run; or a version of PyTorch, a file at a commit or version, or a paper."""


def test_every_line_names_its_source():
    """A file and a version, unless the tests run the program itself."""
    modules = (om, om.codecs, om.layouts, om.linalg, om.rules, om.schedules, om.theory, om.curvature)
    claimed = [
        line
        for module in modules
        for name in vars(module)["__all__"]
        for line in equals_lines(getattr(module, name))
    ]
    assert [line for line in claimed if not NAMED.search(line)] == []
    assert sum("optax" not in line for line in claimed) > 20


def test_keller_in_float32():
    """The published rule, on `in x out` and `out x in` weights alike."""
    for transpose, spec in ((True, "io"), (False, "oi")):
        ours = om.muon(0.02, orthogonalizer=NewtonSchulz("jordan"), scale="keller", axes={"w": spec})
        rule = papers.keller_muon(0.02)
        rng = np.random.default_rng(1)
        w = rng.standard_normal((16, 10))
        params = {"w": jnp.asarray(w.T if transpose else w, jnp.float32)}
        state = ours.init(params)
        for _ in range(20):
            g = rng.standard_normal(w.shape).astype(np.float32).astype(np.float64)
            gradient = {"w": jnp.asarray(g.T if transpose else g, jnp.float32)}
            updates, state = jax.jit(ours.update)(gradient, state, params)
            before, w = w, rule(g, w)
            params = optax.apply_updates(params, updates)
            step = np.asarray(updates["w"], np.float64)
            step = step.T if transpose else step
            rounding.close(step, w - before, units=1, condition=CONDITION, dtype="float32")
