"""With any single operation of an update rule changed, a formula test of that rule fails.

A mutant's name says the module, the function, and what is done to which operation of its kind in that
function: `pytest -m "" -k "momentum.add and Mult"` tries those of one operation.
"""

import fnmatch

import catalog
import formulas
import jax
import mutants
import numpy as np
import pytest
import test_eigenbasis
import test_qk_clip

RECIPES = [f"_recipes.{name}" for name in catalog.NAMES if mutants.modules(f"_recipes.{name}")]
PARTS = [  # modules, functions, and the entries that run them, or else those of the function or the module
    ("_core.rule", "transform* Rule.*", "chain adam compress_state muon"),
    ("_transforms.[!e]*", "*", ""),
    ("_transforms.averages", "_lerp", "ema slow_ema"),
    ("_transforms.clip_leaf", "_clipped*", "clip_norm clip_rms mars_adamw"),
    ("_transforms.factored", "*", "factored shampoo"),
    ("linalg._kronecker", "with_gradient_kl* _factor _mean", "in_eigenbasis-kl"),
    ("linalg._kronecker", "rotated* permuted orthogonal_iteration.step", "in_eigenbasis"),
    (
        "_transforms.eigenbasis",
        "in_eigenbasis.step* _Known.moments",
        "in_eigenbasis in_eigenbasis-kl soap_muon",
    ),
    ("_distributed.bases", "refreshed* _refreshed", "in_eigenbasis"),
    ("_transforms.combine", "_combined*", "divide add mix adam"),
    ("_transforms.combine", "chain* _chain* _merged _of_rules*", "chain adam compress_state muon"),
    ("_transforms.matrices", "module", "orthogonalize scale_by_shape route_matrices muon"),
    ("_routing.resolve", "AxesOfLeaves.*", "orthogonalize scale_by_shape hyperball mean muon"),
    ("_distributed.reductions", "*", "hyperball mean keep_norm"),
    ("linalg._axes", "Axes.reduce Axes.repeat Axes.counts", "hyperball mean keep_norm"),
    ("_transforms.step", "decay_and_step _add_corrected_decay*", "adamw"),
    *((each, "*", "") for each in RECIPES),
    ("_recipes.optimizers", "*", ""),
    ("_recipes.optimizers", "_* module", "sgd adagrad rmsprop adam nadam"),
    ("_recipes.moments", "*", "adagrad rmsprop adam"),
    ("_recipes.of_matrices", "of_matrices of_polar_factors", "muon muonh normuon adamuon muon2 soap"),
    ("_recipes.soap", "basis", "soap klsoap"),
    ("_recipes.route_matrices", "routed*", "route_matrices muon"),
    ("linalg._newton_schulz", "_standard _by_gram _factor _quintic normalize", "orthogonalize"),
    ("linalg._polar_express", "_composed", "orthogonalize"),
    ("linalg._axes", "_view", "orthogonalize"),
]
UNSEEN = {
    "the numbers are the same": [
        "_core.rule: Rule.pick: if 1 never",
        "_core.rule: transform.update: if 3 never",
        "_transforms.combine: chain: if * never",
        "_transforms.combine: chain: Gt *",
        "_recipes.optimizers: _l2: Rule 0 without begin",
        "_transforms.pointwise: debias.advance: if 0 never",
        "_transforms.clip_by_global_norm: _*: if 0 always",
        "_transforms.combine: _combined: if 0 never",
        "_transforms.combine: _combined: for 1 *",
        "_transforms.matrices: scale_by_shape.update: if 2 never",
        "_core.rule: transform.update: if 6 never",
        "_transforms.multi_steps: multi_steps: if 0 never",
        "_transforms.multi_steps: multi_steps.update: where 2 only 2",
        "_transforms.multi_steps: multi_steps.update: map 0 only 1",
        "_transforms.pointwise: root.plus: if 0 never",
        "_transforms.pointwise: square.squared: if 0 always",
        "_recipes.route_matrices: routed.update: if 1 *",
        "_recipes.route_matrices: route_matrices: routed 0 without wide",
        "_recipes.route_matrices: routed: wide 0 ignored",
        "_recipes.route_matrices: routed.update: if [345] never",
        "_transforms.hyperball: _norms: conj 0 gone",
        "_transforms.means: keep_norm.update.rescaled: conj 0 gone",
        "_transforms.means: mean: if 1 never",
        "_transforms.means: mean.init: if 0 never",
        "linalg._axes: Axes.reduce: if 0 never",
        "linalg._axes: Axes.reduce: NotEq 0 opposite",
        "linalg._axes: Axes.reduce: letters 1 ignored",
        "linalg._axes: Axes.reduce: if [12] always",
        "linalg._axes: Axes.reduce: if 1 never",
        "linalg._axes: Axes.reduce: LtE 0 opposite",
        "linalg._axes: Axes.reduce: Mult 0 left",
        "_transforms.factored: factored.update: for 0 backwards",
        "_transforms.means: mean.update: if 1 *",
        "_transforms.means: mean.update: where 0 only 1",
        "_transforms.means: _of_other_shape: *",
        "_transforms.matrices: module: BitOr *",
        "_distributed.reductions: Reduction._each: f 0 without keepdims",
        "_recipes.of_matrices: of_matrices: if 1 *",
        "_recipes.soap_muon: soap_muon: nesterov 0 ignored",
        "linalg._axes: Axes.counts: Mult 0 left",
        "_recipes.adamh: adamh: chain 0 without 1",
        "_recipes.adamh: adamh: b1 1 ignored",
        "linalg._newton_schulz: _factor: if 1 always",
        "linalg._newton_schulz: _quintic: if 0 never",
        "linalg._newton_schulz: normalize: conj *",
        "linalg._polar_express: _composed: if 0 always",
        "linalg._polar_express: _composed: Mult 1 right",
    ],
    "the scale of a factor does not change its basis, and no side is so short or long": [
        "linalg._kronecker: with_gradient_kl: Div [01] left",
        "linalg._kronecker: with_gradient_kl: sqrt [01] only 0",
        "linalg._kronecker: with_gradient_kl.values: m?? 0 only *",
        "_transforms.eigenbasis: in_eigenbasis.step.learn: if 0 always",
    ],
    "nothing is sorted, so that the order is the one before": [
        "_transforms.eigenbasis: in_eigenbasis.step: if 4 always",
        "_transforms.eigenbasis: in_eigenbasis.step: sort 1 ignored",
    ],
    "no entry has such input: a spread refresh, default factors, low precision, None, a mesh, means inside": [
        "_transforms.eigenbasis: in_eigenbasis.step: if 0 always",
        "_transforms.eigenbasis: in_eigenbasis.step: map [15] only 1",
        "_transforms.eigenbasis: in_eigenbasis.step: if 1 *",
        "_transforms.eigenbasis: in_eigenbasis.step: if 5 *",
        "_transforms.eigenbasis: in_eigenbasis.step: if 6 always",
        "_transforms.eigenbasis: in_eigenbasis.step: if 7 never",
        "_transforms.eigenbasis: in_eigenbasis.step: spread [01] ignored",
        "_transforms.eigenbasis: in_eigenbasis.step: BitOr 0 left",
        "_distributed.bases: refreshed: if 1 never",
        "_distributed.bases: refreshed: if 0 never",
        "_distributed.bases: refreshed.refresh: if 0 always",
        "_distributed.bases: _refreshed: if [01] never",
        "_distributed.bases: _refreshed: map 0 only 1",
        "_distributed.bases: _refreshed: USub 0 gone",
        "_recipes.soap: klsoap: b2 1 ignored",
        "_recipes.soap: basis: in_eigenbasis 0 without spread",
        "_recipes.soap: basis: in_eigenbasis 0 without block_size",
    ],
    "of real matrices": [
        "linalg._kronecker: with_gradient_kl: abs 0 only 0",
        "linalg._kronecker: orthogonal_iteration.step: conj 0 gone",
    ],
    "negative axes are the same as positive ones": [
        "linalg._kronecker: with_gradient_kl.values: USub 0 gone",
        "linalg._kronecker: orthogonal_iteration.step: USub [24] gone",
    ],
    "it keeps numbers from overflow, underflow or rounding": [
        "_transforms.clip_by_global_norm: _scaled_norm: [ASUa]*",
        "_transforms.clip_by_global_norm: _scaled_norm: for [04] *",
        "_transforms.clip_by_global_norm: _scaled_norm: sqrt 0 *",
        "_transforms.clip_by_global_norm: _scaled_norm: Mult 0 *",
        "_transforms.combine: divide.quotient: Mult 0 right",
        "_transforms.combine: divide.quotient: sqrt *",
        "_transforms.multi_steps: multi_steps.update: where 1 only 1",
        "_transforms.hyperball: _norms: Pow *",
        "_transforms.hyperball: _norms: USub 0 gone",
        "_transforms.hyperball: _norms: Mult [12] right",
        "_transforms.hyperball: _norms: Lt 0 opposite",
        "_transforms.hyperball: _norms: abs 0 only 0",
        "_transforms.hyperball: _norms: where [012] only 1",
        "_recipes.optimizers: _not_negative: *",
        "_recipes.optimizers: rmsprop: chain 2 without 1",
    ],
    "it rounds what is stored, which no formula does": [
        "_transforms.averages: ema.update: if 2 *",
        "_transforms.averages: momentum.update: if 1 *",
        "_transforms.averages: accumulate.update: if *",
        "_transforms.averages: extrapolate.update: if 0 always",
        "_transforms.in_bfloat16: in_bfloat16: if 0 never",
        "_transforms.in_bfloat16: in_bfloat16: seed *",
        "_transforms.in_bfloat16: in_bfloat16.*",
        "_transforms.in_bfloat16: _*: [!f]*",
        "_recipes.moments: stored: * 0 [!a]*",
        "linalg._polar_express: _composed: for 1 *",
        "*: wrapped 0 without wide",
    ],
    "it is reported, or refuses, and changes no update": [
        "_core.rule: transform.update: strict *",
        "_transforms.clip_by_global_norm: clip_by_global_norm.update: where [12] *",
        "_transforms.clip_by_global_norm: clip_by_global_norm.update: [Mm][iu]*",
        "_transforms.matrices: scale_by_shape: Rule 0 without begin",
        "_transforms.skip_nonfinite: skip_nonfinite.update: where 0 *",
        "_transforms.skip_nonfinite: skip_nonfinite.update: increment *",
        "_recipes.of_matrices: of_matrices: weight_decay_form 0 ignored",
        "_recipes.route_matrices: _inferred: if 0 always",
        "_recipes.of_matrices: of_matrices: if 3 always",
        "_recipes.of_matrices: of_matrices: if [67] *",
    ],
    "no entry has such input: none, zeros, integers, one fault of several, rules, a mesh, many bytes": [
        "_transforms.clip_by_global_norm: clip_by_global_norm.update: BitOr 0 left",
        "_transforms.cautious: cautious.update: if 0 always",
        "_transforms.clip_leaf: _clipped: Rule 0 without begin",
        "_transforms.clip_leaf: _clipped.update: where [01] only 1",
        "_transforms.clip_leaf: _clipped.update: Gt 0 opposite",
        "_transforms.clip_leaf: _clipped.update: BitAnd 0 left",
        "_transforms.clip_by_global_norm: clip_by_global_norm.update: if 0 never",
        "_core.rule: transform.init: if 1 *",
        "_transforms.multi_steps: _zeros: if 0 always",
        "_transforms.multi_steps: _zeros: if 1 *",
        "_transforms.multi_steps: multi_steps.update: if 0 never",
        "_transforms.multi_steps: multi_steps.update: if 1 *",
        "_transforms.multi_steps: multi_steps.update: BitAnd [01] left",
        "_transforms.multi_steps: multi_steps.update.take.given: if 0 never",
        "_transforms.multi_steps: multi_steps.update.take.narrow: *",
        "_transforms.multi_steps: multi_steps.update.take: map *",
        "_transforms.multi_steps: multi_steps.update.step: [BINi]*",
        "_transforms.multi_steps: _waited: map *",
        "_transforms.multi_steps: _of_one.*",
        "_transforms.multi_steps: multi_steps.update.step: for 1 late",
        "_core.rule: transform.update: if 0 always",
        "_transforms.clip_by_global_norm: clip_by_global_norm.update: where 0 *",
        "_transforms.clip_by_global_norm: _scaled_norm: where *",
        "_transforms.means: keep_norm.update.rescaled: BitAnd *",
        "_transforms.means: keep_norm.update.rescaled: where *",
        "_transforms.means: _chosen: if *",
        "_transforms.step: _add_corrected_decay.begin: for 0 late",
        "_transforms.step: _add_corrected_decay.advance: where *",
        "_distributed.reductions: Reduction.sums: if *",
        "_distributed.reductions: Reduction.maximum: if *",
        "_distributed.reductions: Reduction.mean_over_devices: if *",
        "_distributed.reductions: Reduction.mean: maximum 0 only 0",
        "_distributed.reductions: Reduction.mean: Mult 0 left",
        "_distributed.reductions: Reduction._each: f 0 without initial",
        "_distributed.reductions: reduction: if 0 always",
        "_distributed.reductions: reduction: if 1 *",
        "_distributed.reductions: reduction: letters [123] *",
        "_distributed.reductions: reduction: for *",
        "linalg._axes: Axes.reduce: f [012] without initial",
        "linalg._axes: Axes.reduce: Sub 1 right",
        "linalg._axes: Axes.repeat: if 1 never",
        "_recipes.scion: _radius: if 0 never",
        "_recipes.scion: _lmo.norm: if 1 never",
        "_recipes.scion: _radius.own: if 1 never",
        "_recipes.scion: _with_tables.read: [EN]*",
        "_recipes.scion: _with_tables.read: if 0 always",
        "_recipes.scion: _with_tables.read: if 1 *",
        "_recipes.scion: _is_table: if *",
        "_transforms.hyperball: _on_sphere: where [0-4] only 1",
        "_transforms.hyperball: _on_sphere: BitAnd 0 *",
        "_transforms.scale_by_rules: scale_by_rules: if 0 never",
        "_transforms.scale_by_rules: _as_array: if *",
        "_transforms.scale_by_rules: scale_by_rules: for 0 late",
        "_transforms.scale_by_rules: scale_by_rules.advance: if 0 always",
        "_transforms.scale_by_rules: scale_by_rules.update: if 0 never",
        "_transforms.scale_by_rules: scale_by_rules: Rule 0 without begin",
        "_recipes.of_matrices: of_polar_factors: * without divide",
        "_recipes.of_matrices: of_polar_factors: * without polar",
        "_recipes.scion: scion: * without divide",
        "_recipes.scion: scion: * without polar",
        "_recipes.scion: scion: * without reads",
        "_recipes.scion: scion: warning_of_unused *",
        "_transforms.factored: factored.init: if 0 never",
        "_transforms.factored: _at_first: for 0 late",
        "_transforms.factored: factored.update: if [01] never",
        "_transforms.factored: factored.update: map 0 only 1",
        "_transforms.factored: _outer: for 1 late",
        "_transforms.factored: _outer: Add 0 right",
        "_transforms.factored: _outer: where 0 only 1",
        "_transforms.matrices: orthogonalize*: [Pb]*",
        "_transforms.matrices: orthogonalize.update: for 3 late",
        "_transforms.matrices: orthogonalize: if [123] *",
        "_transforms.matrices: orthogonalize.update: if 0 *",
        "_transforms.matrices: orthogonalize.update: if 1 always",
        "_transforms.matrices: scale_by_shape.update: if 1 always",
        "_transforms.multi_steps: _on_all_devices: *",
        "_transforms.multi_steps: _observed: map 0 only 1",
        "_transforms.multi_steps: _observed.seen: if 0 never",
        "_transforms.qk_clip: *",
        "_transforms.skip_nonfinite: skip_nonfinite.update: for *",
        "_transforms.skip_nonfinite: skip_nonfinite.update.or_zero: if * never",
        "_transforms.skip_nonfinite: _sound: if * always",
        "_transforms.skip_nonfinite: _sound: BitOr 0 left",
        "_transforms.skip_nonfinite: _sound: Invert *",
        "_recipes.of_matrices: of_matrices: if 0 never",
        "_recipes.of_matrices: of_matrices: for [01] *",
        "linalg._axes: Axes.counts: Sub 1 right",
        "_recipes.route_matrices: routed.init: if 0 always",
        "_recipes.route_matrices: routed: resolve_leaves 0 without find_output",
        "_recipes.route_matrices: routed.facts: for 0 late",
        "_recipes.route_matrices: routed.facts: handed_down 0 without roles",
        "_recipes.route_matrices: routed.needs_others: Gt 0 opposite",
        "_recipes.route_matrices: routed.update: map 0 only 1",
    ],
    "sharded types, which tests/mesh/test_state.py sees": [
        "_core.rule: transform.update: if 5 *",
        "_core.rule: transform.update: NotEq 0 opposite",
        "_core.rule: transform.update: if 7 never",
        "_core.rule: transform.update: NotEq 1 opposite",
        "_core.rule: transform.update: if 8 never",
        "_core.rule: transform.update: where 0 *",
        "_core.rule: transform.update: Eq 0 opposite",
        "_distributed.bases: refreshed: map [01] only 1",
    ],
    "repeated blocks, which no entry has: test_means and test_hyperball see it; or the tree is read again": [
        "linalg._axes: Axes.reduce: USub 0 gone",
        "linalg._axes: Axes.repeat: if 1 always",
        "linalg._axes: Axes.repeat: Eq 0 opposite",
        "_routing.resolve: AxesOfLeaves.axes_and_shardings: if 1 always",
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
    own = mutant.function.split(".")[0], mutant.module.split(".")[-1]
    names = names.split() or [name for name in own if name in catalog.NAMES][:1]
    return [entry for entry in catalog.ENTRIES if entry.name in names or entry.id in names]


ALL = {str(each): (each, names) for modules, functions, names in PARTS for each in found(modules, functions)}
HIDDEN = set().union(*(unseen(pattern) for patterns in UNSEEN.values() for pattern in patterns))


RUNS = (("float64", 2), ("float64", 8), ("float16", 8))
"""Two steps are enough for most; if the update is compiled, eight take no longer."""

BRANCHES = ("in_eigenbasis", "klsoap", "multi_steps", "shampoo", "skip_nonfinite", "soap")
"""Entries with conditions and loops, which JAX compiles anew at every step if the update is not compiled."""


def a_formula_fails(package, tried, runs=RUNS):
    """In any of the runs of any entry, or there is an error."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        return any(
            not error(entry, package, dtype, steps) < formulas.tolerance(entry, dtype)
            for dtype, steps in runs
            for entry in tried
            if steps > 2 or not entry.id.startswith(BRANCHES)
        )


def error(entry, package, dtype, steps):
    try:
        compiled = entry.id.startswith(BRANCHES)
        return formulas.worst_error(entry.make(package), entry, dtype, steps, compiled)
    except Exception:
        return np.inf


@pytest.mark.examples("_transforms.averages: momentum.add: *")
@pytest.mark.parametrize("name", [name for name in ALL if name not in HIDDEN])
def test_changed_operation(name):
    mutant, names = ALL[name]
    with mutants.package(mutant) as package:
        assert a_formula_fails(package, entries(mutant, names)), mutant.difference()


CHECKED = [  # modules, functions, and what finds their faults at less cost than a formula
    (
        "_transforms.qk_clip",
        "_factors clip_attention_logits.update QKClipState.observe",
        test_qk_clip.is_wrong,
    ),
    ("_routing.attention", "Part.spread Attention._of_keys _thirds", test_qk_clip.is_wrong),
    ("_distributed.bases", "_turns _alike _plans*", test_eigenbasis.balance_is_wrong),
    ("_distributed.balance", "*", test_eigenbasis.balance_is_wrong),
]
CHECKS = {str(each): (each, is_wrong) for *part, is_wrong in CHECKED for each in found(*part)}
CHANGES_NOTHING = {
    "_transforms.qk_clip: _factors: if 0 never",  # all modules have logits
    "_transforms.qk_clip: QKClipState.observe: if 0 always",  # there are parameters
    "_transforms.qk_clip: _factors: where 1 only 1",  # a division whose result is not used
    "_routing.attention: Attention._of_keys: if 1 never",  # heads of queries have an axis, those of keys none
    "_routing.attention: Attention._of_keys: if 2 never",  # an error
    "_routing.attention: Attention._of_keys: max 0 only 0",  # before an error
    "_routing.attention: Part.spread: USub 1 gone",  # layers of latent attention
    "_routing.attention: Part.spread: if 1 always",  # one number for many that are the same
    "_routing.attention: _thirds: for 6 late",  # the first axis has no blocks
    "_routing.attention: _thirds: for 7 late",  # the last axis is not the one of three
    "_distributed.bases: _turns: if 0 never",  # the same turn, but the compiler does not know it
    "_distributed.balance: balanced: if 0 never",  # there are matrices
    "_distributed.balance: Balance._turn.exchanged: if 0 always",  # an exchange of nothing
    "_distributed.balance: Balance._turn.exchanged: if 0 never",  # in every turn there is one
}


@pytest.mark.examples("_transforms.qk_clip: _factors: Div 0 left")
@pytest.mark.parametrize("name", sorted({*CHECKS} - CHANGES_NOTHING))
def test_checked_operation(name):
    mutant, is_wrong = CHECKS[name]
    with mutants.package(mutant) as package:
        assert is_wrong(package), mutant.difference()


@pytest.mark.slow
def test_the_copy_itself_passes():
    """Without a mutation nothing fails: the test above sees the mutation, not the copying."""
    with mutants.package() as package:
        assert package is not mutants.optimorph
        assert not a_formula_fails(package, catalog.ENTRIES[::8])


@pytest.mark.parametrize(("modules", "functions", "names"), PARTS, ids=[part[0] for part in PARTS])
def test_every_part_has_mutants(modules, functions, names):
    for function in functions.split():
        assert any(found(modules, function)), f"no operation is found in {modules}: {function}"


@pytest.mark.parametrize("change", mutants.CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_made(change, monkeypatch):
    monkeypatch.setattr(mutants, "CHANGES", [change])
    made = (any(found(modules, functions)) for modules, functions, _ in PARTS)
    assert any(made), f"{change.__name__} finds nothing to change"


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(HIDDEN))
def test_unseen(name):
    mutant, names = ALL[name]
    with mutants.package(mutant) as package:
        seen = a_formula_fails(package, entries(mutant, names), [("float64", 3)])
        assert not seen, "it is seen: take it off the list"


@pytest.mark.parametrize("pattern", [each for patterns in UNSEEN.values() for each in patterns])
def test_unseen_are_there(pattern):
    assert unseen(pattern), f"{pattern!r} names no mutant any more: mend this list"
