"""With any single term of any update rule deleted, a formula test of that rule fails."""

import contextlib
import importlib
import shutil
import sys
from pathlib import Path

import catalog
import formulas
import jax
import pytest

import optimorph

PACKAGE = Path(optimorph.__file__).parent

# file, what stands there, what is left without the term, the entries of which at least one must fail
T, R, M, N = "transforms/", "optimizers.py", "muon.py", "linalg/newton_schulz.py"
MUTATIONS = {
    "momentum: no decay": (T + "momentum.py", " + number(decay, v) * v", " + v", "momentum"),
    "momentum: no gradient": (T + "momentum.py", "wide(g).astype(v.dtype) + number", "number", "momentum"),
    "momentum: no lookahead": (T + "momentum.py", "add if nesterov else lambda g, v: v", "lambda g, v: v", "momentum"),
    "dampen: no first step": (T + "dampen.py", "state.count == 0", "state.count < 0", "dampen"),
    "dampen: no dampening": (T + "dampen.py", "(1 - number(dampening, g)) * g", "g", "dampen"),
    "ema: no decay": (T + "ema.py", " + b * m", " + m", "ema"),
    "ema: no weight": (T + "ema.py", "(1 - b) * wide(g)", "wide(g)", "ema"),
    "ema: no lookahead": (T + "ema.py", "lerp if nesterov else lambda g, m: m", "lambda g, m: m", "ema"),
    "ema: no initial": (T + "ema.py", "full(params, initial, dtype)", "full(params, 0.0, dtype)", "ema"),
    "square: no square": (T + "square.py", " else x * x", " else x", "square"),
    "square: no conjugate": (T + "square.py", "x * x.conj()", "x * x", "square"),
    "accumulate: no sum": (T + "accumulate.py", "return s + wide(g).astype(s.dtype)", "return s", "accumulate"),
    "accumulate: no memory": (T + "accumulate.py", "return s + wide(g)", "return wide(g)", "accumulate"),
    "accumulate: no initial": (T + "accumulate.py", "full(params, initial, dtype)", "full(params)", "accumulate"),
    "debias: no correction": (T + "debias.py", "x / number(gathered(jnp.finfo(x.dtype).dtype), x)", "x", "debias"),
    "debias: no power": (T + "debias.py", "jnp.power(number(decay, t), t)", "number(decay, t)", "debias"),
    "debias: no ahead": (T + "debias.py", "count + ahead", "count", "debias"),
    "debias: starts at zero": (T + "debias.py", "increment(state.count)  # (1)", "state.count", "debias"),
    "root: no eps": (T + "root.py", "eps_root)), eps), g", "eps_root)), 0.0), g", "root"),
    "root: no eps_root": (T + "root.py", ", eps_root)), eps)", ", 0.0)), eps)", "root"),
    "root: no root": (T + "root.py", "jnp.sqrt(", "(", "root"),
    "divide: no signal": (T + "divide.py", "return s / jnp", "return 1 / jnp", "divide"),
    "divide: no denominator": (T + "divide.py", "s / jnp.maximum(d, least).astype(s.dtype)", "s", "divide"),
    "add: a term less": (T + "add.py", "functools.reduce(operator.add, leaves)", "leaves[0]", "add"),
    "decay: no weights": (T + "add_decayed_weights.py", "term = number(decay, x) * y", "term = number(decay, x)", "add_decayed_weights"),
    "decay: no gradient": (T + "add_decayed_weights.py", "cast_like(x + term, g)", "cast_like(term, g)", "add_decayed_weights"),
    "decay: no rate": (T + "add_decayed_weights.py", "number(decay, x) * ", "", "add_decayed_weights"),
    "decay: never cautious": (T + "add_decayed_weights.py", "if cautious:", "if False:", "add_decayed_weights"),
    "decay: cautious the other way": (T + "add_decayed_weights.py", ".real >= 0", ".real <= 0", "add_decayed_weights"),
    "decay: always cautious": (T + "add_decayed_weights.py", "if cautious:", "if True:", "add_decayed_weights"),
    "decay: never independent": ("descend.py", 'if form == "independent":', "if False:", "adamw nadamw muon"),
    "decay: independent, but no sign": ("descend.py", "return step, optax.scale(-1.0), decay, optax.scale(-1.0)", "return step, decay", "adamw nadamw muon"),
    "decay: no form of muon's others": (M, "            weight_decay_form=weight_decay_form,\n", "", "muon"),
    "multi: no mean": (T + "multi_steps.py", "n = number(count, m)", "n = 1", "multi_steps"),
    "multi: no gradient": (T + "multi_steps.py", "(wide(g).astype(m.dtype) / n - m / n)", "(-m / n)", "multi_steps"),
    "multi: no memory": (T + "multi_steps.py", "jnp.where(due, 0, jnp.where(sound, new, wide(old)))", "wide(old)", "multi_steps"),
    "multi: always due": (T + "multi_steps.py", "sound & (count == jnp.asarray(k_at(state.steps)).astype(count.dtype))", "sound", "multi_steps"),
    "decay: schedule stands still": (
        T + "add_decayed_weights.py",
        "DecayState(increment(state.count), reading(decay))",
        "DecayState(state.count, reading(decay))",
        "add_decayed_weights",
    ),
    "rate: no sign": (T + "scale_by_learning_rate.py", "-number(rate, x)", "number(rate, x)", "scale_by_learning_rate"),
    "rate: no rate": (T + "scale_by_learning_rate.py", "-number(rate, x) * x", "-x", "scale_by_learning_rate"),
    "rate: schedule stands still": (
        T + "scale_by_learning_rate.py",
        "LearningRateState(increment(state.count), reading(rate))",
        "LearningRateState(state.count, reading(rate))",
        "scale_by_learning_rate",
    ),
    "orthogonalize: nothing": (T + "orthogonalize.py", "Everywhere(polar, ", "Everywhere(lambda x: x, ", "orthogonalize"),
    "shape: no scale": (T + "scale_by_shape.py", "factor * ", "", "scale_by_shape"),
    "shape: no root": (T + "scale_by_shape.py", "math.sqrt(outputs / inputs)", "outputs / inputs", "scale_by_shape"),
    "shape: no maximum": (T + "scale_by_shape.py", "max(1, outputs / inputs)", "outputs / inputs", "scale_by_shape"),
    "shape: no larger side": (T + "scale_by_shape.py", "max(inputs, outputs)", "inputs", "scale_by_shape"),
    "shape: no 0.2": (T + "scale_by_shape.py", "0.2 * ", "", "scale_by_shape"),
    "polar: no linear term": (N, "a * x.astype(step.dtype) + step", "step", "orthogonalize"),
    "polar: no cubic term": (N, "else [(b, r), (c,", "else [(c,", "orthogonalize"),
    "polar: no quintic term": (N, ", (c, multiply(r, r, precision))", "", "orthogonalize"),
    "polar: no norm": ("linalg/unit.py", "return x / jnp.sqrt(not_zero(squares)).astype(x.dtype)", "return x", "orthogonalize"),
    "polar: no safety": ("linalg/polar_express.py", "safety: float = 0.02", "safety: float = 0.0", "orthogonalize"),
    "polar: no cushion": ("linalg/polar_express.py", "cushion: float = _CUSHION", "cushion: float = 0.0", "orthogonalize"),
    "polar: a step less": (N, "_standard(x, rows,", "_standard(x, rows[1:],", "orthogonalize"),
    "gram: no linear term of the first Q": (N, ", (a, identity(z))", "", "orthogonalize"),
    "gram: no linear term of Q": (N, ", (a, q))", ")", "orthogonalize"),
    "gram: no linear term of R": (N, ", (a, r))", ")", "orthogonalize"),
    "gram: no linear term of R's other side": (N, ", (a, w))", ")", "orthogonalize"),
    "gram: R stands still": (N, "r = combine(dtype, (1.0, multiply(z, w, precision)), (a, w))", "pass", "orthogonalize"),
    "sgd: no momentum": (R, "else heavy_ball(momentum, nesterov=nesterov, dtype=accumulator_dtype)", "else identity()", "sgd"),
    "sgd: no lookahead": (R, "heavy_ball(momentum, nesterov=nesterov, dtype=", "heavy_ball(momentum, dtype=", "sgd"),
    "sgd: no dampening": (R, "dampen(dampening),", "identity(),", "sgd"),
    "rmsprop: no correction": (R, "correct = debias(decay) if bias_correction else identity()", "correct = identity()", "rmsprop"),
    "rmsprop: no initial": (R, "initial=initial_scale, ", "", "rmsprop"),
    "rmsprop: not centered": (R, "variance if centered", "variance if False", "rmsprop"),
    "rmsprop: the mean's square added": (R, "scale(-1.0)", "scale(1.0)", "rmsprop"),
    "rmsprop: no momentum": (R, "identity() if momentum is None else heavy_ball(momentum, nesterov=nesterov, dtype=mu_dtype),", "identity(),", "rmsprop"),
    "rmsprop: no lookahead": (R, "heavy_ball(momentum, nesterov=nesterov, dtype=mu_dtype),", "heavy_ball(momentum),", "rmsprop"),
    "eps always outside": (R, "root(eps_root=eps) if eps_in_sqrt else root(eps)", "root(eps)", "rmsprop adagrad"),
    "eps always inside": (R, "root(eps_root=eps) if eps_in_sqrt else root(eps)", "root(eps_root=eps)", "rmsprop adagrad"),
    "eps nowhere": (R, "root(eps_root=eps) if eps_in_sqrt else root(eps)", "root()", "rmsprop adagrad"),
    "nadam: no ahead": (R, "debias(b1, ahead=1)", "debias(b1)", "nadam nadamw"),
    "nadam: newest not corrected": (R, "ahead=1)), debias(b1))", "ahead=1)), identity())", "nadam nadamw"),
    "nadam: no newest": (R, "return mix(b1, chain(ema(b1, dtype=mu_dtype), debias(b1, ahead=1)), debias(b1))", "return chain(ema(b1, dtype=mu_dtype), debias(b1, ahead=1))", "nadam nadamw"),
    "mix: no weight of the first": (T + "mix.py", "beta * a", "a", "mix"),
    "mix: no weight of the second": (T + "mix.py", "(1 - beta) * b", "b", "mix"),
    "clip: never": (T + "clip_by_global_norm.py", "jnp.where(whole, x, shorter)", "x", "clip_by_global_norm"),
    "clip: no minimum": (T + "clip_by_global_norm.py", "(norm <= bound) | ~finite", "~finite", "clip_by_global_norm"),
    "clip: no root": (T + "clip_by_global_norm.py", "jnp.sqrt(jnp.where(squares == 0, 1, squares))", "squares", "clip_by_global_norm"),
    "clip: no square": (T + "clip_by_global_norm.py", "jnp.square(p * scale)", "p * scale", "clip_by_global_norm"),
    "clip: no bound": (T + "clip_by_global_norm.py", "bound / jnp.where", "1 / jnp.where", "clip_by_global_norm"),
    "clip: no imaginary part": (T + "clip_by_global_norm.py", "(x.real, x.imag)", "(x.real,)", "clip_by_global_norm"),
    "clip: no scale": (T + "clip_by_global_norm.py", "x * scale.astype(x.dtype) * ratio", "x * ratio", "clip_by_global_norm"),
    "skip: the update not": (T + "skip_nonfinite.py", "chosen(jnp.asarray(u), jnp.zeros_like(u))", "u", "skip_nonfinite"),
    "skip: the state not": (T + "skip_nonfinite.py", "jax.tree.map(chosen, after, state.inner)", "after", "skip_nonfinite"),
    "skip: nothing else": (T + "skip_nonfinite.py", "jax.lax.select(fine, new, old)", "old", "skip_nonfinite"),
    "divide: no guard": (T + "divide.py", "jnp.maximum(d, least)", "d", "divide"),
    "axes: no order": ("linalg/axes.py", '[k for x in "bio" for k, found in enumerate(letters) if found == x]', "list(range(len(letters)))", "muon"),
    "muon: no momentum": (M, "        small(\"muon\", average, state, linear, mu_dtype=mu_dtype, nu_dtype=nu_dtype),\n", "", "muon"),
    "muon: no lookahead": (M, "ema(momentum, nesterov=nesterov, dtype=mu_dtype)", "ema(momentum, dtype=mu_dtype)", "muon"),
    "muon: no polar factor": (M, "        orthogonalize(orthogonalizer, spec, shardings, wire_dtype=wire_dtype),\n", "", "muon"),
    "muon: no scale": (M, "        scale_by_shape(scale, spec, shardings),\n", "", "muon"),
    "muon: others' rate": (M, "learning_rate if others_learning_rate is None else others_learning_rate", "learning_rate", "muon"),
}  # fmt: skip

# the words of each recipe's own sentence, each deleted in turn
SENTENCES = {
    "sgd": ["_l2(weight_decay, mask)"],
    "adagrad": [
        "_l2(weight_decay, mask)",
        "square()",
        "_stored(accumulate, initial_accumulator_value, dtype=nu_dtype)",
    ],
    "rmsprop": [
        "_l2(weight_decay, mask)",
        "square(), _stored",
        "_stored(ema, decay, initial=initial_scale, dtype=nu_dtype)",
        "correct, square()",
        "_stored(ema, decay, dtype=nu_dtype), correct",
    ],
    "adam": ["_l2(weight_decay, mask)"],
    "nadam": ["_l2(weight_decay, mask)"],
    "adamw": ["weight_decay, mask, weight_decay_form)", "learning_rate, weight_decay, mask"],
    "nadamw": ["weight_decay, mask, weight_decay_form)", "learning_rate, weight_decay, mask"],
    "muon": ["weight_decay, mask, weight_decay_form)", "learning_rate, weight_decay, mask"],
}
for _name in ("adam", "adamw"):
    SENTENCES[_name] += ["ema(b1, dtype=mu_dtype)", "debias(b1))"]
for _name in ("adam", "adamw", "nadam", "nadamw"):
    SENTENCES[_name] += [
        "square()",
        "_stored(ema, b2, dtype=nu_dtype)",
        "debias(b2)",
        "eps, eps_root)",
        ", eps_root)",
    ]
WITHOUT = {
    "weight_decay, mask, weight_decay_form)": "0.0, mask, weight_decay_form)",
    "learning_rate, weight_decay, mask": "1.0, weight_decay, mask",
    "square(), _stored": "_stored",
    "correct, square()": "correct, square(), root()",  # |m| for |m|²
    "_stored(ema, decay, dtype=nu_dtype), correct": "correct",
    "debias(b1))": "identity())",
    "eps, eps_root)": "0.0, eps_root)",
    ", eps_root)": ")",
}


def delete_word(source, name, word):
    """The module with one word of one recipe's sentence gone."""
    start = source.index(f"def {name}(")
    start = source.index("    tx = in_float32(" if name != "rmsprop" and name != "muon" else '    """', start)
    if name in ("rmsprop", "muon"):
        start = source.index('    """\n', start)
    end = source.find("\ndef ", start)
    body = source[start:end]
    assert word in body, f"{name}'s sentence has no {word!r} any more: mend this test"
    return source[:start] + body.replace(word, WITHOUT.get(word, "optax.identity()"), 1) + source[end:]


@contextlib.contextmanager
def package(folder, file, change):
    """A copy of the package with one file changed, imported in the place of the real one."""
    copy = folder / "optimorph"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("racing", "__pycache__"))
    path = copy / file
    source = path.read_text()
    changed = change(source)
    assert changed != source, f"{file} has changed: mend this test"
    path.write_text(changed)
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "optimorph"}
    finders = list(sys.meta_path)  # without the type checker, which remembers the real classes by name
    sys.meta_path[:] = [finder for finder in finders if not type(finder).__module__.startswith("jaxtyping")]
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("optimorph")
    finally:
        sys.meta_path[:] = finders
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "optimorph"]:
            del sys.modules[name]
        sys.modules.update(real)


def a_formula_fails(mutant, names):
    assert Path(mutant.__file__).parent != PACKAGE
    with jax.enable_x64(True):
        return any(
            not formulas.worst_error(entry.make(mutant), entry, "float64", steps=4)
            < formulas.TOLERANCE["float64"]
            for entry in catalog.ENTRIES
            if entry.name in names
        )


@pytest.mark.parametrize(("file", "term", "without", "names"), MUTATIONS.values(), ids=MUTATIONS)
def test_deleted_term(tmp_path, file, term, without, names):
    with package(tmp_path, file, lambda source: source.replace(term, without)) as mutant:
        assert a_formula_fails(mutant, names.split())


@pytest.mark.parametrize(
    ("name", "word"), [(name, word) for name, words in SENTENCES.items() for word in words]
)
def test_deleted_word(tmp_path, name, word):
    file = M if name == "muon" else R
    with package(tmp_path, file, lambda source: delete_word(source, name, word)) as mutant:
        assert a_formula_fails(mutant, [name])


def test_the_copy_itself_passes(tmp_path):
    """Without a mutation nothing fails: the test above sees the mutation, not the copying."""
    with package(tmp_path, R, lambda source: source + "\n") as same:
        assert not a_formula_fails(same, {entry.name for entry in catalog.ENTRIES})
