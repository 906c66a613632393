"""The unrolled iterations: the fixed point's derivative in the limit, their own before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Options, Status, ilqr_unrolled, mpc_solve
from jaxmpc.systems import pendulum

T = 8
PARAMS = pendulum.default_params()
X_INIT = pendulum.state(2.0, 0.5)


def solve(solver, g, upper, **kwargs):
    params = PARAMS._replace(physics=PARAMS.physics._replace(g=g))
    return solver(
        pendulum.cost, pendulum.dynamics, X_INIT, jnp.zeros((T, 1)), params,
        u_lower=-2.0, u_upper=upper, **kwargs,
    )  # fmt: skip


def loss(theta, solver, **kwargs):
    s = solve(solver, *theta, **kwargs)
    values = jnp.sum(jnp.sin(s.u)) + jnp.sum(s.x**2) + 0.1 * jnp.sum(s.costate**2)
    return values + s.objective, s


def test_at_the_fixed_point_both_derivatives_agree():
    theta = jnp.array([10.0, 1.1])

    def both(solver, **kwargs):
        return jax.jit(jax.grad(functools.partial(loss, solver=solver, **kwargs), has_aux=True))

    got, unrolled = both(ilqr_unrolled, num_iterations=25)(theta)
    want, fixed = both(mpc_solve)(theta)
    assert unrolled.status == fixed.status == Status.CONVERGED
    assert 0 < np.mean(fixed.free) < 1
    assert_close(unrolled.u, fixed.u, 1e-8)
    assert_close(unrolled.K, fixed.K, 1e-6)
    assert_close(got, want, 1e-6)


@pytest.mark.parametrize("controls", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_before_it_the_derivative_is_that_of_the_iterations(controls):
    """Against central differences of the unrolled computation itself."""

    def dynamics(x, u, t, g):
        push = u if controls == 2 else jnp.concatenate([u, jnp.zeros(1)])
        return x + 0.2 * jnp.stack([x[1] + push[1], g * jnp.sin(x[0]) + push[0]])

    def cost(x, u, t, g):
        return jnp.sum(1 - jnp.cos(x)) + 0.1 * u @ u

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(g):
        s = ilqr_unrolled(
            cost, dynamics, jnp.array([2.0, 0.3]), jnp.zeros((5, controls)), g,
            u_lower=-0.8, u_upper=0.7, num_iterations=2,
        )  # fmt: skip
        return jnp.sum(jnp.sin(s.u)) + s.objective, s

    (_, s), grad = run(1.3)
    assert s.status == Status.MAX_ITERATIONS
    assert 0 < np.mean(s.free) < 1
    h = 1e-6
    (above, _), (below, _) = run(1.3 + h)[0], run(1.3 - h)[0]
    assert_close(grad, (above - below) / (2 * h), 1e-6)


@functools.cache
def unrolled(num_iterations):
    return solve(ilqr_unrolled, 10.0, 2.0, num_iterations=num_iterations)


def test_no_iterations_is_the_rollout_of_u_init():
    s = unrolled(0)
    assert np.all(np.asarray(s.u) == 0)
    assert s.iterations == 0
    assert s.status == Status.MAX_ITERATIONS


def test_the_objective_never_rises():
    values = [float(unrolled(count).objective) for count in (0, 1, 3)]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[-1] > 0.1


@pytest.mark.parametrize("count, error", [(-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_num_iterations_is_checked(count, error):
    with pytest.raises(error, match="num_iterations must be"):
        solve(ilqr_unrolled, 10.0, 2.0, num_iterations=count)


def test_other_statuses():
    bad = ilqr_unrolled(
        pendulum.cost, pendulum.dynamics, jnp.full(3, jnp.nan), jnp.zeros((T, 1)), PARAMS,
        num_iterations=1, options=Options(),
    )  # fmt: skip
    assert bad.status == Status.NONFINITE
    crossed = jax.jit(lambda upper: solve(ilqr_unrolled, 10.0, upper, num_iterations=1))(-3.0)
    assert crossed.status == Status.INFEASIBLE
