"""Which checker of types the tests put into the package."""

import functools

from beartype import beartype


def at_first_call(function):
    """What is defined within a function is checked from its first call on: most of it is never called."""
    if isinstance(function, type) or "<locals>" not in function.__qualname__:
        return beartype(function)
    checked = functools.cache(lambda: beartype(function))
    return functools.wraps(function)(lambda *args, **kwargs: checked()(*args, **kwargs))
