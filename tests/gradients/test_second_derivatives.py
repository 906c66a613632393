"""Second derivatives: reverse over reverse is right, forward over reverse is refused, unless asked
for (``test_forward_mode``)."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close

from jaxmpc import Options, lqr_solve, mpc_solve
from jaxmpc.systems import pendulum

T = 12
X_INIT = pendulum.state(2.4, -0.5)  # some controls end at their bounds, most do not


def plan(physics, upper, options=Options(), x_init=X_INIT):
    params = pendulum.default_params()
    q = params.cost.q.at[-1].set(0.1)
    params = params._replace(physics=physics, cost=params.cost._replace(q=q))
    return mpc_solve(
        pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params,
        u_lower=-upper, u_upper=upper, options=options,
    )  # fmt: skip


def of_the_plan(theta):
    s = plan(pendulum.Physics(*theta[:3]), theta[3])
    weights = jnp.cos(jnp.arange(T))[:, None]
    values = jnp.sum((s.u - weights) ** 2) + jnp.sum(jnp.sin(s.x)) + 0.1 * jnp.sum(s.costate**2)
    return values, s.free


def of_the_objective(theta):
    s = plan(pendulum.Physics(*theta[:3]), theta[3])
    return s.objective, s.free


THETA = jnp.array([10.0, 1.0, 1.0, 1.2])  # g, m, l and the bound on the torque


@pytest.mark.parametrize(
    "loss", [of_the_plan, pytest.param(of_the_objective, marks=pytest.mark.slow)]
)
def test_hessians_match_finite_differences_of_the_gradient(loss):
    hessian = jax.jit(jax.jacrev(lambda theta: jax.jacrev(loss, has_aux=True)(theta)[0]))(THETA)

    @jax.jit
    def gradient(theta):
        slope, free = jax.grad(loss, has_aux=True)(theta)
        return slope, jnp.mean(free)

    _, share = gradient(THETA)
    assert 0 < share < 1
    h = 1e-5
    want = jnp.stack(
        [(gradient(THETA + h * e)[0] - gradient(THETA - h * e)[0]) / (2 * h) for e in jnp.eye(4)]
    )
    assert_close(hessian, want, 1e-7)
    assert_close(hessian, hessian.T, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"x_init": X_INIT}, id="x_init"),
        pytest.param({"upper": jnp.full((T, 1), 1.2)}, id="the bounds"),
    ],
)
def test_hessians_in_one_input_alone_match_finite_differences(inputs):
    """No other input is perturbed, neither by the inner differentiation nor by the outer one."""
    ((name, at),) = inputs.items()
    given = {"physics": pendulum.Physics(*THETA[:3]), "upper": THETA[3], "x_init": X_INIT}
    direction = jnp.cos(1 + jnp.arange(at.size)).reshape(at.shape)

    def along(s):
        solution = plan(**(given | {name: at + s * direction}))
        terms = jnp.sin(solution.u), jnp.cos(solution.x), 0.1 * solution.costate**2
        return sum(jnp.sum(a) for a in terms) + 0.01 * jnp.sum(solution.K)

    first, second, h = jax.jit(jax.grad(along)), jax.jit(jax.grad(jax.grad(along)))(0.0), 1e-5
    assert_close(second, (first(h) - first(-h)) / (2 * h), 1e-6)


def test_forward_over_reverse_is_refused():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.hessian(lambda theta: of_the_objective(theta)[0])(THETA)


def test_second_derivatives_of_the_lqr():
    n, m, T = 2, 1, 4
    keys = jax.random.split(jax.random.key(0), 3)
    C = jnp.tile(jnp.eye(n + m), (T, 1, 1))
    F = jax.random.normal(keys[0], (T, n, n + m)) * 0.5
    c = jax.random.normal(keys[1], (T, n + m))

    def loss(theta):
        scale = C * theta[0]
        s = lqr_solve(theta[1:3], scale, c, F * theta[3])
        return jnp.sum(jnp.sin(s.u)) + jnp.sum(s.x**2) + jnp.sum(s.costate * s.x)

    theta = jnp.array([1.3, 0.4, -0.7, 0.9])
    hessian = jax.jit(jax.jacrev(jax.jacrev(loss)))(theta)
    gradient = jax.jit(jax.grad(loss))
    h = 1e-5
    want = jnp.stack(
        [(gradient(theta + h * e) - gradient(theta - h * e)) / (2 * h) for e in jnp.eye(4)]
    )
    assert_close(hessian, want, 1e-7)
