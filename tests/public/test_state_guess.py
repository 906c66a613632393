"""``x_guess``: where the states start, which changes nothing of what a solution is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Constraints, Options, Rate, Status, ilqr_box, mpc_solve, receding_horizon
from jaxmpc.systems import pendulum

T = 8
PARAMS = pendulum.default_params()
X_INIT = pendulum.state(2.0, 0.5)
BOUNDS = dict(u_lower=-2.0, u_upper=2.0)
GUESS = jnp.tile(pendulum.state(0.1, 0.0), (T + 1, 1))


def plan(x_init, x_guess, u_init=None, solve=mpc_solve, **more):
    return solve(
        pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)) if u_init is None else u_init,
        PARAMS, x_guess=x_guess, **BOUNDS, **more,
    )  # fmt: skip


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
def run(x_init, x_guess, u_init):
    s = plan(x_init, x_guess, u_init)
    return jnp.sum(jnp.sin(s.u)) + s.objective, s


def test_the_solution_and_its_gradient_are_those_without_it():
    zeros = np.zeros((T, 1))
    (_, without), (slope, _) = run(X_INIT, None, zeros)
    (_, guessed), (slope_guessed, slope_of_the_guess) = run(X_INIT, GUESS, zeros)
    np.testing.assert_array_equal(slope_of_the_guess, 0)
    assert int(without.status) == int(guessed.status) == Status.CONVERGED
    assert_close(guessed.u, without.u, 1e-8)
    assert_close(slope_guessed, slope, 1e-8)
    x = guessed.x
    step = jax.vmap(lambda x, u: pendulum.dynamics(x, u, 0, PARAMS))
    assert_close(x, jnp.concatenate([X_INIT[None], step(x[:-1], guessed.u)]), 1e-14)


@pytest.mark.slow
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


@pytest.mark.slow
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
    (_, first), _ = run(X_INIT, GUESS, np.zeros((T, 1)))
    shifted = (jnp.concatenate([a[1:], a[-1:]]) for a in (first.x, first.u))
    (_, second), _ = run(first.x[1], *shifted)
    assert int(got.iterations[1]) == int(second.iterations)
    assert_close(got.u[1], second.u[0], 1e-8)


# A plant that blows up by itself, along a reference that it can follow: the cost vanishes there.

LONG = 60
CONTROLS = 0.5 * np.sin(0.3 * np.arange(LONG))


def explodes(x, u, t, params):
    return x + 0.3 * (x**3 + u)


def reference():
    """The rollout of CONTROLS under a feedback that keeps it near 0, and the controls it took."""
    x, u = [0.3], []
    for v in CONTROLS:
        u.append(v - 4 * x[-1] - x[-1] ** 3)
        x.append(x[-1] + 0.3 * (x[-1] ** 3 + u[-1]))
    return np.array(x)[:, None], np.array(u)[:, None]


def follow(x_guess=None, u_init=None, x_init=None, max_iterations=200, dtype=jnp.float64):
    x, u = (jnp.asarray(a, dtype) for a in reference())

    def cost(z, v, t, params):
        return jnp.sum((z - x[t]) ** 2) + 0.1 * jnp.sum((v - u[t]) ** 2)

    return ilqr_box(
        cost, explodes, x[0] if x_init is None else x_init,
        jnp.full((LONG, 1), 3.0, dtype) if u_init is None else u_init, x_guess=x_guess,
        u_lower=-6.0, u_upper=6.0, options=Options(max_iterations=max_iterations),
    )  # fmt: skip


def misses(s):
    """By how much a plan misses the dynamics, in NumPy."""
    x, u = np.asarray(s.x), np.asarray(s.u)
    with np.errstate(all="ignore"):
        return np.abs(x[:-1] + 0.3 * (x[:-1] ** 3 + u) - x[1:]).max()


@functools.cache
def following():
    """(guess, max_iterations) -> the solution"""
    return jax.jit(lambda guess, count: follow(guess, max_iterations=count))


def test_a_rollout_that_overflows_is_not_the_end():
    """In float32; for float64 see the batch below."""
    _x, u = reference()
    s = jax.jit(lambda: follow(dtype=jnp.float32))()
    assert int(s.status) == Status.CONVERGED
    assert_close(s.u, jnp.asarray(u, jnp.float32), 1e-4)
    assert misses(s) <= 4 * jnp.finfo(jnp.float32).eps


def test_a_guess_with_holes_is_filled():
    guess = reference()[0]
    guess[20:30] = np.nan
    s = following()(guess, 200)
    assert int(s.status) == Status.CONVERGED
    assert_close(s.u, jnp.asarray(reference()[1]), 1e-9)


@pytest.mark.parametrize("max_iterations", [0, 1])
def test_a_plan_is_a_rollout_whenever_the_search_ends(max_iterations):
    s = following()(reference()[0] + 0.1, max_iterations)
    assert int(s.status) == Status.MAX_ITERATIONS
    assert int(s.iterations) == max_iterations
    assert misses(s) <= 1e-15
    np.testing.assert_array_equal(s.x[0], reference()[0][0])


def test_a_start_that_overflows_spoils_no_other_of_the_batch():
    inits = jnp.array([0.3, 0.3, jnp.nan])[:, None]
    u_inits = jnp.stack(
        [jnp.full((LONG, 1), 3.0), jnp.asarray(reference()[1]), jnp.zeros((LONG, 1))]
    )
    s = jax.jit(jax.vmap(lambda x, u: follow(u_init=u, x_init=x)))(inits, u_inits)
    assert s.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
    first = jax.tree.map(lambda a: a[0], s)
    assert_close(first.u, jnp.asarray(reference()[1]), 1e-9)
    assert misses(first) <= 4 * jnp.finfo(float).eps
    assert int(s.iterations[1]) <= 2


@pytest.mark.slow
def test_a_long_horizon_ends_where_a_short_one_does():
    """A swing that gains energy by itself: left alone for long, it turns over and over."""

    def dynamics(x, u, t, params):
        return x + 0.1 * jnp.stack([x[1], u[0] - 2 * jnp.sin(x[0])])

    def cost(x, u, t, params):
        return x[0] ** 2 + 0.1 * x[1] ** 2 + 0.1 * u[0] ** 2

    def solve(T):
        x = jnp.array([1.0, 0.0])
        return ilqr_box(cost, dynamics, x, jnp.zeros((T, 1)), u_lower=-1.0, u_upper=1.0)

    short, long = jax.jit(lambda: solve(500))(), jax.jit(lambda: solve(5000))()
    assert int(short.status) == int(long.status) == Status.CONVERGED
    assert_close(long.objective, short.objective, 1e-9)
    assert_close(long.u[:400], short.u[:400], 1e-8)
