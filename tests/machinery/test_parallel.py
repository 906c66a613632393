"""``lqr_solve(method="parallel")`` against the sequential solve and the dense KKT system."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from lqr_problems import (
    dense,
    floats,
    plan_of,
    random_problem,
    random_weights,
    symmetric,
    wavy,
)

from jaxmpc import Options, lqr_solve, mpc_solve
from jaxmpc.riccati import parallel
from jaxmpc.systems import pendulum

# (n, m, T): on matrix entries and on matrices; horizons that are no power of two.
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SIZES = [
    (2, 3, 1),
    slow((3, 2, 2)),
    slow((2, 1, 3)),
    (2, 3, 5),
    slow((8, 4, 64)),
    slow((2, 1, 1000)),
    slow((8, 4, 4096)),
]


@functools.partial(jax.jit, static_argnames="method")
def solve(problem, free, method="parallel"):
    x_init, C, c, F, f, C_final, c_final = problem
    return lqr_solve(x_init, C, c, F, f, C_final=C_final, c_final=c_final, free=free, method=method)


@functools.partial(jax.jit, static_argnames="method")
def gradient(problem, free, method="parallel"):
    """Of a loss on everything that comes back, the gains included."""

    def loss(problem):
        solution = solve(problem, free, method)
        return wavy(solution, random_weights(solution))

    return jax.grad(loss)(problem)


@pytest.fixture
def fallbacks(monkeypatch):
    """Whether each check called for the sequential recursion."""
    needed = []
    original = parallel._replaced_by

    def spied(sequential):
        def replace(need, fast, args):
            jax.debug.callback(lambda need: needed.append(bool(np.any(need))), need)
            return original(sequential)(need, fast, args)

        return replace

    monkeypatch.setattr(parallel, "_replaced_by", spied)
    solve.clear_cache()
    yield needed
    monkeypatch.undo()
    solve.clear_cache()


def steady(A, B, T, control_cost=1.0, dtype=jnp.float32):
    """A regulator with constant matrices, unit state cost, and forces and linear terms."""
    n, m = B.shape
    rng = np.random.default_rng(3)
    problem, _ = random_problem(n, m, T)
    C = np.diag([1.0] * n + [control_cost] * m)
    problem = problem._replace(
        C=np.broadcast_to(C, (T, n + m, n + m)),
        F=np.broadcast_to(np.concatenate([A, B], axis=1), (T, n, n + m)),
        f=0.1 * rng.normal(size=(T, n)),
        C_final=np.eye(n),
    )
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), problem), jnp.ones((T, m), bool)


@pytest.mark.parametrize("size", SIZES)
def test_is_the_sequential_solve(size):
    problem, free = random_problem(*size)
    got = solve(problem, free)
    assert_close(got, solve(problem, free, "sequential"), 1e-10)
    assert np.all(got.u[~free] == 0)
    assert np.all(got.K[~free] == 0)
    assert np.all(got.k[~free] == 0)


@pytest.mark.parametrize("pinned", ["none", "some", "all"])
def test_solves_the_kkt_system(pinned):
    problem, free = random_problem(2, 3, 5)
    free = dict(none=jnp.ones_like(free), some=free, all=jnp.zeros_like(free))[pinned]
    assert_close(plan_of(solve(problem, free)), dense(problem, free), 1e-10)


@pytest.mark.parametrize("size", [(2, 3, 5), slow((8, 4, 5)), slow((2, 1, 1000))])
def test_gradients_are_those_of_the_sequential_solve(size):
    problem, free = random_problem(*size)
    assert_close(gradient(problem, free), gradient(problem, free, "sequential"), 1e-9)


@pytest.mark.slow
def test_second_derivatives_are_those_of_the_sequential_solve():
    problem, free = random_problem(2, 1, 3)
    direction = random_weights(problem)

    @functools.partial(jax.jit, static_argnames="method")
    def twice(problem, method):
        def slope(problem):
            return wavy(gradient(problem, free, method), direction)

        return jax.grad(slope)(problem)

    assert_close(twice(problem, "parallel"), twice(problem, "sequential"), 1e-9)


def test_indefinite_control_costs_need_no_fallback(fallbacks):
    problem, free = random_problem(3, 2, 5)
    n = 3
    problem = problem._replace(C=problem.C.at[1::2, n:, n:].add(-1.5 * jnp.eye(2)))
    assert jnp.min(jnp.linalg.eigvalsh(symmetric(problem.C)[:, n:, n:])) < -0.1
    assert_close(plan_of(solve(problem, free)), dense(problem, free), 1e-9)
    assert not any(fallbacks)


def position_only():
    """The double integrator with no cost on its velocity and none on its control: a stage alone
    says nothing about its control, the rest of the horizon does."""
    A, B, T = jnp.array([[1.0, 0.1], [0.0, 1.0]]), jnp.array([[0.0], [0.1]]), 6
    problem, free = steady(A, B, T, control_cost=0.0, dtype=float)
    return problem._replace(C=problem.C.at[:, 1, 1].set(0.0)), free


def test_a_stage_that_the_scan_cannot_eliminate_is_solved_sequentially(fallbacks):
    problem, free = position_only()
    assert_close(solve(problem, free), solve(problem, free, "sequential"), 1e-9)
    assert_close(plan_of(solve(problem, free)), dense(problem, free), 1e-6)
    assert fallbacks[0]


def test_the_gradient_falls_back_too():
    problem, free = position_only()
    assert_close(gradient(problem, free), gradient(problem, free, "sequential"), 1e-6)


ROTATION = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
SKEW = np.random.default_rng(0).normal(size=(4, 4))
SYSTEMS = {
    "stiff": (ROTATION, [1e-3, 1e-2, 0.3, 1.0], 1.0),
    "stiff, not normal": (SKEW, [1e-3, 1e-2, 0.3, 1.0], 1.0),
    "unstable": (ROTATION, [1.2, 1.1, 0.3, 0.9], 1.0),
    "unstable, not normal": (SKEW, [1.2, 1.1, 0.3, 0.9], 1.0),
    "unstable, cheap control": (ROTATION, [1.2, 1.1, 0.3, 0.9], 1e-6),
    "unstable, expensive control": (ROTATION, [1.2, 1.1, 0.3, 0.9], 1e4),
    "units far apart": (np.diag([1e-3, 1.0, 1e3, 10.0]) @ ROTATION, [1.2, 1.1, 0.3, 0.9], 1.0),
}


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_float32_is_as_accurate_as_the_sequential_solve(system):
    basis, eigenvalues, control_cost = system
    A = basis @ np.diag(eigenvalues) @ np.linalg.inv(basis)
    B = np.random.default_rng(1).normal(size=(4, 1))
    problem, free = steady(A, B, 200, control_cost)
    truth = solve(jax.tree.map(lambda a: a.astype(float), problem), free, "sequential")
    eps = np.finfo(np.float32).eps

    def error(solution):
        return {
            name: np.max(np.abs(a - b)) / np.max(np.abs(b))
            for name, a, b in zip(
                "xulKk",
                *(map(np.asarray, floats(s)) for s in (solution, truth)),
                strict=True,
            )
        }

    got, reference = error(solve(problem, free)), error(solve(problem, free, "sequential"))
    assert all(got[name] <= 8 * reference[name] + 16 * eps for name in got), (got, reference)


def batch(*pairs):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)


def test_grad_of_vmap_of_jit_and_a_bad_problem_does_not_touch_the_others():
    (good, free), (other, other_free) = (random_problem(2, 1, 4, seed=seed) for seed in range(2))
    singular = other._replace(C=jnp.zeros_like(other.C), C_final=jnp.zeros_like(other.C_final))
    broken = other._replace(C=other.C.at[2].set(jnp.nan))
    problems, frees = batch(*[(p, free) for p in (good, singular, broken)], (other, other_free))

    def loss(problems, method):
        solution = jax.vmap(functools.partial(solve, method=method))(problems, frees)
        return jnp.sum(jax.vmap(wavy, (0, None))(solution, weights)), solution

    weights = random_weights(solve(good, free))
    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnames="method")
    got, want = grad(problems, "parallel"), grad(problems, "sequential")
    for i in (0, 3):
        at = functools.partial(jax.tree.map, lambda a: a[i])  # noqa: B023
        assert_close(at(got), at(want), 1e-9)
    assert np.all(np.isnan(got[1].x[2, -1]))


def loops(jaxpr, inside_cond=False):
    """(is it inside the branch of a cond, its length or None) of every scan and while."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("scan", "while"):
            yield inside_cond, eqn.params.get("length")
        is_cond = eqn.primitive.name == "cond"
        if is_cond:
            assert eqn.invars[0].aval.shape == ()  # under vmap too: no branch runs in vain
        for param in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(param):
                yield from loops(getattr(param, "jaxpr", param), inside_cond or is_cond)


def is_jaxpr(a):
    return hasattr(a, "eqns") or hasattr(getattr(a, "jaxpr", None), "eqns")


def test_nothing_goes_through_the_horizon_stage_by_stage():
    n, m, T = 3, 2, 37
    problem, free = random_problem(n, m, T)
    problems = jax.tree.map(lambda a: jnp.stack([jnp.stack([a] * 2)] * 2), problem)

    def lengths(method):
        each = functools.partial(gradient, free=free, method=method)
        jaxpr = jax.make_jaxpr(jax.vmap(jax.vmap(lambda p: each(p))))(problems)
        found = set(loops(jaxpr.jaxpr))
        assert found
        return {length for inside, length in found if not inside}

    assert T in lengths("sequential")
    assert lengths("parallel") == {n}  # the pivots of one elimination


def test_an_unknown_method_is_refused():
    problem, _ = random_problem(2, 1, 3)
    with pytest.raises(ValueError, match=r"method must be one of .*'parallel'.*got 'fast'"):
        lqr_solve(problem.x_init, problem.C, problem.c, problem.F, method="fast")
    with pytest.raises(ValueError, match=r"options\.riccati must be one of .*got 'fast'"):
        mpc_solve(
            pendulum.cost,
            pendulum.dynamics,
            jnp.array([1.0, 0.0, 0.0]),
            jnp.zeros((3, 1)),
            pendulum.default_params(),
            options=Options(riccati="fast"),
        )
