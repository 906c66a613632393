"""Sizes of states and controls that the user knows: they shape the search, not the solution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Constraints, Rate, Status, ilqr_box

T, PUSH = 8, 2.0
DISTANCES = np.array([2.0, 3.0, 4.5])


@jax.jit
@jax.vmap
def fastest(distance, x_size, u_size):
    """From rest to rest in the least time: the step is a control, which all stages share; rows
    alone bound it and the push, and no cost has any curvature."""

    def dynamics(x, u, t, p):
        return jnp.stack([x[0] + u[1] * x[1] + 0.5 * u[1] ** 2 * u[0], x[1] + u[1] * u[0], u[1]])

    def within(x, u, t, p):
        return jnp.stack([u[0] - PUSH, -PUSH - u[0], u[1] - 0.6, 0.02 - u[1]])

    constraints = Constraints(
        inequality=within,
        equality=lambda x, u, t, p: jnp.where(t > 0, u[1:] - x[2:], 0.0),
        terminal_equality=lambda x, p: jnp.stack([x[0] - p, x[1]]),
        x_size=x_size,
        u_size=u_size,
    )
    return ilqr_box(
        lambda x, u, t, p: u[1], dynamics, jnp.zeros(3), jnp.full((T, 2), 0.3), distance,
        constraints=constraints,
    )  # fmt: skip


def solved(x_size, u_size):
    sizes = (np.tile(size, (len(DISTANCES), 1)) for size in (x_size, u_size))
    return fastest(jnp.asarray(DISTANCES), *map(jnp.asarray, sizes))


def plans():
    """Full push for half of the time, full brake for the other: d = PUSH (time / 2)²."""
    step = 2 * np.sqrt(DISTANCES / PUSH) / T
    push = np.repeat([PUSH, -PUSH], T // 2)
    return np.stack(np.broadcast_arrays(push, step[:, None]), axis=-1)


RIGHT = np.array([3.0, 3.0, 0.3]), np.array([2.0, 0.3])


def test_known_sizes_find_what_the_search_does_not_see_by_itself():
    with_them, without = solved(*RIGHT), solved(np.zeros(3), np.zeros(2))
    assert np.all(np.asarray(with_them.status) == Status.CONVERGED)
    assert_close(with_them.u, plans(), 1e-8)
    assert np.max(with_them.iterations) < np.min(without.iterations)


@pytest.mark.parametrize("off", [1e-3, 1e3])
def test_wrong_sizes_lead_nowhere_else(off):
    z = solved(off * RIGHT[0], off * RIGHT[1])
    converged = np.asarray(z.status) == Status.CONVERGED
    assert np.any(np.asarray(z.iterations) != np.asarray(solved(*RIGHT).iterations))
    if converged.any():
        assert_close(z.u[converged], plans()[converged], 1e-8)


def test_with_a_rate_the_control_before_has_the_size_of_a_control():
    def limited(size):
        return ilqr_box(
            lambda x, u, t, p: x @ x + u @ u, lambda x, u, t, p: x + u[:1], jnp.ones(2),
            jnp.zeros((T, 1)),
            constraints=Constraints(rate=Rate(jnp.zeros(1), 0.1), u_size=size, x_size=size),
        )  # fmt: skip

    assert jax.eval_shape(limited, 1.0).x.shape == (T + 1, 2)
