"""Questions about unresolved leaves: one for each kind, and one answer for all."""

import re
from collections.abc import Mapping, Sequence

from optimorph._routing.grouping import format_groups, group_by, rule_for


def questions(
    asked: Mapping[str, tuple[str, Sequence[str | None]]], paths: Sequence[str], who: str = ""
) -> list[str]:
    """A question for each kind of unresolved leaves, with rules to type; at last one rule for each kind.

    Of one kind are leaves with the same last names and the same possible answers.

    Args:
      asked: the path of an unresolved leaf → the question, and its answers, the likeliest first.
      paths: of all leaves.
      who: the function that errors name.
    """
    start = f"{who}: " if who else ""
    faults = [(path, start + question) for path, (question, _) in asked.items()]
    kind = {path: (_last_names(path), answers) for path, (_, answers) in asked.items()}
    texts = format_groups(faults, paths, kind.__getitem__)
    groups = group_by(asked, kind.__getitem__)
    if len(groups) > 1:
        rules = [f"    {rule_for(group, paths)}: {asked[group[0]][1][0]!r}," for group in groups]
        texts.append("\n".join(["All at once, by the first answers:", "  axes={", *rules, "  }"]))
    return texts


def _last_names(path: str) -> str:
    """The names of a layer and its parameter, without numbers."""
    return re.sub(r"\d+", "0", "/".join(path.split("/")[-2:]))
