"""The plan of a barrier τ: ``Options(smoothed="plan")``."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxmpc.batch import lanes
from jaxmpc.derivative.implicit import Solver, policy_of, traced_once
from jaxmpc.derivative.isolation import by_policy, stand_in
from jaxmpc.problem.barrier import forces, with_barrier
from jaxmpc.problem.expansions import constraint_values, stage_costs
from jaxmpc.problem.prices import slack_price
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.riccati.point import Rows
from jaxmpc.solver.inside import start_inside
from jaxmpc.solver.loop import solver
from jaxmpc.types import Options, Smoothing, Solution, Status

Solve = Callable[[Data, Options], Solution]


def solving(
    problem: Problem, options: Options, attach: Callable[[Problem, Solver], Solve]
) -> Solve:
    """What solves the problem; ``attach`` makes of a problem and its solver a function that has the
    derivative, if it is to have one."""
    if options.smoothing is None:
        return attach(problem, traced_once(solver(problem)))
    if options.smoothed == "plan":
        solve = plan_inside(problem, attach)
    else:
        solve = attach(problem, traced_once(solver(problem)))

    def labelled(data: Data, options: Options) -> Solution:
        solution = solve(data, options)
        value = lax.stop_gradient(jnp.asarray(options.smoothing, data.x_init.dtype))
        how = Smoothing(jnp.broadcast_to(value, solution.status.shape), options.smoothed)
        return dataclasses.replace(solution, smoothing=how)

    return labelled


def plan_inside(problem: Problem, attach: Callable[[Problem, Solver], Solve]) -> Solve:
    """The plan with the barrier ``options.smoothing``, searched for from the exact one."""
    exactly = traced_once(solver(problem))

    def solve(data: Data, options: Options) -> Solution:
        dtype = data.x_init.dtype
        tau = lax.stop_gradient(jnp.asarray(options.smoothing, dtype))
        tau = jnp.where(tau > 0, tau, jnp.nan)
        options = dataclasses.replace(options, smoothing=None)
        fixed = lax.stop_gradient(data)
        exact, found = exactly(fixed, options)
        inner, moving = with_barrier(problem, data, tau)
        start = start_inside(problem, fixed, exact, found, tau)
        moving = moving._replace(u_init=lax.stop_gradient(start))
        closely = options
        if options.tolerance is None and not inner.constrained:
            # A rounding of a control is many of its distance from a bound: to the last digits.
            closely = dataclasses.replace(options, tolerance=64 * lanes.eps(dtype))
        plan = attach(inner, traced_once(solver(inner)))(moving, closely)
        hopeless = exact.status == Status.INFEASIBLE
        plan = dataclasses.replace(
            plan,
            iterations=exact.iterations + plan.iterations,
            status=jnp.where(hopeless, exact.status, plan.status),
        )
        return _without_barrier(problem, data, moving, plan, options)

    return solve


def _without_barrier(
    problem: Problem, data: Data, moving: Data, plan: Solution, options: Options
) -> Solution:
    """The objective and the multipliers of the problem itself, as functions of the plan."""
    solved, policy, blank = policy_of(plan, options)
    # What is not finite must not be differentiated.
    at = plan.x, plan.u, plan.multipliers, data.theta, data.prices, moving.theta
    x, u, multipliers, theta, prices, barrier = stand_in(solved, at, blank)
    g = constraint_values(problem, theta, x, u)
    objective = jnp.sum(stage_costs(problem, theta, x, u)) + slack_price(g, prices)
    found = objective, forces(g, barrier, multipliers)
    objective, multipliers = by_policy(found, policy, options.derivative)
    return dataclasses.replace(
        plan,
        objective=jnp.where(solved, objective, plan.objective),
        multipliers=lanes.select(solved, multipliers, lax.stop_gradient(_nan_like(multipliers))),
    )


def _nan_like(rows: Rows) -> Rows:
    nan: Rows = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), rows)
    return nan
