"""States as arguments of programs that `jax.export` saves."""

from collections.abc import Iterator
from typing import Any

import jax
from jax import export

from optimorph._core.types import PyTree


def register_for_export(state: PyTree) -> None:
    """Name the types in a state, so that `jax.export` can save and read programs that take it.

        register_for_export(jax.eval_shape(tx.init, params))
        saved = jax.export.export(jax.jit(tx.update))(gradients, state, params).serialize()

    JAX saves a program together with the trees that it takes and returns, and asks for a name of each named
    tuple in them. The program that reads `saved` calls this too, before `jax.export.deserialize`. Types that
    have a name keep it, so that it may be called more than once.

    Args:
      state: of any optimizer of this library or of optax, or its shapes.

    Raises:
      ValueError: two types of one package that have the same name.
    """
    for kind in {*_types(jax.tree.structure(state))}:
        name = f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"
        try:
            export.register_namedtuple_serialization(kind, serialized_name=name)
        except ValueError as error:
            if "registration for type" not in str(error):  # another type has this name
                raise


def _types(structure: Any) -> Iterator[type]:
    """The named tuples in a tree."""
    kind, _ = structure.node_data() or (None, None)
    if kind is not None and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        yield kind
    for child in structure.children():
        yield from _types(child)
