"""A value in an error, also one that is far too long for it, such as a tree of parameters."""

import reprlib
from typing import Any

import jax
import numpy as np


class _Repr(reprlib.Repr):
    """The first few entries of containers; of an array its shape, which takes nothing from its device."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple = 3, 3, 6, 6
        self.maxstring = self.maxother = 160

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, jax.Array | np.ndarray) and x.size > 8:
            return f"{x.dtype}{[*x.shape]}"
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            inner = ", ".join(f"{name}=..." for name in getattr(x, "_fields", ()))
            return f"{type(x).__name__}({inner})"
        return super().repr1(x, level)


shown = _Repr().repr
"""The text of a value: its repr, or the beginning of it."""
