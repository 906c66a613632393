"""Batches: each problem as if it were alone, whatever happens to the others."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Options, Status, ilqr_box, mpc_solve
from jaxmpc.systems import pendulum

T = 12


def weighted():
    params = pendulum.default_params()
    return params._replace(cost=params.cost._replace(q=params.cost.q.at[-1].set(0.1)))


def solve(x_init, params, upper=2.0, options=Options()):
    return mpc_solve(
        pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params,
        u_lower=-upper, u_upper=upper, options=options,
    )  # fmt: skip


def starts(num):
    angle, rate = jax.random.uniform(jax.random.key(3), (2, num), minval=-1, maxval=1)
    return jax.vmap(pendulum.state)(jnp.pi * angle, rate)


def parts(s):
    """Of a problem's loss: everything that is differentiable."""
    values = jnp.sum(jnp.sin(s.u)), jnp.sum(s.x**2), 0.1 * jnp.sum(jnp.cos(s.costate)), s.objective
    return jnp.stack(values)


def loss(solutions, counts):
    """Of a batch; only the problems that count contribute."""
    return jnp.sum(jnp.where(counts, jnp.sum(jax.vmap(parts)(solutions), 1), 0))


@pytest.mark.slow  # values and gradients are compared in test_transforms
def test_a_batch_with_mixed_convergence_equals_a_loop():
    x_init = starts(8)
    # Few iterations: some problems converge and some do not.
    options = Options(max_iterations=3)
    one = jax.jit(lambda x: ilqr_box(
        pendulum.cost, pendulum.dynamics, x, jnp.zeros((T, 1)), weighted(),
        u_lower=-2.0, u_upper=2.0, options=options,
    ))  # fmt: skip
    batch = jax.vmap(one)(x_init)
    assert len(np.unique(batch.status)) > 1
    for i in range(8):
        alone = one(x_init[i])
        together = jax.tree.map(lambda a, i=i: a[i], batch)
        assert int(alone.status) == int(together.status)
        assert int(alone.iterations) == int(together.iterations)
        assert_close(together.u, alone.u, 1e-9)
        assert_close(together.x, alone.x, 1e-9)


BAD = {
    "nan": lambda x: x.at[2].set(jnp.nan).at[5].set(jnp.nan),
    "overflow": lambda x: x.at[2].set(1e300).at[5, 2].set(jnp.inf),
}
GOOD = np.array([True, True, False, True, True, False, True, True])


@functools.cache
def shared_gradient(policy):
    """(x_init, counts, max_iterations) -> the gradient in what the problems share, the solutions"""

    @jax.jit
    def run(x_init, counts, max_iterations):
        options = Options(max_iterations=max_iterations, unconverged=policy)

        def total(params):
            solutions = jax.vmap(lambda x: solve(x, params, options=options))(x_init)
            return loss(solutions, counts), solutions

        return jax.grad(total, has_aux=True)(weighted())

    return run


@pytest.mark.parametrize("policy", ["zero", "implicit"])
def test_bad_problems_change_neither_solutions_nor_shared_gradients(policy):
    def run(x_init, counts):
        return shared_gradient(policy)(x_init, counts, 200)

    x_init, everything = starts(8), np.ones(8, bool)
    want, alone = run(x_init, GOOD)
    assert np.all(np.asarray(alone.status) == Status.CONVERGED)
    for spoil in BAD.values():
        # Whether or not the loss masks them: NaN in the loss itself is the user's to mask.
        grad, solutions = run(spoil(x_init), GOOD)
        assert np.all(np.asarray(solutions.status)[~GOOD] == Status.NONFINITE)
        for field in ("x", "u", "costate", "objective", "status", "iterations"):
            assert_close(getattr(solutions, field)[GOOD], getattr(alone, field)[GOOD], 1e-12)
        assert_close(grad, want, 1e-12)
    grad, _ = run(x_init, everything)
    assert abs(float(grad.physics.g - want.physics.g)) > 1e-3  # the masked ones would count


def test_a_bad_problem_that_the_loss_does_count_gives_no_gradient():
    x_init = BAD["nan"](starts(8))
    for good, alone in zip(GOOD, np.eye(8, dtype=bool), strict=True):
        grad, _ = shared_gradient("zero")(x_init, alone, 200)
        assert np.all(np.isfinite(grad.physics))
        assert (grad.physics.l != 0) == good


SINGULAR_SOMEWHERE = {
    "log at 1": lambda x: -jnp.log(1 - x[0] ** 2) + x[1] ** 2,
    "distance at 0": lambda x: 1 / (0.1 + jnp.linalg.norm(x)) + x[0] ** 2,
    "distance between": lambda x: 1 / (0.1 + jnp.sqrt((x[0] - x[1]) ** 2)) + x @ x,
    "angle": lambda x: jnp.arctan2(x[0] - x[1], x[0] - 1) ** 2,
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("log at 1", marks=pytest.mark.slow),
        pytest.param("distance at 0", marks=pytest.mark.slow),
        pytest.param("distance between", marks=pytest.mark.slow),
        "angle",
    ],
)
def test_no_function_is_singular_where_a_bad_problem_is_differentiated(name):
    """Nor does it matter that the problems read a shared table with a bad row."""
    table = jnp.array([[0.5, 0.1], [0.3, -0.4], [jnp.nan, 1.0]])

    def cost(x, u, t, p):
        return p["w"] * SINGULAR_SOMEWHERE[name](x) + u @ u + jnp.sum((x - table[p["i"]]) ** 2)

    @jax.jit
    def run(x_init, rows, counts):
        def total(w):
            def one(x, i):
                return mpc_solve(cost, lambda x, u, t, p: x + 0.1 * u, x, jnp.zeros((3, 2)),
                                 {"w": w, "i": i})  # fmt: skip

            s = jax.vmap(one)(x_init, rows)
            return jnp.sum(jnp.where(counts[:, None, None], jnp.sin(s.u), 0)), s.status

        return jax.grad(total, has_aux=True)(0.3)

    x_init, rows = jnp.array([[0.5, 0.2], [-0.3, 0.1], [0.1, 0.4]]), jnp.array([0, 1, 0])
    counts = np.array([True, True, False])
    want, status = run(x_init, rows, counts)
    assert np.all(np.asarray(status)[:2] == Status.CONVERGED)
    assert abs(float(want)) > 1e-4
    for bad in (
        run(x_init.at[2].set(jnp.nan), rows, counts),
        run(x_init, rows.at[2].set(2), counts),
    ):
        assert int(bad[1][2]) == Status.NONFINITE
        assert_close(bad[0], want, 1e-12)
    # Nobody to borrow from: every gradient is zero.
    grad, status = run(x_init * jnp.nan, rows, counts)
    assert np.all(np.asarray(status) == Status.NONFINITE)
    assert float(grad) == 0


def test_a_bad_problem_alone_has_a_zero_gradient():
    def run(w, x):
        def cost(x, u, t, w):
            return w * jnp.sum(jnp.log(1 - x)) ** 2 + u @ u

        s = mpc_solve(cost, lambda x, u, t, w: x + 0.1 * u, x, jnp.zeros((3, 2)), w)
        return jnp.sum(s.u)

    # One after the other, each without a batch.
    slope = jax.jit(jax.grad(lambda w, xs: jnp.sum(jax.lax.map(lambda x: run(w, x), xs))))
    good, bad = np.array([0.1, 0.2]), np.array([np.nan, 0.0])
    assert slope(1.0, np.stack([bad, np.full(2, np.nan)])) == 0
    assert_close(2 * slope(1.0, np.stack([good, bad])), slope(1.0, np.stack([good] * 2)), 1e-12)
    assert slope(1.0, np.stack([good, bad])) != 0


def test_a_nan_in_a_problems_own_parameters_stays_there():
    params = weighted()

    @jax.jit
    def run(weights, counts):
        def total(physics, weights):
            def one(x, q):
                return solve(x, params._replace(physics=physics, cost=params.cost._replace(q=q)))

            solutions = jax.vmap(one)(starts(8), weights)
            return loss(solutions, counts), solutions.status

        return jax.grad(total, (0, 1), has_aux=True)(params.physics, weights)

    weights = jnp.tile(params.cost.q, (8, 1))
    want, _ = run(weights, GOOD)
    (shared, own), status = run(weights.at[~GOOD].set(jnp.nan), GOOD)
    assert np.all(np.asarray(status)[~GOOD] == Status.NONFINITE)
    assert_close((shared, own), want, 1e-12)
    assert np.all(np.asarray(own)[~GOOD] == 0)


def test_traced_infeasible_bounds_are_a_status_of_their_problem():
    @jax.jit
    def run(upper, counts):
        def total(params):
            solutions = jax.vmap(
                lambda x, b: mpc_solve(
                    pendulum.cost,
                    pendulum.dynamics,
                    x,
                    jnp.zeros((T, 1)),
                    params,
                    u_lower=-0.5,
                    u_upper=b,
                )
            )(starts(4), upper)
            return loss(solutions, counts), solutions

        return jax.grad(total, has_aux=True)(weighted())

    counts = np.array([True, False, True, False])
    want, alone = run(np.full(4, 2.0), counts)
    grad, solutions = run(np.array([2.0, -1.0, 2.0, np.nan]), counts)
    assert list(np.asarray(solutions.status)) == [0, Status.INFEASIBLE, 0, Status.INFEASIBLE]
    assert_close(solutions.u[counts], alone.u[counts], 1e-12)
    assert_close(grad, want, 1e-12)


def test_the_policies_for_the_unconverged():
    """In the derivatives of each problem in g, by counting it alone, or part by part."""

    def of(policy):
        run = shared_gradient(policy)
        found = [run(starts(8), alone, 3)[0].physics.g for alone in np.eye(8, dtype=bool)]
        return np.stack(found)

    @jax.jit
    @jax.vmap
    def by_parts(x):
        def values(g):
            params = weighted()
            params = params._replace(physics=params.physics._replace(g=g))
            s = solve(x, params, options=Options(max_iterations=3, unconverged="nan"))
            return parts(s), s.status

        return jax.jacrev(values, has_aux=True)(10.0)

    nan, status = map(np.asarray, by_parts(starts(8)))
    converged = status == Status.CONVERGED
    assert 0 < np.mean(converged) < 1
    assert np.all(np.isnan(nan[~converged]))
    assert np.all(nan[converged] != 0)
    zero, implicit = of("zero"), of("implicit")
    assert np.all(zero[~converged] == 0)
    assert_close(zero[converged], nan[converged].sum(1), 1e-12)
    assert np.all(np.isfinite(implicit))
    assert np.all(implicit != 0)
    assert_close(implicit[converged], zero[converged], 1e-12)


def test_shared_weights_have_no_gradient_per_problem_in_memory():
    batch, n, width = 37, 3, 101

    def network(x, u, t, params):
        h = jnp.tanh(params["V"] @ jnp.concatenate([x, u]))
        return 0.9 * x + 0.1 * (params["W"] @ h)

    def cost(x, u, t, params):
        return x @ x + u @ u

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "V": jax.random.normal(keys[0], (width, n + 1)),
        "W": jax.random.normal(keys[1], (n, width)) / width,
    }
    x_init = jax.random.normal(keys[2], (batch, n))

    def total(params, x_init):
        def one(x):
            return mpc_solve(cost, network, x, jnp.zeros((5, 1)), params, u_lower=-1.0, u_upper=1.0)

        return jnp.sum(jax.vmap(one)(x_init).u ** 2)

    text = jax.jit(jax.grad(total)).lower(params, x_init).compile().as_text()
    # What is inside of a fused loop is never stored.
    text = re.sub(r"(?ms)^%\S*(fused|wrapped)_\S* \(.*?^}$", "", text)
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f64\[([\d,]+)\]", text)}
    assert any(batch in s and width in s for s in shapes)  # the activations
    # With a stage axis they are the layer's Jacobians; without, weights times problems.
    per_problem = [s for s in shapes if {batch, width} <= set(s) and set(s) & {n, n + 1}]
    assert [s for s in per_problem if 5 not in s] == []


@pytest.mark.parametrize(
    "tolerance",
    [
        pytest.param(None, id="default", marks=pytest.mark.slow),
        pytest.param(1e-30, id="out of reach", marks=pytest.mark.slow),  # so is test_waiting's
    ],
)
def test_what_waits_for_the_others_stays_what_it_was(tolerance):
    """In float32, where most searches end by rounding, each at a trip of its own."""
    params = pendulum.default_params(jnp.float32)
    x_init = pendulum.sample_states(jax.random.key(5), 24, jnp.float32)
    options = Options(tolerance=tolerance, unconverged="implicit")

    def loss(x):
        solution = mpc_solve(
            pendulum.cost,
            pendulum.dynamics,
            x,
            jnp.zeros((20, 1), jnp.float32),
            params,
            u_lower=-2.0,
            u_upper=2.0,
            options=options,
        )
        return jnp.sum(jnp.sin(solution.u)), solution

    solve = jax.grad(loss, has_aux=True)
    slopes, batch = jax.jit(jax.vmap(solve))(x_init)
    slopes_alone, alone = jax.jit(lambda x: jax.lax.map(solve, x))(x_init)
    assert len(set(np.asarray(batch.iterations).tolist())) > 2
    np.testing.assert_array_equal(batch.status, alone.status)
    np.testing.assert_array_equal(batch.free, alone.free)
    assert_close((batch.u, batch.K, batch.costate), (alone.u, alone.K, alone.costate), 1e-3)
    assert_close(slopes, slopes_alone, 1e-3)
