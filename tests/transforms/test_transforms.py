"""Every JAX transformation of ``mpc_solve``, and of the closures that it differentiates."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close
from jax.sharding import NamedSharding, PartitionSpec

from jaxmpc import Options, Status, lqr_solve, mpc_solve
from jaxmpc.systems import pendulum

T = 8
PARAMS = pendulum.default_params()
PARAMS = PARAMS._replace(cost=PARAMS.cost._replace(q=PARAMS.cost.q.at[-1].set(0.1)))


def starts(num):
    angle, rate = jax.random.uniform(jax.random.key(3), (2, num), minval=-1, maxval=1)
    return jax.vmap(pendulum.state)(jnp.pi * angle, rate)


def loss(g, x_init, options=Options()):
    """The physics as a parameter."""
    params = PARAMS._replace(physics=PARAMS.physics._replace(g=g))
    s = mpc_solve(pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params,
                  u_lower=-2.0, u_upper=2.0, options=options)  # fmt: skip
    return jnp.sum(jnp.sin(s.u)) + s.objective


def closed_over(g, x_init):
    """The same, with everything closed over."""

    def dynamics(x, u, t, params):
        assert params is None
        return pendulum.dynamics(x, u, t, PARAMS._replace(physics=PARAMS.physics._replace(g=g)))

    def cost(x, u, t, params):
        return pendulum.cost(x, u, t, PARAMS)

    s = mpc_solve(cost, dynamics, x_init, jnp.zeros((T, 1)), u_lower=-2.0, u_upper=2.0)
    return jnp.sum(jnp.sin(s.u)) + s.objective


@pytest.fixture(scope="module")
def reference():
    """Values and gradients in g, one problem at a time."""
    f = jax.jit(jax.value_and_grad(loss))
    values, grads = zip(*(f(10.0, x) for x in starts(6)), strict=True)
    return jnp.stack(values), jnp.stack(grads)


@pytest.mark.parametrize("f", [pytest.param(loss, marks=pytest.mark.slow), closed_over])
def test_vmap_of_grad(f, reference):
    values, grads = jax.jit(jax.vmap(jax.value_and_grad(f), (None, 0)))(10.0, starts(6))
    assert_close((values, grads), reference, 1e-9)


@pytest.mark.parametrize("f", [pytest.param(loss, marks=pytest.mark.slow), closed_over])
def test_grad_of_vmap(f, reference):
    total = jax.jit(jax.grad(lambda g: jnp.sum(jax.vmap(f, (None, 0))(g, starts(6)))))
    assert_close(total(10.0), jnp.sum(reference[1]), 1e-9)


def test_vmap_over_a_closed_over_value(reference):
    values, grads = jax.vmap(jax.value_and_grad(closed_over))(jnp.full(6, 10.0), starts(6))
    assert_close((values, grads), reference, 1e-9)


def test_without_jit(reference):
    value, grad = jax.value_and_grad(closed_over)(10.0, starts(6)[0])
    assert_close((value, grad), (reference[0][0], reference[1][0]), 1e-9)


def test_inside_a_scan_and_a_checkpoint(reference):
    def total(g):
        body = jax.checkpoint(lambda carry, x: (carry + loss(g, x), None))
        return jax.lax.scan(body, 0.0, starts(6))[0]

    assert_close(jax.jit(jax.grad(total))(10.0), jnp.sum(reference[1]), 1e-9)


def test_changing_a_number_in_the_options_does_not_retrace():
    traces = 0

    @jax.jit
    def run(options):
        nonlocal traces
        traces += 1
        return loss(10.0, starts(1)[0], options)

    base = Options(tolerance=1e-6, max_iterations=100)
    run.trace(base)
    run.trace(dataclasses.replace(base, tolerance=1e-8, max_iterations=50, line_search_decay=0.3))
    run.trace(dataclasses.replace(base, regularization=1e-3))
    assert traces == 1
    run.trace(dataclasses.replace(base, hessian="ilqr"))
    assert traces == 2


def test_the_program_does_not_grow_with_the_horizon():
    def size(T):
        def value(g):
            params = PARAMS._replace(physics=PARAMS.physics._replace(g=g))
            return mpc_solve(pendulum.cost, pendulum.dynamics, starts(1)[0], jnp.zeros((T, 1)),
                             params, u_lower=-2.0, u_upper=2.0).objective  # fmt: skip

        return str(jax.make_jaxpr(jax.grad(value))(10.0)).count(" = ")

    assert size(200) == size(20)


def test_float32_stays_float32_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        params = jax.tree.map(lambda a: a.astype(jnp.float32), PARAMS)
        x_init = starts(1)[0].astype(jnp.float32)

        def run(params):
            s = mpc_solve(pendulum.cost, pendulum.dynamics, x_init,
                          jnp.zeros((T, 1), jnp.float32), params,
                          u_lower=-2.0, u_upper=2.0)  # fmt: skip
            return s.objective, s

        grad, solution = jax.grad(run, has_aux=True)(params)
    assert solution.status == Status.CONVERGED
    for leaf in jax.tree.leaves((grad, solution)):
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_)


def test_dtypes_are_promoted_together():
    x_init = starts(1)[0].astype(jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        s = mpc_solve(lambda x, u, t, p: p * x @ x + u @ u, lambda x, u, t, p: x + u[0], x_init,
                      jnp.zeros((T, 1), jnp.float32), jnp.float64(2.0))  # fmt: skip
    assert s.u.dtype == s.x.dtype == s.K.dtype == jnp.float64


@pytest.mark.slow  # plans and gradients are compared in test_many_devices
def test_a_sharded_batch_gives_the_same_results_where_it_lies():
    mesh = jax.make_mesh(
        (len(jax.devices()),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    sharding = NamedSharding(mesh, PartitionSpec("batch"))
    x_init = starts(2 * len(jax.devices()))
    run = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0)))
    want = run(10.0, x_init)
    sharded = jax.device_put(x_init, sharding)
    got = run(10.0, sharded)
    assert_close(got, want, 1e-12)
    assert got[0].sharding.is_equivalent_to(sharding, 1)


def test_jit_of_the_lqr_batches():
    C = jnp.tile(jnp.eye(3), (T, 1, 1))
    F = jnp.tile(jnp.array([[1.0, 0.1, 0.0], [0.0, 1.0, 0.1]]), (T, 1, 1))
    x = jax.random.normal(jax.random.key(0), (5, 2))
    solve = jax.jit(jax.vmap(lambda x: lqr_solve(x, C, jnp.zeros((T, 3)), F).u))
    together = solve(x)
    for i in range(5):
        assert_close(together[i], lqr_solve(x[i], C, jnp.zeros((T, 3)), F).u, 1e-12)


def test_integer_leaves_and_none_in_params_pass_through():
    params = {"order": jnp.arange(2), "weight": jnp.array(2.0), "nothing": None}

    def cost(x, u, t, params):
        return params["weight"] * jnp.sum(x[params["order"]] ** 2) + u @ u

    def run(weight):
        s = mpc_solve(cost, lambda x, u, t, p: x + u, jnp.ones(2), jnp.zeros((3, 2)),
                      {**params, "weight": weight})  # fmt: skip
        return jnp.sum(s.u)

    # With stage costs w |x|² + |u|² and x⁺ = x + u, three Riccati steps for each entry.
    def plan(weight):
        gains, value = [], 0.0
        for _ in range(3):
            gains.append(-value / (1 + value))
            value = weight + value / (1 + value)
        x, total = 1.0, 0.0
        for gain in reversed(gains):
            total, x = total + gain * x, x + gain * x
        return 2 * total  # of both entries

    assert_close(jax.grad(run)(2.0), jax.grad(plan)(2.0), 1e-9)
