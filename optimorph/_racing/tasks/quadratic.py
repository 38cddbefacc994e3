"""Pathological curvature: a quadratic whose condition number you choose."""

import itertools

import jax.numpy as jnp
import numpy as np

from optimorph import theory
from optimorph._racing.task import Task

SIZE = 32
WORST = 1e6  # beyond it float32 no longer keeps the smallest eigenvalue positive


def task(condition: float = 1e3) -> Task:
    """Bring a matrix W to zero on ½ tr(Wᵀ H W), the eigenvalues of H spread from 1/R to 1.

    Descent, heavy ball and Nesterov's method get the step size and momentum that theory gives for R; the
    others have theirs from a sweep at R = 1000. Nobody decays weights, as the solution is zero.

    Args:
      condition: R, from 1 to `WORST`.
    """
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    hessian = jnp.asarray(basis * np.geomspace(1 / condition, 1, SIZE) @ basis.T, jnp.float32)
    curvature = (1.0, 1 / condition)
    descent, ball, look = (
        theory.gradient_descent(*curvature),
        theory.polyak(*curvature),
        theory.nesterov(*curvature),
    )

    def start(seed):
        return np.random.default_rng(seed).standard_normal((SIZE, SIZE)).astype(np.float32)

    def loss(params, batch):
        w = params["kernel"]
        return 0.5 * jnp.sum(w * (hessian @ w))

    return Task(
        name="quadratic",
        title=f"quadratic of condition number {condition:g}",
        measure="loss",
        init=lambda seed: {"kernel": jnp.asarray(start(seed))},
        loss=loss,
        batches=lambda seed: itertools.repeat(()),
        held_out=lambda part: [()],
        steps=500,
        schedule=lambda peak, steps: lambda count: peak,
        momentum={"momentum": ball.momentum, "nesterov": look.momentum},
        weight_decay=0.0,
        theory={
            "sgd": descent.learning_rate,
            "momentum": ball.learning_rate,
            "nesterov": look.learning_rate,
        },
    )
