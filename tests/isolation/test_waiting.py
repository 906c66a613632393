"""What a problem that has ended reports while others of its batch go on."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmpc import Status, mpc_solve


def dynamics(x, u, t, growth):
    return jnp.stack([growth * x[0] + 0.1 * x[1], x[1] + 0.1 * u[0] + 0.02 * jnp.sin(x[0])])


def cost(x, u, t, growth):
    return 0.5 * (x[0] ** 2 + 0.1 * x[1] ** 2 + 0.01 * u[0] ** 2)


def plan(x_init, growth):
    solution = mpc_solve(cost, dynamics, x_init, jnp.zeros((200, 1)), growth)
    return jnp.sum(jnp.sin(solution.u)), solution


def test_it_is_the_same_whoever_goes_on():
    """Unstable plants, whose costates are not those of the rollout at the end."""
    run = jax.jit(jax.vmap(jax.value_and_grad(plan, (0, 1), has_aux=True)))
    x_init = jnp.array([[-3.0, 0.5], [0.1, 0.0], [2.0, 1.0]])
    growth = jnp.array([1.1, 1.5, 1.02])
    together = run(x_init, growth)
    (_, solution), _ = together
    assert np.all(np.asarray(solution.status) == Status.CONVERGED)
    iterations = np.asarray(solution.iterations)
    assert iterations.min() < iterations.max()
    for i in range(3):
        same = jnp.full(3, i)
        alone = run(x_init[same], growth[same])
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            assert np.array_equal(a[i], b[i])
