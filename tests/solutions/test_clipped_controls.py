"""Plants that clip their controls to the range that is also u_lower, u_upper: plan, status,
iterations and gradient are those without. The smooth problem's gradient is that of dense autodiff.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close

from jaxmpc import (
    Constraints,
    Status,
    certify,
    ilqr_unrolled,
    mpc_solve,
    receding_horizon,
)

T, M = 5, 3


def as_given(u, limits):
    return u


def clipped(u, limits):
    """Each control in another way: at a bound the slopes that JAX sees are ½, 0 and ½."""
    low, high, safe_low, safe_high = limits
    by_where = jnp.where(u >= high, high, jnp.where(u <= low, low, u))
    middle, half = (safe_low + safe_high) / 2, (safe_high - safe_low) / 2
    normalized = jnp.clip((u - middle) / half, -1, 1) * half + middle
    return jnp.stack([jnp.clip(u, low, high)[0], by_where[1], normalized[2]])


def dynamics_of(form):
    def dynamics(x, u, t, params):
        k, unit, limits = params
        force = form(u, limits) / unit
        bend = k * jnp.sin(x[0])
        return x + 0.2 * jnp.stack([x[1], bend + force[0], force[1] + 0.3 * force[2] - x[2] * x[1]])

    return dynamics


def cost(x, u, t, params):
    return 0.5 * x @ x + 0.01 * jnp.sum(jnp.square(u / params[1]))


def loss(parts):
    x, u, objective = parts
    return jnp.sum(jnp.sin(x)) + jnp.sum(jnp.cos(u)) + objective


def solve(form, inputs, method=mpc_solve, **others):
    return method(
        cost, dynamics_of(form), inputs["x_init"], jnp.zeros((T, M), inputs["x_init"].dtype),
        inputs["params"], u_lower=inputs["u_lower"], u_upper=inputs["u_upper"], **others,
    )  # fmt: skip


def slopes_of(form):
    """The gradient in all inputs, and the solution."""

    def total(inputs):
        s = solve(form, inputs)
        return loss((s.x, s.u, s.objective)), s

    return jax.jit(jax.grad(total, has_aux=True))


SMOOTH, CLIPPED = slopes_of(as_given), slopes_of(clipped)


@jax.jit
def dense(u, inputs):
    return oracle.gradient(
        lambda out: loss((out["x"], out["u"], out["objective"])), cost, dynamics_of(as_given), None,
        u, inputs,
    )  # fmt: skip


def problem(low, high, unit=1.0, limits=None, dtype=float):
    """``limits`` of the plant, where they are not the bounds."""
    low, high = np.broadcast_to(low, (T, M)), np.broadcast_to(high, (T, M))
    limits = (low.min(), high.max()) if limits is None else limits
    finite = [b if abs(b) < 1e6 else s * unit for b, s in zip(limits, (-2, 2), strict=True)]
    # What is normalized has to have a range.
    low, high = np.array(low, float), np.array(high, float)
    low[:, 2], high[:, 2] = np.maximum(low[:, 2], finite[0]), np.minimum(high[:, 2], finite[1])
    return jax.tree.map(
        lambda a: jnp.asarray(a, dtype),
        dict(
            x_init=np.array([1.2, 0.3, -0.8]),
            params=(1.0, unit, (*limits, *finite)),
            u_lower=low,
            u_upper=high,
        ),
    )


def varying():
    """Bounds that come together at some stages."""
    low, high = -np.ones((T, M)), np.ones((T, M))
    low[1:3, 0], high[3, 1] = 1.0, -1.0
    return low, high


PROBLEMS = {
    "one": (-1.0, 1.0),
    "small": (-1e-3, 1e-3, 1e-3),
    "large": (-300.0, 300.0, 300.0),
    "from zero": (0.0, 5.0, 5.0),
    "up to zero": (-300.0, 0.0, 300.0),
    "lopsided": (-1.0, 10.0, 3.0),
    "lower alone": (0.0, np.inf),
    "upper alone": (-np.inf, 0.1),
    "a large number for none": (-1.0, 1e30),
    "equal at some stages": varying(),
    "equal": (1.0, 1.0, 1.0, (-1.0, 1.0)),
    "equal at zero": (0.0, 0.0, 1.0, (0.0, 5.0)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_plant_that_clips_is_as_one_that_does_not(name):
    inputs = problem(*PROBLEMS[name])
    want, smooth = SMOOTH(inputs)
    got, solution = CLIPPED(inputs)
    assert solution.status == smooth.status == Status.CONVERGED
    assert solution.iterations == smooth.iterations
    assert np.any(~np.asarray(smooth.free))
    unit = float(inputs["params"][1])
    assert_close(solution.u / unit, smooth.u / unit, 1e-12, scale=1.0)
    assert_close((solution.x, solution.costate), (smooth.x, smooth.costate), 1e-12)
    np.testing.assert_array_equal(solution.free, smooth.free)
    for gradient in (want, got):
        gradient["params"] = gradient["params"][:1]
    assert_close(got, want, 1e-11)
    if name == "equal at zero":
        return  # multipliers of 0, which each of two bounds holds by half
    slopes = dense(smooth.u, inputs)
    slopes["params"] = slopes["params"][:1]
    assert_close(got, slopes, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "one" else pytest.mark.slow) for name in PROBLEMS],
)
def test_in_float32_too(name):
    inputs = problem(*PROBLEMS[name], dtype=jnp.float32)
    want, smooth = SMOOTH(inputs)
    got, solution = CLIPPED(inputs)
    assert solution.status == smooth.status == Status.CONVERGED
    assert solution.iterations == smooth.iterations
    unit = float(inputs["params"][1])
    assert_close(solution.u / unit, smooth.u / unit, 1e-5, scale=1.0)
    for key in ("x_init", "u_lower", "u_upper"):
        assert_close(got[key], want[key], 1e-4)


def both(run):
    return run(as_given), run(clipped)


ONE = problem(-1.0, 1.0)


@pytest.mark.slow
def test_with_rows():
    """The interior-point method ends on the bounds as well."""

    def run(form):
        @jax.jit
        @jax.value_and_grad
        def total(inputs):
            rows = Constraints(inequality=lambda x, u, t, params: x[1:2] - 0.35)
            s = solve(form, inputs, constraints=rows)
            ok = s.status == Status.CONVERGED
            return loss((s.x, s.u, s.objective)) + jnp.where(ok, 0, jnp.nan)

        value, slopes = total(ONE)
        return value, slopes["x_init"], slopes["u_upper"]

    assert_close(*both(run), 1e-9)


def test_the_certificate_is_that_of_inside():
    u = SMOOTH(ONE)[1]

    def run(form):
        return certify(
            cost, dynamics_of(form), ONE["x_init"], u, ONE["params"],
            u_lower=ONE["u_lower"], u_upper=ONE["u_upper"],
        )  # fmt: skip

    smooth, clips = both(run)
    assert_close(clips, smooth, 1e-9)
    assert clips.kkt_residual < 1e-10


@pytest.mark.slow
def test_unrolled():
    def run(form):
        @jax.jit
        @jax.grad
        def total(inputs):
            s = solve(form, inputs, ilqr_unrolled, num_iterations=3)
            return loss((s.x, s.u, s.objective))

        slopes = total(ONE)
        return slopes["x_init"], slopes["u_upper"]

    assert_close(*both(run), 1e-11)


@pytest.mark.slow
def test_in_closed_loop():
    """Model and plant clip."""

    def run(form):
        @jax.jit
        @jax.value_and_grad
        def total(inputs):
            e = solve(form, inputs, receding_horizon, num_steps=3)
            return loss((e.x, e.u, jnp.sum(e.costs)))

        value, slopes = total(ONE)
        return value, slopes["x_init"], slopes["u_lower"], slopes["u_upper"]

    assert_close(*both(run), 1e-11)


@pytest.mark.slow
def test_second_derivatives():
    def run(form):
        def total(x_init):
            s = solve(form, ONE | {"x_init": x_init})
            return loss((s.x, s.u, s.objective))

        return jax.jit(jax.jacrev(jax.jacrev(total)))(ONE["x_init"])

    assert_close(*both(run), 1e-9)


def test_smooth_functions_and_those_without_bounds_are_left_as_they_are():
    """A kink that does not depend on the control is none, nor is an index that does."""

    def programs(dynamics, **bounds):
        def run(x):
            return mpc_solve(cost, dynamics, x, jnp.zeros((T, M)), ONE["params"], **bounds).u

        return str(jax.make_jaxpr(run)(ONE["x_init"])).count("custom_jvp_call")

    table = jnp.ones(T)

    def reads(x, u, t, params):
        return dynamics_of(as_given)(jnp.maximum(x, -9), u, t, params) * table[t]

    bounds = dict(u_lower=-1.0, u_upper=1.0)
    none = programs(reads, **bounds)
    assert programs(dynamics_of(clipped)) == none
    assert programs(dynamics_of(clipped), **bounds) > none
