"""How an array reads as matrices: one letter per axis."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Axes:
    """One letter per axis: `i` input (summed over), `o` output, `b` batch (each slice its own matrix).

    | leaf | shape | spec |
    |---|---|---|
    | dense kernel (Flax, Haiku) | (in, out) | `io` |
    | dense weight (Equinox, PyTorch) | (out, in) | `oi` |
    | convolution kernel (Flax) | (height, width, in, out) | `iiio` |
    | layers stacked by a scan | (layer, in, out) | `bio` |
    | attention kernel, whole | (model, head, size) | `ioo` |
    | attention kernel, per head | (model, head, size) | `ibo` |

    Args:
      spec: the letters, with at least one `i` and one `o`.

    Raises:
      ValueError: another letter, or no `i`, or no `o`.
    """

    spec: str

    def __post_init__(self):
        """Refuse a spec that is not a matrix."""
        if set(self.spec) - set("iob") or "i" not in self.spec or "o" not in self.spec:
            raise ValueError(
                f"Axes: {self.spec!r} does not describe a matrix. Type one letter per axis: i (input), "
                "o (output), b (batch), with at least one i and one o, such as 'io', 'oi', 'iiio' or 'bio'."
            )

    def sizes(self, shape: Shape) -> tuple[int, int]:
        """The numbers of inputs and outputs of each matrix in an array of this shape."""
        return math.prod(shape[k] for k in self._of("i")), math.prod(shape[k] for k in self._of("o"))

    def matrices(self, x: jax.Array) -> jax.Array:
        """The array as a stack `(*batch, inputs, outputs)`."""
        batch = tuple(x.shape[k] for k in self._of("b"))
        return jnp.transpose(x, self._order()).reshape(*batch, *self.sizes(x.shape))

    def array(self, stack: jax.Array, shape: Shape) -> jax.Array:
        """The array of this shape whose `matrices` are the stack."""
        order = self._order()
        back = sorted(range(len(order)), key=order.__getitem__)
        return jnp.transpose(stack.reshape([shape[k] for k in order]), back)

    def _of(self, letter: str) -> list[int]:
        return [k for k, found in enumerate(self.spec) if found == letter]

    def _order(self) -> list[int]:
        return self._of("b") + self._of("i") + self._of("o")


def read(who: str, axes: str | Callable[[str, Shape], str | None], path: str, shape: Shape) -> Axes | None:
    """How the leaf at a path reads; None is "not a matrix".

    Raises:
      ValueError: naming `who` and the leaf, when the spec has another number of axes than the shape.
    """
    spec = axes(path, shape) if callable(axes) else axes
    if spec is None:
        return None
    if len(spec) != len(shape):
        raise ValueError(
            f"{who}: {path!r} has shape {shape}, {len(shape)} axes, but its spec {spec!r} describes "
            f"{len(spec)}. Type one letter per axis, i (input), o (output) or b (batch), or None for a leaf "
            f"that is not a matrix: axes={{{path!r}: {_likely(shape)!r}}}."
        )
    return Axes(spec)


def _likely(shape: Shape) -> str | None:
    return "i" * (len(shape) - 1) + "o" if len(shape) > 1 else None
