"""The polar factor of a stack of matrices by products alone."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Inexact

from optimorph.core.types import DTypeLike
from optimorph.linalg.coefficients import EXACT, LIMIT, MARGINS, Coefficients, Table
from optimorph.linalg.presets import table
from optimorph.linalg.symmetric import Symmetric, apply, blocked, combine, gram, identity, multiply
from optimorph.linalg.unit import unit

Stack = Inexact[Array, "*batch n m"]

ITERATIONS = ("auto", "standard", "gram")

HALF = {"gpu": jnp.dtype(jnp.float16), "tpu": jnp.dtype(jnp.bfloat16)}
"""Platform → the fast dtype: where there is a choice, the one of finer rounding. Nothing here is large."""


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """The polar factor by matrix products alone: what is left when every singular value is made 1.

        X ← G / ‖G‖F                                                       (1)
        X ← a X + (b R + c R²) X,  R = X Xᴴ, row by row of the table       (2)

    Each step applies the odd polynomial a σ + b σ³ + c σ⁵ to the singular values and leaves the singular
    vectors as they are. On matrices wider than high, the Gram iteration does the same with small ones,

        Q ← Q (a + Z),  R ← (a + Z) R (a + Z),  Z = b R + c R²;  at the end  X ← Q X      (3)

    which starts anew from X where rounding would be felt. The smaller side is always R's. Scale does not
    matter: polar(cG) = polar(G) for c > 0, of any finite size; zero comes back as zero.

    Shapes:
      `(*batch, n, m)` in, the same out; each matrix by itself.

    Args:
      coefficients: "polar_express", "jordan", "you" or "cans"; a table, such as
        `linalg.polar_express(lower=1e-4, steps=6)`; or rows `((a, b, c), ...)`, of which the last repeats.
      steps: how many times (2) is applied, at least 1.
      iteration: "standard", (2); "gram", (3); or "auto", the one of fewer operations for the shape, but (2)
        where (3) goes beyond what rounding allows: in bfloat16, and for a table such as "cans".
      dtype: of the iteration, whose products are summed in float32. By default float16 on GPUs and bfloat16
        on TPUs, if the table is safe in it, else float32; float64 and complex input keep their own.
      precision: of float32 products, as `jax.lax.Precision` names it; "highest" rounds nothing to fewer bits.
      max_stack_bytes: matrices beyond this are computed in turns, so that memory stays bounded.

    Raises:
      ValueError: an unknown preset, a table that is not safe in the dtype, fewer than one step, an unknown
        iteration.

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
        """Refuse what could not be computed, and keep the description hashable."""
        if not isinstance(self.coefficients, str | Coefficients):
            object.__setattr__(self, "coefficients", tuple(tuple(row) for row in self.coefficients))
        if self.iteration not in ITERATIONS:
            raise ValueError(
                f"NewtonSchulz: no iteration is called {self.iteration!r}. Type one of "
                f"{', '.join(map(repr, ITERATIONS))}."
            )
        if self.max_stack_bytes < 1:
            raise ValueError(
                f"NewtonSchulz: max_stack_bytes must be positive, but is {self.max_stack_bytes}."
            )
        found = self.table
        if self.dtype is not None and not _safe(found, jnp.dtype(self.dtype)):
            raise ValueError(
                f"NewtonSchulz: {found.source} is safe in {found.dtype}, not in {jnp.dtype(self.dtype)}. "
                "Leave out dtype, or type coefficients='polar_express', which has room for rounding."
            )

    @property
    def table(self) -> Coefficients:
        """The coefficients, a row for each step."""
        return table(self.coefficients, self.steps)

    def __call__(self, g: Stack) -> Stack:
        """The approximate polar factor of every matrix."""
        if g.size == 0:
            return g
        tall = g.shape[-2] > g.shape[-1]
        x = unit(g.mT.conj() if tall else g)  # (1)
        x = x.astype(self._dtype(x.dtype)).reshape(-1, *x.shape[-2:])
        turn = max(1, self.max_stack_bytes // (x.itemsize * math.prod(x.shape[1:])))
        x = self._iterate(x) if len(x) <= turn else jax.lax.map(self._iterate, x, batch_size=turn)
        x = x.reshape(*g.shape[:-2], *x.shape[-2:]).astype(g.dtype)
        return x.mT.conj() if tall else x

    def flops(self, n: int, m: int) -> float:
        """Of one matrix n x m, n ≤ m, of float32: multiplications and additions."""
        restarts = self._restarts((n, m), self._dtype(jnp.dtype(jnp.float32)))
        return 2.0 * operations((n, m), self.table.rows, restarts)

    def _iterate(self, x: jax.Array) -> jax.Array:
        rows, restarts, halves = self.table.rows, self._restarts(x.shape, x.dtype), blocked(x.shape[-2])
        if restarts is None:
            return _standard(x, rows, self.precision, halves)
        return _by_gram(x, rows, restarts, self.precision, halves)

    def _restarts(self, shape: tuple[int, ...], dtype: jnp.dtype) -> tuple[int, ...] | None:
        """Those of the Gram iteration; None for the standard one."""
        rows, restarts = self.table.rows, self.table.restarts()
        if self.iteration != "auto":
            return restarts if self.iteration == "gram" else None
        tame = max(self.table.conditions(restarts)) <= LIMIT and dtype != jnp.bfloat16
        fewer = operations(shape, rows, restarts) < operations(shape, rows, None)
        return restarts if tame and fewer else None

    def _dtype(self, own: jnp.dtype) -> jnp.dtype:
        if self.dtype is not None and not jnp.issubdtype(own, jnp.complexfloating):
            return jnp.dtype(self.dtype)
        fast = HALF.get(jax.default_backend())
        return fast if fast is not None and own == jnp.float32 and _safe(self.table, fast) else own


def operations(shape: tuple[int, ...], rows: Table, restarts: Sequence[int] | None) -> int:
    """Multiplications of each matrix, `(..., n, m)` with n ≤ m: (2) without restarts, (3) with them.

    A blocked symmetric product counts three quarters of a whole one.
    """
    n, m = shape[-2:]
    share = 0.75 if blocked(n) else 1.0
    square, wide = share * n**3, share * n * n * m
    powers = [int(c != 0) for _, _, c in rows]  # an R² for each row with a fifth power
    if restarts is None:
        return round(sum(wide + power * square + n * n * m for power in powers))
    stretches = [j - i for i, j in itertools.pairwise([0, *restarts, len(rows)])]
    products = sum(powers) + sum(3 * (length - 1) for length in stretches)  # R²; R twice, Q
    return round(products * square + len(stretches) * (wide + n * n * m))


def _standard(x: jax.Array, rows: Table, precision: str, halves: bool) -> jax.Array:
    dtype = x.dtype
    for a, b, c in rows:
        r = combine(dtype, (1.0, gram(x, precision, halves)))
        step = apply(_quintic(r, b, c, precision), x, precision)
        x = (a * x.astype(step.dtype) + step).astype(dtype)  # (2)
    return x


def _by_gram(x: jax.Array, rows: Table, restarts: Sequence[int], precision: str, halves: bool) -> jax.Array:
    dtype = x.dtype
    for i, j in itertools.pairwise([0, *restarts, len(rows)]):
        r = combine(dtype, (1.0, gram(x, precision, halves)))
        x = apply(_factor(r, rows[i:j], precision), x, precision).astype(dtype)
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


def _safe(found: Coefficients, dtype: jnp.dtype) -> bool:
    """Whether a table's room for rounding is enough for a dtype."""
    finer = [*MARGINS]
    if found.dtype == EXACT or dtype.name not in finer:
        return False
    return finer.index(dtype.name) >= finer.index(found.dtype)
