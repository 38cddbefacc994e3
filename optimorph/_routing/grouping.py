"""Groups of leaves whose paths differ only in numbers, for tables and errors."""

import re
from collections.abc import Callable, Hashable, Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

T = TypeVar("T")

_MAX_TEXTS = 20


def group_by(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Lists of the items with equal keys, in the order of their first items."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def without_numbers(path: str) -> tuple[str, ...]:
    """The texts between the numbers of a path; a `*` in the path itself is text."""
    return tuple(re.split(r"\d+", path))


def glob_of(paths: Iterable[str]) -> str:
    """One pattern for paths that differ only in numbers: `*` for every number that is not the same in all."""
    columns = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    return "".join(texts[0] if len(set(texts)) == 1 else "*" for texts in columns)


def format_groups(faults: Iterable[tuple[str, str]], paths: Iterable[str]) -> list[str]:
    """One text for each group of leaves with the same fault. After 20 groups, only the paths are listed.

    Args:
      faults: the path and the text of each leaf. In the text, `repr(path)` is replaced: the first time by the
        group's name, after that by a rule for the group.
      paths: the paths of all leaves. The rule for a group must not match any other leaf.
    """
    groups = group_by(faults, lambda fault: (without_numbers(fault[0]), fault[1].replace(repr(fault[0]), "")))
    paths, rest = list(paths), groups[_MAX_TEXTS:]
    texts = [_text(group, paths) for group in groups[:_MAX_TEXTS]]
    if rest:
        names = ", ".join(_name([path for path, _ in group]) for group in rest)
        texts.append(f"... and {sum(map(len, rest))} more leaves: {names}")
    return texts


def _text(group: list[tuple[str, str]], paths: list[str]) -> str:
    path, text = group[0]
    if len(group) == 1:
        return text
    members = [path for path, _ in group]
    before, *after = text.split(repr(path))
    return _rule(members, paths).join([before + _name(members) + "".join(after[:1]), *after[1:]])


def _name(members: list[str]) -> str:
    return repr(glob_of(members)) + (f" ({len(members)} leaves)" if len(members) > 1 else "")


def _rule(members: list[str], paths: list[str]) -> str:
    """The source code of a pattern that matches these leaves and no others."""
    pattern = glob_of(members)
    if {path for path in paths if fnmatchcase(path, pattern)} == set(members):
        return repr(pattern)
    exact = "".join(r"\d+" if text == "*" else re.escape(text) for text in re.split(r"(\*)", pattern))
    return f"re.compile(r'^{exact}$')"
