"""`optimorph plan module:function`: what `muon` does with the parameters that a function returns."""

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optimorph._core.checks import BadInput
from optimorph._core.types import PyTree
from optimorph._plan import plan
from optimorph._transforms.matrices import SCALES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns the parameters; it is only traced, so it needs no "
        "memory",
    )
    parser.add_argument(
        "--axes",
        metavar="PATTERN=SPEC",
        action="append",
        default=[],
        help="a rule, such as '*lookup*=none' or 'layers/*/kernel=bio'; the first that matches wins",
    )
    parser.add_argument(
        "--scale",
        metavar="NAME",
        default="rms_to_rms",
        choices=[*SCALES, "none"],
        help=f"scale of an update by its shape: {', '.join(SCALES)}, none (default: rms_to_rms)",
    )
    parser.add_argument(
        "--state",
        choices=["float32", "int8"],
        default="float32",
        help="how moments are stored (default: float32)",
    )


def main(arguments: argparse.Namespace) -> int:
    """Print the plan; return 1 if a leaf is unresolved or a rule decides for no leaf, otherwise 0."""
    axes: dict[str, str | None] = {}
    for text in arguments.axes:
        pattern, spec = _rule(text)
        axes.setdefault(pattern, spec)  # the first rule for a pattern wins
    scale = None if arguments.scale == "none" else arguments.scale
    state = None if arguments.state == "float32" else arguments.state
    table = plan(_shapes(arguments.target), scale=scale, axes=axes, state=state)
    if not len(table):
        raise BadInput(f"{arguments.target!r} returns no arrays; it must return parameters or their shapes")
    print(table)
    return int(bool(table.unused) or any(row.unresolved is not None for row in table))


def _rule(text: str) -> tuple[str, str | None]:
    pattern, equals, spec = text.rpartition("=")
    if not (pattern and equals and spec):
        raise BadInput(f"--axes {text!r} is not of the form PATTERN=SPEC, such as '*/kernel=bio'")
    return pattern, None if spec.lower() == "none" else spec


def _shapes(target: str) -> PyTree:
    name, _, attribute = target.partition(":")
    if name.endswith(".py"):
        raise BadInput(f"{target!r} is a file; type its module, {Path(name).stem}:{attribute or 'init'}")
    if not (name and attribute):
        raise BadInput(f"{target!r} is not of the form MODULE:FUNCTION, such as model:init")
    sys.path.insert(0, os.getcwd())
    try:
        function: Any = importlib.import_module(name)
        for part in attribute.split("."):
            function = getattr(function, part)
        return jax.eval_shape(lambda: jax.tree.map(_array, function()))
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        first = str(error).strip().split("\n")[0]
        raise BadInput(f"{target!r} cannot be evaluated: {type(error).__name__}: {first}") from error


def _array(leaf: Any) -> Any:
    """An array for an array, a number or a shape; None for anything else. Only traced, never allocated."""
    if isinstance(leaf, jax.Array | np.ndarray | float | complex):
        return leaf
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jnp.zeros(leaf.shape, leaf.dtype)
    return None
