"""The rollout of a step from states that are not one yet."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc.batch import lanes
from jaxmpc.problem.trace import trace
from jaxmpc.solver.iterate import with_gaps
from jaxmpc.solver.line_search import Step, take_step

T, ALPHA = 4, 0.25


def dynamics(x, u, t, params):
    return jnp.sin(x) + u


def cost(x, u, t, params):
    return x @ x + u @ u


@pytest.mark.parametrize("size, left", [(1e-3, 1 - ALPHA), (1e-9, 0.0)])
def test_a_step_closes_its_share_of_the_gaps_and_small_ones_for_good(size, left):
    rng = np.random.default_rng(0)
    x_init, u = rng.normal(size=2), rng.normal(size=(T, 2))
    gaps, x = size * rng.normal(size=(T, 2)), [x_init]
    for t in range(T):
        x.append(np.sin(x[t]) + u[t] - gaps[t])
    problem, data, _ = trace(cost, dynamics, jnp.asarray(x_init), jnp.asarray(u), None)
    at = with_gaps(problem, data, jnp.asarray(u), jnp.asarray(x))
    K, none = jnp.asarray(0.3 * rng.normal(size=(T, 2, 2))), jnp.zeros(())
    step = Step(at.u + 0.2, jnp.zeros_like(at.u), K, none, none)

    new = lanes.any_rank(take_step)(problem, data, at, step, jnp.asarray(ALPHA))
    new_x, new_u = np.asarray(new.x), np.asarray(new.u)
    assert_close(new_u, u + ALPHA * 0.2 + np.einsum("tij,tj->ti", K, (new_x - x)[:-1]), 1e-12)
    assert_close(new.gaps, left * gaps, 1e-6, scale=size)
    assert_close(np.sin(new_x[:-1]) + new_u - new_x[1:], left * gaps, 1e-6, scale=size)
