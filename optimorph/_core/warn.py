"""Warnings that are not given again while a transformation is only looked at."""

import contextlib
import warnings
from collections.abc import Iterator
from contextvars import ContextVar

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No warnings of this library, in this thread.

    The filters of `warnings` are those of all threads: two threads that changed them at once would leave them
    changed.
    """
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def warn(message: str, stacklevel: int = 2) -> None:
    if not _QUIET.get():
        warnings.warn(message, stacklevel=stacklevel + 1)
