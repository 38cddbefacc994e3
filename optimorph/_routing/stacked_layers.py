"""Which axis of a leaf counts the layers of a stack, by the norms and biases of its modules."""

from collections.abc import Sequence

from optimorph._core.types import Shape
from optimorph._routing.grouping import parents
from optimorph._routing.names import MAYBE_STACK, STACK, UNSTACKED, by_name


class _Module:
    """What is known of all leaves below a module."""

    def __init__(self):
        self.counts: set[tuple[int, int]] | None = None
        self.vectors = 0
        self.stacked_vectors: list[Shape] = []

    def add(self, shape: Shape, is_vector: bool) -> None:
        """One more leaf; a norm's scale or a bias is a vector, unless it is stacked.

        `counts` has (position, size) of the axes that all leaves share, of the first two. Biases of one
        output in each layer, (layers, 1), may be both.
        """
        own = {(k, size) for k, size in enumerate((shape if len(shape) > 1 else shape * 2)[:2])}
        self.counts = own if self.counts is None else self.counts & own
        sides = [size for size in shape if size > 1]
        if is_vector and len(sides) == 1 and shape[1:] != (1,):
            self.vectors += 1
        elif is_vector and len(sides) == 2:
            self.stacked_vectors.append((*sides,))

    def layers(self) -> list[int]:
        """The positions of axes that may count layers: shorter than the widest vector is long."""
        counts = self.counts or ()
        return [
            k
            for k, n in counts
            if n > 1 and any(n in sides and n < sides[0] * sides[1] // n for sides in self.stacked_vectors)
        ]


class StackedLayers:
    """The axis of each leaf that counts layers."""

    def __init__(self, paths: Sequence[str], shapes: Sequence[Shape]):
        self.modules: dict[str, _Module] = {}
        for path, shape in zip(paths, shapes, strict=True):
            is_vector = by_name(path, (2,))[0] in ("norm", "bias")
            for name in parents(path):
                self.modules.setdefault(name, _Module()).add(shape, is_vector)

    def axis(self, path: str, shape: Shape) -> int | None:
        """The axis that counts layers, `UNSTACKED` if none does, None if norms and biases do not tell.

        The nearest module with norms or biases decides. They are stacked if they have two axes, and one size
        at one position in all leaves of the module counts the layers. They are not stacked if they have one.
        """
        for name in parents(path) if len(shape) > 1 else ():
            module = self.modules[name]
            if module.vectors:
                rest = path[len(name) :].replace(".", "/")
                inside = not (MAYBE_STACK.search(rest) or STACK.search(rest))
                return UNSTACKED if inside and not module.stacked_vectors else None
            found = module.layers()
            if len(found) == 1:
                return found[0]
        return None

    def maybe_axis(self, path: str, shape: Shape) -> int | None:
        """The axis that may count layers where norms and biases do not tell.

        Its size is that of the same axis, and of no other, in all leaves of the nearest module with several
        shapes.
        """
        counts = (self.modules[name].counts or set() for name in parents(path))
        shared = next((each for each in counts if len(each) < 2), set())
        return next((k for k, n in shared if 1 < n <= min(max(shape) // 4, 256) and len(shape) > 2), None)
