"""What constraints say of x_init alone is not the plan's to meet."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Constraints, Slack, Status, mpc_solve, receding_horizon
from jaxmpc.problem.trace import trace

T, DT, PRICE = 10, 0.1, 3.0
BEYOND = jnp.array([0.0, 1e-8, 1e-3, 0.2])  # the speed past its limit of 1


def cost(x, u, t, p):
    return (x[0] - 3) ** 2 + 0.1 * u[0] ** 2


def dynamics(x, u, t, p):
    return x + DT * jnp.stack([x[1], u[0]])


def speeding(x, u, t, p):
    return x[1:] - 1


def along_the_limit(d, constraints):
    x_init = jnp.stack([jnp.zeros_like(d), 1 + d])
    solution = mpc_solve(
        cost, dynamics, x_init, jnp.zeros((T, 1)), u_lower=-5.0, u_upper=5.0,
        constraints=constraints,
    )  # fmt: skip
    return solution.u[0, 0], solution


def solved(constraints):
    run = jax.value_and_grad(along_the_limit, has_aux=True)
    (_, solution), slope = jax.jit(jax.vmap(lambda d: run(d, constraints)))(BEYOND)
    return solution, slope


def brakes_at_once(solution, slope):
    """The first control brings the speed to 1, where it stays."""
    assert np.all(np.asarray(solution.status) == Status.CONVERGED)
    assert_close(solution.u[:, 0, 0], -BEYOND / DT, 1e-7)
    assert np.max(np.abs(solution.u[:, 1 : T - 1])) <= 1e-7
    assert_close(slope, np.full(len(BEYOND), -1 / DT), 1e-7)
    assert np.max(solution.violation) <= 1e-9
    assert_close(solution.initial_violation, BEYOND, 1e-7)


@pytest.mark.slow  # it goes the same way beside other rows, and in closed loop
def test_a_first_state_past_its_limit_is_no_failure():
    solution, slope = solved(Constraints(inequality=speeding))
    brakes_at_once(solution, slope)
    assert np.all(np.asarray(solution.multipliers.inequality[:, 0]) == 0)
    assert_close(solution.violations.inequality[:, 0, 0], BEYOND, 1e-7)
    assert np.max(solution.violations.inequality[:, 1:]) <= 1e-9


def test_an_equality_that_the_first_state_breaks_neither_and_soft_rows_keep_their_price():
    constraints = Constraints(equality=speeding, inequality=speeding, slack=Slack(linear=PRICE))
    solution, slope = solved(constraints)
    brakes_at_once(solution, slope)
    assert np.all(np.asarray(solution.multipliers.equality[:, 0]) == 0)
    for row in (solution.violations.equality, solution.violations.inequality):
        assert_close(row[:, 0, 0], BEYOND, 1e-7)
        assert np.max(row[:, 1:]) <= 1e-9
    paid = solution.objective - jax.vmap(costs)(solution.x, solution.u)
    assert_close(paid, PRICE * BEYOND, 1e-9)


def costs(x, u):
    return jnp.sum(jax.vmap(cost, (0, 0, None, None))(x[:-1], u, 0, None))


def test_along_a_hard_limit_noise_costs_no_step():
    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(noise):
        episode = receding_horizon(
            cost, dynamics, jnp.array([0.0, 1.0]), jnp.zeros((T, 1)), num_steps=len(noise),
            plant=lambda x, u, t, p: dynamics(x, u, t, p) + noise[t] * jnp.array([0.0, 1.0]),
            u_lower=-5.0, u_upper=5.0, constraints=Constraints(inequality=speeding),
        )  # fmt: skip
        return jnp.vdot(jnp.arange(1.0, 7.0), episode.u[:, 0]), episode

    noise = jnp.array([0.1, -0.05, 1e-6, 1e-9, 0.02, -0.3])
    (_, episode), slope = run(noise)
    assert np.all(np.asarray(episode.status) == Status.CONVERGED)
    # Each control takes back what the noise before it did.
    assert_close(episode.u[:, 0], -jnp.concatenate([jnp.zeros(1), noise[:-1]]) / DT, 1e-6)
    assert_close(slope, -jnp.array([2.0, 3.0, 4.0, 5.0, 6.0, 0.0]) / DT, 1e-6)


# Which rows no control moves.


def unmoved(fn, kind="inequality", slack=None, u=0.0, **bounds):
    constraints = Constraints(**{kind: fn}, slack=slack)
    x_init, u_init = jnp.array([0.0, 1.0]), jnp.full((2, 1), u)
    _, data, _ = trace(cost, dynamics, x_init, u_init, None, constraints=constraints, **bounds)
    return data.unmoved.tolist()


ROWS = {
    "the state alone": (lambda x, u, t, p: x - 1, [True, True]),
    "the state beside the control": (
        lambda x, u, t, p: jnp.stack([x[0], u[0], x[1] + u[0]]),
        [True, False, False],
    ),
    "flat at u_init": (lambda x, u, t, p: u**2 - 1, [False]),
    "through a product that is 0 at x_init": (lambda x, u, t, p: x * u[0], [True, False]),
    "from the second stage on": (lambda x, u, t, p: jnp.where(t > 0, u, -1), [True]),
}


@pytest.mark.parametrize("fn, want", ROWS.values(), ids=ROWS)
def test_which_rows_no_control_moves(fn, want):
    assert unmoved(fn) == want
    assert unmoved(fn, kind="equality") == want


def test_a_row_that_is_flat_between_some_of_the_controls():
    def beyond_a_dead_zone(x, u, t, p):
        return 1 - jnp.maximum(jnp.abs(u) - 0.1, 0)

    assert unmoved(beyond_a_dead_zone, u_lower=-2.0, u_upper=2.0) == [False]


def test_soft_rows_stay():
    slack = Slack(linear=jnp.array([jnp.inf, 1.0]))
    assert unmoved(lambda x, u, t, p: x - 1, slack=slack) == [True, False]


def test_no_function_is_looked_at_where_it_is_not_defined():
    def logarithm(x, u, t, p):
        return jnp.log(u)

    with jax.debug_nans(True):
        assert unmoved(logarithm, u=1e-3) == [False]
        assert unmoved(logarithm, u=1.0, u_lower=1e-6) == [False]
