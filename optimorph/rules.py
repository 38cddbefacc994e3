"""Make your own transform from a rule for one leaf.

    class SignState(NamedTuple):
        average: Any
        roles = holds(average=AVERAGE)

    def sign_of_average(decay):
        def init(leaf):
            return SignState(full_like(leaf.weight))

        def update(g, state, leaf, now):
            g, m = common(g, state.average)
            m = decay * m + (1 - decay) * g
            return jnp.sign(m), SignState(m)

        return transform("sign_of_average", Rule(roles_of(SignState), update, init=init))

`transform` adds everything that all transforms share: trees, missing and masked leaves, dtypes, and errors
that name the leaf. `optimorph.chain` merges neighbouring rules. The roles say what the fields of a state
hold. `compress_state`, probes and `carry_state` use them.
"""

from optimorph._core.numbers import as_float32, as_scalar, as_schedule, common, full_like, increment
from optimorph._core.own_rule import transform
from optimorph._core.roles import AVERAGE, TOTAL, VELOCITY, Role, holds, roles_of, scalar
from optimorph._core.rule import Leaf, Leaves, Rule, handed

__all__ = [
    "AVERAGE",
    "TOTAL",
    "VELOCITY",
    "Leaf",
    "Leaves",
    "Role",
    "Rule",
    "as_float32",
    "as_scalar",
    "as_schedule",
    "common",
    "full_like",
    "handed",
    "holds",
    "increment",
    "roles_of",
    "scalar",
    "transform",
]
__dir__ = __all__.copy  # dir() shows the public names alone
