"""Polar factors of matrices whose columns are divided over devices, which are neighbours along mesh axes.

Each device holds some columns Xₖ of every matrix. The powers of a polynomial need R = X Xᴴ alone, and

    R = Σ Xₖ Xₖᴴ,    X ← (α + Q) X,  so that  Xₖ ← α Xₖ + Q Xₖ        (1)

Only matrices of the size of R are sent. Each device computes its own rows of every polynomial of R, and
gathers those of the others before a product; or all devices repeat the polynomial, which sends less:

    Z = b R + c R²;  Q ← Q Z + a Q + α Z,  α ← a α;  R ← (a + Z) R (a + Z)        (2)

Polynomials of R commute, so that own rows always stand on the left.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from optimorph.linalg._coefficients import Table
from optimorph.linalg._symmetric import combine, product


class Neighbours(NamedTuple):
    """Devices that share matrices: every so many neighbours along some mesh axes.

    Args:
      names: mesh axes, the outermost first.
      devices: the number of devices along these axes.
      size: the number of neighbours that share a matrix; it divides that of the devices.
      repeat: whether each of them repeats the polynomial of R; else each computes its own rows.
    """

    names: tuple[str, ...]
    devices: int
    size: int
    repeat: bool

    def each(self, x: jax.Array) -> jax.Array:
        """The arrays of all that share a matrix, `(size, *shape)`."""
        return jax.lax.all_gather(x, self.names, axis_index_groups=self._groups)

    def rows(self, x: jax.Array) -> jax.Array:
        """All rows of matrices `(batch, own rows, n)`."""
        return jax.lax.all_gather(x, self.names, axis=1, axis_index_groups=self._groups, tiled=True)

    def sum(self, x: jax.Array) -> jax.Array:
        """The own rows of the sum of matrices `(batch, n, n)` over those that share them."""
        if len(x) == 1:  # as n x n, for which XLA has a reduce-scatter on TPUs too
            return self._row_sums(x[0], 0)[None]
        return self._row_sums(x, 1)

    def _row_sums(self, x: jax.Array, axis: int) -> jax.Array:
        return jax.lax.psum_scatter(
            x, self.names, scatter_dimension=axis, axis_index_groups=self._groups, tiled=True
        )

    @property
    def _groups(self) -> list[list[int]]:
        return [[*range(k, k + self.size)] for k in range(0, self.devices, self.size)]


class Work(NamedTuple):
    """What one device does for one matrix that it shares.

    Args:
      flops: multiplications and additions.
      bytes: that it sends.
      collectives: for any number of matrices of one shape.
    """

    flops: float
    bytes: float
    collectives: int


def work(
    shape: tuple[int, int],
    rows: Table,
    restarts: Sequence[int] | None,
    size: int,
    repeat: bool,
    itemsize: int,
) -> Work:
    """What `polar_of_columns` does for a matrix n x m whose columns are divided over so many devices."""
    n, m = shape[0] + -shape[0] % size, -(-shape[1] // size)
    powers, each = sum(c != 0 for _, _, c in rows), stretches(rows, restarts)
    products = powers + sum(3 * (len(stretch) - 1) for stretch in each)
    own_rows = n if repeat else n // size
    flops = 2.0 * n * (products * own_rows * n + len(each) * 2 * n * m)
    gathers = 0 if repeat else powers + sum(len(stretch) for stretch in each if len(stretch) > 1)
    collectives = gathers + 2 * len(each)
    return Work(flops, itemsize * collectives * n * n * (size - 1) / size, collectives + 1)


def normalize_columns(x: jax.Array, largest: jax.Array, neighbours: Neighbours) -> jax.Array:
    """X / ‖X‖F of every matrix, of which this device has columns x, divided by their largest |entry|."""
    squares = jnp.sum((x * x.conj()).real, axis=(-2, -1), keepdims=True)
    both = neighbours.each(jnp.stack([largest.astype(squares.dtype), squares]))
    most = jnp.max(both[:, 0], axis=0)
    most = jnp.where(most == 0, 1, most)
    total = jnp.sum(both[:, 1] * (both[:, 0] / most) ** 2, axis=0)
    return x * (largest / most / jnp.sqrt(jnp.where(total == 0, 1, total))).astype(x.dtype)


def polar_of_columns(
    x: jax.Array, rows: Table, restarts: Sequence[int] | None, precision: str, neighbours: Neighbours
) -> jax.Array:
    """(1) of normalized matrices; without restarts R is computed anew in every step."""
    n, dtype = x.shape[1], x.dtype
    x = jnp.pad(x, [(0, 0), (0, -n % neighbours.size), (0, 0)])
    for stretch in stretches(rows, restarts):
        r = neighbours.sum(product(x, x.mT.conj(), precision).astype(dtype))
        alpha, q = _factor(neighbours.rows(r) if neighbours.repeat else r, stretch, precision, neighbours)
        step = product(q if neighbours.repeat else neighbours.rows(q), x, precision)
        x = (alpha * x.astype(step.dtype) + step).astype(dtype)
    return x[:, :n]


def _factor(r: jax.Array, rows: Table, precision: str, neighbours: Neighbours) -> tuple[float, jax.Array]:
    """α and Q of (2), from α = 1 and Q = 0."""

    def whole(s: jax.Array) -> jax.Array:
        return s if neighbours.repeat else neighbours.rows(s)

    def total(*terms: tuple[float, jax.Array]) -> jax.Array:
        return combine(r.dtype, *((factor, (x,)) for factor, x in terms))[0]

    alpha, q = 1.0, None
    for step, (a, b, c) in enumerate(rows, 1):
        z = total((b, r), *([(c, product(r, whole(r), precision))] if c else []))
        right = whole(z) if len(rows) > 1 else z
        q = z if q is None else total((1.0, product(q, right, precision)), (a, q), (alpha, z))
        alpha *= a
        if step < len(rows):
            w = total((1.0, product(r, right, precision)), (a, r))
            r = total((1.0, product(w, right, precision)), (a, w))
    assert q is not None
    return alpha, q


def stretches(rows: Table, restarts: Sequence[int] | None) -> list[Table]:
    """The rows from each restart to the next; each row alone without restarts."""
    starts = range(len(rows)) if restarts is None else [0, *restarts]
    return [rows[i:j] for i, j in itertools.pairwise([*starts, len(rows)])]
