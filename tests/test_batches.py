"""Batches: each problem as if it were alone, whatever happens to the others."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jaxmpc import Options, Status, ilqr_box, mpc_solve
from jaxmpc.systems import pendulum

T = 12


def weighted():
    params = pendulum.default_params()
    return params._replace(cost=params.cost._replace(q=params.cost.q.at[-1].set(0.1)))


def solve(x_init, params, upper=2.0, options=Options()):
    return mpc_solve(
        pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params,
        u_lower=-upper, u_upper=upper, options=options,
    )  # fmt: skip


def starts(num):
    angle, rate = jax.random.uniform(jax.random.key(3), (2, num), minval=-1, maxval=1)
    return jax.vmap(pendulum.state)(jnp.pi * angle, rate)


def loss(solution):
    return (
        jnp.sum(jnp.sin(solution.u))
        + 0.1 * jnp.sum(solution.x**2, where=jnp.isfinite(solution.x))
        + jnp.sum(solution.objective, where=jnp.isfinite(solution.objective))
    )


def test_a_batch_with_mixed_convergence_equals_a_loop():
    x_init = starts(8)
    # Few iterations: some problems converge and some do not.
    options = Options(max_iterations=3)
    one = jax.jit(lambda x: ilqr_box(
        pendulum.cost, pendulum.dynamics, x, jnp.zeros((T, 1)), weighted(),
        u_lower=-2.0, u_upper=2.0, options=options,
    ))  # fmt: skip
    batch = jax.vmap(one)(x_init)
    assert len(np.unique(batch.status)) > 1
    for i in range(8):
        alone = one(x_init[i])
        together = jax.tree.map(lambda a, i=i: a[i], batch)
        assert int(alone.status) == int(together.status)
        assert int(alone.iterations) == int(together.iterations)
        assert_close(together.u, alone.u, 1e-9)
        assert_close(together.x, alone.x, 1e-9)


BAD = {
    "nan": lambda x: x.at[2].set(jnp.nan).at[5].set(jnp.nan),
    "overflow": lambda x: x.at[2].set(1e300).at[5, 2].set(jnp.inf),
}


@pytest.mark.parametrize("policy", ["zero", "implicit"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_problems_change_neither_solutions_nor_shared_gradients(bad, policy):
    good = jnp.array([0, 1, 3, 4, 6, 7])
    x_init = starts(8)
    options = Options(unconverged=policy)

    @jax.jit
    def run(x_init, params):
        def total(params):
            solutions = jax.vmap(lambda x: solve(x, params, options=options))(x_init)
            return loss(solutions), solutions

        return jax.grad(total, has_aux=True)(params)

    grad, solutions = run(BAD[bad](x_init), weighted())
    want, alone = run(x_init[good], weighted())
    assert np.all(np.asarray(solutions.status)[[2, 5]] == Status.NONFINITE)
    assert np.all(np.asarray(alone.status) == Status.CONVERGED)
    for field in ("x", "u", "costate", "objective", "status", "iterations"):
        assert_close(getattr(solutions, field)[good], getattr(alone, field), 1e-12)
    assert_close(grad, want, 1e-12)


def test_a_nan_in_a_problems_own_parameters_stays_there():
    x_init, params = starts(6), weighted()
    weights = jnp.tile(params.cost.q, (6, 1))

    @jax.jit
    def run(x_init, weights):
        def total(physics, weights):
            def one(x, q):
                return solve(x, params._replace(physics=physics, cost=params.cost._replace(q=q)))

            solutions = jax.vmap(one)(x_init, weights)
            return loss(solutions), solutions.status

        return jax.grad(total, (0, 1), has_aux=True)(params.physics, weights)

    (shared, own), status = run(x_init, weights.at[3].set(jnp.nan))
    keep = jnp.array([0, 1, 2, 4, 5])
    (shared_want, own_want), _ = run(x_init[keep], weights[keep])
    assert int(status[3]) == Status.NONFINITE
    assert_close(shared, shared_want, 1e-12)
    assert_close(own[keep], own_want, 1e-12)
    assert np.all(np.asarray(own[3]) == 0)


def test_traced_infeasible_bounds_are_a_status_of_their_problem():
    upper = jnp.array([2.0, -1.0, 2.0, jnp.nan])
    x_init = starts(4)

    @jax.jit
    def run(x_init, upper):
        def total(params):
            solutions = jax.vmap(
                lambda x, b: mpc_solve(
                    pendulum.cost, pendulum.dynamics, x, jnp.zeros((T, 1)), params,
                    u_lower=-0.5, u_upper=b,
                )  # fmt: skip
            )(x_init, upper)
            return loss(solutions), solutions

        return jax.grad(total, has_aux=True)(weighted())

    grad, solutions = run(x_init, upper)
    want, alone = run(x_init[jnp.array([0, 2])], upper[jnp.array([0, 2])])
    assert list(np.asarray(solutions.status)) == [0, Status.INFEASIBLE, 0, Status.INFEASIBLE]
    assert_close(solutions.u[jnp.array([0, 2])], alone.u, 1e-12)
    assert_close(grad, want, 1e-12)


@pytest.mark.parametrize("field", ["x", "u", "costate", "objective"])
def test_the_policies_for_the_unconverged(field):
    x_init = starts(8)

    def grads(policy):
        options = Options(max_iterations=3, unconverged=policy)

        def one(x, params):
            def value(params):
                solution = solve(x, params, options=options)
                return jnp.sum(jnp.sin(getattr(solution, field))), solution.status

            return jax.grad(value, has_aux=True)(params)

        grad, status = jax.jit(jax.vmap(one, (0, None)))(x_init, weighted())
        return np.asarray(grad.physics.g), np.asarray(status)

    zero, status = grads("zero")
    converged = status == Status.CONVERGED
    assert 0 < np.mean(converged) < 1
    assert np.all(zero[~converged] == 0)
    assert np.all(zero[converged] != 0)
    nan, _ = grads("nan")
    assert np.all(np.isnan(nan[~converged]))
    assert_close(nan[converged], zero[converged], 1e-12)
    implicit, _ = grads("implicit")
    assert np.all(np.isfinite(implicit)) and np.all(implicit != 0)
    assert_close(implicit[converged], zero[converged], 1e-12)


def test_shared_weights_have_no_gradient_per_problem_in_memory():
    batch, n, width = 37, 3, 101

    def network(x, u, t, params):
        h = jnp.tanh(params["V"] @ jnp.concatenate([x, u]))
        return 0.9 * x + 0.1 * (params["W"] @ h)

    def cost(x, u, t, params):
        return x @ x + u @ u

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "V": jax.random.normal(keys[0], (width, n + 1)),
        "W": jax.random.normal(keys[1], (n, width)) / width,
    }
    x_init = jax.random.normal(keys[2], (batch, n))

    def total(params, x_init):
        def one(x):
            return mpc_solve(cost, network, x, jnp.zeros((5, 1)), params, u_lower=-1.0, u_upper=1.0)

        return jnp.sum(jax.vmap(one)(x_init).u ** 2)

    text = jax.jit(jax.grad(total)).lower(params, x_init).compile().as_text()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f64\[([\d,]+)\]", text)}
    assert (batch, 5, width) in {tuple(s) for s in shapes} or any(batch in s for s in shapes)
    # Activations [batch, T, width] are needed; weights times batch are not, in any layout.
    forbidden = [s for s in shapes if batch in s and width in s and (n in s or n + 1 in s)]
    jacobians = [s for s in forbidden if 5 in s]  # of the layers, one per stage: expansions
    assert [s for s in forbidden if s not in jacobians] == []
