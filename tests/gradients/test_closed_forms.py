"""Constrained plans and their gradients where both are known: in closed form, or as the solution of
one dense linear system."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Constraints, Status, mpc_solve

# Bryson and Denham: over there and back in a unit of time, with the least effort, not further than
# a limit. A quadratic program: with the active rows given, plan, multipliers and gradients are
# those of its linear system.

T = 40
DT = 1 / T
STEP, PUSH = jnp.array([[1.0, DT], [0.0, 1.0]]), jnp.array([DT**2 / 2, DT])


def limited(x, u, t, limit):
    return x[:1] - limit


def back_again(x, limit):
    return x + jnp.array([0.0, 1.0])


def there_and_back(x_init, limit):
    return mpc_solve(
        lambda x, u, t, limit: 0.5 * DT * jnp.sum(u**2),
        lambda x, u, t, limit: STEP @ x + PUSH * u[0],
        x_init, jnp.zeros((T, 1)), limit,
        constraints=Constraints(inequality=limited, terminal_equality=back_again),
    )  # fmt: skip


def dense(x_init, limit, active):
    """Plan [T], multipliers [T] of the limit and all that the limit leaves, [T]."""

    def states(u):
        def step(x, u):
            return STEP @ x + PUSH * u, x

        last, before = jax.lax.scan(step, x_init, u)
        return before[:, 0] - limit, back_again(last, limit)

    (near, end), (G, E) = states(jnp.zeros(T)), jax.jacobian(states)(jnp.zeros(T))
    held = active.astype(float)
    kkt = jnp.block(
        [
            [DT * jnp.eye(T), G.T, E.T],
            [held[:, None] * G, jnp.diag(1 - held), jnp.zeros((T, 2))],
            [E, jnp.zeros((2, T + 2))],
        ]
    )
    solution = jnp.linalg.solve(kkt, -jnp.concatenate([jnp.zeros(T), held * near, end]))
    u, nu = solution[:T], solution[T : 2 * T]
    return u, nu, near + G @ u


@functools.cache
def there_and_back_and_what_is_right():
    """Slopes and plans of a batch, beside those of the dense system; a share of the loss is that of
    the multipliers."""
    of_u, of_nu = jnp.asarray(np.random.default_rng(1).normal(size=(2, T)))

    def loss(x_init, limit, share):
        z = there_and_back(x_init, limit)
        nu = z.multipliers.inequality[:, 0]
        return z.u[:, 0] @ of_u + share * (nu @ of_nu), z

    def want(x_init, limit, share, active):
        u, nu, left = dense(x_init, limit, active)
        return u @ of_u + share * (nu @ of_nu), (u, nu, left)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def both(*inputs):
        slope, z = jax.grad(loss, (0, 1), has_aux=True)(*inputs)
        active = z.multipliers.inequality[:, 0] > 0
        want_slope, right = jax.grad(want, (0, 1), has_aux=True)(*inputs, active)
        return slope, z, want_slope, right

    return both


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["plan", "plan and multipliers"])
def test_there_and_back_below_a_limit(share):
    N = 32
    rng = np.random.default_rng(0)
    limits = jnp.asarray(rng.uniform(0.06, 0.2, N))
    starts = jnp.stack([jnp.zeros(N), jnp.asarray(1 + 0.1 * rng.normal(size=N))], 1)
    both = there_and_back_and_what_is_right()
    slope, z, want_slope, (u, nu, left) = both(starts, limits, share)
    assert np.all(np.asarray(z.status) == Status.CONVERGED)
    # The program is convex: what meets all conditions is its minimum.
    assert np.min(nu) >= -1e-9
    assert np.max(left[:, 1:]) <= 1e-9
    assert_close(z.u[:, :, 0], u, 1e-8)
    assert_close(z.multipliers.inequality[:, :, 0], nu, 1e-7)
    slope, want_slope = (np.column_stack([x, limit]) for x, limit in (slope, want_slope))
    for got, right in zip(slope, want_slope, strict=True):
        assert_close(got, right, 1e-8)


# Rows that leave no freedom: c/2 (u − 1)² subject to s u = b has the plan b / s.

SCALES = jnp.meshgrid(jnp.array([1e-4, 1.0, 1e4]), jnp.array([1e-2, 1.0, 1e2]))


def at_the_end(c, s, b):
    """The only control is fixed by a row of the last state."""
    z = mpc_solve(
        lambda x, u, t, p: 0.5 * c * jnp.sum((u - 1) ** 2), lambda x, u, t, p: u,
        jnp.zeros(1), jnp.zeros((1, 1)),
        constraints=Constraints(terminal_equality=lambda x, p: s * x - b),
    )  # fmt: skip
    return z.u[0, 0], z


def beside_a_free_one(c, s, b):
    """One control of two is fixed by a row of its own."""
    z = mpc_solve(
        lambda x, u, t, p: 0.5 * c * jnp.sum((u - 1) ** 2), lambda x, u, t, p: x,
        jnp.zeros(1), jnp.zeros((1, 2)),
        constraints=Constraints(equality=lambda x, u, t, p: s * u[:1] - b),
    )  # fmt: skip
    return z.u[0, 0], z


@pytest.mark.parametrize(
    "fixed", [pytest.param(at_the_end, marks=pytest.mark.slow), beside_a_free_one]
)
def test_controls_that_rows_fix(fixed):
    run = jax.vmap(jax.value_and_grad(fixed, 2, has_aux=True), (0, 0, None))
    c, s = (a.ravel() for a in SCALES)
    (u, z), slope = jax.jit(run)(c, s, 3.0)
    assert np.all(np.asarray(z.status) == Status.CONVERGED)
    assert_close(u * s, np.full(9, 3.0), 1e-9)
    assert_close(slope * s, np.ones(9), 1e-9)
    assert np.all(np.asarray(z.iterations) <= 20)
