"""A quadratic with a condition number of the user's choice."""

import itertools

import jax.numpy as jnp
import numpy as np

from optimorph import theory
from optimorph._racing.task import Task

SIZE = 32
WORST = 1e6  # for a larger condition number, rounding to float32 can make the smallest eigenvalue negative


def task(condition: float = 1e3) -> Task:
    """Minimize ½ tr(Wᵀ H W) over a matrix W. The eigenvalues of H are spread from 1/R to 1.

    `sgd`, `momentum` and `nesterov` use the learning rate and momentum that theory gives for R. The learning
    rates of the other optimizers are from a sweep at R = 1000. There is no weight decay, because it would
    help to reach the solution, which is zero. R, the condition number, is from 1 to `WORST`.
    """
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    hessian = jnp.asarray(basis * np.geomspace(1 / condition, 1, SIZE) @ basis.T, jnp.float32)
    curvature = (1.0, 1 / condition)
    sgd, momentum = theory.gradient_descent(*curvature), theory.polyak(*curvature)
    nesterov = theory.nesterov(*curvature)

    def init(seed):
        kernel = np.random.default_rng(seed).standard_normal((SIZE, SIZE)).astype(np.float32)
        return {"kernel": jnp.asarray(kernel)}

    def loss(params, batch):
        w = params["kernel"]
        return 0.5 * jnp.sum(w * (hessian @ w))

    return Task(
        name="quadratic",
        title=f"quadratic of condition number {condition:g}",
        measure="loss",
        init=init,
        loss=loss,
        batches=lambda seed: itertools.repeat(()),
        held_out=lambda part: [()],
        steps=500,
        schedule=lambda peak, steps: lambda count: peak,
        momentum={"momentum": momentum.momentum, "nesterov": nesterov.momentum},
        weight_decay=0.0,
        theory={
            "sgd": sgd.learning_rate,
            "momentum": momentum.learning_rate,
            "nesterov": nesterov.learning_rate,
        },
    )
