"""What users hand over, as a task; and what cannot be raced, said before it starts."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimorph.core.checks import check_numbers
from optimorph.core.tree import leaf_paths
from optimorph._racing.contestants import Rates
from optimorph._racing.task import Task

Entry = optax.GradientTransformation | Callable[..., optax.GradientTransformation]
"""An optimizer, or a function of a learning rate that makes one."""


def task(
    loss: Callable[..., Any],
    params: Any,
    batches: Any,
    held_out: Iterable[Any],
    steps: int,
    title: str,
    measure: str,
    log_loss: bool | None,
) -> Task:
    """The task of `race`'s arguments, as its docstring has them."""
    outside = list(held_out)
    if not outside:
        raise ValueError("race: held_out has no batch. Type held_out=[batch], one that is not trained on.")
    if steps < 1:
        raise ValueError(f"race: steps must be at least 1, but is {steps}. Type steps=100, for example.")
    return Task(
        name="own",
        title=title,
        measure=measure,
        init=lambda seed: jax.tree.map(_array, params(seed) if _is_function(params) else params),
        loss=loss,
        batches=lambda seed: _endless(batches, seed),
        held_out=lambda part: outside,
        steps=steps,
        log_loss=log_loss,
    )


def points(
    optimizers: Mapping[str, Entry], learning_rates: Sequence[float] | Mapping[str, Sequence[float]]
) -> dict[str, list[Rates]]:
    """The learning rates to try, of every optimizer that is a function of one."""
    functions = [n for n, tx in optimizers.items() if not isinstance(tx, optax.GradientTransformation)]
    if not optimizers:
        raise ValueError("race: nobody races. Type optimizers={'adamw': om.adamw(1e-3)}, for example.")
    if isinstance(learning_rates, Mapping):
        table, unknown = learning_rates, set(learning_rates) - set(functions)
    else:
        table = dict.fromkeys(functions, learning_rates)
        unknown = set() if functions or not len(learning_rates) else {"every optimizer"}
    if unknown:
        raise ValueError(
            f"race: learning_rates has rates of {', '.join(sorted(unknown))}, which is no function of one. "
            "Type 'adamw': om.adamw instead of 'adamw': om.adamw(1e-3), for example, or leave out its rates."
        )
    for name in functions:
        if not len(table.get(name, ())):
            raise ValueError(
                f"race: {name!r} is a function of a learning rate, but has none to try. "
                f"Type learning_rates={{{name!r}: [1e-3, 3e-3]}}, or {name!r}: ...(1e-3), a transformation."
            )
        for rate in table[name]:
            check_numbers("race", learning_rate=rate)
    return {name: [Rates(float(rate)) for rate in table[name]] for name in functions}


def check(found: Task, params: Any, batches: Any, seeds: int) -> None:
    """Refuse what would fail later, or race in vain.

    Raises:
      ValueError: naming what it is and what to type instead.
    """
    if seeds < 1:
        raise ValueError(f"race: seeds must be at least 1, but is {seeds}. Type seeds=3, for example.")
    if seeds > 1 and not _is_function(params) and not callable(batches):
        raise ValueError(
            f"race: seeds={seeds}, but neither params nor batches depend on a seed, so that all runs "
            "would be one. Type params=lambda seed: ..., or batches=lambda seed: ..., or seeds=1."
        )
    tree = found.init(0)
    for path, leaf in zip(leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ValueError(
                f"race: params has {leaf.dtype} at {path!r}, where gradients need floating point. "
                "Leave it out of params, and put it in by closure in loss."
            )
    batch = next(found.batches(0))
    for other in found.held_out(""):
        if _form(other) != _form(batch):
            raise ValueError(
                f"race: a batch of held_out is {_form(other)}, but one of batches is {_form(batch)}. "
                "Both are lists of batches: type held_out=[batch]."
            )
    _scalar(found, tree, batch)
    if not all(jnp.isfinite(found.loss(tree, outside)) for outside in found.held_out("")):
        raise ValueError(
            "race: the loss is no finite number before the first step. Look for a division by zero, a "
            "logarithm of zero or a NaN in held_out."
        )


def _scalar(found: Task, tree: Any, batch: Any) -> None:
    """Refuse a loss that is not one real number."""
    out = jax.eval_shape(found.loss, tree, batch)
    if not isinstance(out, jax.ShapeDtypeStruct) or out.shape or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"race: loss must return one real number, but returns {out}. Type its mean, alone.")


def _form(batch: Any) -> str:
    """A batch without its sizes."""
    return str(jax.tree.map(lambda leaf: f"{jnp.ndim(leaf)} axes", batch))


def _array(leaf: Any) -> jax.Array:
    """An array of a strong type, as updates keep it."""
    try:
        return jnp.array(leaf, jnp.result_type(leaf))
    except TypeError:
        raise ValueError(
            f"race: params holds {leaf!r}, which is no array. Split it off first, as nnx.split and "
            "eqx.partition do, and put it back in loss."
        ) from None


def _is_function(params: Any) -> bool:
    """Whether parameters are made by a seed. A model that can be called is a tree, a function a leaf."""
    return callable(params) and jax.tree.leaves(params) == [params]


def _endless(batches: Any, seed: int) -> Iterator[Any]:
    if not callable(batches) and isinstance(batches, Iterator):
        raise ValueError(
            "race: batches can be read only once, and every optimizer reads them. "
            "Type list(batches), or batches=lambda seed: ..., which makes a new iterator."
        )
    while True:
        epoch: Any = batches(seed) if callable(batches) else batches
        empty = True
        for batch in epoch:
            empty = False
            yield batch
        if empty:
            raise ValueError("race: batches has no batch. Type a list of batches, or a function of a seed.")
