"""Which codec a moment is stored by."""

import functools
import math
from collections.abc import Callable

from optimorph._core.roles import FIRST, SECOND
from optimorph._core.rule import Leaves, handed, handed_down
from optimorph._core.shown import shown
from optimorph._core.types import Rules, Shape
from optimorph._core.warn import warn
from optimorph._routing.names import by_name
from optimorph._routing.rules import NO_MATCH, lookup
from optimorph._storage.encoding import CodecRule, named
from optimorph.codecs import Codec, Float8, Nonneg8, Signed8

WIDE = ("bias", "embedding", "norm", "vector")
"""Roles of leaves whose moments are not compressed by default."""

SMALL = 4096
"""Leaves with fewer numbers are not compressed by default."""

BOTH = "{'first': Signed8(), 'second': Nonneg8()}"
"""What to type."""


def argument_of(who: str) -> str:
    """The argument of `compress_state` that has the rules, or of an optimizer."""
    return "rules" if who == "compress_state" else "state"


def codec_rule(who: str, rules: Rules | None) -> Callable[[Leaves], CodecRule]:
    """All leaves → the rules as one function, which refuses what is no fitting codec."""
    if isinstance(rules, Codec):
        what = f"{who}: {argument_of(who)} must say which moments {shown(rules)} is for"
        raise ValueError(f"{what}. Type {BOTH}, for example.")
    found = lookup({} if rules is None else rules, who, argument_of(who))

    def codec_among(leaves: Leaves, kind: str, path: str, shape: Shape) -> Codec | None:
        with handed_down(all_leaves=leaves):
            codec = found(named(kind, path), shape)
        if codec is NO_MATCH:
            return by_default(kind, path, shape)
        if codec is not None and not isinstance(codec, Codec):
            raise ValueError(
                f"{who}: the rules give {shown(codec)} for {named(kind, path)!r}, which is not a codec. "
                "Type optimorph.codecs.Signed8(), for example, or None for no compression."
            )
        if kind == FIRST and isinstance(codec, Nonneg8):
            raise ValueError(
                f"{who}: the rules give {shown(codec)} for {named(kind, path)!r}, whose numbers have "
                f"signs. Type {BOTH}, for example."
            )
        if kind == SECOND and isinstance(codec, Signed8 | Float8):
            raise ValueError(
                f"{who}: the rules give {shown(codec)} for {named(kind, path)!r}, which can round to 0, "
                f"but updates are divided by roots of these moments. Type {BOTH}, for example."
            )
        return codec

    def codec_rule_of(leaves: Leaves) -> CodecRule:
        around = handed("all_leaves") or leaves
        return by_default if rules is None else functools.partial(codec_among, around)

    return codec_rule_of


def warn_nothing(who: str, argument: str) -> None:
    warn(
        f"{who}: no moment is compressed. By default those of leaves with at least two axes and {SMALL} "
        "numbers are, without embeddings, biases, norms and vectors. For others type "
        f"{argument}={BOTH}, or leave out what has no effect.",
        stacklevel=3,
    )


def linear(path: str, shape: Shape) -> Codec | None:
    """A rule: the default, with linear codes of first moments, which suffice for orthogonalized ones."""
    kind, _, leaf = path.partition("/")
    codec = by_default(kind, leaf, shape)
    return Signed8(mapping="linear") if isinstance(codec, Signed8) else codec


@functools.lru_cache(maxsize=1 << 12)
def by_default(kind: str, path: str, shape: Shape) -> Codec | None:
    if len(shape) < 2 or math.prod(shape) < SMALL or by_name(path, shape)[0] in WIDE:
        return None
    return {FIRST: Signed8(), SECOND: Nonneg8()}.get(kind)
