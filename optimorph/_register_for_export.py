"""States as arguments of programs that `jax.export` saves."""

from collections.abc import Iterator
from typing import Any

import jax
from jax import export

from optimorph._core.types import PyTree


def register_for_export(state: PyTree) -> None:
    """Register the types in a state, so that `jax.export` can save and load programs that take this state.

        register_for_export(jax.eval_shape(tx.init, params))
        saved = jax.export.export(jax.jit(tx.update))(gradients, state, params).serialize()

    JAX saves a program together with the trees that it takes and returns. It needs a registered name for each
    named tuple in these trees. The process that loads `saved` must call this function too, before
    `jax.export.deserialize`. It may be called more than once, because registered types keep their names.
    JAX needs the package `flatbuffers` to save and load programs: `pip install flatbuffers`.

    Args:
      state: a state of any optimizer of this library or of optax, or its shapes.

    Raises:
      ValueError: two types in one package have the same name.
    """
    for kind in {*_types(jax.tree.structure(state))}:
        name = f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"
        try:
            export.register_namedtuple_serialization(kind, serialized_name=name)
        except ValueError as error:
            if "registration for type" not in str(error):  # another type has this name
                raise


def _types(structure: Any) -> Iterator[type]:
    kind, _ = structure.node_data() or (None, None)
    if kind is not None and issubclass(kind, tuple) and hasattr(kind, "_fields"):
        yield kind
    for child in structure.children():
        yield from _types(child)
