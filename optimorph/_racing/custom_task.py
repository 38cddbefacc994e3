"""Turn the arguments of `optimorph.race` into a task, and refuse bad arguments before training starts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optimorph._core.checks import check_function, check_numbers, is_integer
from optimorph._core.numbers import upcast
from optimorph._core.paths import leaf_paths
from optimorph._core.shown import shown
from optimorph._core.warn import quietly
from optimorph._racing.registry import LearningRates
from optimorph._racing.task import Task

Optimizer = optax.GradientTransformation | Callable[..., optax.GradientTransformation]
"""An optimizer, or a function of a learning rate that returns one."""

OPTIMIZERS = "optimizers={'adamw': om.adamw(1e-3)}"
"""What to type, for example."""


def make_task(
    loss: Callable[..., Any], params: Any, batches: Any, held_out: Iterable[Any], steps: int, **labels: Any
) -> Task:
    """The task that arguments of `optimorph.race` describe; labels are `title`, `measure` and `log_loss`."""
    _want(callable(loss), "loss", loss, "a function", "loss=lambda params, batch: ...")
    repeated = callable(batches) or isinstance(batches, Iterable)
    _want(repeated, "batches", batches, "a list of batches or a function of a seed", "batches=[batch]")
    _want(isinstance(held_out, Iterable), "held_out", held_out, "a list of batches", "held_out=[batch]")
    _want(is_integer(steps, 1), "steps", steps, "an integer of at least 1", "steps=100")
    check_function("race", "loss", loss, "the parameters and a batch", None, None)
    if _is_function(params):
        check_function("race", "params", params, "a seed", 0)
    if callable(batches):
        check_function("race", "batches", batches, "a seed", 0)
    held_out_batches = list(held_out)
    if not held_out_batches:
        raise ValueError("race: held_out is empty. Type held_out=[batch], a batch that is not trained on.")
    return Task(
        name="custom",
        init=lambda seed: jax.tree.map(_to_array, params(seed) if _is_function(params) else params),
        loss=lambda tree, batch: jax.tree.map(_upcast, loss(tree, batch)),
        batches=lambda seed: _endless(batches, seed),
        held_out=lambda part: held_out_batches,
        steps=steps,
        **labels,
    )


def candidate_rates(
    optimizers: Mapping[str, Optimizer], learning_rates: Sequence[float] | Mapping[str, Sequence[float]]
) -> dict[str, list[LearningRates]]:
    """Name → the learning rates to try, for every optimizer that is a function of a learning rate."""
    named = isinstance(optimizers, Mapping) and len(optimizers) > 0
    named = named and all(isinstance(name, str) for name in optimizers)
    _want(named, "optimizers", optimizers, "a mapping from names to at least one optimizer", OPTIMIZERS)
    for name, tx in optimizers.items():
        known = isinstance(tx, optax.GradientTransformation) or callable(tx)
        _want(known, f"optimizers[{name!r}]", tx, "an optimizer or a function of a learning rate", OPTIMIZERS)
    given = [*learning_rates.values()] if isinstance(learning_rates, Mapping) else [learning_rates]
    for rates in given:
        listed = isinstance(rates, Sequence | np.ndarray | jax.Array) and not isinstance(rates, str)
        _want(listed, "learning_rates", rates, "a list of numbers", "learning_rates=[1e-3, 3e-3]")
    functions = [n for n, tx in optimizers.items() if not isinstance(tx, optax.GradientTransformation)]
    if isinstance(learning_rates, Mapping):
        table, unknown = learning_rates, set(learning_rates) - set(functions)
    else:
        table = dict.fromkeys(functions, learning_rates)
        unknown = set() if functions or not len(learning_rates) else {"every optimizer"}
    if unknown:
        raise ValueError(
            f"race: learning_rates has rates of {', '.join(sorted(unknown))}, but optimizers has no such "
            "function of a learning rate. Type 'adamw': om.adamw instead of 'adamw': om.adamw(1e-3), for "
            "example, or leave out the rates."
        )
    for name in functions:
        if not len(table.get(name, ())):
            raise ValueError(
                f"race: {name!r} is a function of a learning rate, but has no rates to try. "
                f"Type learning_rates={{{name!r}: [1e-3, 3e-3]}}, or {name!r}: ...(1e-3), a transformation."
            )
        numbers = not any(map(callable, table[name]))
        _want(numbers, "learning_rates", table[name], "a list of numbers", "learning_rates=[1e-3]")
        for rate in table[name]:
            check_numbers("race", learning_rate=rate)
    return {name: [LearningRates(float(rate)) for rate in table[name]] for name in functions}


def check(task: Task, params: Any, batches: Any, seeds: int, sweep_bytes: Any) -> None:
    """Refuse what would fail during training, or would measure nothing."""
    size = isinstance(sweep_bytes, int | float | np.number) and sweep_bytes >= 0
    _want(bool(size), "sweep_bytes", sweep_bytes, "a number of bytes", "sweep_bytes=2**30")
    _want(is_integer(seeds, 1), "seeds", seeds, "an integer of at least 1", "seeds=3")
    if seeds > 1 and not _is_function(params) and not callable(batches):
        raise ValueError(
            f"race: seeds={seeds}, but neither params nor batches is a function of a seed, so that all runs "
            "would be equal. Type params=lambda seed: ..., or batches=lambda seed: ..., or seeds=1."
        )
    tree = task.init(0)
    for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"race: params has {leaf.dtype} at {path!r}, where gradients need floating point. "
                "Leave it out of params, and let loss refer to it as a variable from outside."
            )
    batch = next(task.batches(0))
    for held_out_batch in task.held_out(""):
        if _structure(held_out_batch) != _structure(batch):
            raise ValueError(
                f"race: held_out has a batch with the structure {_structure(held_out_batch)}, but batches "
                f"has one with {_structure(batch)}. Both must be lists of batches: type held_out=[batch]."
            )
    out = jax.eval_shape(task.loss, tree, batch)
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"race: loss must return one real number, but returns {out}. Return only the mean loss."
        )
    if not all(jnp.isfinite(task.loss(tree, held_out_batch)) for held_out_batch in task.held_out("")):
        raise ValueError(
            "race: the loss is not finite before the first step. Look for a division by zero, a "
            "logarithm of zero or a NaN in held_out."
        )


def check_updates(task: Task, optimizers: Mapping[str, Any]) -> None:
    """Refuse an optimizer that needs more than gradients, its state and the parameters."""
    params = task.init(0)
    for name, tx in optimizers.items():
        try:
            with quietly():  # training warns
                jax.eval_shape(lambda params, tx=tx: tx.update(params, tx.init(params), params), params)
        except TypeError as error:
            raise ValueError(
                f"race: optimizers[{name!r}] must be an optimizer that only needs gradients, a state and "
                f"parameters, but {error}. Leave it out, or type {OPTIMIZERS}, for example."
            ) from error


def _want(fine: bool, name: str, value: Any, wanted: str, advice: str) -> None:
    if not fine:
        raise ValueError(f"race: {name} must be {wanted}, but is {shown(value)}. Type {advice}, for example.")


def _upcast(x: Any) -> Any:
    """A loss in float32 or wider; what is no real number is refused later."""
    return upcast(x) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x


def _structure(batch: Any) -> str:
    return str(jax.tree.map(lambda leaf: f"{jnp.ndim(leaf)} axes", batch))


def _to_array(leaf: Any) -> jax.Array:
    """A copy with a strong type. Updates return strong types, and a change of type would recompile."""
    try:
        return jnp.array(leaf, jnp.result_type(leaf))
    except TypeError:
        raise ValueError(
            f"race: params holds {shown(leaf)}, which is not an array. Split it off first, as nnx.split and "
            "eqx.partition do, and put it back in loss."
        ) from None


def _is_function(params: Any) -> bool:
    """Whether params is a function of a seed. A callable model is not one: it is no leaf of a pytree."""
    return callable(params) and jax.tree.leaves(params) == [params]


def _endless(batches: Any, seed: int) -> Iterator[Any]:
    if not callable(batches) and isinstance(batches, Iterator):
        raise ValueError(
            "race: batches is an iterator, which can be read only once, but every optimizer has to read it. "
            "Type list(batches), or batches=lambda seed: ..., which makes a new iterator."
        )
    while True:
        epoch: Any = batches(seed) if callable(batches) else batches
        empty = True
        for batch in epoch:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "race: batches is empty. Type a list of batches, or a function that returns some for a seed."
            )
