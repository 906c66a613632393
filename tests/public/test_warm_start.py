"""``shift``: where the next solve of a loop of one's own starts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_close

from jaxmpc import (
    Affine,
    Constraints,
    Multipliers,
    Quadratic,
    Rate,
    Solution,
    Status,
    mpc_solve,
    receding_horizon,
    shift,
)

CART = np.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]])
T, N = 6, 4
X_INIT, U_INIT = jnp.array([1.0, 0.0]), jnp.zeros((T, 1))
CONSTRAINTS = Constraints(
    rate=Rate(previous=jnp.zeros(1), limit=0.3), x_lower=jnp.array([-jnp.inf, -0.25])
)


def made(status):
    """A solution that only has what is shifted: its own stage's number everywhere."""
    stages = jnp.arange(T + 1.0)[:, None]
    of_rows = Multipliers(rate=stages[:-1], state=stages, terminal_equality=jnp.array([7.0]))
    nothing = dict.fromkeys(
        ("costate", "K", "free", "objective", "kkt_residual", "iterations"), jnp.zeros(())
    )
    return Solution(
        x=stages, u=stages[:-1], status=jnp.int32(status), multipliers=of_rows, **nothing
    )


def test_everything_moves_up_by_one_stage():
    start = shift(made(Status.CONVERGED))
    assert start.u_init[:, 0].tolist() == [1, 2, 3, 4, 5, 5]
    assert start.x_guess[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 6]
    assert start.previous.tolist() == [0]
    assert start.multipliers.rate[:, 0].tolist() == [1, 2, 3, 4, 5, 5]
    assert start.multipliers.state[:, 0].tolist() == [1, 2, 3, 4, 5, 6, 6]
    assert start.multipliers.terminal_equality.tolist() == [7]  # the end stays the end
    assert start.multipliers.inequality is None


def test_multipliers_of_what_did_not_converge_are_not_handed_on():
    start = shift(made(Status.MAX_ITERATIONS))
    assert not any(a.any() for a in jax.tree.leaves(start.multipliers))
    assert start.u_init[0] == 1


def test_only_the_control_before_has_a_derivative():
    u = made(Status.CONVERGED)

    def all_of(a):
        start = shift(dataclasses.replace(u, x=u.x * a, u=(u.u + 1) * a))
        return jax.tree.map(jnp.sum, (start.previous, start.u_init, start.x_guess))

    assert jax.jacobian(all_of)(1.0) == (1, 0, 0)


def test_a_loop_in_python_is_the_closed_loop():
    """Around a plant that JAX knows nothing of."""
    cost, dynamics = Quadratic(jnp.eye(3)), Affine(jnp.asarray(CART))

    @jax.jit
    def plan(x, u_init, constraints):
        return mpc_solve(cost, dynamics, x, u_init, u_lower=-1.0, constraints=constraints)

    def in_jax(x, u, t, params):
        return jnp.asarray(CART) @ jnp.concatenate([x, u]) + 0.01

    want = jax.jit(
        lambda: receding_horizon(
            cost, dynamics, X_INIT, U_INIT, num_steps=N, plant=in_jax, u_lower=-1.0,
            constraints=CONSTRAINTS,
        )
    )()  # fmt: skip
    x, iterations = np.asarray(X_INIT), []
    # Multipliers from the start, as in the closed loop, and one program for all steps.
    solution = plan(X_INIT, U_INIT, CONSTRAINTS)
    for k in range(N):
        assert solution.status == Status.CONVERGED
        assert_close(want.x[k], x, 1e-9)
        assert_close(want.u[k], solution.u[0], 1e-8)
        iterations.append(int(solution.iterations))
        x = CART @ np.concatenate([x, solution.u[0]]) + 0.01
        start = shift(solution)
        solution = plan(jnp.asarray(x), start.u_init, start.constraints(CONSTRAINTS))
    assert iterations == want.iterations.tolist()
