"""``x_guess``: where the states start, which changes nothing of what a solution is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Constraints, Rate, Status, ilqr_box, mpc_solve, receding_horizon
from jaxmpc.systems import pendulum

T = 8
PARAMS = pendulum.default_params()
X_INIT = pendulum.state(2.0, 0.5)
BOUNDS = dict(u_lower=-2.0, u_upper=2.0)
GUESS = jnp.tile(pendulum.state(0.1, 0.0), (T + 1, 1))


def plan(x_init, x_guess, params=PARAMS, solve=mpc_solve, **more):
    return solve(
        pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params, x_guess=x_guess,
        **BOUNDS, **more,
    )  # fmt: skip


def test_the_solution_and_its_gradient_are_those_without_it():
    def loss(x_init, x_guess):
        s = plan(x_init, x_guess)
        return jnp.sum(jnp.sin(s.u)) + s.objective, s

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, without), slope = run(X_INIT, None)
    (_, guessed), slope_guessed = run(X_INIT, GUESS)
    assert int(without.status) == int(guessed.status) == Status.CONVERGED
    assert_close(guessed.u, without.u, 1e-8)
    assert_close(slope_guessed, slope, 1e-8)
    x = guessed.x
    step = jax.vmap(lambda x, u: pendulum.dynamics(x, u, 0, PARAMS))
    assert_close(x, jnp.concatenate([X_INIT[None], step(x[:-1], guessed.u)]), 1e-14)


def test_its_gradient_is_zero():
    slope = jax.jit(jax.grad(lambda guess: plan(X_INIT, guess).objective))(GUESS)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("shared", [True, False])
def test_under_vmap_it_is_shared_or_each_has_its_own(shared):
    x_inits = pendulum.sample_states(jax.random.key(0), 20)
    guesses = GUESS if shared else jnp.stack([k / 20 * GUESS for k in range(20)])
    axes = (0, None if shared else 0)
    batch = jax.jit(jax.vmap(lambda x, g: plan(x, g, solve=ilqr_box), axes))(x_inits, guesses)
    one = jax.jit(lambda x, g: plan(x, g, solve=ilqr_box))
    for k in (0, 13):
        alone = one(x_inits[k], guesses if shared else guesses[k])
        assert int(alone.status) == int(batch.status[k]) == Status.CONVERGED
        assert_close(batch.u[k], alone.u, 1e-8)


def test_it_promotes_as_the_other_arguments_do():
    with jax.numpy_dtype_promotion("standard"):
        s = jax.eval_shape(
            lambda x, g: ilqr_box(
                lambda x, u, t, p: x @ x + u @ u,
                lambda x, u, t, p: x,
                x,
                jnp.zeros((T, 1), jnp.float32),
                x_guess=g,
            ),
            X_INIT.astype(jnp.float32),
            GUESS,
        )
    assert s.u.dtype == jnp.float64


def test_with_a_rate_it_is_the_users_state_alone():
    rate = Constraints(rate=Rate(previous=jnp.zeros(1), limit=0.5))
    without, guessed = (
        jax.jit(lambda g: plan(X_INIT, g, constraints=rate))(g) for g in (None, GUESS)
    )
    assert guessed.x.shape == GUESS.shape
    assert int(guessed.status) == Status.CONVERGED
    assert_close(guessed.u, without.u, 1e-7)


def test_in_closed_loop_it_is_shifted_with_the_plan():
    got = receding_horizon(
        pendulum.cost, pendulum.dynamics, X_INIT, jnp.zeros((T, 1)), PARAMS, num_steps=2,
        x_guess=GUESS, **BOUNDS,
    )  # fmt: skip
    assert np.all(got.status == Status.CONVERGED)
    solve = jax.jit(
        lambda x, u, g: mpc_solve(
            pendulum.cost, pendulum.dynamics, x, u, PARAMS, x_guess=g, **BOUNDS
        )
    )
    first = solve(X_INIT, jnp.zeros((T, 1)), GUESS)
    shifted = (jnp.concatenate([a[1:], a[-1:]]) for a in (first.u, first.x))
    second = solve(first.x[1], *shifted)
    assert int(got.iterations[1]) == int(second.iterations)
    assert_close(got.u[1], second.u[0], 1e-8)
