"""The integrators against SciPy, against invariants, and inside of the solver."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close
from scipy.integrate import solve_ivp

from jaxmpc import Status, mpc_solve
from jaxmpc.integrators import euler, implicit_midpoint, rk4

METHODS = {"euler": (euler, 1), "rk4": (rk4, 4), "implicit midpoint": (implicit_midpoint, 2)}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param][0]


def van_der_pol(x, u, t, params):
    """With the friction and the frequency in params."""
    del t
    position, velocity = x
    return jnp.stack(
        (
            velocity,
            params["friction"] * (1 - position**2) * velocity
            - params["frequency"] ** 2 * position
            + u[0],
        )
    )


PARAMS = {"friction": jnp.array(1.3), "frequency": jnp.array(0.9)}
X, U = jnp.array([1.2, -0.4]), jnp.array([0.3])


def run(step, x, num, u=U, params=PARAMS):
    return jax.jit(lambda x: jax.lax.fori_loop(0, num, lambda t, x: step(x, u, t, params), x))(x)


# What a step is.


@pytest.mark.parametrize("name", METHODS)
def test_order_of_convergence(name):
    """Halving dt divides the error at time 2 by 2^order."""
    method, order = METHODS[name]
    friction, frequency = (float(value) for value in PARAMS.values())

    def field(_, x):
        return [x[1], friction * (1 - x[0] ** 2) * x[1] - frequency**2 * x[0] + float(U[0])]

    true = solve_ivp(field, (0, 2), np.asarray(X), "DOP853", rtol=1e-13, atol=1e-13).y[:, -1]
    errors = [
        np.linalg.norm(run(method(van_der_pol, 2 / num), X, num) - true) for num in (64, 128, 256)
    ]
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), order, atol=0.1)


def test_time_as_a_state_keeps_the_order():
    """x' = cos(time): at a held time every method would be of order 1."""

    def ode(x, u, t, params):
        return jnp.stack((jnp.cos(x[1]), jnp.ones(())))

    errors = [abs(run(rk4(ode, 2 / num), jnp.zeros(2), num)[0] - np.sin(2)) for num in (8, 16)]
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 4, atol=0.1)


def test_the_ode_sees_the_index_of_the_stage_and_the_held_control(method):
    table = jnp.array([1.0, 10.0, 100.0])

    def ode(x, u, t, params):
        return u + table[t] + 0 * x

    x = run(method(ode, 0.5), jnp.zeros(1), 3, u=jnp.array([2.0]))
    np.testing.assert_allclose(x, 0.5 * (111 + 3 * 2), rtol=1e-14)


def test_implicit_midpoint_solves_its_equation_to_the_last_digits():
    x_next = implicit_midpoint(van_der_pol, 0.3)(X, U, 0, PARAMS)
    want = X + 0.3 * van_der_pol((X + x_next) / 2, U, 0, PARAMS)
    np.testing.assert_allclose(x_next, want, rtol=4e-16)


def test_only_implicit_midpoint_conserves_energy():
    def oscillator(x, u, t, params):
        return jnp.stack((4 * x[1], -x[0]))

    def drift(method):
        x = run(method(oscillator, 0.1), jnp.array([1.0, 0.5]), 1000)
        return abs((x[0] ** 2 + 4 * x[1] ** 2) / 2 - 1)

    assert drift(implicit_midpoint) < 1e-13
    assert drift(rk4) > 1e-4
    assert drift(euler) > 1


def test_only_implicit_midpoint_survives_a_stiff_problem():
    """A fast mode of rate 1e4 s⁻¹ that follows a slow one, at dt = 0.01 s."""

    def stiff(x, u, t, params):
        fast, slow = x
        return jnp.stack((-1e4 * (fast - slow**2), -slow))

    x = jnp.array([1.0, 1.0])
    true = np.exp([-2.0, -1.0])
    np.testing.assert_allclose(run(implicit_midpoint(stiff, 0.01), x, 100), true, rtol=1e-3)
    for method in (euler, rk4):
        assert not np.max(np.abs(run(method(stiff, 0.01), x, 100))) < 1e6


def test_nan_where_newton_finds_no_root():
    """x⁺ = x + dt (1 + ((x + x⁺)/2)²) has no real solution from x = 0 once dt > 1."""

    def explosive(x, u, t, params):
        return 1 + x**2

    def step(dt):
        return implicit_midpoint(explosive, dt)(jnp.zeros(1), U, 0, None)

    assert np.isnan(step(1.5)).all()
    np.testing.assert_allclose(step(0.5), (1 - np.sqrt(0.75)) / 0.25, rtol=1e-14)


# Derivatives.


def flat_step(method):
    """x⁺ as a function of one vector (x, u, params, dt)."""

    def step(z):
        params = {"friction": z[3], "frequency": z[4]}
        return method(van_der_pol, z[5])(z[:2], z[2:3], 0, params)

    return step, jnp.concatenate((X, U, jnp.stack(list(PARAMS.values())), jnp.array([0.2])))


def central_differences(fn, z, h=1e-5):
    columns = [(fn(z + h * e) - fn(z - h * e)) / (2 * h) for e in jnp.eye(z.size)]
    return jnp.stack(columns, axis=-1)


def test_derivatives_match_central_differences(method):
    """First and second, in x, u, params and dt, in either mode and mixed."""
    step, z = flat_step(method)
    for jacobian in (jax.jacfwd, jax.jacrev):
        first = jax.jit(jacobian(step))
        assert_close(first(z), central_differences(jax.jit(step), z), 1e-8)
        for outer in (jax.jacfwd, jax.jacrev):
            assert_close(jax.jit(outer(first))(z), central_differences(first, z), 1e-8)


def test_derivatives_match_those_of_unrolled_newton():
    implicit, z = flat_step(implicit_midpoint)

    def unrolled(z):
        x, u, params, dt = z[:2], z[2:3], {"friction": z[3], "frequency": z[4]}, z[5]

        def residual(y):
            return y - x - dt * van_der_pol((x + y) / 2, u, 0, params)

        y = x
        for _ in range(6):
            J = jax.jacfwd(residual)(y)
            (a, b), (c, d) = J
            adjugate = jnp.array([[d, -b], [-c, a]])
            y = y - adjugate @ residual(y) / (a * d - b * c)
        return y

    for _ in range(2):
        implicit, unrolled = jax.jacfwd(implicit), jax.jacfwd(unrolled)
        assert_close(jax.jit(implicit)(z), jax.jit(unrolled)(z), 1e-12)


def test_reverse_over_reverse_through_a_scan(method):
    """There JAX drops the rule of `custom_root` and differentiates what is inside of it."""
    step, z = flat_step(method)

    def final(z, loop):
        def body(x, _):
            return step(jnp.concatenate((x, z[2:]))), None

        x = z[:2]
        if loop:
            x, _ = jax.lax.scan(body, x, length=3)
        else:
            for _ in range(3):
                x, _ = body(x, None)
        return jnp.sum(jnp.sin(x))

    hessian = jax.jit(jax.jacrev(jax.jacrev(final)), static_argnums=1)
    assert_close(hessian(z, True), hessian(z, False), 1e-12)


# Dtypes and transforms.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_kept_under_strict_promotion(method, dtype):
    x, u, params = jax.tree.map(lambda a: a.astype(dtype), (X, U, PARAMS))
    for dt in (0.1, jnp.asarray(0.1, dtype)):
        with jax.numpy_dtype_promotion("strict"):
            out = method(van_der_pol, dt)(x, u, 0, params)
            gradient = jax.grad(lambda x, dt=dt: method(van_der_pol, dt)(x, u, 0, params)[0])(x)
        assert out.dtype == gradient.dtype == dtype
        want = method(van_der_pol, 0.1)(X, U, 0, PARAMS)
        assert_close(out, want, 4 * float(jnp.finfo(dtype).eps))


def test_a_wider_parameter_widens_the_result(method):
    out = method(van_der_pol, 0.1)(X.astype(jnp.float32), U, 0, PARAMS)
    assert out.dtype == jnp.float64


def test_jit_and_vmap_change_nothing_and_nan_spoils_nobody_else(method):
    step = method(van_der_pol, 0.1)
    xs = jax.random.normal(jax.random.key(0), (6, 2)).at[2, 0].set(jnp.nan).at[4, 1].set(jnp.inf)
    good = np.array([0, 1, 3, 5])

    def value(x):
        return jnp.sum(jnp.sin(step(x, U, 0, PARAMS)))

    for fn in (lambda x: step(x, U, 0, PARAMS), jax.grad(value)):
        batched = np.asarray(jax.jit(jax.vmap(fn))(xs))
        assert np.isfinite(batched[good]).all()
        assert not np.isfinite(batched[[2, 4]]).all(axis=1).any()
        for i in good:
            np.testing.assert_allclose(batched[i], fn(xs[i]), rtol=1e-13, atol=1e-15)


# Inside of the solver.

T = 12
WEIGHTS = jnp.array([1.0, 0.5])


def cost(x, u, t, params):
    return 0.5 * jnp.sum(WEIGHTS * x**2) + 0.05 * jnp.sum(u**2)


def loss(out):
    weights = jnp.cos(jnp.arange(T))[:, None]
    return jnp.sum((out["u"] - weights) ** 2) + 0.3 * jnp.sum(jnp.sin(out["x"]))


@pytest.mark.slow  # a repetition: reverse over reverse through a scan is what a solver does
@pytest.mark.parametrize("method", [implicit_midpoint, euler, rk4])
def test_gradients_through_the_solver_match_dense_autodiff(method):
    dynamics = method(van_der_pol, 0.2)

    def value(inputs):
        solution = mpc_solve(
            cost, dynamics, inputs["x_init"], jnp.zeros((T, 1)), inputs["params"],
            u_lower=inputs["u_lower"], u_upper=inputs["u_upper"],
        )  # fmt: skip
        return loss({"x": solution.x, "u": solution.u}), solution

    @jax.jit
    @jax.vmap
    def both(x_init):
        bound = jnp.full((T, 1), 1.0)
        inputs = dict(x_init=x_init, params=PARAMS, u_lower=-bound, u_upper=bound)
        grad, solution = jax.grad(value, has_aux=True)(inputs)
        want = oracle.gradient(loss, cost, dynamics, None, solution.u, inputs)
        return grad, want, solution

    grad, want, solution = both(jax.random.normal(jax.random.key(3), (6, 2)))
    assert np.all(np.asarray(solution.status) == Status.CONVERGED)
    assert 0.1 < np.mean(solution.free) < 0.9
    for i in range(6):
        one, true = (jax.tree.map(lambda a, i=i: a[i], tree) for tree in (grad, want))
        assert_close(one, true, 1e-8, scale=max(map(np.max, map(np.abs, jax.tree.leaves(true)))))


@pytest.mark.slow
def test_gradient_in_the_length_of_the_step(method):
    """dt is closed over and traced: the solver has to find it there."""

    def value(dt):
        dynamics = method(van_der_pol, dt)
        u = mpc_solve(cost, dynamics, X, jnp.zeros((T, 1)), PARAMS).u
        return jnp.sum((u - 1) ** 2)

    gradient = jax.jit(jax.value_and_grad(value))
    h = 1e-5
    want = (gradient(0.2 + h)[0] - gradient(0.2 - h)[0]) / (2 * h)
    np.testing.assert_allclose(gradient(0.2)[1], want, rtol=1e-7)


# Errors.


@pytest.mark.parametrize("dt", [0, -0.1, np.nan, np.inf, np.float32(-1), jnp.array(0.0)])
def test_dt_has_to_be_positive(method, dt):
    with pytest.raises(ValueError, match="dt must be positive and finite, got"):
        method(van_der_pol, dt)


def test_other_wrong_arguments(method):
    with pytest.raises(ValueError, match=r"dt must be a scalar, got shape \[2\]"):
        method(van_der_pol, jnp.ones(2))
    with pytest.raises(TypeError, match="dt must be a real number, got str"):
        method(van_der_pol, "0.1")
    with pytest.raises(TypeError, match="ode must be a callable, got float"):
        method(0.1, 0.1)
    with pytest.raises(
        ValueError, match=r"what ode returns must have shape \[n\] = \[2\], got \[\]"
    ):
        method(lambda x, u, t, params: x[0], 0.1)(X, U, 0, PARAMS)
