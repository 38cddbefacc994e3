"""With any single operation of an update rule changed, a formula test of that rule fails.

A mutant's name says the module, the function, and what is done to which operation of its kind in that
function: `pytest -k "momentum.add and Mult"` tries those of one operation.
"""

import fnmatch

import catalog
import formulas
import jax
import mutants
import pytest

PARTS = [  # modules, functions, and the entries that run them if none has the function's name or the module's
    ("transforms.*", "*", ""),
    ("optimizers", "*", "sgd adagrad rmsprop adam nadam adamw nadamw"),
    ("muon", "muon", "muon"),
    ("descend", "descend", "adamw"),
    ("linalg._newton_schulz", "_standard _by_gram _factor _quintic", "orthogonalize"),
    ("linalg._polar_express", "polar_express", "orthogonalize"),
    ("linalg._newton_schulz", "normalize", "orthogonalize"),
    ("linalg._axes", "_view", "muon"),
]
UNSEEN = {
    "float64 is not narrowed": [
        "transforms.in_bfloat16: *",
        "optimizers: _stored: if 0 never",
        "optimizers: _stored: Eq 0 opposite",
    ],
    "it is reported, and changes no update": [
        "transforms.skip_nonfinite: _reporter.report: *",
        "transforms.skip_nonfinite: skip_nonfinite.update: where *",
        "transforms.skip_nonfinite: skip_nonfinite.update: increment *",
        "transforms.skip_nonfinite: skip_nonfinite.update: if *",
        "transforms.clip_by_global_norm: clip_by_global_norm.update: where [12] *",
        "transforms.clip_by_global_norm: clip_by_global_norm.update: minimum *",
        "transforms.clip_by_global_norm: clip_by_global_norm.update: Mult *",
        "transforms.clip_by_global_norm: clip_by_global_norm.update: map *",
        "transforms.multi_steps: multi_steps.update: where 4 *",
        "transforms.multi_steps: multi_steps.update: increment *",
    ],
    "no entry has such input: a mask, no decay, one bad leaf of many, nothing, rules, a mesh, blocks": [
        "transforms.add_decayed_weights: add_decayed_weights: if 0 always",
        "transforms.add_decayed_weights: add_decayed_weights.update: if 0 never",
        "transforms.skip_nonfinite: skip_nonfinite.update: for *",
        "transforms.skip_nonfinite: skip_nonfinite.update.or_zero: if *",
        "transforms.skip_nonfinite: _sound: for *",
        "transforms.skip_nonfinite: _sound: if [01] always",
        "transforms.skip_nonfinite: _sound: BitOr 0 left",
        "transforms.skip_nonfinite: _sound: Invert *",
        "transforms.clip_by_global_norm: clip_by_global_norm.update: BitOr 0 left",
        "transforms.clip_by_global_norm: _scaled_norm: where * only 2",
        "transforms.multi_steps: multi_steps.update: BitAnd 0 right",
        "transforms.multi_steps: multi_steps.update: where [13] only 1",
        "transforms.multi_steps: _all_finite: *",
        "transforms.multi_steps: _on_all_devices: *",
        "transforms.orthogonalize: orthogonalize: if [12] *",
        "transforms.orthogonalize: orthogonalize.update: if *",
        "transforms.orthogonalize: module: *",
        "transforms.scale_by_shape: scale_by_shape.scaled: if 1 *",
        "transforms.scale_by_shape: scale_by_shape.scaled: Eq 1 *",
        "muon: muon: if [02] *",
        "linalg._axes: _view: [!f]*",
        "linalg._axes: _view: for 5 late",
    ],
    "no entry gives it another value than the default": [
        "transforms.orthogonalize: * ignored",
        "transforms.orthogonalize: orthogonalize: Pow *",
        "optimizers: *adamw: b[12] * ignored",
        "linalg._polar_express: * ignored",
    ],
    "it keeps numbers from overflow, underflow or rounding": [
        "transforms.clip_by_global_norm: _scaled_norm: for [04] *",
        "transforms.clip_by_global_norm: _scaled_norm: abs *",
        "transforms.clip_by_global_norm: _scaled_norm: USub *",
        "transforms.clip_by_global_norm: _scaled_norm: Add *",
        "transforms.clip_by_global_norm: _scaled_norm: Sub *",
        "transforms.divide: divide.quotient: Mult 0 right",
        "transforms.divide: divide.quotient: sqrt *",
        "optimizers: _not_negative: *",
        "optimizers: rmsprop: chain 2 without 1",
        "linalg._polar_express: polar_express: for 1 *",
    ],
    "the numbers are the same": [
        "transforms.clip_by_global_norm: clip_by_global_norm.update: where 0 only 2",
        "transforms.clip_by_global_norm: _scaled_norm: if 0 always",
        "transforms.clip_by_global_norm: _at_least: if 0 always",
        "transforms.multi_steps: multi_steps: if 0 never",
        "transforms.multi_steps: multi_steps.update: map *",
        "transforms.multi_steps: multi_steps.update: where 0 only 2",
        "transforms.orthogonalize: orthogonalize.update: for 3 late",
        "transforms.root: root.plus: if 0 never",
        "transforms.square: square.squared: if 0 always",
        "optimizers: *: divide 0 without 0",
        "linalg._newton_schulz: _factor: if 1 always",
        "linalg._newton_schulz: _quintic: if 0 never",
        "linalg._polar_express: polar_express: if 0 always",
        "linalg._polar_express: polar_express: Mult 1 right",
        "linalg._newton_schulz: normalize: conj *",
    ],
    "it does not run": [
        "transforms.add: add.*: for *",
        "transforms.clip_by_global_norm: clip_by_global_norm.update: Div 1 left",
        "transforms.clip_by_global_norm: _scaled_norm: if 0 never",
        "transforms.clip_by_global_norm: _at_least: if 0 never",
        "transforms.debias: debias.update.gathered: Add 0 right",
        "transforms.divide: divide.quotient: maximum 0 only 1",
        "transforms.multi_steps: multi_steps.update: Add 0 right",
        "transforms.orthogonalize: orthogonalize.update: for [24] *",
        "transforms.root: root.plus: Add 0 right",
        "transforms.scale_by_learning_rate: scale_by_learning_rate.update.step: Mult 0 left",
        "transforms.scale_by_shape: scale_by_shape.scaled: if 0 never",
        "transforms.scale_by_shape: scale_by_shape.scaled: Mult 0 left",
        "transforms.skip_nonfinite: _sound: BitOr 0 right",
        "transforms.skip_nonfinite: _sound: Mult *",
        "linalg._newton_schulz: _factor: if 0 never",
        "linalg._polar_express: polar_express: Add [01] *",
        "linalg._polar_express: polar_express: Mult 2 *",
        "linalg._polar_express: polar_express: Sub 0 right",
        "linalg._newton_schulz: normalize: USub *",
        "linalg._newton_schulz: normalize: Div 0 right",
        "linalg._axes: _view: for [0134] late",
    ],
}
"""Why a mutant, one of those with such a name, cannot make a formula test fail."""


def found(modules, functions):
    """The mutants of those functions of those modules."""
    for module in mutants.modules(modules):
        for mutant in mutants.mutants(module):
            if any(fnmatch.fnmatchcase(mutant.function, pattern) for pattern in functions.split()):
                yield mutant


def unseen(pattern):
    return {name for name in ALL if fnmatch.fnmatchcase(name, pattern)}


def entries(mutant, names):
    """Those of the function's name, or else of the module's, or else of the part's."""
    own = mutant.function.split(".")[0], mutant.module.split(".")[-1]
    names = next(([name] for name in own if name in NAMES), names.split())
    return [entry for entry in catalog.ENTRIES if entry.name in names]


NAMES = {entry.name for entry in catalog.ENTRIES}
ALL = {str(each): (each, names) for modules, functions, names in PARTS for each in found(modules, functions)}
HIDDEN = set().union(*(unseen(pattern) for patterns in UNSEEN.values() for pattern in patterns))


def a_formula_fails(package, tried):
    """Two steps, which are enough for most, or eight."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return any(
            not formulas.worst_error(entry.make(package), entry, "float64", steps, compiled=False)
            < formulas.TOLERANCE["float64"]
            for steps in (2, 8)
            for entry in tried
        )


@pytest.mark.examples("transforms.momentum: momentum.add: *")
@pytest.mark.parametrize("name", [name for name in ALL if name not in HIDDEN])
def test_changed_operation(name):
    mutant, names = ALL[name]
    with mutants.package(mutant) as package:
        assert a_formula_fails(package, entries(mutant, names)), mutant.difference()


@pytest.mark.slow
def test_the_copy_itself_passes():
    """Without a mutation nothing fails: the test above sees the mutation, not the copying."""
    with mutants.package() as package:
        assert package is not mutants.optimorph
        assert not a_formula_fails(package, catalog.ENTRIES)


@pytest.mark.parametrize(("modules", "functions", "names"), PARTS, ids=[part[0] for part in PARTS])
def test_every_part_has_mutants(modules, functions, names):
    for function in functions.split():
        assert any(found(modules, function)), f"no operation is found in {modules}: {function}"


@pytest.mark.parametrize("change", mutants.CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_made(change, monkeypatch):
    monkeypatch.setattr(mutants, "CHANGES", [change])
    made = (any(found(modules, functions)) for modules, functions, _ in PARTS)
    assert any(made), f"{change.__name__} finds nothing to change"


@pytest.mark.parametrize("pattern", [each for patterns in UNSEEN.values() for each in patterns])
def test_unseen(pattern):
    assert unseen(pattern), f"{pattern!r} names no mutant any more: mend this list"
