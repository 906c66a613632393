"""Constraints that cannot be met: the status, and how close the plan comes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constrained_problems import DT, PROBLEMS, ipopt
from constrained_solves import BAD, compiled, lane, spoiled
from helpers import assert_close

from jaxmpc import Constraints, Status, mpc_solve

pytestmark = pytest.mark.xdist_group("constrained")  # they share compiled programs

# Infeasible problems.


def test_a_limit_that_a_stage_is_too_short_to_keep_is_infeasible_by_its_distance():
    _, solutions = compiled("soft")(x_init=spoiled("soft", "out of the box"))
    problem = PROBLEMS["soft"]
    angle, speed = map(float, BAD["out of the box"][0])
    params = problem.inputs["params"]
    fastest = params["fastest"]
    assert solutions.status[1] == Status.INFEASIBLE
    # The first state is not the plan's to choose; it can brake with 5 until the second.
    assert_close(solutions.initial_violation[1], speed - fastest, 1e-12)
    second = speed + DT * (params["gravity"] * np.sin(angle) - 5 - 0.1 * speed)
    assert_close(solutions.violation[1], second - fastest, 1e-6)
    assert_close(solutions.violations.inequality[1, 1, 0], second - fastest, 1e-6)
    # Two steps are enough to get below it, where the limit is hard.
    assert np.max(solutions.x[1, 2:-1, 1]) <= fastest + 1e-3


@pytest.mark.slow
def test_a_target_out_of_reach_is_missed_by_as_little_as_can_be():
    """In the sum of squares, which is what IPOPT minimises here in place of the cost."""
    problem, target = PROBLEMS["terminal equality"], np.array([-9.0, 0.5])
    params = {**problem.inputs["params"], "target": target}
    grads, solutions = compiled("terminal equality")(params=params)
    assert np.all(np.asarray(solutions.status) == Status.INFEASIBLE)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))

    def miss(x, params):
        return (x[0] - params["target"][0]) ** 2 + (x[1] - params["target"][1]) ** 2

    nearest = dataclasses.replace(
        problem,
        cost=lambda x, u, t, params: 0.0 * u[0],
        terminal_cost=miss,
        terminal_equality=None,
    )
    for i, x_init in enumerate(problem.x_init):
        solution = lane(solutions, i)
        want = ipopt(nearest, {**problem.at(x_init), "params": params}, solution.u)
        missed = np.asarray(solution.x[-1]) - target
        assert_close(np.sum(missed**2), want.objective, 1e-3)
        assert_close(solution.violation, np.max(np.abs(missed)), 1e-12)


def test_the_least_violation_of_an_integrator_is_known():
    """From 0, ten steps of at most 0.1: 1 is as far as it gets of the 5 that it should."""

    @jax.jit
    def run(target):
        return mpc_solve(
            lambda x, u, t, p: u @ u, lambda x, u, t, p: x + 0.1 * u, jnp.zeros(1),
            jnp.zeros((10, 1)), target, u_lower=-1.0, u_upper=1.0,
            constraints=Constraints(terminal_equality=lambda x, target: x - target),
        )  # fmt: skip

    solution = run(5.0)
    assert solution.status == Status.INFEASIBLE
    assert_close(solution.violation, 4.0, 1e-9)
    assert_close(solution.u, jnp.ones((10, 1)), 1e-9)
    solution = run(0.8)  # of the plans that get there, the evenest
    assert solution.status == Status.CONVERGED
    assert_close(solution.u, jnp.full((10, 1), 0.8), 1e-9)
    assert_close(solution.multipliers.terminal_equality, jnp.array([-16.0]), 1e-8)
