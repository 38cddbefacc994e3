"""The polar factor of a stack of matrices by Newton-Schulz iterations: matrix products alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Inexact

from optimorph._core.checks import check_dtypes, check_integer, check_matrices
from optimorph._core.numbers import upcast, with_type_of
from optimorph._core.shown import shown
from optimorph._core.target import Target, for_target
from optimorph._core.types import DTypeLike
from optimorph.linalg._coefficients import (
    EXACT,
    JORDAN,
    MARGINS,
    MAX_CONDITION,
    YOU,
    Coefficients,
    Table,
    checked_rows,
)
from optimorph.linalg._polar_express import polar_express
from optimorph.linalg._shared_columns import (
    Neighbours,
    Work,
    normalize_columns,
    polar_of_columns,
    stretches,
    work,
)
from optimorph.linalg._symmetric import Symmetric, apply, blocked, combine, gram, identity, multiply

Stack = Inexact[Array, "*batch n m"]

ITERATIONS = ("auto", "standard", "gram")

FAST_DTYPES = {"gpu": jnp.dtype(jnp.float16), "tpu": jnp.dtype(jnp.bfloat16)}
"""Platform → the fast dtype; on GPUs float16, whose rounding is finer and whose range suffices here."""

PRESETS: dict[str, Callable[[int], Coefficients]] = {
    "polar_express": lambda steps: polar_express(steps=steps),
    "jordan": JORDAN.take,
    "you": YOU.take,
    "cans": lambda steps: polar_express(steps=steps, safety=0.0, cushion=0.0),
}
"""Name → number of steps → table."""


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """The polar factor, approximately, by matrix products that move every singular value towards 1.

        X ← G / ‖G‖F                                                       (1)
        X ← a X + (b R + c R²) X,  R = X Xᴴ, for each row of the table     (2)

    Each step applies the odd polynomial a σ + b σ³ + c σ⁵ to the singular values and keeps the singular
    vectors. For matrices wider than tall, the Gram iteration does the same with smaller products,

        Q ← Q (a + Z),  R ← (a + Z) R (a + Z),  Z = b R + c R²;  at the end  X ← Q X      (3)

    and restarts from X before rounding matters. R has the size of the smaller side. The result does not
    depend on the scale of G: polar(cG) = polar(G) for every c > 0. The polar factor of zero is zero.

    Shapes:
      `(*batch, n, m)` in, the same out; each matrix independently.

    Args:
      coefficients: "polar_express", "jordan", "you" or "cans"; a table, such as
        `linalg.polar_express(lower=1e-4, steps=6)`; or rows `((a, b, c), ...)`, of which the last repeats.
      steps: the number of steps (2), at least 1.
      iteration: "standard", (2); "gram", (3); or "auto", whichever takes fewer operations for the shape, but
        (2) where (3) is not accurate enough: in bfloat16, and for a table such as "cans".
      dtype: the dtype of the iteration. Its products accumulate in float32. By default it is float16 on GPUs
        and bfloat16 on TPUs if the table is safe in that dtype, and float32 otherwise. float64 and complex
        input keep their dtypes.
      precision: the precision of float32 products, a name that `jax.lax.Precision` takes. With "highest",
        factors are not rounded to fewer bits.
      max_stack_bytes: the most bytes of matrices that are computed at once. A larger stack is computed in
        several batches, which need less memory.

    Raises:
      ValueError: an unknown preset or iteration, fewer than one step, or a table that is not safe in the
        dtype.

    References:
      Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Amsel et al. 2025,
      arXiv:2505.16932 (Polar Express); Dao-AILab 2026, "Gram Newton-Schulz"; Björck & Bowie 1971.
    """

    coefficients: str | Coefficients | Sequence[Sequence[float]] = "polar_express"
    steps: int = 5
    _: dataclasses.KW_ONLY
    iteration: str = "auto"
    dtype: DTypeLike | None = None
    precision: str = "highest"
    max_stack_bytes: int = 2**28

    def __post_init__(self):
        if not isinstance(self.coefficients, str | Coefficients):
            object.__setattr__(self, "coefficients", checked_rows("NewtonSchulz", self.coefficients))
        check_integer("NewtonSchulz", "steps", self.steps, 5)
        if self.iteration not in ITERATIONS:
            raise ValueError(
                f"NewtonSchulz: iteration is {shown(self.iteration)}. Type one of "
                f"{', '.join(map(repr, ITERATIONS))}."
            )
        check_integer("NewtonSchulz", "max_stack_bytes", self.max_stack_bytes, 2**28)
        check_dtypes("NewtonSchulz", dtype=self.dtype)
        if not _is_precision(self.precision):
            raise ValueError(
                f"NewtonSchulz: precision is {shown(self.precision)}. Type 'highest', 'high' or 'default'."
            )
        table = self.table
        if self.dtype is not None and not _safe(table, jnp.dtype(self.dtype)):
            raise ValueError(
                f"NewtonSchulz: with {table.source} the iteration may diverge by rounding in "
                f"{jnp.dtype(self.dtype)}. The table is made for {table.dtype} arithmetic. Leave out dtype, "
                "or type coefficients='polar_express', which allows for the rounding of bfloat16."
            )

    @property
    def table(self) -> Coefficients:
        """The coefficients, a row for each step."""
        return _table(self.coefficients, self.steps)

    def __call__(self, g: Stack) -> Stack:
        """The approximate polar factor of every matrix."""
        check_matrices("NewtonSchulz", g)
        if g.size == 0:
            return g
        tall = g.shape[-2] > g.shape[-1]
        x = normalize(g.mT.conj() if tall else g)  # (1)
        (y,) = for_target(NewtonSchulz._iterations, self, x.reshape(-1, *x.shape[-2:]), results=1)
        x = y.reshape(x.shape).astype(g.dtype)
        return with_type_of(x.mT.conj() if tall else x, g)

    def flops(self, n: int, m: int, platform: str = "") -> float:
        """Multiplications and additions for one float32 matrix n x m, n ≤ m, without blocks."""
        restarts = _restarts(self, (n, m), self.dtype_on(jnp.dtype(jnp.float32), platform), False)
        return 2.0 * operations((n, m), self.table.rows, restarts, False)

    def of_columns(self, g: Stack, neighbours: Neighbours) -> Stack:
        """The own columns of the factors of matrices n x m, n ≤ m, whose columns are divided over devices."""
        x, largest = rescale(g)
        x = normalize_columns(x, largest, neighbours)  # (1)
        (y,) = for_target(_of_columns, (self, neighbours), x, results=1)
        return y.astype(g.dtype)

    def work(self, n: int, m: int, size: int, repeat: bool, platform: str = "") -> Work:
        """What `of_columns` does for one float32 matrix that so many devices share."""
        dtype = self.dtype_on(jnp.dtype(jnp.float32), platform)
        restarts = _restarts(self, (n, m), dtype, False)
        return work((n, m), self.table.rows, restarts, size, repeat, dtype.itemsize)

    def _iterations(self, target: Target, stack: jax.Array) -> list[jax.Array]:
        """(2) or (3) of normalized matrices, in the dtype and the form that suit the target."""
        x = stack.astype(self.dtype_on(stack.dtype, target.platform))
        in_blocks = blocked(x.shape[-2], target)
        batch = max(1, self.max_stack_bytes // (x.itemsize * math.prod(x.shape[1:])))

        def iterate(x: jax.Array) -> jax.Array:
            rows, restarts = self.table.rows, _restarts(self, x.shape[-2:], x.dtype, in_blocks)
            if restarts is None:
                return _standard(x, rows, self.precision, in_blocks)
            return _by_gram(x, rows, restarts, self.precision, in_blocks)

        x = iterate(x) if len(x) <= batch else jax.lax.map(iterate, x, batch_size=batch)
        return [x.astype(stack.dtype)]

    def dtype_on(self, own: jnp.dtype, platform: str) -> jnp.dtype:
        """The dtype of the iteration for matrices of a dtype, on "cpu", "gpu" or "tpu"."""
        if self.dtype is not None and not jnp.issubdtype(own, jnp.complexfloating):
            return jnp.dtype(self.dtype)
        fast = FAST_DTYPES.get(platform)
        return fast if fast is not None and own == jnp.float32 and _safe(self.table, fast) else own


def _of_columns(about: tuple[NewtonSchulz, Neighbours], target: Target, x: jax.Array) -> list[jax.Array]:
    """(2) or (3) of normalized matrices, of which x are the own columns, in the dtype for the target."""
    method, neighbours = about
    dtype, shape = method.dtype_on(x.dtype, target.platform), (x.shape[1], x.shape[2] * neighbours.size)
    restarts = _restarts(method, shape, dtype, False)
    y = polar_of_columns(x.astype(dtype), method.table.rows, restarts, method.precision, neighbours)
    return [y.astype(x.dtype)]


def normalize(g: jax.Array) -> jax.Array:
    """g / ‖g‖F of every matrix, in float32 or wider, without overflow or underflow; zero stays zero."""
    x, _ = rescale(g)
    squares = jnp.sum((x * x.conj()).real, axis=(-2, -1), keepdims=True)
    return x / jnp.sqrt(safe_denominator(squares)).astype(x.dtype)


def rescale(g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """g / c and c, the largest |entry| of every matrix, `(*batch, 1, 1)`; zero stays zero.

    Derivatives treat c as a constant. That is right for every f(g) = cᵏ f(g / c), homogeneous of degree k.
    """
    x = _undivided(upcast(g))
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    number = largest.dtype.type
    middle = jnp.where(largest > 1, number(2.0**-64), number(2.0**64))  # so that all reciprocals are normal
    return x * middle.astype(x.dtype) / safe_denominator(largest * middle).astype(x.dtype), largest


def _undivided(g: jax.Array) -> jax.Array:
    """g, with no matrix divided over devices where the type says how g is sharded (Explicit axes).

    Only the first batch axis stays divided: more of them cannot become one axis.
    """
    sharding = jax.typeof(g).sharding
    spec = PartitionSpec(*sharding.spec[: min(g.ndim - 2, 1)], *[None] * (g.ndim - min(g.ndim - 2, 1)))
    return g if sharding.spec == spec else jax.sharding.reshard(g, sharding.update(spec=spec))


def safe_denominator(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1, x)


def operations(shape: tuple[int, ...], rows: Table, restarts: Sequence[int] | None, in_blocks: bool) -> int:
    """Multiplications for each matrix, `(..., n, m)` with n ≤ m: (2) without restarts, (3) with them.

    A symmetric product in blocks counts three quarters of a whole one.
    """
    n, m = shape[-2:]
    share = 0.75 if in_blocks else 1.0
    square, wide = share * n**3, share * n * n * m
    lengths = [len(stretch) for stretch in stretches(rows, restarts)]
    squares = sum(c != 0 for _, _, c in rows)  # an R² for each row with a fifth power
    products = squares + sum(3 * (length - 1) for length in lengths)  # R twice, Q
    return round(products * square + len(lengths) * (wide + n * n * m))


@functools.lru_cache(maxsize=1 << 10)
def _table(coefficients: str | Coefficients | Table, steps: int) -> Coefficients:
    """The table of a preset's name, or of rows, for a number of steps."""
    if isinstance(coefficients, Coefficients):
        return coefficients.take(steps)
    if not isinstance(coefficients, str):
        return Coefficients(coefficients).take(steps)
    if coefficients not in PRESETS:
        raise ValueError(
            f"NewtonSchulz: coefficients must be a table or a name, but is {shown(coefficients)}. Type "
            f"{', '.join(map(repr, PRESETS))}, linalg.polar_express(...), or the rows: ((a, b, c), ...)."
        )
    return PRESETS[coefficients](steps)


@functools.lru_cache(maxsize=1 << 10)
def _restarts(
    method: NewtonSchulz, shape: tuple[int, ...], dtype: jnp.dtype, in_blocks: bool
) -> tuple[int, ...] | None:
    """The restarts of the Gram iteration; None for the standard one."""
    rows, restarts = method.table.rows, method.table.restarts()
    if method.iteration != "auto":
        return restarts if method.iteration == "gram" else None
    accurate = max(method.table.conditions(restarts)) <= MAX_CONDITION and dtype != jnp.bfloat16
    fewer = operations(shape, rows, restarts, in_blocks) < operations(shape, rows, None, in_blocks)
    return restarts if accurate and fewer else None


def _is_precision(name: Any) -> bool:
    try:
        return isinstance(jax.lax.Precision(name), jax.lax.Precision)
    except (TypeError, ValueError):
        return False


def _standard(x: jax.Array, rows: Table, precision: str, in_blocks: bool) -> jax.Array:
    dtype = x.dtype
    for a, b, c in rows:
        r = combine(dtype, (1.0, gram(x, precision, in_blocks)))
        step = apply(_quintic(r, b, c, precision), x, precision)
        x = (a * x.astype(step.dtype) + step).astype(dtype)  # (2)
    return x


def _by_gram(
    x: jax.Array, rows: Table, restarts: Sequence[int], precision: str, in_blocks: bool
) -> jax.Array:
    dtype = x.dtype
    for stretch in stretches(rows, restarts):
        r = combine(dtype, (1.0, gram(x, precision, in_blocks)))
        x = apply(_factor(r, stretch, precision), x, precision).astype(dtype)
    return x


def _factor(r: Symmetric, rows: Table, precision: str) -> Symmetric:
    """Q of (3) from Q = 1."""
    dtype, q = r[0].dtype, None
    for step, (a, b, c) in enumerate(rows, 1):
        z = _quintic(r, b, c, precision)
        if q is None:
            q = combine(dtype, (1.0, z), (a, identity(z)))
        else:
            q = combine(dtype, (1.0, multiply(q, z, precision)), (a, q))
        if step < len(rows):
            w = combine(dtype, (1.0, multiply(r, z, precision)), (a, r))
            r = combine(dtype, (1.0, multiply(z, w, precision)), (a, w))
    assert q is not None
    return q


def _quintic(r: Symmetric, b: float, c: float, precision: str) -> Symmetric:
    """Z of (3)."""
    terms = [(b, r)] if c == 0 else [(b, r), (c, multiply(r, r, precision))]
    return combine(r[0].dtype, *terms)


def _safe(table: Coefficients, dtype: jnp.dtype) -> bool:
    """Whether a table allows for the rounding of a dtype."""
    dtypes = [*MARGINS]
    if table.dtype == EXACT or dtype.name not in dtypes:
        return False
    return dtypes.index(dtype.name) >= dtypes.index(table.dtype)
