"""Bounds of the states: what they mean where they are absent, scalar, crossed or alone.

Plans, multipliers and gradients are held against IPOPT and dense autodiff in the tests of all
constrained problems.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Affine, Constraints, Multipliers, Quadratic, Status, certify, mpc_solve
from jaxmpc.validation import state_bounds

T, N = 6, 2
CART = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))
COST = Quadratic(jnp.eye(3))
X_INIT, U_INIT = jnp.array([1.0, 0.0]), jnp.zeros((T, 1))
INF = jnp.inf
NONE = jnp.full((T + 1, N), INF)
TOO_FAST = -NONE.at[:, 1].set(0.2)

# A batch of bounds, all of which one program solves.
LANES = {
    "none": (-NONE, NONE),
    "lower": (TOO_FAST, NONE),
    "of the first state": (TOO_FAST.at[0].set(2.0), NONE.at[0].set(-2.0)),
    "crossed": (TOO_FAST.at[3, 1].set(0.5), NONE.at[3, 1].set(0.4)),
    "narrow": (TOO_FAST.at[3, 1].set(-0.1), NONE.at[3, 1].set(-0.1 + 1e-3)),
    "nan": (TOO_FAST.at[3, 1].set(jnp.nan), NONE),
}


@functools.cache
def lanes():
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def run(lower, upper, multipliers):
        def value(lower, upper):
            constraints = Constraints(x_lower=lower, x_upper=upper, multipliers=multipliers)
            solution = mpc_solve(COST, CART, X_INIT, U_INIT, constraints=constraints)
            return jnp.sum(jnp.sin(solution.x)) + solution.objective, solution

        grads, solution = jax.grad(value, (0, 1), has_aux=True)(lower, upper)
        constraints = Constraints(x_lower=lower, x_upper=upper)
        return solution, grads, certify(COST, CART, X_INIT, solution, constraints=constraints)

    bounds = [jnp.stack(side) for side in zip(*LANES.values(), strict=True)]
    found = run(*bounds, Multipliers(state=jnp.zeros((T + 1, N))))
    found = jax.tree.map(np.asarray, found)
    return {name: jax.tree.map(lambda a, i=i: a[i], found) for i, name in enumerate(LANES)}


def test_infinite_bounds_are_none():
    solution, grads, certificate = lanes()["none"]
    # Of ½ Σ |x|² + |u|², with the states as they follow from the controls.
    F, x, of_u, stages = np.asarray(CART.F), np.asarray(X_INIT), np.zeros((N, T)), []
    for t in range(T):
        stages.append(np.column_stack([x, of_u]))
        x, of_u = F[:, :N] @ x, F[:, :N] @ of_u + F[:, N:] * (np.arange(T) == t)
    states = np.concatenate(stages)
    start, moves = states[:, 0], states[:, 1:]
    u = -np.linalg.solve(moves.T @ moves + np.eye(T), moves.T @ start)
    assert solution.status == Status.CONVERGED
    assert_close(solution.u[:, 0], u, 1e-9)
    assert_close(solution.objective, 0.5 * (np.sum((start + moves @ u) ** 2) + u @ u), 1e-12)
    assert solution.violation == 0
    for absent in (solution.multipliers.state, solution.violations.state, *grads):
        assert np.all(absent == 0)
    # There is nothing from which a row that is absent could be far or near.
    assert certificate.slack == certificate.multiplier == np.inf


def test_a_lower_bound_holds_and_its_multiplier_is_negative():
    solution, (in_lower, in_upper), certificate = lanes()["lower"]
    assert solution.status == Status.CONVERGED
    speed, nu = solution.x[:, 1], solution.multipliers.state[:, 1]
    assert np.all(speed >= -0.2 - 1e-9)
    assert np.sum(nu < -1e-3) >= 2
    assert np.all(nu <= 0)
    assert_close(speed[nu < 0], np.full(np.sum(nu < 0), -0.2), 1e-9)
    assert np.all(in_upper == 0)
    assert np.all((in_lower[:, 1] != 0) == (nu != 0))
    assert certificate.slack == pytest.approx(np.min(speed[nu == 0][1:] + 0.2), rel=1e-6)


def test_bounds_of_the_first_state_do_not_count():
    got, want = lanes()["of the first state"], lanes()["lower"]
    assert_close(got[0].u, want[0].u, 1e-12)
    assert_close(got[1], want[1], 1e-12)
    assert got[0].violation == want[0].violation
    assert got[0].initial_violation == 0


def test_traced_bounds_that_cross_are_infeasible_alone():
    solution, grads, _ = lanes()["crossed"]
    assert solution.status == Status.INFEASIBLE
    # The least violation is half of the gap, on either side.
    assert_close(solution.violation, 0.05, 1e-3)
    assert_close(solution.violations.state[3, 1], 0.05, 1e-3)
    assert all(np.all(g == 0) for g in grads)


def test_narrow_bounds_hold():
    solution, *_ = lanes()["narrow"]
    assert solution.status == Status.CONVERGED
    assert -0.1 - 1e-9 <= solution.x[3, 1] <= -0.1 + 1e-3 + 1e-9


def test_a_bound_that_is_nan_is_no_bound_that_is_absent():
    solution, *_ = lanes()["nan"]
    assert solution.status == Status.NONFINITE


def test_one_stage_in_closed_form():
    """u = bound − x_0 is the least push that gets there, and u² has the slope 2u."""

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def run(x_init, lower, upper):
        constraints = Constraints(x_lower=lower, x_upper=upper)
        solution = mpc_solve(
            lambda x, u, t, p: u @ u, lambda x, u, t, p: x + u, x_init, jnp.zeros((1, 2)),
            constraints=constraints,
        )  # fmt: skip
        return solution.u @ jnp.array([1.0, 10.0]) @ jnp.ones(1), solution

    (_, solution), grads = run(jnp.array([0.5, 0.5]), 2.0, jnp.array([3.0, 2.0]))
    assert solution.status == Status.CONVERGED
    assert_close(solution.u, jnp.array([[1.5, 1.5]]), 1e-9)
    # The second is between equal bounds.
    assert_close(solution.multipliers.state, jnp.array([[0.0, 0.0], [-3.0, -3.0]]), 1e-9)
    assert_close(grads, (jnp.array([-1.0, -10.0]), jnp.array(6.0), jnp.array([0.0, 5.0])), 1e-9)


def test_what_bounds_broadcast_to():
    for value in (0.5, 1, [0.5, 1.0], np.full((4, 2), 0.5)):
        constraints = Constraints(x_lower=value, x_upper=np.inf)
        lower, upper = state_bounds(constraints, (4, 2), jnp.float32)
        assert_close(lower, np.broadcast_to(value, (4, 2)), 0)
        assert lower.dtype == upper.dtype == jnp.float32
    assert state_bounds(Constraints(), (4, 2), jnp.float32) == (None, None)


def unstable(x, u, t, p):
    return jnp.stack([1.5 * x[0] + 0.1 * x[1], x[1] + 0.1 * u[0] + 0.02 * jnp.sin(x[0])])


def price(x, u, t, p):
    return 0.5 * (x[0] ** 2 + 0.1 * x[1] ** 2 + 0.01 * u[0] ** 2)


def plan_of_unstable(x_init, guess):
    return mpc_solve(
        price, unstable, x_init, jnp.zeros((300, 1)), x_guess=guess,
        constraints=Constraints(x_lower=jnp.array([-jnp.inf, -0.85])),
    )  # fmt: skip


# By IPOPT (CasADi, multiple shooting, tolerance 1e-12), the states at x_init at first.
OF_UNSTABLE = 0.5877520455605931


def test_a_rollout_that_says_nothing_is_no_start():
    """1.5³⁰⁰ = 7e52: the states start at x_init instead, and so they do when they are told to."""
    x_init = jnp.array([0.1, 0.0])
    s = jax.jit(plan_of_unstable)(x_init, None)
    assert int(s.status) == Status.CONVERGED
    assert_close(s.objective, OF_UNSTABLE, 1e-9)
    assert_close(jnp.min(s.x[:, 1]), -0.85, 1e-12)
    assert_close(s.x[-1], np.zeros(2), 1e-9, scale=1)


@pytest.mark.slow
def test_so_it_starts_where_it_is_told_to():
    x_init = jnp.array([0.1, 0.0])
    held = jnp.broadcast_to(x_init, (301, 2))
    want = jax.jit(plan_of_unstable)(x_init, None)
    for guess in (held, 0 * held):
        s = jax.jit(plan_of_unstable)(x_init, guess)
        assert int(s.status) == Status.CONVERGED
        assert_close(s.u, want.u, 1e-9)
