"""Hyperparameters in the state, where they can be read and set."""

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import (
    RANGES,
    call_fault,
    check_numbers,
    check_transforms,
    dtype_name,
    one_or_several,
)
from optimorph._core.differences import checked_state
from optimorph._core.numbers import is_array, restored
from optimorph._core.shown import shown
from optimorph._core.types import DTypeLike, Shape
from optimorph._core.wrapped import wrapped

_SCHEDULE = " schedule"
"""After the name of a number: no argument of a function has such a name."""


def inject_hyperparams(
    inner_factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: DTypeLike | None = None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Keep the numbers of an optimizer in its state, where they can be changed between two steps.

        tx = inject_hyperparams(adamw)(learning_rate=schedule, weight_decay=0.1)
        state = tx.init(params)
        state.hyperparams["weight_decay"] = jnp.float32(0.05)

    This is `optax.inject_hyperparams` with four differences:

    - The numbers are float32, or float64 if jax has it enabled, also where an integer is set. optax rounds
      them to the dtype of the parameters, and in bfloat16 b2 = 0.999 becomes 1.
    - Masks, axes, dtypes and orthogonalizers are not mistaken for schedules.
    - NumPy numbers, such as `np.float32(0.1)`, are injected too.
    - `optax.tree.get(state, "learning_rate")` returns one number also if the learning rate has a schedule.
      Setting that number has no effect, because every update takes the next value of the schedule.

    Args:
      inner_factory: a function that makes an optimizer, of this library or of optax.
      static_args: the names of further arguments that are functions but not schedules.
      hyperparam_dtype: the dtype of the numbers in the state. Arrays keep their own.

    Raises:
      ValueError: `hyperparam_dtype` narrower than float32; `static_args` that the factory does not have.

    Equals:
      optax.inject_hyperparams(inner_factory, static_args, hyperparam_dtype=jnp.float32)
    """
    if isinstance(inner_factory, type) or not callable(inner_factory):
        raise ValueError(
            f"inject_hyperparams: inner_factory must be a function that makes an optimizer, but is "
            f"{shown(inner_factory)}. Type inject_hyperparams(optimorph.adamw)(learning_rate=1e-3)."
        )
    signature = inspect.signature(inner_factory)
    names = signature.parameters
    made_by = inner_factory
    while isinstance(made_by, functools.partial):
        made_by = made_by.func
    who = getattr(made_by, "__name__", repr(made_by))
    ours = getattr(made_by, "__module__", "").startswith("optimorph.")
    spare = frozenset(name for name, p in names.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    static = _static(who, names, one_or_several(static_args), ours)
    dtype = _checked_dtype(hyperparam_dtype)

    @functools.wraps(inner_factory)
    def factory(**arguments: Any) -> optax.GradientTransformation:
        made = inner_factory(**{name: value for name, value in arguments.items() if name not in spare})
        check_transforms("inject_hyperparams", made)
        return made

    @functools.wraps(inner_factory)
    def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{who}: {error}") from None
        if unnamed := spare & {*given.arguments}:
            raise ValueError(
                f"inject_hyperparams: {who} has no name for {given.arguments[min(unnamed)]}, so the state "
                "cannot keep it. Type a function with named arguments, such as lambda learning_rate: ..."
            )
        given.apply_defaults()
        given.arguments.update({k: _number(who, k, x, ours) for k, x in given.arguments.items()})
        integers = frozenset(name for name, x in given.arguments.items() if _is_integer(x))
        shapes = {name: np.shape(x) if is_array(x) else () for name, x in given.arguments.items()}
        functions = {name for name, x in given.arguments.items() if callable(x) and not _is_schedule(x)}
        injected: Any = optax.inject_hyperparams(factory, tuple(sorted(static | functions)), jnp.dtype(dtype))
        tx = wrapped("inject_hyperparams", injected(*given.args, **given.kwargs), wide=True)

        def init(params):
            state: Any = tx.init(params)
            own = jax.tree.map(lambda x: jnp.copy(restored(x)), state.hyperparams)  # not the caller's
            return _renamed(state._replace(hyperparams=own), lambda name: name + _SCHEDULE)

        def update(updates, state, params=None, **extra):
            state = checked_state("inject_hyperparams", state, optax.InjectStatefulHyperparamsState)
            state = _renamed(state, lambda name: name.removesuffix(_SCHEDULE))
            _check_hyperparams(who, state.hyperparams, shapes)
            was_set = {name for name, x in state.hyperparams.items() if _is_integer(x)} - integers
            real = {name: state.hyperparams[name].astype(dtype) for name in was_set}
            state = state._replace(hyperparams=state.hyperparams | real)
            updates, state = tx.update(updates, state, params, **extra)
            return updates, _renamed(state, lambda name: name + _SCHEDULE)

        return optax.GradientTransformationExtraArgs(init, update)

    return make


def _static(who: str, names: Mapping[str, inspect.Parameter], given: Sequence[str], ours: bool) -> set[str]:
    """The arguments that are not injected: those given, and those that are no numbers by their annotation."""
    if unknown := [name for name in given if not isinstance(name, str) or name not in names]:
        raise ValueError(
            f"inject_hyperparams: static_args has {unknown}, which are not arguments of {who}. Type some of "
            f"{sorted(names)}."
        )
    number = jax.Array if ours else float  # here a number that cannot be traced is annotated as a float alone
    return {*given} | {name for name, parameter in names.items() if not _may_be(number, parameter)}


def _checked_dtype(hyperparam_dtype: DTypeLike | None) -> str:
    dtype = dtype_name(jnp.result_type(float) if hyperparam_dtype is None else hyperparam_dtype)
    if dtype not in ("float32", "float64"):
        raise ValueError(
            f"inject_hyperparams: hyperparam_dtype must be float32 or float64, but is "
            f"{dtype or repr(hyperparam_dtype)}: bfloat16 rounds 0.999 to 1. Type "
            "hyperparam_dtype=jnp.float32, or leave it out."
        )
    return dtype


def _number(who: str, name: str, value: Any, ours: bool) -> Any:
    """An argument as `optax.inject_hyperparams` takes it for a number, if it is one."""
    number = value.item() if isinstance(value, np.generic) else value
    if hasattr(value, "__jax_array__"):  # which may be a function too
        number = jnp.asarray(value)
    if ours and name in RANGES and isinstance(number, int):
        check_numbers(who, **{name: number})
    if name in RANGES and type(number) is int:
        return float(number)  # an integer would stay one in the state
    return number


def _is_schedule(f: Callable[..., Any]) -> bool:
    """Whether a function of the step count returns a number. Masks return booleans or trees."""
    if call_fault(f, 0) is not None:
        return False
    try:
        value = f(jnp.zeros([], jnp.int32))
    except Exception:
        return True  # whose error `init` raises
    return is_array(value) and not jnp.issubdtype(jnp.result_type(value), jnp.bool_)


def _check_hyperparams(who: str, found: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Refuse what was set in a state and is not an argument of the optimizer, or not of its shape."""
    for name, value in found.items():
        if name not in shapes:
            arguments = [name for name in found if name in shapes]
            raise ValueError(
                f"inject_hyperparams: the state has the hyperparameter {name!r}, which is not an argument of "
                f"{who}. Type one of {arguments}."
            )
        shape = shapes[name]
        if not is_array(value) or np.shape(value) != shape:
            expected = f"an array of shape {shape}" if shape else "one number, such as jnp.float32(1e-3)"
            raise ValueError(
                f"inject_hyperparams: in the state the argument {name!r} is {shown(value)}. Set {expected}."
            )


def _is_integer(x: Any) -> bool:
    return is_array(x) and jnp.issubdtype(jnp.result_type(x), jnp.integer)


def _renamed(state: Any, name_of: Callable[[str], str]) -> Any:
    states = {name_of(name): s for name, s in state.hyperparams_states.items()}
    return state._replace(hyperparams_states=states)


def _may_be(kind: type, parameter: inspect.Parameter) -> bool:
    """Whether an argument's annotation allows this type; one without annotation may be anything."""
    annotation = parameter.annotation
    if annotation is parameter.empty or isinstance(annotation, str):
        return True
    return annotation is kind or kind in typing.get_args(annotation)
