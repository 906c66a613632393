"""Functions with forward derivatives alone, such as loops until something converges: there is a
plan, and instead of a gradient an error that says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import (
    Constraints,
    Options,
    Status,
    certify,
    ilqr_unrolled,
    mpc_solve,
    receding_horizon,
)

X, U = np.array([1.2]), np.zeros((6, 1))
BOUNDS = dict(u_lower=-1.5, u_upper=1.5)
DT = 0.3


def cost(x, u, t, gain):
    return jnp.sum(x**2) + 0.05 * jnp.sum(u**2)


def implicit(x, u, t, gain):
    """The y with y + DT gain y³ = x + DT u, by Newton's method until it stands."""
    b = x + DT * u

    def newton(state):
        y, _ = state
        step = (y + DT * gain * y**3 - b) / (1 + 3 * DT * gain * y**2)
        return y - step, jnp.max(jnp.abs(step))

    return jax.lax.while_loop(lambda state: state[1] > 1e-13, newton, (b, jnp.ones(())))[0]


def closed(x, u, t, gain):
    """The same by Cardano's formula."""
    p, q = 1 / (DT * gain), (x + DT * u) / (DT * gain)
    root = jnp.sqrt(q**2 / 4 + p**3 / 27)
    return jnp.cbrt(q / 2 + root) + jnp.cbrt(q / 2 - root)


def terminal_cost(x, gain):
    """3 x², by doubling a count."""
    return jax.lax.while_loop(
        lambda k: k[0] < 3, lambda k: (k[0] + 1, k[1] + x @ x), (0, 0 * x[0])
    )[1]


@pytest.fixture(scope="module")
def want():
    return mpc_solve(
        cost, closed, X, U, 1.0, terminal_cost=lambda x, gain: 3 * jnp.sum(x**2), **BOUNDS
    )


@pytest.mark.parametrize("hessian", ["exact", pytest.param("ilqr", marks=pytest.mark.slow)])
def test_the_plan_is_that_of_the_closed_form(want, hessian):
    options = Options(hessian=hessian)
    got = mpc_solve(
        cost, implicit, X, U, 1.0, terminal_cost=terminal_cost, options=options, **BOUNDS
    )
    assert got.status == want.status == Status.CONVERGED
    assert np.any(got.free)
    assert not np.all(got.free)
    assert_close((got.u, got.x, got.costate, got.K), (want.u, want.x, want.costate, want.K), 1e-8)
    at = certify(cost, implicit, X, got, 1.0, terminal_cost=terminal_cost, **BOUNDS)
    assert at.kkt_residual < 1e-8
    assert at.curvature > 0


@pytest.mark.slow
def test_a_batch_under_constraints():
    def solve(dynamics, x):
        floor = Constraints(inequality=lambda x, u, t, gain: 0.1 - x + 0 * dynamics(x, u, t, gain))
        return mpc_solve(cost, dynamics, x, U[:3], 1.0, constraints=floor, **BOUNDS)

    x = jnp.array([[1.2], [0.4]])
    got, want = (jax.jit(jax.vmap(lambda x, f=f: solve(f, x)))(x) for f in (implicit, closed))
    assert np.all(got.status == Status.CONVERGED)
    assert_close((got.u, got.multipliers), (want.u, want.multipliers), 1e-7)


CALLS = {
    "mpc_solve": lambda gain: mpc_solve(cost, implicit, X, U, gain, **BOUNDS),
    "receding_horizon": lambda gain: receding_horizon(cost, implicit, X, U, gain, num_steps=2),
    "ilqr_unrolled": lambda gain: ilqr_unrolled(cost, implicit, X, U, gain, num_iterations=2),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_gradient_is_refused_by_name(call):
    message = r"no gradient of it: dynamics cannot be .* in reverse mode.*custom_root.*fori_loop"
    with pytest.raises(TypeError, match=message):
        jax.eval_shape(jax.grad(lambda gain: jnp.sum(call(gain).u)), 1.0)
