"""What recipes do with `state`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import is_one_of
from optimorph._core.rule import Transform
from optimorph._core.shown import shown
from optimorph._core.types import DTypeLike, Rules
from optimorph._storage.codec_rules import warn_nothing
from optimorph._storage.compress_state import compress_state
from optimorph._storage.encoding import in_codes
from optimorph.codecs import Codec

INT8 = "int8"


def with_state_storage(
    who: str,
    tx: optax.GradientTransformation,
    state: str | Rules | None,
    int8: Rules | None = None,
    **dtypes: DTypeLike | None,
) -> optax.GradientTransformationExtraArgs:
    """An element-wise transformation with its state stored as the argument `state` of a recipe says.

    "int8" stands for the rules `int8`, by default those of `compress_state`. `dtypes` are `mu_dtype` and the
    like; a narrow one beside `state` is refused.
    """
    if state is None:
        return optax.with_extra_args_support(tx)
    rules = isinstance(state, Codec | Mapping) or (callable(state) and not isinstance(state, type))
    if not is_one_of(state, (INT8,)) and not rules:
        raise ValueError(
            f"{who}: state must be 'int8', the rules of compress_state or None, but is {shown(state)}. "
            "Type state='int8'."
        )
    for name, dtype in dtypes.items():
        if dtype is not None and jnp.finfo(dtype).bits < 32:
            raise ValueError(
                f"{who}: state and {name}={jnp.dtype(dtype).name!r} both say how moments are stored. Type "
                "only one of the two."
            )
    return compress_state(tx, int8 if isinstance(state, str) else state, elementwise=True)


def warning_if_nothing(tx: Transform, who: str, state: Any) -> Transform:
    """An optimizer that routes leaves, which warns at `init` if "int8" compresses the state of no leaf."""

    def init(params):
        made = tx.init(params)
        if jax.tree.leaves(params) and not any(in_codes(x.dtype) for x in jax.tree.leaves(made)):
            warn_nothing(who, "state")
        return made

    return tx.with_init(init) if is_one_of(state, (INT8,)) else tx
