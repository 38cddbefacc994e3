"""Some leaves to one transform, the others to another, by rules."""

from collections.abc import Mapping

import optax

from optimorph._core.checks import LeafError
from optimorph._core.rule import aligned
from optimorph._core.types import Rules
from optimorph._routing.rules import UNSAID, labels, lookup


def partition(
    rules: Rules, transforms: Mapping[str, optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """Update every leaf by the transform that the rules name for it.

        partition({"*embed*": "slow", "encoder/*": "frozen", "*": "fast"},
                  {"slow": adamw(1e-4), "frozen": optax.set_to_zero(), "fast": muon(0.02)})

    A leaf has the state of its own transform and no other; a frozen one has none. This is
    `optax.partition` with rules for labels, found again from the paths at every trace: it works where trees
    change their identity, as inside `nnx.jit`, and with modules that can be called.

    Args:
      rules: as those of `labels`: pattern → name, or (path, shape) → name, or a tree of names.
      transforms: by name.

    Raises:
      ValueError: at `init`, all leaves that no rule matches, or whose rule names no transform.
    """

    say = lookup(rules)

    def name(path, shape):
        said = say(path, shape)
        if said is UNSAID or said in [*transforms]:  # what cannot be hashed is no name
            return said
        raise LeafError(f"partition: {path!r} is to go to {said!r}, but there are only {[*transforms]}.")

    def split(tree):
        found = labels(name)(tree)
        return optax.partition({**transforms}, lambda _: found)  # a module of labels may be callable

    def update(updates, state, params=None, **extra):
        gs, tree, _ = aligned("partition", updates, params)
        updates = tree.unflatten(gs)
        known = updates if params is None else params  # a missing gradient has no shape
        return split(known).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: split(params).init(params), update)
