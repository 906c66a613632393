"""What the interior-point method carries from trip to trip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.problem.expansions import constraint_values, stage_costs
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.problem.stages import transition
from jaxmpc.riccati.point import Rows
from jaxmpc.solver.interior.barrier import Layout, Pairs
from jaxmpc.solver.interior.filter import Filter

# What a trip is for: to measure the problem; a step of the barrier method; one of the restoration;
# one of the finish.
PROBE, INTERIOR, RESTORE, FINISH = 0, 1, 2, 3


class Values(NamedTuple):
    """The functions along a trajectory."""

    costs: Array  # [T+1]
    gaps: Array  # [T, n], by how much the dynamics do not hold
    g: Rows


class Trajectory(NamedTuple):
    x: Array  # [T+1, n]
    u: Array  # [T, m]
    costate: Array  # [T+1, n]
    pairs: Pairs
    values: Values


class Measures(NamedTuple):
    """What a problem's numbers are large or small against."""

    scale: Array  # what is to be gained, in units of the objective
    reach: Array  # [n+m], how far states and controls go for that
    freedom: Array  # of every row and bound, diag(G H⁻¹ Gᵀ): how far a unit of force moves it
    hold: Array  # the weights that hold rows


class Held(NamedTuple):
    """The active set that a finish begins with."""

    active: Array  # of every row, bool
    beyond: Array
    clamped: Array  # [T, m]


class Prices(NamedTuple):
    """What violation is summed with."""

    gaps: Array  # [T, n]
    rows: Array


class Search(NamedTuple):
    at: Trajectory
    # Where the barrier goes on after a finish; what a restoration stays near to.
    kept: Trajectory
    mode: Array
    tau: Array
    tau_before: Array  # a restoration
    measures: Measures
    filter: Filter
    prices: Prices
    still: Array  # the last step was a full one, and promised rounding only
    violation: Array  # the cost of it at which a restoration began
    weight: Array  # of every row in that cost
    held: Held
    fresh: Array  # the finish begins here, with the active set of the barrier
    error: Array  # of the finish, the least so far
    fewest: Array  # rows and bounds that it held, likewise
    misses: Array
    tries: Array  # finishes that have failed
    wait: Array  # so many τ before the next
    regularization: Array
    mirror: Array  # what replaces an indefinite Hessian: its own convex part, or that of the cost
    anew: Array  # begin again, with every state at x_init
    second: Array  # that has been done
    rested: Array  # [T, m], the controls of a least violation that was found before,
    rested_off: Array  # and how large that is, over the rows' sizes; inf: there is none
    leaving: Array  # nothing is left to try: go to a rollout,
    last: Array  # and evaluate it, and stop
    infeasible: Array
    restarts: Array
    iterations: Array


def layout_of(g: Rows, u: Array) -> Layout:
    return Layout(u.shape[0], g.stage.shape[1], g.final.shape[0], u.shape[1])


def evaluate(problem: Problem, data: Data, x: Array, u: Array) -> Values:
    step, now = transition(problem, data.theta, u)
    return Values(
        stage_costs(problem, data.theta, x, u),
        jax.vmap(step)(x[:-1], u, now) - x[1:],
        constraint_values(problem, data.theta, x, u),
    )


def tiny_of(a: Array) -> float:
    """Nothing that is divided by is smaller."""
    return float(jnp.finfo(a.dtype).tiny) ** 0.5
