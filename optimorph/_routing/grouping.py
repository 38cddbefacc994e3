"""Groups of leaves whose paths differ only in numbers, for tables and errors."""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

T = TypeVar("T")

_MAX_TEXTS = 20
_MAX_RULE = 80
"""How long a rule is at most that is written in every answer."""


def group_by(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Lists of the items with equal keys, in the order of their first items."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def numbers_in(path: str) -> list[int]:
    """The numbers of a path, by which layers that differ in nothing else are in order."""
    return [*map(int, re.findall(r"\d+", path))]


def without_numbers(path: str) -> tuple[str, ...]:
    """The texts between the numbers of a path; a `*` in the path itself is text."""
    return tuple(re.split(r"\d+", path))


def module_of(path: str) -> str:
    """The module that has the layer of a leaf."""
    module = path.rpartition("/")[0] if re.search(r"/(kernel|w|weights?)$", path) else path
    return module.rpartition("/")[0]


def parents(path: str) -> Iterator[str]:
    """The modules that a leaf is in, the innermost first."""
    path = path.replace(".", "/")
    while path:
        path = path.rpartition("/")[0]
        yield path


def glob_of(paths: Iterable[str]) -> str:
    """One pattern for paths: `*` for every number that is not the same in all.

    Where more than numbers differ, `*` stands for all names before the last ones that they share.
    """
    paths = [*paths]
    texts = [re.split(r"(\d+)", path) for path in paths]
    if len({(*text[::2],) for text in texts}) == 1:
        columns = zip(*texts, strict=True)
        return "".join(column[0] if len(set(column)) == 1 else "*" for column in columns)
    shared = []
    for names in zip(*(path.split("/")[::-1] for path in paths), strict=False):
        if len({without_numbers(name) for name in names}) > 1:
            break
        shared.append(glob_of(names))
    return "/".join(["*", *shared[::-1]])


def table(titles: tuple[str, ...], cells: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table."""
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [titles, tuple("-" * width for width in widths), *cells]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def format_groups(
    faults: Iterable[tuple[str, str]], paths: Iterable[str], kind: Callable[[str], Hashable] | None = None
) -> list[str]:
    """One text for each group of leaves with the same fault. After 20 groups, only the paths are listed.

    Args:
      faults: the path and the text of each leaf. In the text, `repr(path)` is replaced: the first time by the
        group's name, after that by a rule for the group.
      paths: the paths of all leaves. The rule for a group must not match any other leaf.
      kind: path → what is the same for leaves of one group; without it, their texts and all but the numbers
        of their paths.
    """
    texts_of, paths = dict(faults), list(paths)

    def like(path: str) -> Hashable:
        return without_numbers(path), texts_of[path].replace(repr(path), "")

    groups = group_by(texts_of, kind or like)
    rest = groups[_MAX_TEXTS:]
    texts = [_text(group, texts_of[group[0]], paths) for group in groups[:_MAX_TEXTS]]
    if rest:
        names = ", ".join(map(_name, rest))
        texts.append(f"... and {sum(map(len, rest))} more leaves: {names}")
    return texts


def rule_for(members: Sequence[str], paths: Sequence[str]) -> str:
    """The source code of a pattern that matches these leaves and no others."""
    pattern, own = glob_of(members), {*members}
    if {path for path in paths if path == pattern or fnmatchcase(path, pattern)} == own:
        return repr(pattern)
    globs = [glob_of(group) for group in group_by(members, without_numbers)]
    exact = [re.sub(r"\\\*", r"\\d+", re.escape(glob)) for glob in globs]
    if {path for path in paths if any(re.fullmatch(one, path) for one in exact)} != own:  # other numbers
        exact = [*map(re.escape, members)]
    return f"re.compile(r'^{_alternatives(exact)}$')"


def _alternatives(texts: Sequence[str]) -> str:
    """A regular expression for these, in which the names that all begin and end with stand once."""
    if len(texts) == 1:
        return texts[0]
    names = [text.split("/") for text in texts]
    most = min(map(len, names)) - 1
    first = next((k for k in range(most) if len({text[k] for text in names}) > 1), most)
    last = next((k for k in range(most - first) if len({text[~k] for text in names}) > 1), most - first)
    middle = "|".join("/".join(text[first : len(text) - last]) for text in names)
    return "/".join([*names[0][:first], f"({middle})", *names[0][len(names[0]) - last :]])


def _text(members: list[str], text: str, paths: Sequence[str]) -> str:
    before, found, after = text.partition(repr(members[0]))
    first, *lines = after.split("\n")
    rule, often = rule_for(members, paths), sum(repr(members[0]) in line for line in lines) > 1
    short = often and len(rule) > _MAX_RULE
    named = [f"  leaves = {rule}"] * short
    lines = [line.replace(repr(members[0]), "leaves" if short else rule) for line in lines]
    name = found and _name(members)
    return "\n".join([before + name + first.replace(repr(members[0]), rule), *named, *lines])


def _name(members: list[str]) -> str:
    return repr(glob_of(members)) + (f" ({len(members)} leaves)" if len(members) > 1 else "")
