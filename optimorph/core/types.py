"""The types that signatures share."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

Numeric = int | float | np.number | np.ndarray | jax.Array
"""A hyperparameter: a Python number, a scalar array or a tracer."""

Schedule = Callable[[Any], Any]
"""Step count (a scalar integer array) → hyperparameter."""

ScalarOrSchedule = Numeric | Schedule

PyTree = Any

AxesRules = Mapping[str, str | None] | Callable[[str, tuple[int, ...]], str | None]
"""How leaves read as matrices: path pattern → spec, or (path, shape) → spec; None is "not a matrix"."""

LeafAxes = str | Callable[[str, tuple[int, ...]], str | None]
"""One spec for every leaf, or (path, shape) → spec."""

Mask = Any
"""What `optax.masked` takes: a tree of booleans, or a function from a tree to one."""

__all__ = ["AxesRules", "DTypeLike", "LeafAxes", "Mask", "Numeric", "PyTree", "ScalarOrSchedule", "Schedule"]
