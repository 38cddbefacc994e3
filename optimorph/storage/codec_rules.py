"""Which codec a moment is stored by."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from optimorph.codecs import Codec, Encoded, Float8, Nonneg8, Signed8
from optimorph.core.types import Rules, Shape
from optimorph.routing.names import by_name
from optimorph.routing.rules import UNSAID, lookup
from optimorph.storage.moments import FIRST, SECOND

WIDE = ("bias", "embedding", "norm", "vector")
"""Roles of leaves whose moments stay as they are by default."""

SMALL = 4096
"""Leaves of fewer numbers stay as they are by default."""

BOTH = "{'first/*': Signed8(), 'second/*': Nonneg8()}"
"""What to type."""

CodecRule = Callable[[str, str, Shape], Codec | None]
"""(kind, path, shape) → codec, or None for as it is."""


def codec_rule(rules: Rules | None) -> CodecRule:
    """The rules as one function; what they leave unsaid is as by default.

    Raises:
      ValueError: a bare codec, which does not say what it is for; when called, what rules say and is none.
    """
    if isinstance(rules, Codec):
        raise ValueError(
            f"compress_state: rules must say which moments {rules!r} is for. Type {BOTH}, for example."
        )
    found = lookup({} if rules is None else rules)

    def chosen(kind: str, path: str, shape: Shape) -> Codec | None:
        codec = found(named(kind, path), shape)
        if codec is UNSAID:
            return by_default(kind, path, shape)
        if codec is not None and not isinstance(codec, Codec):
            raise ValueError(
                f"compress_state: the rules say {codec!r} of {named(kind, path)!r}, which is no codec. Type "
                "optimorph.codecs.Signed8(), for example, or None for as it is."
            )
        if kind == FIRST and isinstance(codec, Nonneg8):
            raise ValueError(
                f"compress_state: the rules say {codec!r} of {named(kind, path)!r}, whose numbers have "
                f"signs. Type {BOTH}, for example."
            )
        if kind == SECOND and isinstance(codec, Signed8 | Float8):
            raise ValueError(
                f"compress_state: the rules say {codec!r} of {named(kind, path)!r}, whose roots are divided "
                f"by, and it has a code for 0. Type {BOTH}, for example."
            )
        return codec

    return chosen


def linear(path: str, shape: Shape) -> Codec | None:
    """A rule: as by default, but of first moments linear codes, which suffice for what is orthogonalized."""
    kind, _, leaf = path.partition("/")
    codec = by_default(kind, leaf, shape)
    return Signed8(mapping="linear") if isinstance(codec, Signed8) else codec


def named(kind: str, path: str) -> str:
    """What rules call a moment: `first/blocks/0/kernel`."""
    return f"{kind}/{path}" if path else kind


def stored_codec(chosen: CodecRule, kind: str, path: str, stored: Encoded) -> Codec | None:
    """The codec of what is stored; None of what is as it is, always so of complex numbers and float64.

    Raises:
      ValueError: it was stored by another codec.
    """
    dtype, scales = stored.codes.dtype, stored.scales
    assert scales is not None
    codec = chosen(kind, path, stored.codes.shape)
    coded = jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize < 4
    if not coded and (not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 4):
        return None
    if coded if codec is None else not _is_of(codec, stored.codes, scales):
        said = "that it is as it is" if codec is None else repr(codec)
        blocks = f" with {scales.shape[-1]} scales a row" if coded and scales.ndim else ""
        raise ValueError(
            f"compress_state: {named(kind, path)!r} is stored in {dtype}{blocks}, but the rules say {said}. "
            "The state is that of other rules: type those with which it was made, or tx.init(params)."
        )
    return codec


def by_default(kind: str, path: str, shape: Shape) -> Codec | None:
    """The codec of a moment of which no rule says anything."""
    if len(shape) < 2 or math.prod(shape) < SMALL or by_name(path, shape)[0] in WIDE:
        return None
    return {FIRST: Signed8(), SECOND: Nonneg8()}.get(kind)


def _is_of(codec: Codec, codes: jax.Array, scales: jax.Array) -> bool:
    """Whether they have the shapes and dtypes of what a codec stores; of one without scales codes alone."""
    form = codec.form(codes.shape)
    beside = form.scales is None or (scales.shape, scales.dtype) == (form.scales.shape, form.scales.dtype)
    return codes.dtype == form.codes.dtype and beside
