"""Errors that name the transform, what it was given, what it expected and what to type instead.

Every `check_` function raises a ValueError that names `who`, the argument, its value and one that would do.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optimorph._core.numbers import is_array, is_schedule
from optimorph._core.shown import shown

P = ParamSpec("P")
R = TypeVar("R")

_LARGEST = sys.float_info.max
_DECAY = ("in [0, 1)", lambda x: 0 <= x < 1, "0.9")
_POSITIVE = ("finite and above 0", lambda x: 0 < x < np.inf, "1.0")
_NOT_NEGATIVE = ("finite and at least 0", lambda x: 0 <= x < np.inf, "0.0")
_BOUND = ("above 0", lambda x: x > 0, "1.0")

_DECAYS = ("b1", "b2", "b3", "decay", "factor_decay", "lookahead", "momentum")
_POSITIVES = ("initial_value", "largest_inverse_root", "offset", "power", "smoothness", "strong_convexity")
_NOT_NEGATIVES = (
    *("alpha", "eps", "eps_root", "gamma", "initial", "initial_accumulator_value", "initial_scale"),
    *("final_value", "weight_decay"),
)

RANGES = {
    **dict.fromkeys(_DECAYS, _DECAY),
    **dict.fromkeys(_POSITIVES, _POSITIVE),
    **dict.fromkeys(_NOT_NEGATIVES, _NOT_NEGATIVE),
    **dict.fromkeys(("learning_rate", "others_learning_rate"), (*_NOT_NEGATIVE[:2], "1e-3")),
    **dict.fromkeys(("max_norm", "max_rms"), _BOUND),
    "cushion": (*_DECAY[:2], "0.02"),
    "dampening": ("in [0, 1]", lambda x: 0 <= x <= 1, "0.0"),
    "exponent": ("in (1/2, 1]", lambda x: 0.5 < x <= 1, "1.0"),
    "lower": ("in (0, 1)", lambda x: 0 < x < 1, "1e-3"),
    "safety": (*_DECAY[:2], "0.01"),
    "threshold": (*_POSITIVE[:2], "100.0"),
    "weight": (*_NOT_NEGATIVE[:2], "1.0"),
}
"""Every hyperparameter's range, by its name: the same name means the same thing everywhere."""

SCHEDULED = ("alpha", "b3", "learning_rate", "others_learning_rate", "weight_decay")
"""Hyperparameters that may be functions of the step count."""


DTYPES = ("accumulator_dtype", "factor_dtype", "mu_dtype", "nu_dtype")
"""Arguments that say how states are stored."""

STORED = ("bfloat16", "float16", "float32", "float64")
"""What they may be; of complex numbers both halves."""


COUNTS = ("block_size", "every", "max_dim")
"""Arguments that are integers of at least 1."""


class BadInput(Exception):
    """A command cannot use the user's input; the message says what to type instead."""


class LeafError(ValueError):
    """The error of one leaf; functions of trees collect these and report all of them at once."""


def check_numbers(who: str, **values: Any) -> None:
    """Refuse what is not one number, or outside its range; of tracers the shape is seen, schedules pass."""
    for name, value in values.items():
        if is_schedule(value) and name in SCHEDULED:
            check_schedule(who, name, value)
            continue
        text, inside, example = RANGES[name]
        fix = f"Type {name}={example}, for example."
        if value is None:
            raise ValueError(f"{who}: {name} is missing. {fix}")
        if not (is_array(value) and is_real(value)) or isinstance(value, jax.ShapeDtypeStruct):
            raise ValueError(f"{who}: {name} must be a number {text}, but is {shown(value)}. {fix}")
        shape = getattr(value, "shape", ())
        if shape != ():
            raise ValueError(
                f"{who}: {name} must be one number {text}, but has shape {shape}. "
                f"For a sweep over {name}, jax.vmap a function of one {name}."
            )
        if not isinstance(value, Tracer) and not inside(np.asarray(value).item()):  # jnp would trace it
            raise ValueError(f"{who}: {name} must be {text}, but is {value}. {fix}")


def check_schedule(who: str, name: str, schedule: Any) -> None:
    if (fault := call_fault(schedule, 0)) is not None:
        raise ValueError(
            f"{who}: {name} must be a number or a function of the step count, but {_name(schedule)} cannot "
            f"be called with a count alone: {fault}. Type a schedule and not the function that makes it, "
            f"for example {name}=optax.linear_schedule(1e-3, 0.0, 1000)."
        )


def call_fault(f: Any, *arguments: Any) -> str | None:
    """Why a function cannot be called with these arguments alone; None if it can, or does not say."""
    if isinstance(f, type) or not callable(f):
        return "it is not a function"
    try:
        signature = inspect.signature(f)
    except ValueError:  # of some functions that are not written in Python
        return None
    try:
        signature.bind(*arguments)
    except TypeError as error:
        return str(error)
    return None


def check_function(who: str, name: str, f: Any, of: str, *arguments: Any) -> None:
    if (fault := call_fault(f, *arguments)) is not None:
        raise ValueError(f"{who}: {name} must be a function of {of}, but is {shown(f)}: {fault}.")


def is_one_of(value: Any, choices: Sequence[Any]) -> bool:
    """Whether it is one of these words and numbers; what is compared elementwise is none of them."""
    return isinstance(value, str | int | float | np.generic) and value in choices


def check_matrices(who: str, x: Any, numbers: Any = jnp.inexact) -> None:
    """Refuse what is no stack of matrices of these numbers."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, numbers) or len(x.shape) < 2:
        raise ValueError(
            f"{who}: matrices are an array of floating-point numbers of shape (*batch, n, m), but here they "
            f"are {shown(x)}. Type jnp.ones((3, 4)), for example."
        )


def one_or_several(names: Any) -> list[Any]:
    """What an argument names that takes one word or several."""
    return [*names] if isinstance(names, Iterable) and not isinstance(names, str) else [names]


def check_flags(who: str, **flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool | np.bool_):
            raise ValueError(f"{who}: {name} must be True or False, but is {shown(flag)}. Type {name}=True.")


def is_transform(tx: Any) -> bool:
    return callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))


def check_transforms(who: str, *transforms: Any) -> None:
    for tx in transforms:
        if not is_transform(tx):
            call = f"{_name(tx)}(...), which makes one" if callable(tx) else "optimorph.adamw(1e-3)"
            raise ValueError(
                f"{who}: a gradient transformation has the functions init and update, but {_name(tx)} has "
                f"not. Type {call}."
            )


def check_counts(who: str, **counts: Any) -> None:
    """Refuse what is no integer of at least 1; None passes where it has a meaning."""
    for name, value in counts.items():
        if value is not None or name not in ("block_size", "max_dim"):
            check_integer(who, name, value, 10)


def check_integer(
    who: str, name: str, x: Any, example: int, least: int = 1, below: int | float = np.inf
) -> None:
    if not is_integer(x, least, below):
        raise ValueError(
            f"{who}: {name} must be an integer of at least {least}, but is {shown(x)}. Type {name}={example}."
            f"{if_injected(name, x)}"
        )


def check_factor(who: str, path: str, shape: tuple[int, ...], factor: Any, name: str = "factor") -> None:
    known = isinstance(factor, int | float | np.ndarray | np.generic | jax.Array) and is_array(factor)
    if not known or isinstance(factor, bool) or not is_real(factor):
        raise ValueError(
            f"{who}: the {name} of {path!r} must be a real number, but is {shown(factor)}. Type 0.5."
        )
    value = np.asarray(1.0 if isinstance(factor, Tracer) else factor, float)
    if not np.all(np.isfinite(value)) or (name == "radius" and np.any(value <= 0)):
        what = "finite and above 0" if name == "radius" else "finite"
        raise ValueError(f"{who}: the {name} of {path!r} must be {what}, but is {shown(factor)}. Type 0.5.")
    sizes = np.shape(factor)
    if len(sizes) > len(shape) or any(n not in (1, m) for n, m in zip(sizes, shape, strict=False)):
        raise ValueError(
            f"{who}: {path!r} has shape {shape}, but its {name} has shape {sizes}. Type a number, or one for "
            "each index of the first axis, or [[...]] with one for each index of the second."
        )


def _name(x: Any) -> str:
    return getattr(x, "__name__", shown(x)) if callable(x) else shown(x)


def check_dtypes(who: str, **dtypes: Any) -> None:
    """Refuse a dtype that cannot hold what it is for; None passes."""
    for name, dtype in dtypes.items():
        if dtype is None:
            continue
        if dtype_name(dtype) not in STORED:
            raise ValueError(
                f"{who}: {name} must be one of {', '.join(STORED)}, but is {shown(dtype)}. Type "
                f"{name}='bfloat16'."
            )
        if name == "nu_dtype" and jnp.dtype(dtype) == jnp.float16:
            raise ValueError(
                f"{who}: {name} must not be float16, which cannot hold squares below 6e-8 or above "
                f"65504, those of gradients below 0.00024 or above 256. Type {name}='bfloat16'."
            )


def dtype_name(dtype: Any) -> str | None:
    """Its name, however it is written; None of what is no dtype."""
    try:
        return jnp.dtype(dtype).name
    except (TypeError, ValueError):
        return None


def checked(recipe: Callable[P, R]) -> Callable[P, R]:
    """Check every boolean of `recipe`, and what the tables here name, under the recipe's own name.

    None is a value where it is the default.
    """
    who, signature = recipe.__name__, inspect.signature(recipe)
    parameters = signature.parameters.values()
    absent = frozenset(p.name for p in parameters if p.default is None)
    flags = frozenset(
        p.name for p in parameters if isinstance(p.default, bool) or bool in get_args(p.annotation)
    )

    checks = (check_numbers, RANGES), (check_dtypes, DTYPES), (check_counts, COUNTS), (check_flags, flags)

    @functools.wraps(recipe)
    def build(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise TypeError(f"{who}: {error}") from None
        given = {k: v for k, v in given.items() if not (v is None and k in absent)}
        for check, names in checks:
            check(who, **{k: v for k, v in given.items() if k in names})
        return recipe(*args, **kwargs)

    return build


class NoParamsError(ValueError):
    """`update` was called without parameters, which a transformation needs."""


def check_params(who: str, params: Any, why: str) -> None:
    if params is None:
        raise NoParamsError(
            f"{who}: update was called without params, but {why}. "
            "Type tx.update(gradients, state, params) instead of tx.update(gradients, state)."
        )


def is_integer(value: Any, least: int, below: int | float = np.inf) -> bool:
    """Whether it is an integer, and no boolean, in [least, below)."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(least <= value < below)


def if_injected(name: str, x: Any) -> str:
    """What else to type where `optax.inject_hyperparams` may have made an array of a Python number."""
    if not isinstance(x, jax.Array):
        return ""
    return (
        " If optax.inject_hyperparams made this array, type optimorph.inject_hyperparams instead, around a "
        f"function of your own with static_args=({name!r},)."
    )


def check_seed(who: str, seed: Any) -> None:
    if not is_integer(seed, 0, 2**32):
        raise ValueError(
            f"{who}: seed must be an integer in [0, 2**32), but is {shown(seed)}. Type seed=0."
            f"{if_injected('seed', seed)}"
        )


def is_real(value: Any) -> bool:
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        return False
    dtype = jnp.result_type(value)
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def abbreviated(texts: Sequence[str], separator: str = "\n  ") -> str:
    """The first eight texts, joined, and the number of the others."""
    others = [f"... and {len(texts) - 8} more"] if len(texts) > 8 else []
    return separator.join([*texts[:8], *others])


def not_an_array(who: str, path: str, leaf: Any) -> str:
    fix = "Leave out such leaves: eqx.filter(model, eqx.is_array)."
    return f"{who}: {path!r} is {shown(leaf)}, which is not an array. {fix}"
