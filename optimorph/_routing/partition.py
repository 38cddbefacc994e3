"""Leaves to transformations, by rules."""

from collections.abc import Mapping
from typing import Any

import optax

from optimorph._core.checks import LeafError, is_transform
from optimorph._core.differences import checked_state, other_state
from optimorph._core.paths import by_path, leaf_paths
from optimorph._core.rule import Leaves, aligned, handed
from optimorph._core.shown import shown
from optimorph._core.types import Rules
from optimorph._core.wrapped import wrapped
from optimorph._routing.rules import NO_MATCH, among, labelled, lookup, warn_unused


def partition(
    rules: Rules, transforms: Mapping[str, optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """Update every leaf by the transformation that the rules name for it.

        partition({"*embed*": "slow", "encoder/*": "frozen", "*": "fast"},
                  {"slow": adamw(1e-4), "frozen": optax.set_to_zero(), "fast": muon(0.02)})

    Each leaf only has the state of its own transformation; a frozen leaf has no state. `partition` is
    `optax.partition` with rules in place of labels. The labels are computed from the paths whenever the
    function is traced. Therefore it also works inside `nnx.jit` and with callable modules, such as those of
    Equinox.

    Args:
      rules: as in `labels`: pattern → name, or (path, shape) → name, or a tree of names.
      transforms: name → transformation. One that no leaf is labelled for has no effect, and no warning.

    Raises:
      ValueError: a value that is not a transformation; at `init`, naming all leaves that no rule matches or
        whose label is not in `transforms`.
    """
    if not isinstance(transforms, Mapping):
        raise ValueError(
            f"partition: transforms must map labels to transformations, but is {shown(transforms)}. Type "
            "{'matrices': optimorph.sgd(0.1), ...}."
        )
    if isinstance(rules, Mapping) and any(map(is_transform, rules.values())):
        raise ValueError(
            "partition: the values of rules are transformations, but rules give each leaf a label. Type the "
            "rules first: partition({'*': 'all'}, {'all': optimorph.sgd(0.1)})."
        )
    txs: dict[Any, Any] = {name: wrapped("partition", tx) for name, tx in transforms.items()}
    match = lookup(rules, "partition")

    def label(path, shape):
        name = match(path, shape)
        if name is NO_MATCH or name in [*transforms]:  # a list: the label may not be hashable
            return name
        raise LeafError(
            f"partition: the label of {path!r} is {shown(name)}, but transforms has {[*transforms]}."
        )

    def split(tree):
        tree_labels = labelled("partition", label, tree)
        if (readings := handed("readings")) is not None:
            readings.labels |= by_path(tree_labels)
        return optax.partition(txs, lambda _: tree_labels)  # a module of labels may be callable

    def update(updates, state, params=None, **extra):
        state = checked_state("partition", state, optax.transforms.PartitionState)
        if {*state.inner_states} != {*txs}:
            raise other_state("partition")
        gs, tree, ws = aligned("partition", updates, params)
        updates = tree.unflatten(gs)
        params = None if params is None else tree.unflatten(ws)
        leaves = updates if params is None else params  # params have shapes where gradients are missing
        with among(Leaves.of(leaves)):
            return split(leaves).update(updates, state, params, **extra)

    def init(params):
        warn_unused("partition", "rules", rules, leaf_paths(params))
        with among(Leaves.of(params)):
            return split(params).init(params)

    return optax.GradientTransformationExtraArgs(init, update)
