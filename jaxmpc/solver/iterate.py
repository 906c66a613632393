"""Where the search is: controls, their rollout, and what it minimises there."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmpc.problem.expansions import constraint_values, rollout, stage_costs
from jaxmpc.problem.problem import Data, Model
from jaxmpc.solver import augmented
from jaxmpc.solver.augmented import Penalty


class Iterate(NamedTuple):
    """A control sequence, its rollout and what it costs."""

    u: Array  # [T, m]
    x: Array  # [T+1, n]
    costs: Array  # [T+1]
    # Of the constraints, if there are any.
    g: Any = None  # Rows, their values
    penalty: Any = None  # Penalty, what the point is judged by


def iterate(model: Model, data: Data, u: Array) -> Iterate:
    """The point that the controls u lead to."""
    x = rollout(model, data.theta, data.x_init, u)
    penalty = None
    if model.constrained:
        penalty = augmented.start(data.multipliers, jnp.zeros_like(x[0, 0]))
    return _iterate(model, data, u, x, penalty)


def _iterate(model: Model, data: Data, u: Array, x: Array, penalty: Penalty | None) -> Iterate:
    costs = stage_costs(model, data.theta, x, u)
    return Iterate(u, x, costs, constraint_values(model, data.theta, x, u), penalty)


def merits(point: Iterate, prices: Any) -> Array:
    """What the search minimises the sum of, [T+1]: the costs, with what the constraints add."""
    if point.penalty is None:
        return point.costs
    stage, final = augmented.values(point.g, point.penalty, prices)
    costs = point.costs
    costs = costs if stage is None else costs.at[:-1].add(jnp.sum(stage, axis=1))
    return costs if final is None else costs.at[-1].add(jnp.sum(final, axis=0))


def rounding(point: Iterate, costate: Array, prices: Any) -> Array:
    """The size of rounding in the objective: that of the costs, and that of each state, which the
    costates amplify."""
    eps = float(jnp.finfo(point.x.dtype).eps)
    costs, states = jnp.abs(merits(point, prices)), jnp.abs(costate * point.x)
    return eps * (4 * jnp.sum(costs, axis=0) + jnp.sum(states, axis=(0, 1)))
