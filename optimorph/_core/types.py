"""The types that signatures share."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike as DTypeLike

Numeric = int | float | np.number | np.ndarray | jax.Array
"""A hyperparameter: a Python number, a scalar array or a tracer."""

Schedule = Callable[[Any], Any]
"""Step count (a scalar integer array) → hyperparameter."""

ScalarOrSchedule = Numeric | Schedule

PyTree = Any

Shape = tuple[int, ...]

Rules = Mapping[Any, Any] | Callable[[str, Shape], Any] | PyTree
"""What is said of leaves: pattern of paths → anything, in order; or (path, shape) → anything; or a tree."""

AxesRules = Rules
"""Rules that say how leaves read as matrices: a spec, or None for "not a matrix"."""

Mask = Any
"""What `optax.masked` takes, a tree of booleans or a function from a tree to one; or rules by pattern."""
