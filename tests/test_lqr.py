"""``lqr_solve`` against a dense solve of its KKT system, and that solve's derivatives."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.flatten_util import ravel_pytree

from jaxmpc import lqr_solve

# (n, m, T): recursions on matrix entries up to n + m = 6, on matrices above, and from m = 9 on
# with a loop over the pivots.
SIZES = {
    "scalar one stage": (1, 1, 1),
    "scalar": (1, 1, 6),
    "one stage": (3, 2, 1),
    "one control": (4, 1, 5),
    "two controls": (2, 2, 4),
    "entries": (3, 2, 5),
    "matrices": (8, 4, 5),
    "nine controls": (2, 9, 3),
}
SMALL = SIZES["two controls"]


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


@jax.jit
def solve(problem, free):
    x_init, C, c, F, f, C_final, c_final = problem
    return lqr_solve(x_init, C, c, F, f, C_final=C_final, c_final=c_final, free=free)


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


def random_weights(tree, seed=1):
    flat, unravel = ravel_pytree(tree)
    return unravel(jnp.asarray(np.random.default_rng(seed).normal(size=flat.size)))


def wavy(tree, weights):
    """A loss with a curvature of its own."""
    return sum(
        jnp.vdot(w, jnp.sin(a) + 0.1 * a**2)
        for a, w in zip(jax.tree.leaves(tree), jax.tree.leaves(weights), strict=True)
    )


@pytest.mark.parametrize("masked", [False, True], ids=["all free", "masked"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_plan_and_costates_solve_the_kkt_system(size, masked):
    problem, free = random_problem(*size)
    free = free if masked else jnp.ones_like(free)
    solution = solve(problem, free)
    assert_close(plan_of(solution), dense(problem, free), 1e-10)
    assert np.all(solution.u[~free] == 0)
    feedback = jnp.einsum("tij,tj->ti", solution.K, solution.x[:-1]) + solution.k
    assert_close(feedback, solution.u, 1e-10)


def test_defaults_are_zero_offsets_no_terminal_cost_and_all_free():
    problem, free = random_problem(*SMALL)
    zeros = jax.tree.map(jnp.zeros_like, problem)
    bare = problem._replace(f=zeros.f, C_final=zeros.C_final, c_final=zeros.c_final)
    got = lqr_solve(problem.x_init, problem.C, problem.c, problem.F)
    assert_close(plan_of(got), dense(bare, jnp.ones_like(free)), 1e-10)


def test_gains_are_those_of_every_tail_of_the_horizon():
    problem, free = random_problem(*SMALL)
    solution = solve(problem, free)
    assert_close((solution.K, solution.k), jax.jit(dense_gains)(problem, free), 1e-10)
    assert np.all(solution.K[~free] == 0) and np.all(solution.k[~free] == 0)


def test_an_indefinite_problem_gives_its_stationary_point():
    problem, free = random_problem(*SMALL)
    problem = problem._replace(C=problem.C - 2.0 * jnp.eye(SMALL[0] + SMALL[1]))
    assert jnp.min(jnp.linalg.eigvalsh(problem.C[:, -1:, -1:])) < 0
    assert_close(plan_of(solve(problem, free)), dense(problem, free), 1e-9)


def loss(problem, free, weights):
    return wavy(plan_of(solve(problem, free)), weights)


gradient = jax.jit(jax.grad(loss))


@pytest.mark.parametrize("size", [SMALL, (8, 4, 3), (2, 9, 2)], ids=str)
def test_gradients_are_those_of_the_dense_solve(size):
    problem, free = random_problem(*size)
    weights = random_weights(plan_of(solve(problem, free)))
    want = jax.jit(jax.grad(lambda p: wavy(dense_plan(p, free), weights)))(problem)
    want = want._replace(C=symmetric(want.C), C_final=symmetric(want.C_final))
    assert_close(gradient(problem, free, weights), want, 1e-10)


def symmetric(C):
    return (C + jnp.swapaxes(C, -1, -2)) / 2


def test_gradients_through_the_gains_are_those_of_the_dense_solve():
    problem, free = random_problem(2, 2, 3)
    solution = solve(problem, free)
    weights = random_weights((solution.K, solution.k))

    def loss(problem):
        solution = solve(problem, free)
        return wavy((solution.K, solution.k), weights)

    got = jax.jit(jax.grad(loss))(problem)
    want = jax.jit(jax.grad(lambda p: wavy(dense_gains(p, free), weights)))(problem)
    want = want._replace(C=symmetric(want.C), C_final=symmetric(want.C_final))
    assert_close(got, want, 1e-10, scale=1.0)  # gains do not depend on x_init


def test_only_the_symmetric_part_of_the_cost_counts():
    problem, free = random_problem(*SMALL)
    same = problem._replace(C=symmetric(problem.C), C_final=symmetric(problem.C_final))
    assert_close(solve(problem, free), solve(same, free), 1e-14)


@pytest.mark.parametrize("fields", [("x", "u", "costate"), ("K", "k")], ids=str)
def test_second_derivatives_are_the_differences_of_the_gradient(fields):
    problem, free = random_problem(2, 1, 3)

    def of(problem):
        solution = solve(problem, free)
        return [getattr(solution, name) for name in fields]

    weights = random_weights(of(problem))
    flat, unravel = ravel_pytree(problem)

    def loss(flat):
        return wavy(of(unravel(flat)), weights)

    gradient, step = jax.jit(jax.grad(loss)), 1e-5
    want = [
        (gradient(flat + e) - gradient(flat - e)) / (2 * step) for e in step * np.eye(flat.size)
    ]
    assert_close(jax.jit(jax.jacrev(jax.jacrev(loss)))(flat), jnp.stack(want), 1e-8)


def test_vmap_solves_and_differentiates_each_problem():
    pairs = [random_problem(*SMALL, seed=seed) for seed in range(3)]
    problems, frees = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
    weights = random_weights(plan_of(solve(*pairs[0])))
    got = jax.vmap(gradient, (0, 0, None))(problems, frees, weights)
    want = [gradient(*pair, weights) for pair in pairs]
    assert_close(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *want), 1e-12)
    want = [solve(*pair) for pair in pairs]
    want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *want)
    assert_close(jax.vmap(solve)(problems, frees), want, 1e-12)


def test_float32_stays_float32_without_implicit_promotion():
    problem, free = random_problem(*SMALL)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), problem)
    want = solve(problem, free)
    weights = jax.tree.map(lambda a: a.astype(jnp.float32), random_weights(plan_of(want)))
    with jax.numpy_dtype_promotion("strict"):
        got = solve(single, free)
        slopes = gradient(single, free, weights)
    assert {a.dtype for a in jax.tree.leaves((got, slopes))} == {jnp.dtype("float32")}
    assert_close(got, want, 1e-4)


def test_dtypes_are_promoted_together():
    x_init, C, c, F, *_ = random_problem(*SMALL)[0]
    assert lqr_solve(x_init.astype(jnp.float32), C, c, F).u.dtype == jnp.float64
