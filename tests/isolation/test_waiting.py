"""What a problem that has ended reports while others of its batch go on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmpc import Options, Status, mpc_solve


def dynamics(x, u, t, growth):
    return jnp.stack([growth * x[0] + 0.1 * x[1], x[1] + 0.1 * u[0] + 0.02 * jnp.sin(x[0])])


def cost(x, u, t, growth):
    return 0.5 * (x[0] ** 2 + 0.1 * x[1] ** 2 + 0.01 * u[0] ** 2)


def plan(x_init, growth, tolerance):
    options = Options(tolerance=tolerance, unconverged="implicit")
    solution = mpc_solve(cost, dynamics, x_init, jnp.zeros((200, 1)), growth, options=options)
    return jnp.sum(jnp.sin(solution.u)), solution


@functools.cache
def program():
    each = jax.value_and_grad(plan, (0, 1), has_aux=True)
    return jax.jit(jax.vmap(each, (0, 0, None)))


@pytest.mark.parametrize("tolerance", [1e-10, pytest.param(1e-30, id="out of reach")])
def test_it_is_the_same_whoever_goes_on(tolerance):
    """Unstable plants, whose costates are not those of the rollout at the end. Where the tolerance
    is out of reach, all of them end by rounding."""

    def run(x_init, growth):
        return program()(x_init, growth, tolerance)

    x_init = np.array([[-3.0, 0.5], [0.1, 0.0], [0.5, 0.0]])
    growth = np.array([1.1, 1.5, 1.02])
    together = run(x_init, growth)
    (_, solution), _ = together
    if tolerance == 1e-10:
        assert np.all(np.asarray(solution.status) == Status.CONVERGED)
    iterations = np.asarray(solution.iterations)
    assert iterations.min() < iterations.max()
    for i in range(3):
        same = np.full(3, i)
        alone = run(x_init[same], growth[same])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert np.array_equal(a[i], b[i])
