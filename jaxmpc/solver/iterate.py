"""Where the search is: controls, their rollout, and what it minimises there."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import constraint_values, rollout, stage_costs
from jaxmpc.problem.prices import Prices
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.riccati.point import Rows
from jaxmpc.solver import augmented
from jaxmpc.solver.augmented import Penalty


class Iterate(NamedTuple):
    """A control sequence, its rollout and what it costs."""

    u: Array  # [T, m]
    x: Array  # [T+1, n]
    costs: Array  # [T+1]
    g: Rows  # the values of the constraints
    penalty: Penalty  # what they are judged by


def new_iterate(problem: Problem, data: Data, u: Array) -> Iterate:
    """The iterate of the controls u, from which a search starts."""
    x = rollout(problem, data.theta, data.x_init, u)
    penalty = augmented.start(data.multipliers, jnp.zeros_like(x[0, 0]))
    return evaluated(problem, data, u, x, penalty)


def evaluated(problem: Problem, data: Data, u: Array, x: Array, penalty: Penalty) -> Iterate:
    """The iterate of the controls u and their rollout x."""
    costs = stage_costs(problem, data.theta, x, u)
    return Iterate(u, x, costs, constraint_values(problem, data.theta, x, u), penalty)


def merits(at: Iterate, prices: Prices) -> Array:
    """What the search minimises the sum of, [T+1]: the costs, with what the constraints add."""
    stage, final = augmented.values(at.g, at.penalty, prices)
    sums = jnp.sum(stage, axis=1), jnp.sum(final, axis=0, keepdims=True)
    return at.costs + jnp.concatenate(sums)


def rounding(at: Iterate, costate: Array, prices: Prices) -> Array:
    """The size of rounding in the objective: that of the costs, and that of each state, which the
    costates amplify."""
    costs, states = jnp.abs(merits(at, prices)), jnp.abs(costate * at.x)
    return lanes.eps(costs) * (4 * jnp.sum(costs, axis=0) + jnp.sum(states, axis=(0, 1)))
