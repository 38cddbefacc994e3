"""The state of `compress_state`."""

from typing import Any, NamedTuple

from optimorph._core.roles import holds, scalar


class CompressedState(NamedTuple):
    """The inner state with codes in place of moments, their scales, the seed of the noise, and a count.

    Args:
      inner: as the inner transformation has it; codes have the shapes of the moments.
      scales: a tree like the parameters for each moment, `(*batch, blocks)`; zeros of what has none.
      seed: uint32.
      count: how many updates there have been, int32.
    """

    averages = holds(inner="")  # stored as codes, which are no moments to others
    inner: Any
    scales: tuple[Any, ...]
    seed: Any
    count: Any
    roles = holds(seed=scalar("seed of compress_state"), count=scalar("count of compress_state"))
