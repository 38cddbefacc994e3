"""The largest and the smallest eigenvalue of a loss's Hessian, which `theory` needs."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optimorph._core.checks import check_function, check_integer, not_an_array
from optimorph._core.numbers import is_array, upcast
from optimorph._core.paths import leaf_paths
from optimorph._core.rounding import check_key
from optimorph._core.types import PyTree
from optimorph.linalg._newton_schulz import safe_denominator


class Extremes(NamedTuple):
    """The largest and the smallest eigenvalue of a Hessian as estimated, and a bound for each error."""

    largest: jax.Array
    smallest: jax.Array
    largest_error: jax.Array
    smallest_error: jax.Array

    @property
    def condition(self) -> jax.Array:
        """The condition number, largest / smallest; infinity if the Hessian is not positive definite."""
        positive = self.smallest > 0
        return jnp.where(positive, self.largest / jnp.where(positive, self.smallest, 1), jnp.inf)


def extremes(
    loss: Callable[..., Any], params: PyTree, *args: Any, steps: int = 32, key: jax.Array | None = None
) -> Extremes:
    """The largest and the smallest eigenvalue of the Hessian of a loss, by Lanczos' method.

        βₖ vₖ₊₁ = w - αₖ vₖ - βₖ₋₁ vₖ₋₁,  w = H vₖ,  αₖ = ⟨vₖ, w⟩        (1)
        T y = θ y,  T = tridiag(β, α, β)                                  (2)
        |λ - θ| ≤ βₛ |yₛ| for an eigenvalue λ                             (3)  s = steps

    The largest and the smallest θ are returned, and (3) as the error of each. Both θ are inside the spectrum,
    so the true largest eigenvalue can only be larger, and the true smallest one only smaller. A large error
    means that more steps are needed. An extreme eigenvalue that is far from all others converges first. With
    a condition number R the smallest eigenvalue takes a few times √R steps. v₁ is random. The iteration ends
    early if it has found the whole space, as with few parameters; the eigenvalues are then exact. In float32
    the rounding error is about 1e-6 of the largest eigenvalue, so use float64 for condition numbers above
    1e5.

    Every v is made orthogonal to all previous ones, so `steps` copies of the parameters are kept, in float32
    or wider. The loss is called with parameters of that dtype too. The program is compiled once for each loss
    and set of shapes. So pass the same function again instead of a new lambda, and pass data through `args`.

    `theory` computes a learning rate from both eigenvalues. Add the error to the largest eigenvalue, because
    training diverges if it is underestimated:

        found = curvature.extremes(loss, params, batch)
        best = theory.polyak(float(found.largest + found.largest_error), float(found.smallest))
        tx = sgd(best.learning_rate, best.momentum)

    If the Hessian is not positive definite, `smallest` is not above 0, and `theory` raises an error. If the
    Hessian is singular, `smallest` is rounding noise around 0 and the condition number has no meaning.

    Args:
      loss: a function of params and args, `loss(params, *args)`, to one real number, twice differentiable.
      params: any tree of real arrays. Leaves that are None are left out.
      args: trees of arrays.
      steps: the number of products with the Hessian, at least 1.
      key: the key of the random v₁. The default is `jax.random.key(0)`.

    Raises:
      ValueError: a leaf that is not a real floating-point array, a tree without leaves, or fewer than one
        step.

    References:
      Lanczos 1950, "An iteration method for the solution of the eigenvalue problem of linear differential
      and integral operators"; (3): Parlett 1998, "The symmetric eigenvalue problem", section 13.2; products:
      Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    check_integer("extremes", "steps", steps, 32)
    if key is not None:
        check_key("extremes", key)
    check_function("extremes", "loss", loss, "the parameters and args", params, *args)
    _check(params)
    params = jax.tree.map(upcast, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    key = jax.random.key(0) if key is None else key
    return _extremes(loss, params, args, key, min(int(steps), size))


@functools.partial(jax.jit, static_argnums=(0, 4))
def _extremes(loss: Callable[..., Any], params: PyTree, args: Any, key: jax.Array, steps: int) -> Extremes:
    _, product = jax.linearize(lambda w: jax.grad(loss)(w, *args), params)
    kind = max((leaf.dtype for leaf in jax.tree.leaves(params)), key=lambda dtype: dtype.itemsize)

    def hessian(v: PyTree) -> PyTree:
        w = product(jax.tree.map(lambda x, p: x.astype(p.dtype), v, params))
        return jax.tree.map(lambda x: x.astype(kind), w)

    start = optax.tree.random_like(key, params, jax.random.normal, kind)
    alpha, beta = _lanczos(hessian, start, steps)
    t = jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    scale = safe_denominator(jnp.max(jnp.abs(t)))
    values, vectors = jnp.linalg.eigh(t / scale)  # (2)
    values, errors = scale * values, beta[-1] * jnp.abs(vectors[-1])  # (3)
    return Extremes(values[-1], values[0], errors[-1], errors[0])


def _lanczos(hessian: Callable[[PyTree], PyTree], start: PyTree, steps: int) -> tuple[jax.Array, jax.Array]:
    """α and β of (1). Once v has run out, they are α₁ and 0, whose eigenvalue is never beyond the others."""
    length, v = _normalized(start)
    zeros = jnp.zeros(steps, length.dtype)

    def outside(basis, w):
        return jax.tree.map(operator.sub, w, _combination(basis, _components(basis, w)))

    def step(k, carry):
        basis, v, alpha, beta = carry
        basis = jax.tree.map(lambda b, x: b.at[k].set(x), basis, v)
        w = hessian(v)
        alpha = alpha.at[k].set(jnp.where((_norm(v) > 0) | (k == 0), _inner(v, w), alpha[0]))
        w = outside(basis, outside(basis, w))  # (1); twice is enough to be orthogonal to rounding
        b, v = _normalized(w)
        c, v = _normalized(outside(basis, v))  # 1, or less where w is rounding noise
        goes_on = c > 0.5
        beta = beta.at[k].set(jnp.where(goes_on, b * c, 0))
        return basis, jax.tree.map(lambda x: jnp.where(goes_on, x, 0), v), alpha, beta

    basis = jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), start)
    _, _, alpha, beta = jax.lax.fori_loop(0, steps, step, (basis, v, zeros, zeros))
    return alpha, beta


def _normalized(w: PyTree) -> tuple[jax.Array, PyTree]:
    """‖w‖ and w / ‖w‖; zeros of zeros."""
    length = _norm(w)
    return length, jax.tree.map(lambda x: x / safe_denominator(length), w)


def _components(basis: PyTree, w: PyTree) -> jax.Array:
    """⟨vⱼ, w⟩ for every j."""
    each = jax.tree.map(lambda b, x: jnp.tensordot(b, x, x.ndim, precision="highest"), basis, w)
    return jax.tree.reduce(operator.add, each)


def _combination(basis: PyTree, components: jax.Array) -> PyTree:
    """Σ cⱼ vⱼ."""
    return jax.tree.map(lambda b: jnp.tensordot(components, b, 1, precision="highest"), basis)


def _inner(v: PyTree, w: PyTree) -> jax.Array:
    return jax.tree.reduce(operator.add, jax.tree.map(lambda x, y: jnp.sum(x * y), v, w))


def _norm(v: PyTree) -> jax.Array:
    """‖v‖, whose squares neither overflow nor vanish."""
    largest = jax.tree.reduce(jnp.maximum, jax.tree.map(lambda x: jnp.max(jnp.abs(x), initial=0), v))
    scaled = jax.tree.map(lambda x: x / safe_denominator(largest), v)
    return largest * jnp.sqrt(_inner(scaled, scaled))


def _check(params: PyTree) -> None:
    leaves = jax.tree.leaves(params)
    for path, leaf in zip(leaf_paths(params), leaves, strict=True):
        if not is_array(leaf):
            raise ValueError(not_an_array("extremes", path, leaf))
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(
                f"extremes: {path!r} is of {jnp.result_type(leaf)}, but a Hessian is of real floating "
                "numbers. Give the real and imaginary parts of complex numbers, and integers through args: "
                "eqx.partition(model, eqx.is_inexact_array)."
            )
    if not sum(jnp.size(leaf) for leaf in leaves):
        raise ValueError(
            "extremes: params has no numbers, so there is no Hessian. Type extremes(loss, params)."
        )


__all__ = ["Extremes", "extremes"]
__dir__ = __all__.copy  # dir() shows the public names alone
