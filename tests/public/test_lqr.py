"""``lqr_solve`` against a dense solve of its KKT system, and that solve's derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.flatten_util import ravel_pytree
from lqr_problems import (
    dense,
    dense_gains,
    dense_plan,
    plan_of,
    random_problem,
    random_weights,
    symmetric,
    wavy,
)

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


@jax.jit
def solve(problem, free):
    x_init, C, c, F, f, C_final, c_final = problem
    return lqr_solve(x_init, C, c, F, f, C_final=C_final, c_final=c_final, free=free)


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
    assert np.all(solution.K[~free] == 0)
    assert np.all(solution.k[~free] == 0)


def test_an_indefinite_problem_gives_its_stationary_point():
    problem, free = random_problem(*SMALL)
    problem = problem._replace(C=problem.C - 2.0 * jnp.eye(SMALL[0] + SMALL[1])[None])
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
    floats = plan_of(got), got.K, got.k
    assert {a.dtype for a in jax.tree.leaves((floats, slopes))} == {jnp.dtype("float32")}
    assert got.status.dtype == jnp.int32
    assert_close(got, want, 1e-4)


def test_dtypes_are_promoted_together():
    x_init, C, c, F, *_ = random_problem(*SMALL)[0]
    with jax.numpy_dtype_promotion("standard"):
        assert lqr_solve(x_init.astype(jnp.float32), C, c, F).u.dtype == jnp.float64
