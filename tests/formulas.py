"""Step by step against the float64 transcription: the comparison that the mutation tests must make fail."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rounding

STEPS = 24
COMPLEX = (3,)  # the shape of the complex leaf
CONDITION = 1000
"""Of 1 - 0.999^t in the first step, and of Muon's tables, whose slope at zero is 948 at most."""
TOLERANCE = {dtype: rounding.eps(dtype) * CONDITION for dtype in ("float64", "float32")}
TOLERANCE |= {half: rounding.eps(half) / 2 + TOLERANCE["float32"] for half in ("bfloat16", "float16")}
"""Of the largest update; in half precision the arithmetic is that of float32, and its result is rounded."""


def tolerance(entry, dtype):
    """Of an entry's largest update."""
    return TOLERANCE[dtype] * entry.condition


def worst_error(transform, entry, dtype="float32", steps=STEPS, compiled=True):
    """The largest difference from the paper's updates in any leaf, over that leaf's largest update.

    Both see the same gradient and the same weight at every step, so an error cannot hide in a trajectory.
    Not `compiled`, it takes a tenth of the time where a transform is tried once: operations are shared.
    """
    rng = np.random.default_rng(7)
    weights = {name: draw(rng, shape, dtype, False) for name, shape in shapes(entry, dtype).items()}
    rule = rule_of_all(entry, weights)
    state = transform.init(weights)
    update = jax.jit(transform.update) if compiled else transform.update
    errors, sizes = dict.fromkeys(weights, 0.0), dict.fromkeys(weights, 0.0)
    for _ in range(steps):
        gradients = {name: draw(rng, w.shape, w.dtype, entry.positive) for name, w in weights.items()}
        updates, state = update(gradients, state, weights)
        for name, expected in rule(
            *({k: exact(x) for k, x in t.items()} for t in (gradients, weights))
        ).items():
            assert jnp.finfo(updates[name].dtype).bits == jnp.finfo(gradients[name].dtype).bits
            error = np.max(np.abs(exact(updates[name]) - expected))
            errors[name] = max(errors[name], error if np.isfinite(error) else np.inf)
            sizes[name] = max(sizes[name], np.max(np.abs(expected)))
        weights = optax.apply_updates(weights, jax.tree.map(_real_like, updates, weights))
    return max(errors[name] / (sizes[name] or 1.0) for name in weights)


def rule_of_all(entry, names):
    """The paper's rule as one of all leaves."""
    if entry.together:
        return entry.paper()
    rules = {name: entry.paper() for name in names}
    return lambda g, w: {name: np.asarray(rule(g[name], w[name])) for name, rule in rules.items()}


def shapes(entry, dtype):
    if entry.matrices:
        return {"w_wide": (4, 9), "w_tall": (9, 4), "w_square": (5, 5)}
    leaves = {"matrix": (3, 4), "vector": (5,), "scalar": ()}
    return leaves if entry.real or dtype in ("bfloat16", "float16") else leaves | {"complex": COMPLEX}


def draw(rng, shape, dtype, positive):
    dtype = jnp.dtype(dtype)
    x = rng.standard_normal(shape)
    if shape == COMPLEX:
        x = x + 1j * rng.standard_normal(shape)
        dtype = jnp.dtype(jnp.complex128 if jnp.finfo(dtype).bits == 64 else jnp.complex64)
    return jnp.asarray(abs(x) if positive else x, dtype)


def exact(x):
    return np.asarray(x).astype(np.complex128 if jnp.iscomplexobj(x) else np.float64)


def _real_like(update, weight):
    """The square of a complex gradient is real; as an update of a complex weight it has no imaginary part."""
    return update.astype(weight.dtype)
