"""Constrained plans and multipliers against IPOPT."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constrained_problems import (
    PROBLEMS,
    SWERVE,
    active_set,
    between,
    gradient,
    ipopt,
    kkt_errors,
    rows,
)
from constrained_solves import (
    as_dict,
    assert_gradients_close,
    compiled,
    each_problem,
    lane,
    loss,
    one_by_one,
    plain,
    program,
    solve,
    value,
)
from helpers import assert_close

from jaxmpc import Options, Status

pytestmark = pytest.mark.xdist_group("constrained")  # they share compiled programs


def _any(masks):
    return any(np.any(mask) for mask in masks.values())


@each_problem
def test_plans_and_multipliers_are_those_of_ipopt(name):
    problem, (_, solutions) = PROBLEMS[name], plain(name)
    assert np.all(np.asarray(solutions.status) == Status.CONVERGED)
    assert np.max(solutions.violation) <= 1e-9
    kinds = set()

    @jax.jit
    def facts(*point):
        return kkt_errors(problem, *point), active_set(problem, *point, margin=0)

    for i, x_init in enumerate(problem.x_init):
        solution, inputs = lane(solutions, i), problem.at(x_init)
        # Both start from the same plan; without that, they may find different local minima.
        want = ipopt(problem, inputs)
        assert_close(solution.objective, want.objective, 1e-9)
        assert_close(solution.u, want.u, 1e-6)
        assert_close(solution.x, want.x, 1e-6)
        assert_close(solution.costate, want.costate, 1e-6)
        multipliers = as_dict(solution.multipliers)
        scale = max(np.max(np.abs(nu)) for nu in want.multipliers.values())
        assert_close(multipliers, want.multipliers, 1e-6, scale=scale)
        errors, active = facts(inputs, solution.u, multipliers)
        assert max(map(float, errors.values())) <= 1e-8, errors
        assert_close(~solution.free, active.at_lower | active.at_upper, 0)
        kinds |= {kind for kind in ("held", "paid") if _any(getattr(active, kind))}
        kinds |= {"bounds"} if np.any(~solution.free) else set()
        kinds |= {"no bounds"} if np.any(solution.free) else set()
    # The starts reach every kind of activity that the problem is there for.
    assert {"bounds", "no bounds", "held"} <= kinds
    assert ("paid" in kinds) == any(key in problem.inputs for key in ("slack", "terminal_slack"))


@pytest.mark.slow  # the problem `everything` has rows of the rate that hold, too
def test_tight_limits_of_the_rate():
    problem = PROBLEMS["slew"]
    run = jax.jit(jax.vmap(lambda x: solve(problem, jax.tree.map(jnp.asarray, problem.at(x)))))
    solutions = run(jnp.asarray(problem.x_init))
    assert np.all(solutions.status == Status.CONVERGED)
    for i, x_init in enumerate(problem.x_init):
        want = ipopt(problem, problem.at(x_init))
        assert np.sum(np.abs(want.multipliers["rate"]) > 1e-6) > 10
        assert_close(solutions.u[i], want.u, 1e-6)
        assert_close(solutions.objective[i], want.objective, 1e-9)


@functools.cache
def around_the_disc(dtype):
    def plan(x):
        return solve(SWERVE, jax.tree.map(lambda a: jnp.asarray(a, dtype), SWERVE.at(x)))

    return jax.jit(jax.vmap(plan))(jnp.asarray(SWERVE.x_init, dtype))


@pytest.mark.slow
def test_a_disc_in_the_way_in_float32():
    """Where multipliers are large, so is the rounding of what they multiply."""
    solutions, low = around_the_disc(jnp.float64), around_the_disc(jnp.float32)
    assert np.all(low.status == Status.CONVERGED)
    assert_close(low.u, solutions.u, 1e-2)
    assert_close(low.objective, solutions.objective, 1e-4)


@pytest.mark.slow  # beside IPOPT, and with such a limit of the rate, is `everything`
def test_a_disc_in_the_way():
    solutions = around_the_disc(jnp.float64)
    errors_of = jax.jit(functools.partial(kkt_errors, SWERVE))
    assert np.all(solutions.status == Status.CONVERGED)
    for i, x_init in enumerate(SWERVE.x_init):
        solution, inputs = lane(solutions, i), SWERVE.at(x_init)
        # From the same side: the other one has a local minimum of its own.
        want = ipopt(SWERVE, inputs, solution.u)
        assert np.max(want.multipliers["inequality"]) > 30
        assert_close(solution.u, want.u, 1e-6)
        assert_close(solution.objective, want.objective, 1e-9)
        errors = errors_of(inputs, solution.u, as_dict(solution.multipliers))
        assert max(map(float, errors.values())) <= 1e-7, errors


@each_problem
def test_inactive_rows_have_no_multiplier_and_active_ones_no_slack(name):
    problem, (_, solutions) = PROBLEMS[name], plain(name)
    for i, x_init in enumerate(problem.x_init):
        solution, inputs = lane(solutions, i), problem.at(x_init)
        for key, row in rows(problem, inputs, solution.x, solution.u).items():
            nu = as_dict(solution.multipliers)[key]
            if "inequality" in key:
                assert np.all(nu >= 0)
                assert np.all(nu[row < -1e-6] == 0)
            elif key in ("rate", "state"):
                lower, upper = map(np.asarray, between(inputs, key, row))
                assert np.all(nu[(row > lower + 1e-6) & (row < upper - 1e-6)] == 0)
                assert_close(row[nu > 0], upper[nu > 0], 1e-9)
                assert_close(row[nu < 0], lower[nu < 0], 1e-9)


def test_a_single_solve_equals_that_in_a_batch():
    _, solutions = plain("soft")
    for i, (_, alone) in enumerate(one_by_one("soft")):
        together = lane(solutions, i)
        assert int(alone.status) == int(together.status)
        # Their rounding differs, and with it, where ρ is large, the last digits.
        for field in ("x", "u", "costate", "objective", "multipliers"):
            assert_close(getattr(alone, field), getattr(together, field), 1e-8)


# Degenerate and equivalent formulations.


def twice(fn):
    return None if fn is None else lambda *args: jnp.concatenate([fn(*args), fn(*args)])


def folded(multipliers):
    """The sums of both; the rate is no function, and there once."""
    return {
        k: nu if k == "rate" else sum(jnp.split(nu, 2, axis=-1)) for k, nu in multipliers.items()
    }


TWICE = ["terminal equality", "stage equality", "friction cone", "state box"]


@pytest.mark.parametrize(
    "name", TWICE[:1] + [pytest.param(name, marks=pytest.mark.slow) for name in TWICE[1:]]
)
def test_a_constraint_that_stands_there_twice_is_the_same_constraint(name):
    """Only the sum of its multipliers is unique."""
    problem = PROBLEMS[name]
    functions = ("inequality", "equality", "terminal_inequality", "terminal_equality")
    doubled = dataclasses.replace(problem, **{k: twice(getattr(problem, k)) for k in functions})

    @jax.jit
    def run(x_init):
        def one(x_init):
            inputs = problem.at(x_init)
            grad, solution = jax.grad(value, 1, has_aux=True)(doubled, inputs, fold=folded)
            multipliers = folded(as_dict(solution.multipliers))
            want = gradient(loss, problem, solution.u, multipliers, inputs)
            return grad, want, solution, multipliers

        return jax.vmap(one)(x_init)

    grads, want_grads, solutions, multipliers = run(jnp.asarray(problem.x_init))
    assert np.all(np.asarray(solutions.status) == Status.CONVERGED)
    for i, x_init in enumerate(problem.x_init):
        want = ipopt(problem, problem.at(x_init))
        assert_close(solutions.u[i], want.u, 1e-6)
        assert_close(solutions.objective[i], want.objective, 1e-9)
        scale = max(np.max(np.abs(nu)) for nu in want.multipliers.values())
        assert_close(lane(multipliers, i), want.multipliers, 1e-6, scale=scale)
        assert_gradients_close(lane(grads, i), lane(want_grads, i), 1e-7)


@pytest.mark.slow
def test_a_rate_that_ends_in_a_bound_is_found():
    """Limit and bound hold one control at once: its multipliers are not unique, the plan is."""
    problem = PROBLEMS["rate"]
    rate = problem.inputs["rate"]
    rate = {**rate, "limit": np.tile([1.5, 0.6], (18, 1))}  # 0.5, −1, −2.5, −4, the bound
    _, solutions = compiled("rate")(rate=rate)
    assert np.all(np.asarray(solutions.status) == Status.CONVERGED)
    for i, x_init in enumerate(problem.x_init):
        want = ipopt(problem, {**problem.at(x_init), "rate": rate})
        assert_close(solutions.u[i], want.u, 1e-6)
        assert_close(solutions.objective[i], want.objective, 1e-9)
    assert np.any(np.abs(solutions.u[:, 2, 0]) == 4)


def test_an_infinite_slack_weight_is_a_hard_constraint():
    hard = PROBLEMS["state box"]
    infinite = {"linear": np.full((20, 2), np.inf), "quadratic": np.array([0.0, 0.5])}
    at_the_end = {"linear": np.full(3, np.inf), "quadratic": np.array([30.0, 5.0, 0.0])}
    grads, solutions = compiled("soft")(slack=infinite, terminal_slack=at_the_end)
    for key in ("slack", "terminal_slack"):
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads.pop(key)))

    @jax.jit
    def oracle(inputs, u, multipliers):
        return gradient(loss, hard, u, multipliers, inputs)

    for i, x_init in enumerate(hard.x_init):
        solution, want = lane(solutions, i), ipopt(hard, hard.at(x_init))
        assert solution.status == Status.CONVERGED
        assert solution.violation <= 1e-9
        assert_close(solution.u, want.u, 1e-6)
        assert_close(solution.objective, want.objective, 1e-9)
        multipliers = as_dict(solution.multipliers)
        assert_close(multipliers, want.multipliers, 1e-6)
        assert_gradients_close(
            lane(grads, i), oracle(hard.at(x_init), solution.u, multipliers), 1e-7
        )


@pytest.mark.slow
def test_an_infinite_rate_limit_is_none():
    problem = PROBLEMS["rate"]
    rate = {**problem.inputs["rate"], "limit": np.full((18, 2), np.inf)}
    grads, solutions = compiled("rate")(rate=rate)
    assert np.all(np.asarray(solutions.multipliers.rate) == 0)
    assert np.all(np.asarray(grads["rate"]["limit"]) == 0)
    unlimited = {k: v for k, v in rate.items() if k != "limit"}
    for i, x_init in enumerate(problem.x_init):
        want = ipopt(problem, {**problem.at(x_init), "rate": unlimited})
        assert solutions.status[i] == Status.CONVERGED
        assert_close(solutions.u[i], want.u, 1e-6)


def test_a_search_from_the_solution_ends_at_once():
    for name in ("soft", "everything"):
        _, cold = plain(name)
        grads, warm = compiled(name)(u_init=cold.u, multipliers=cold.multipliers)
        assert np.all(np.asarray(warm.status) == Status.CONVERGED)
        assert np.all(np.asarray(warm.iterations) <= np.minimum(cold.iterations / 2, 5))
        assert_close(warm.u, cold.u, 1e-8)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["obstacle", "soft", "everything"])
@pytest.mark.parametrize("options", [Options(riccati="parallel"), Options(hessian="ilqr")])
def test_options_change_the_way_and_not_the_answer(name, options):
    run = program(PROBLEMS[name], options=options)
    problem = PROBLEMS[name]
    inputs = jax.tree.map(jnp.asarray, problem.at(jnp.asarray(problem.x_init)))
    want_grads, want = plain(name)
    zeros = jax.tree.map(jnp.zeros_like, want.multipliers)
    grads, got = run(inputs, jnp.tile(problem.u_init, (3, 1, 1)), zeros)
    assert np.all(np.asarray(got.status) == Status.CONVERGED)
    assert_close(got.u, want.u, 1e-7)
    for i in range(3):
        assert_gradients_close(lane(grads, i), lane(want_grads, i), 1e-6)
