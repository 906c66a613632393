"""``receding_horizon``: a loop of solves, as a scan with a derivative."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constrained_problems import RATE
from helpers import assert_close

from jaxmpc import Affine, Constraints, Rate, Status, mpc_solve, receding_horizon
from jaxmpc.systems import pendulum

T, N = 8, 5
PARAMS = pendulum.default_params()
X_INIT = pendulum.state(2.0, 0.5)
BOUNDS = dict(u_lower=-2.0, u_upper=2.0)
WARM = 3  # iterations on average of a solve that starts from the one before; 2.3 were measured


def plant(x, u, t, params):
    """Other physics than the model's, and a disturbance that knows the time."""
    heavier = params._replace(physics=params.physics._replace(m=params.physics.m * 1.2))
    return pendulum.dynamics(x, u, t, heavier) + jnp.array([0.0, 0.0, 0.01]) * jnp.asarray(t, float)


def episode(g=10.0, x_init=X_INIT, plant=plant):
    params = PARAMS._replace(physics=PARAMS.physics._replace(g=g))
    return receding_horizon(
        pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params,
        num_steps=N, plant=plant, **BOUNDS,
    )  # fmt: skip


@functools.cache
def program():
    """(g, x_init) -> a loss, the episode, and the loss's gradient."""

    def loss(g, x_init):
        e = episode(g, x_init)
        return jnp.sum(jnp.sin(e.x)) + jnp.sum(e.u**2) + jnp.sum(e.costs), e

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def test_it_is_the_loop_of_solves():
    (_, got), _ = program()(10.0, X_INIT)
    solve = jax.jit(
        lambda x, u: mpc_solve(pendulum.cost, pendulum.dynamics, x, u, PARAMS, **BOUNDS)
    )
    x, u = X_INIT, jnp.zeros((T, 1))
    for k in range(N):
        solution = solve(x, u)
        assert_close(got.x[k], x, 1e-9)
        assert_close(got.u[k], solution.u[0], 1e-8)
        assert_close(got.costs[k], pendulum.cost(x, solution.u[0], k, PARAMS), 1e-9)
        assert int(got.status[k]) == int(solution.status) == Status.CONVERGED
        assert int(got.iterations[k]) == int(solution.iterations)
        x = plant(x, solution.u[0], k, PARAMS)
        u = jnp.concatenate([solution.u[1:], solution.u[-1:]])
    assert_close(got.x[N], x, 1e-9)
    assert np.all(np.asarray(got.iterations[1:]) < int(got.iterations[0]) + 1)


def test_the_gradient_is_that_of_finite_differences():
    def loss(g, x_init):
        (value, _), _ = program()(g, x_init)
        return value

    g, h = 10.0, 1e-5
    _, (in_g, in_x_init) = program()(g, X_INIT)
    assert_close(in_g, (loss(g + h, X_INIT) - loss(g - h, X_INIT)) / (2 * h), 1e-6)
    steps = h * np.eye(3)
    want = [(loss(g, X_INIT + e) - loss(g, X_INIT - e)) / (2 * h) for e in steps]
    assert_close(in_x_init, jnp.stack(want), 1e-6)


def test_the_stage_index_is_that_of_the_episode():
    """Tracking of a ramp that starts late: only absolute time gets there. The plant is the model
    by default."""
    reference = jnp.concatenate([jnp.zeros(6), jnp.arange(1.0, 20.0)])

    def cost(x, u, t, reference):
        return (x[0] - reference[t]) ** 2 + 1e-6 * u @ u

    e = receding_horizon(
        cost, lambda x, u, t, p: x + u, jnp.zeros(1), jnp.zeros((4, 1)), reference, num_steps=12
    )
    assert_close(e.x[1:, 0], reference[1:13], 1e-3)
    assert_close(e.x[1:], e.x[:-1] + e.u, 1e-14)


@pytest.mark.slow  # test_closed_loop_isolation has more of them
def test_a_batch_with_a_bad_start():
    x_init = jnp.stack([X_INIT, jnp.full(3, jnp.nan)])
    e = jax.vmap(lambda x: episode(x_init=x))(x_init)
    (_, alone), _ = program()(10.0, X_INIT)
    assert_close(e.x[0], alone.x, 1e-9)
    assert np.all(np.asarray(e.status[1]) == Status.NONFINITE)


def test_the_rate_counts_from_the_control_that_was_applied():
    problem = RATE
    given = jax.tree.map(jnp.asarray, problem.inputs)
    limit, fastest = given["rate"]["limit"], 0.1

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(previous):
        episode = receding_horizon(
            problem.cost, problem.dynamics, given["x_init"], jnp.zeros((18, 2)), given["params"],
            num_steps=6, terminal_cost=problem.terminal_cost,
            u_lower=given["u_lower"], u_upper=given["u_upper"],
            constraints=Constraints(
                inequality=lambda x, u, t, params: x[1:] - jnp.where(t < 3, 9.0, fastest),
                rate=Rate(previous, limit, given["rate"]["weight"]),
            ),
        )  # fmt: skip
        return jnp.sum(jnp.sin(episode.u)), episode

    previous = given["rate"]["previous"]
    (_, episode), slope = run(previous)
    assert np.all(np.asarray(episode.status) == Status.CONVERGED)
    # Warm-started multipliers: later solves take fewer iterations than the first.
    assert max(episode.iterations[1:]) < episode.iterations[0]
    changes = np.abs(np.diff(np.concatenate([previous[None], episode.u]), axis=0))
    limit = np.asarray(limit)
    assert np.all(changes <= limit[0] + 1e-8)
    assert np.any(changes >= limit[0] - 1e-8)
    assert np.all(episode.x[3:-1, 1] <= fastest + 1e-8)  # t is the episode's

    h = 1e-4
    for i in range(2):
        e = jnp.zeros(2).at[i].set(h)
        (above, _), _ = run(previous + e)
        (below, _), _ = run(previous - e)
        assert_close(slope[i], (above - below) / (2 * h), 1e-4)


def test_along_a_limit_of_speed_warm_solves_are_short():
    """A cart drives at its limit for most of the way, and the model is right."""
    cart = Affine(jnp.array([[1.0, 0.2, 0.02], [0.0, 1.0, 0.2]]))

    @jax.jit
    def run():
        return receding_horizon(
            lambda x, u, t, p: (x[0] - 5) ** 2 + 0.1 * x[1] ** 2 + 0.1 * jnp.sum(u**2),
            cart, jnp.zeros(2), jnp.zeros((15, 1)), num_steps=30, u_lower=-2.0, u_upper=2.0,
            constraints=Constraints(x_upper=jnp.array([jnp.inf, 1.0])),
        )  # fmt: skip

    episode = run()
    assert np.all(np.asarray(episode.status) == Status.CONVERGED)
    speed = np.asarray(episode.x[1:, 1])
    assert np.max(speed) <= 1 + 1e-9
    assert np.sum(speed >= 1 - 1e-9) >= 15
    assert np.mean(episode.iterations[1:]) <= WARM


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        (dict(num_steps=0), ValueError, "num_steps must be at least 1"),
        (dict(num_steps=2.5), TypeError, "num_steps must be a Python int"),
        (dict(num_steps=1, plant=3), TypeError, "plant must be a callable"),
        (dict(num_steps=1, plant=lambda x, u, t, p: x[:2]), ValueError, "plant returns"),
    ],
)
def test_errors_name_the_argument(kwargs, error, match):
    with pytest.raises(error, match=match):
        receding_horizon(
            pendulum.cost, pendulum.dynamics, X_INIT, jnp.zeros((T, 1)), PARAMS, **kwargs
        )
