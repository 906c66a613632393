"""More problems than lanes: the same solutions as all at once, whatever the order they end in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Options, Status, mpc_solve
from jaxmpc.batch import lanes
from jaxmpc.batch.turns import in_turns
from jaxmpc.systems import pendulum

T = 8
LANES = 4


@pytest.fixture
def few_lanes(monkeypatch):
    monkeypatch.setattr(lanes, "width", lambda bytes_each: LANES)


def solve(x_init, physics, upper, max_iterations=200):
    params = pendulum.default_params()._replace(physics=physics)
    return mpc_solve(
        pendulum.cost,
        pendulum.dynamics,
        x_init,
        jnp.zeros((T, 1)),
        params,
        u_lower=-2.0,
        u_upper=upper,
        options=Options(max_iterations=max_iterations),
    )


def problems(num):
    """Some that take long, some NaN, some infeasible, some out of iterations."""
    x_init = np.array(pendulum.sample_states(jax.random.key(1), num))
    physics = jax.tree.map(
        lambda p: p * jnp.linspace(0.8, 1.2, num), pendulum.default_params().physics
    )
    upper = np.full(num, 2.0)
    x_init[3], x_init[num - 1] = np.nan, np.nan
    upper[5] = -3.0
    max_iterations = np.full(num, 200, np.int32)
    max_iterations[1] = 1
    return x_init, physics, upper, max_iterations


@pytest.mark.parametrize("num", [pytest.param(5, marks=pytest.mark.slow), 23])
def test_taking_turns_changes_no_solution(num, monkeypatch):
    batch = jax.tree.map(lambda a: a[-num:], problems(23))
    # A function of its own each time: jit would keep the first program.
    want = jax.jit(jax.vmap(functools.partial(solve)))(*batch)
    monkeypatch.setattr(lanes, "width", lambda bytes_each: LANES)
    with jax.numpy_dtype_promotion("strict"):
        got = jax.jit(jax.vmap(functools.partial(solve)))(*batch)
    np.testing.assert_array_equal(got.status, want.status)
    np.testing.assert_array_equal(got.iterations, want.iterations)
    np.testing.assert_array_equal(got.free, want.free)
    solved = np.asarray(want.status != Status.NONFINITE) & (want.status != Status.INFEASIBLE)
    assert_close(*(jax.tree.map(lambda a: a[solved], s) for s in (got, want)), 1e-9)
    if num == 23:
        assert {int(s) for s in want.status} >= {
            Status.CONVERGED, Status.MAX_ITERATIONS, Status.NONFINITE, Status.INFEASIBLE
        }  # fmt: skip


def test_gradients_of_problems_that_took_turns(few_lanes):
    x_init, physics, upper, _ = problems(23)

    def loss(physics, x_init, upper):
        return jnp.sum(jax.vmap(solve)(x_init, physics, upper).u[..., 0] ** 2, axis=1)

    def total(*args):
        values = loss(*args)
        return jnp.sum(jnp.where(jnp.isfinite(values), values, 0))

    got = jax.jit(jax.grad(total))(physics, x_init, upper)
    alone = jax.jit(jax.grad(lambda p, x, b: jnp.sum(solve(x, p, b).u ** 2)))
    for i in (0, 4, 12, 21):
        want = alone(jax.tree.map(lambda a, i=i: a[i], physics), x_init[i], upper[i])
        assert_close(jax.tree.map(lambda a, i=i: a[i], got), want, 1e-8)


@pytest.mark.slow
def test_nested_batches_take_turns_together(few_lanes):
    x_init = pendulum.sample_states(jax.random.key(2), 6).reshape(2, 3, 3)
    physics = pendulum.default_params().physics
    nested = jax.jit(jax.vmap(jax.vmap(lambda x: solve(x, physics, 2.0))))(x_init)
    single = [solve_alone(x) for x in x_init.reshape(6, 3)]
    assert_close(nested.u.reshape(6, T, 1), jnp.stack([s.u for s in single]), 1e-9)


@jax.jit
def solve_alone(x):
    return solve(x, pendulum.default_params().physics, 2.0)


@pytest.mark.parametrize("size", [3, 4, 5, 40])
def test_every_problem_is_worked_on_once_and_to_its_end(size):
    """Countdowns of different lengths: what is reported is each one's own."""
    lengths = jnp.asarray(np.random.default_rng(size).integers(0, 30, size), jnp.float32)

    def report(data, state):
        left, steps = state
        return {"steps": steps, "left": jnp.stack([left, -left])}

    got = jax.jit(
        lambda lengths: in_turns(
            size,
            LANES,
            take=lambda index: lengths[index],
            start=lambda data, wanted: (jnp.where(wanted, data, 0), jnp.zeros(LANES, jnp.int32)),
            step=lambda data, s: (
                jnp.maximum(s[0] - 1, 0),
                s[1] + jnp.where(s[0] > 0, 1, 0).astype(jnp.int32),
            ),
            running=lambda s: s[0] > 0,
            report=report,
        )
    )(lengths)
    np.testing.assert_array_equal(got["steps"], lengths)
    assert got["left"].shape == (size, 2)
    assert not got["left"].any()
