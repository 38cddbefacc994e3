"""Hyperparameters in the state, where they can be read and set."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import optax

from optimorph.core.checks import RANGES
from optimorph.core.types import DTypeLike

NEVER_SCHEDULES = (
    "accumulator_dtype",
    "axes",
    "mask",
    "mu_dtype",
    "nu_dtype",
    "orthogonalizer",
    "others",
    "scale",
    "shardings",
    "weight_decay_form",
    "comm_dtype",
)
"""Arguments of recipes that can be called, as functions and dtypes can, but are no schedules."""


def inject_hyperparams(
    inner_factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: DTypeLike | None = None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Keep a recipe's numbers in the state, from which every step takes them anew.

        tx = inject_hyperparams(adamw)(learning_rate=schedule, weight_decay=0.1)
        state = tx.init(params)
        state.hyperparams["weight_decay"] = jnp.float32(0.05)

    This is `optax.inject_hyperparams`, but for two things. optax rounds the numbers to the dtype of the
    parameters, and b2 = 0.999 is 1 in bfloat16: here they are float32, or float64 where jax has it enabled.
    And masks, axes, dtypes and orthogonalizers are not taken for schedules.

    Args:
      inner_factory: a recipe, of this library or of optax.
      static_args: the names of further arguments that are functions but no schedules.
      hyperparam_dtype: of the numbers in the state, if not as above; arrays keep their own.

    Raises:
      ValueError: `hyperparam_dtype` narrower than float32; `static_args` that the factory does not have.

    Equals:
      optax.inject_hyperparams(inner_factory, static_args, hyperparam_dtype=jnp.float32)
    """
    signature = inspect.signature(inner_factory)
    names = signature.parameters
    static = {static_args} if isinstance(static_args, str) else set(static_args)
    if unknown := static - set(names):
        raise ValueError(
            f"inject_hyperparams: static_args has {sorted(unknown)}, which are no arguments of "
            f"{getattr(inner_factory, '__name__', inner_factory)}. Type some of {sorted(names)}."
        )
    dtype = jnp.result_type(float) if hyperparam_dtype is None else jnp.dtype(hyperparam_dtype)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise ValueError(
            f"inject_hyperparams: hyperparam_dtype must be float32 or float64, but is {dtype}, in which "
            "0.999 is another number. Type hyperparam_dtype=jnp.float32, or leave it out."
        )
    static |= {name for name in NEVER_SCHEDULES if name in names}
    injected: Any = optax.inject_hyperparams(inner_factory, tuple(sorted(static)), dtype)

    @functools.wraps(inner_factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        given = signature.bind(*args, **kwargs)
        for name, value in given.arguments.items():
            if name in RANGES and type(value) is int:
                given.arguments[name] = float(value)  # an integer would stay one in the state
        return injected(*given.args, **given.kwargs)

    return make
