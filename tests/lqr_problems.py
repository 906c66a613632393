"""Random problems of ``lqr_solve``, and a dense solve of their KKT system."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


class Problem(NamedTuple):
    x_init: jax.Array
    C: jax.Array
    c: jax.Array
    F: jax.Array
    f: jax.Array
    C_final: jax.Array
    c_final: jax.Array


class Plan(NamedTuple):
    x: jax.Array
    u: jax.Array
    costate: jax.Array


def random_problem(n, m, T, seed=0):
    rng = np.random.default_rng([n, m, T, seed])

    def convex(*shape):  # not symmetric: the skew part has no effect
        A, skew = rng.normal(size=(2, *shape, shape[-1]))
        square = A @ np.swapaxes(A, -1, -2) / shape[-1] + 0.5 * np.eye(shape[-1])
        return square + skew - np.swapaxes(skew, -1, -2)

    problem = Problem(
        x_init=rng.normal(size=n),
        C=convex(T, n + m),
        c=rng.normal(size=(T, n + m)),
        F=rng.normal(size=(T, n, n + m)) / np.sqrt(n + m),
        f=rng.normal(size=(T, n)),
        C_final=convex(n),
        c_final=rng.normal(size=n),
    )
    free = rng.uniform(size=(T, m)) < 0.6
    free[T // 2] = False  # one stage without any choice
    free[0, 0] = True
    return jax.tree.map(jnp.asarray, problem), jnp.asarray(free)


def plan_of(solution):
    return Plan(solution.x, solution.u, solution.costate)


def dense_plan(problem, free):
    """The stationary point of the Lagrangian, from its Hessian (the KKT matrix) and gradient."""
    x_init, C, c, F, f, C_final, c_final = problem
    n, (T, m) = x_init.shape[0], free.shape
    zero, unravel = ravel_pytree(
        Plan(jnp.zeros((T + 1, n)), jnp.zeros((T, m)), jnp.zeros((T + 1, n)))
    )

    def lagrangian(flat):
        x, u, costate = unravel(flat)
        z = jnp.concatenate([x[:-1], u], axis=1)
        stages = 0.5 * jnp.einsum("ti,tij,tj", z, C, z) + jnp.vdot(c, z)
        final = 0.5 * x[-1] @ C_final @ x[-1] + c_final @ x[-1]
        gap = jnp.einsum("tij,tj->ti", F, z) + f - x[1:]
        return stages + final + jnp.vdot(costate[1:], gap) + costate[0] @ (x_init - x[0])

    matrix, vector = jax.hessian(lagrangian)(zero), jax.grad(lagrangian)(zero)
    everything = Plan(jnp.ones((T + 1, n)), free.astype(float), jnp.ones((T + 1, n)))
    counts = ravel_pytree(everything)[0] == 1
    matrix = jnp.where(counts[:, None] & counts[None, :], matrix, jnp.eye(zero.size))
    return unravel(jnp.linalg.solve(matrix, jnp.where(counts, -vector, 0)))


def dense_gains(problem, free):
    """u_t as an affine function of x_t, with every control before stage t pinned."""
    T = free.shape[0]

    def gain(t):
        after = free & (jnp.arange(T) >= t)[:, None]

        def plan(push):
            offset = jnp.concatenate([problem.x_init[None], problem.f]).at[t].add(push)
            return dense_plan(problem._replace(x_init=offset[0], f=offset[1:]), after)

        still = jnp.zeros_like(problem.x_init)
        K = jax.jacfwd(lambda push: plan(push).u[t])(still)
        x, u, _ = plan(still)
        return K, u[t] - K @ x[t]

    return jax.lax.map(gain, jnp.arange(T))


dense = jax.jit(dense_plan)


def floats(tree):
    """Its leaves, without a status."""
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def random_weights(tree, seed=1):
    flat, unravel = ravel_pytree(floats(tree))
    return unravel(jnp.asarray(np.random.default_rng(seed).normal(size=flat.size)))


def wavy(tree, weights):
    """A loss with a curvature of its own."""
    return sum(
        jnp.vdot(w, jnp.sin(a) + 0.1 * a**2) for a, w in zip(floats(tree), weights, strict=True)
    )


def symmetric(C):
    return (C + jnp.swapaxes(C, -1, -2)) / 2
