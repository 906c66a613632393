"""Where the search is: controls, their rollout, and what it costs."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import rollout, stage_costs
from jaxmpc.problem.problem import Data, Problem


class Iterate(NamedTuple):
    """A control sequence, its rollout and what it costs."""

    u: Array  # [T, m]
    x: Array  # [T+1, n]
    costs: Array  # [T+1]


def new_iterate(problem: Problem, data: Data, u: Array) -> Iterate:
    """The iterate of the controls u, from which a search starts."""
    x = rollout(problem, data.theta, data.x_init, u)
    return Iterate(u, x, stage_costs(problem, data.theta, x, u))


def rounding(at: Iterate, costate: Array) -> Array:
    """The size of rounding in the objective: that of the costs, and that of each state, which the
    costates amplify."""
    costs, states = jnp.abs(at.costs), jnp.abs(costate * at.x)
    return lanes.eps(costs) * (4 * jnp.sum(costs, axis=0) + jnp.sum(states, axis=(0, 1)))
