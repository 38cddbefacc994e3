"""The state of `compress_state`."""

from typing import Any, NamedTuple

from optimorph._core.roles import holds, scalar


class CompressedState(NamedTuple):
    """The inner state with codes in place of moments, their scales, the seed of the noise, and a count.

    Args:
      inner: the state of the inner transformation. The codes have the shapes of the moments.
      scales: for each moment a tree like the parameters, whose leaves are `(*batch, blocks)`. Moments that
        are not compressed have zeros.
      seed: the seed of the noise, uint32.
      noise_count: the number of updates, int32.
    """

    averages = holds(inner="")  # stored as codes, which are no moments to others
    inner: Any
    scales: tuple[Any, ...]
    seed: Any
    noise_count: Any
    roles = holds(seed=scalar("seed of compress_state"), noise_count=scalar("count of compress_state"))
