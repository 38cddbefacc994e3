"""Leaves whose paths differ in numbers only, said as one."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

_SHOWN = 20


def apart_from_numbers(path: str) -> tuple[str, ...]:
    """What paths that differ in numbers only have in common; a star of their own is no number."""
    return tuple(re.split(r"\d+", path))


def starred(paths: Iterable[str]) -> str:
    """Paths that differ in numbers only, as one, with a star for every number in which they differ."""
    pieces = zip(*(re.split(r"(\d+)", path) for path in paths), strict=True)
    return "".join(piece[0] if len(set(piece)) == 1 else "*" for piece in pieces)


def listed(faults: Iterable[tuple[str, str]], paths: Iterable[str]) -> list[str]:
    """What is wrong with which leaf, once for leaves that are alike; when it is much, the rest by name alone.

    Args:
      faults: (path, text) of leaves; a text names its path as `repr` does, and a rule for it so too.
      paths: of all leaves, which a rule for some must not mean.
    """
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for path, text in faults:
        kind = (*apart_from_numbers(path), text.replace(repr(path), ""))
        groups.setdefault(kind, []).append((path, text))
    paths, shown, rest = list(paths), list(groups.values())[:_SHOWN], list(groups.values())[_SHOWN:]
    texts = [_text(group, paths) for group in shown]
    if rest:
        names = ", ".join(_name([path for path, _ in group]) for group in rest)
        texts.append(f"... and {sum(map(len, rest))} more leaves: {names}")
    return texts


def _text(group: list[tuple[str, str]], paths: list[str]) -> str:
    path, text = group[0]
    if len(group) == 1:
        return text
    alike = [path for path, _ in group]
    before, *after = text.split(repr(path))
    return _rule(alike, paths).join([before + _name(alike) + "".join(after[:1]), *after[1:]])


def _name(alike: list[str]) -> str:
    return repr(starred(alike)) + (f" ({len(alike)} leaves)" if len(alike) > 1 else "")


def _rule(alike: list[str], paths: list[str]) -> str:
    """A pattern, to be typed, that means these leaves and no others."""
    pattern = starred(alike)
    if {path for path in paths if fnmatchcase(path, pattern)} == set(alike):
        return repr(pattern)
    exact = "".join(r"\d+" if piece == "*" else re.escape(piece) for piece in re.split(r"(\*)", pattern))
    return f"re.compile(r'^{exact}$')"
