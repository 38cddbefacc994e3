"""What the widths and the numbers of layers tell: which layer takes in what another one puts out."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from optimorph._core.types import Shape
from optimorph._routing.grouping import group_by, without_numbers
from optimorph._routing.layer_widths import (
    DISTRIBUTION,
    channels,
    layer_name,
    number_of,
    sides_of,
)
from optimorph._routing.leaf_spec import LeafSpec
from optimorph.linalg import Axes

_PARTS = ("vector", "norm", "bias")
"""The roles of leaves that are no layers."""

_NO_DENSE_LAYERS = ("norm", "bias", "embedding")
"""The roles of leaves of two axes that take in no features."""

IN_PERCEPTRON = re.compile(r"mlp|(^|[/_])ffn?([/_]|$)|feed_?forward", re.IGNORECASE)

_OUTPUT = re.compile(r"(^|/)(outputs?(_\w+)?|head)$", re.IGNORECASE)
"""A name of a module whose last layer puts out what the model does."""


class Layers:
    """What widths and numbers tell of the layers without names, and of all other leaves."""

    def __init__(
        self,
        paths: Sequence[str],
        shapes: Sequence[Shape],
        specs: Sequence[LeafSpec],
        unnamed: list[int],
        others: list[int],
    ):
        self.paths, self.specs = paths, specs
        sides = [*map(sides_of, paths, shapes, specs)]
        taken = {n for k, spec in enumerate(specs) if spec.axes is not None for n in sides[k][0]}
        for k, spec in enumerate(specs):
            if (
                spec.role == "embedding"
                and taken.isdisjoint(sides[k][1])
                and min(sides[k][1], default=0) <= 4
            ):
                sides[k] = (set(), sides[k][1])
        self.inputs, self.outputs = zip(*sides, strict=True)
        self.with_inputs, self.with_outputs = _by_width(self.inputs), _by_width(self.outputs)
        self.channels, self.flat = (
            {
                n
                for k, spec in enumerate(specs)
                if spec.axes or (len(shapes[k]) == 2 and spec.role not in _NO_DENSE_LAYERS)
                if spec.role != "gates" and self.has_window(k) == window
                for n in self.inputs[k]
            }
            for window in (True, False)
        )
        self.channels_in: dict[str, tuple[set[int], set[int]]] = {}
        for k in range(len(paths)):
            module = self.module(k) if self.has_window(k) else ""
            while module:
                taken, given = self.channels_in.setdefault(module, (set(), set()))
                taken |= self.inputs[k]
                given |= self.outputs[k]
                module = module.rpartition("/")[0]
        numbered = [k for k, spec in enumerate(specs) if spec.role not in _PARTS]
        self.by_numbers = sorted(numbered, key=lambda k: _numbers(paths[k]), reverse=True)
        self.recurrent = {n for k, spec in enumerate(specs) if spec.role == "gates" for n in self.inputs[k]}
        self.convolutions = any(
            s.role in ("convolution", "one channel") or (s.role == "dense" and channels(s.axes))
            for s in specs
        )
        self.chains = {}
        for chain in group_by(unnamed, lambda k: (self.module(k), _kind(paths[k]))):
            chain.sort(key=lambda k: number_of(layer_name(paths[k])))
            self.chains |= {k: (chain, place) for place, k in enumerate(chain)}
        layers = {k for k, spec in enumerate(specs) if spec.axes is not None or spec.role == DISTRIBUTION}
        named = layers - {*self.chains}
        self.chains |= {k: ([k], 0) for k in others}
        self.in_named_layers = _by_width([x if k in named else set() for k, x in enumerate(self.inputs)])
        self.matrices = sum(spec.axes is not None for spec in specs)
        self.tables: dict[int, list[str]] = {}
        for path, shape, spec in zip(paths, shapes, specs, strict=True):
            if spec.role == "embedding" and shape:
                self.tables.setdefault(shape[0], []).append(path)
        self.embeddings = {n for k, s in enumerate(specs) if s.role == "embedding" for n in self.outputs[k]}

    def module(self, k: int) -> str:
        """The module that has the layer."""
        return layer_name(self.paths[k]).rpartition("/")[0]

    def takers(self, k: int) -> Iterator[int]:
        """The leaves outside the layer that take in its outputs."""
        return self._others(k, self.outputs[k], self.with_inputs)

    def givers(self, k: int) -> Iterator[int]:
        """The leaves outside the layer whose outputs it may take in."""
        return self._others(k, self.inputs[k], self.with_outputs)

    def _others(self, k: int, widths: set[int], by_width: dict[int, dict[int, None]]) -> Iterator[int]:
        own = layer_name(self.paths[k]) + "/"
        for j in by_width.get(min(widths), ()):
            if j != k and not self.paths[j].startswith(own) and all(j in by_width[n] for n in widths):
                yield j

    def next_of(self, k: int) -> int | None:
        """The layer of the same module with the next number."""
        chain, place = self.chains[k]
        return chain[place + 1] if place + 1 < len(chain) else None

    def follows(self, k: int | None) -> bool:
        """Whether it takes in the outputs of the layer with the number before."""
        chain, place = self.chains.get(k, ([], 0))
        return place > 0 and self.outputs[chain[place - 1]] <= self.inputs[chain[place]]

    def is_sink(self, k: int) -> bool:
        """Whether no other leaf takes in its outputs, or a part of them, or these and others together."""
        if self.puts_out_words(k):
            return True
        if next(self.takers(k), None) is not None or self.has_parts(k):
            return False
        if self.has_window(k):
            is_last = self.is_root(k) or _OUTPUT.search(self.module(k)) is not None
            return is_last and not self.is_reshaped(k)
        return not self.is_joined(k) and not self.is_reshaped(k)

    def puts_out_words(self, k: int) -> bool:
        """Whether it has an output for each row of an embedding in its module, which no layer needs."""
        module = self.module(k) + "/" if self.module(k) else ""
        embeddings = self.tables.get(max(self.outputs[k]), ())
        words = not self.has_window(k) and any(path.startswith(module) for path in embeddings)
        return words and all(self.has_giver_beside(j, k) for j in self.takers(k))

    def has_giver_beside(self, j: int, k: int) -> bool:
        """Whether a layer takes in the outputs of another one than `k` in its own module."""
        return any(g != k and self.module(g) == self.module(j) for g in self.givers(j))

    def is_root(self, k: int) -> bool:
        """Whether all layers are in its module, or in modules of that, or before it."""
        own = re.sub(r"(^|/)layers?$", "", self.module(k)) + "/"

        def is_around(j: int) -> bool:
            return self.paths[j].startswith(own) or self.order(j, k) < 0

        return own == "/" or all(map(is_around, self.by_numbers))

    def is_in_list(self, k: int) -> bool:
        """Whether it is no convolution, and its module is in a list of several."""
        return not self.has_window(k) and re.search(r"(^|/)\d+/", self.module(k)) is not None

    def is_reshaped(self, k: int) -> bool:
        """Whether a layer takes in its outputs in another shape.

        Of a convolution, a dense layer takes in the channels of several places, or another convolution takes
        in these and more. Of a dense layer, a convolution of its module takes in the outputs as channels.
        """
        width = max(self.outputs[k])
        if self.has_window(k):
            joined = {2 * width, *(width + n for n in self.with_outputs)}
            return not joined.isdisjoint(self.channels) or any(
                n > width and n % width == 0 for n in self.flat
            )
        squares = (width // n for n in self.channels if width >= 2 * max(self.inputs[k]) and width % n == 0)
        if any(n > 1 and math.isqrt(n) ** 2 == n for n in squares):  # to places of a picture
            return True
        taken, given = self.channels_in.get(self.module(k), ((), ()))
        return any(4 <= n < width and width % n == 0 for n in {*taken} - {*given})

    def is_fed(self, k: int) -> bool:
        """Whether it takes in outputs of another layer, or features of convolutions, or puts out words."""
        features = self.convolutions and not self.has_window(k) and self.is_narrower(k)
        return features or next(self.givers(k), None) is not None or self.puts_out_words(k)

    def joins(self, k: int) -> bool:
        """Whether it takes in the outputs of several equal layers together."""
        return any(min(self.inputs[k]) % n == 0 for n in self.with_outputs if n > max(self.outputs[k]) > 0)

    def is_narrower(self, k: int) -> bool:
        """Whether it has fewer outputs than inputs."""
        return min(self.inputs[k]) > max(self.outputs[k])

    def has_few_outputs(self, k: int) -> bool:
        """Whether it has at most four outputs, 16 times as many inputs, and no leaf takes in its outputs."""
        few = 1 < max(self.outputs[k]) <= 4 and min(self.inputs[k]) >= 16 * max(self.outputs[k])
        return few and not self.has_window(k) and next(self.takers(k), None) is None

    def has_window(self, k: int) -> bool:
        """Whether it is a convolution."""
        return channels(self.specs[k].axes) is not None

    def has_parts(self, k: int) -> bool:
        """Whether the next layer takes in a part of its outputs, as behind a gate."""
        after, width = self.next_of(k), max(self.outputs[k])
        return after is not None and any(
            n * times == width for n in self.inputs[after] for times in (2, 3, 4)
        )

    def is_joined(self, k: int) -> bool:
        """Whether a later layer takes in its outputs together with others."""
        chain, place = self.chains[k]
        unfed = [j for j in chain[place + 1 :] if next(self.givers(j), None) is None]
        width, wider = max(self.outputs[k]), {n for j in unfed for n in self.inputs[j]}
        together = any(n > width and (n % width == 0 or n - width in self.with_outputs) for n in wider)
        return together or any(16 <= width < n < 2 * width for n in self.recurrent)

    def is_needed(self, k: int) -> bool:
        """Whether what has a name takes in its outputs: a layer beside it, one without others, or a norm."""

        def has_no_others(j: int) -> bool:
            return all(g == k or (g in self.chains and self.follows(self.next_of(g))) for g in self.givers(j))

        layers = self._others(k, self.outputs[k], self.in_named_layers)
        if any(self.is_beside(j, k) or has_no_others(j) for j in layers):
            return True
        roles = (self.specs[j].role for j in self.takers(k))
        return next(roles, None) == "norm" and all(role == "norm" for role in roles)

    def is_beside(self, j: int, k: int) -> bool:
        """Whether it is in the module of another layer, or a distribution in one around that."""
        around = self.specs[j].role == DISTRIBUTION and self.module(k).startswith(self.module(j))
        return around or self.module(j) == self.module(k)

    def next_begins_anew(self, k: int) -> bool:
        """Whether it is the end of a chain of layers, and the next layer takes in what the first takes in."""
        after, (chain, _) = self.next_of(k), self.chains[k]
        anew = after is not None and self.inputs[after] == self.inputs[chain[0]] and not self.is_fed(after)
        return anew and self.follows(k) and not self.is_needed(k)

    def takes_its_own_end(self, k: int) -> bool:
        """Whether only layers before it take in its outputs, and these have no other inputs."""
        takers = self.takers(k) if self.inputs[k] != self.outputs[k] else iter(())
        first = next(takers, None)
        if first is None or self.is_reshaped(k):
            return False
        return all(
            self.specs[j].axes is not None
            and self.order(j, k) <= 0
            and [*itertools.islice(self.givers(j), 2)] == [k]
            for j in itertools.chain([first], takers)
        )

    def is_end(self, k: int) -> bool:
        """Whether no leaf takes in its outputs, or only the first layers of other modules."""
        if is_stack(self.specs[k].axes) or self.next_of(k) is not None or not self.is_fed(k):
            return False
        if next(self.takers(k), None) is None:
            pairs = max(self.outputs[k]) >= 32 and 2 * max(self.outputs[k]) in self.with_inputs
            inner = pairs or self.has_parts(k) or self.is_joined(k) or self.is_reshaped(k)
            return not inner and (self.is_narrower(k) or not self.has_window(k))
        first = any(self.module(j) != self.module(k) for j in self.takers(k)) and self.takes_its_own_end(k)
        return first and self.is_narrower(k) and all(any(self.takers(j)) for j in self.takers(k))

    def only_earlier_take(self, k: int) -> bool:
        """Whether only layers with the same name and lower numbers take in its outputs."""
        takers = [*itertools.islice(self.takers(k), 9)]
        return 0 < len(takers) < 9 and all(self.order(j, k) < 0 for j in takers)

    def order(self, j: int, k: int) -> int:
        """The difference of the first numbers that differ in the paths of two layers; 0 if names differ."""
        pairs = zip(self.paths[j].split("/"), self.paths[k].split("/"), strict=False)
        one, other = next(((a, b) for a, b in pairs if a != b), ("", ""))
        return number_of(one) - number_of(other) if without_numbers(one) == without_numbers(other) else 0

    def is_last_of_all(self, k: int) -> bool:
        """Whether it is the last layer of a model that has no others than those of its module."""
        chain, place = self.chains[k]
        whole = place + 1 == len(chain) == self.matrices and not self.embeddings
        inner = is_stack(self.specs[k].axes) or self.is_needed(k) or self.is_reshaped(k)
        return whole and not inner

    def may_be_last(self, k: int) -> bool:
        """Whether it is the last layer of its module, and may be that of the model.

        Beside an embedding as wide as its outputs, which may be the output layer too, it is so only if its
        inputs are as wide.
        """
        if self.next_of(k) is not None or is_stack(self.specs[k].axes) or self.is_needed(k):
            return False
        if self.is_reshaped(k):
            return False
        is_root = self.is_root(k)
        if self.embeddings & self.outputs[k]:
            return is_root and self.inputs[k] == self.outputs[k]
        return is_root or (
            self.follows(k) and not self.has_window(k) and not IN_PERCEPTRON.search(self.paths[k])
        )


def _numbers(path: str) -> list[Any]:
    """A key by which paths that differ in numbers alone are in the order of these."""
    return [int(text) if text.isdecimal() else text for text in re.split(r"(\d+)", path)]


def _by_width(sides: Sequence[set[int]]) -> dict[int, dict[int, None]]:
    """Width → the leaves that have it on this side."""
    found: dict[int, dict[int, None]] = {}
    for k, widths in enumerate(sides):
        for width in widths:
            found.setdefault(width, {})[k] = None
    return found


def is_stack(axes: Axes | None) -> bool:
    """Whether a leaf is several matrices, one for each index of another axis."""
    return axes is not None and "b" in axes.spec


def _kind(path: str) -> str:
    """Whether a layer without a name is a convolution, and a transposed one."""
    return "".join(re.findall("conv|transpose", layer_name(path).rpartition("/")[2].lower()))
