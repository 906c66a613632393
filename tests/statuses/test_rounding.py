"""What rounding does to a status, and to what is said of the residual."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Status, mpc_solve
from jaxmpc.systems import cartpole

COUNT = 64


def test_a_plan_right_to_rounding_has_converged_whatever_the_unit_of_its_cost():
    """One stage, three controls that reach the goal: at the minimum next to nothing is left of the
    terms of the cost, and what cancels cancels inside the costate."""
    rng = np.random.default_rng(0)
    M, B, goal = (rng.normal(size=(COUNT, 3, k)) for k in (3, 3, 1))
    Q, goal = M @ M.swapaxes(1, 2), goal[..., 0]

    @jax.jit
    @jax.vmap
    def run(Q, B, goal, scale):
        return mpc_solve(
            lambda x, u, t, p: 1e-6 * scale * u @ u, lambda x, u, t, p: x + B @ u,
            jnp.ones(3), jnp.zeros((1, 3)),
            terminal_cost=lambda x, p: scale * (x - goal) @ Q @ (x - goal),
        )  # fmt: skip

    H = B.swapaxes(1, 2) @ Q @ B + 1e-6 * np.eye(3)
    exact = np.linalg.solve(H, -(B.swapaxes(1, 2) @ Q @ (1 - goal)[..., None]))[..., 0]
    for scale in (1e-6, 1.0, 1e4, 1e8):
        solution = run(Q, B, goal, np.full(COUNT, scale))
        assert np.all(solution.status == Status.CONVERGED), scale
        off = np.abs(solution.u[:, 0] - exact).max(1) / np.abs(exact).max(1)
        assert np.max(off) < 1e-6  # H has a condition of up to 1e8


@pytest.mark.slow  # a sample of the campaign says the same of many problems
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_unit_of_the_cost_changes_no_bit(dtype):
    x_init = cartpole.sample_states(jax.random.key(0), COUNT, dtype)
    params = cartpole.default_params(dtype)

    @jax.jit
    def run(scale):
        def plan(x_init):
            solution = mpc_solve(
                lambda x, u, t, params: scale * cartpole.cost(x, u, t, params), cartpole.dynamics,
                x_init, jnp.zeros((20, 1), dtype), params,
                u_lower=jnp.asarray(cartpole.U_LOWER, dtype),
                u_upper=jnp.asarray(cartpole.U_UPPER, dtype),
            )  # fmt: skip
            return jnp.sum(solution.u**2), solution

        slope, solution = jax.vmap(jax.grad(plan, has_aux=True))(x_init)
        return solution.u, solution.status, solution.iterations, slope

    plain, *scaled = (run(jnp.asarray(2.0**power, dtype)) for power in (0, -20, 20))
    assert np.all(plain[1] == Status.CONVERGED)
    for other in scaled:
        assert_close(other, plain, 0)


def test_the_residual_of_an_unstable_plan_is_not_understated():
    """Held against 80-bit arithmetic; a state grows by 1e3 to 1e5 along the horizon."""
    n, T, wide = 4, 60, np.longdouble
    rng = np.random.default_rng(3)
    A = rng.normal(size=(COUNT, n, n)) / np.sqrt(n)
    growth = 10 ** (rng.uniform(3, 5, COUNT) / T)
    A *= (growth / np.abs(np.linalg.eigvals(A)).max(1))[:, None, None]
    B, x_init = rng.normal(size=(COUNT, n)), rng.normal(size=(COUNT, n))

    @jax.jit
    @jax.vmap
    def run(A, B, x_init):
        return mpc_solve(
            lambda x, u, t, p: x @ x + u @ u, lambda x, u, t, p: A @ x + B * u[0],
            x_init, jnp.zeros((T, 1)),
        )  # fmt: skip

    solution = run(A, B, x_init)
    assert np.all(solution.status == Status.CONVERGED)
    A, B, u = A.astype(wide), B.astype(wide), np.asarray(solution.u, wide)[..., 0]
    x = [x_init.astype(wide)]
    for t in range(T):
        x.append(np.einsum("bij,bj->bi", A, x[t]) + B * u[:, t, None])
    costate, true = 0 * x[0], np.zeros(COUNT, wide)
    for t in reversed(range(T)):
        true = np.maximum(true, abs(2 * u[:, t] + (B * costate).sum(1)))
        costate = 2 * x[t] + np.einsum("bji,bj->bi", A, costate)
    claimed = np.asarray(solution.kkt_residual)
    assert np.max(true) > 1e-9  # far above what float64 resolves in a stage
    assert np.all(true <= 10 * np.maximum(claimed, 1e-12))
