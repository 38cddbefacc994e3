"""Questions about unresolved leaves: one for each kind, and one answer for all."""

import re
from collections.abc import Sequence

from optimorph._routing.grouping import format_groups, group_by, rule_for
from optimorph._routing.leaf_spec import LeafSpec


def questions(who: str, paths: Sequence[str], specs: Sequence[LeafSpec]) -> list[str]:
    """A question for each kind of unresolved leaves, with rules to type; at last one rule for each kind.

    Of one kind are leaves with the same last names and the same possible answers.

    Args:
      who: the function that errors name; "" for none.
      paths: of all leaves.
      specs: of all leaves.
    """
    asked = {path: spec for path, spec in zip(paths, specs, strict=True) if spec.unresolved is not None}
    start = f"{who}: " if who else ""
    faults = [(path, f"{start}{spec.question(path)}") for path, spec in asked.items()]
    kind = {path: (_last_names(path), spec.answers) for path, spec in asked.items()}
    texts = format_groups(faults, paths, kind.__getitem__)
    groups = group_by(asked, kind.__getitem__)
    if len(groups) > 1:
        rules = [f"    {rule_for(group, paths)}: {asked[group[0]].answers[0]!r}," for group in groups]
        texts.append("\n".join(["All at once, by the first answers:", "  axes={", *rules, "  }"]))
    return texts


def _last_names(path: str) -> str:
    """The names of a layer and its parameter, without numbers."""
    return re.sub(r"\d+", "0", "/".join(path.split("/")[-2:]))
