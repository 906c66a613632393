"""The gradient of controls that answer by feedback, and its rounding."""

import jax.numpy as jnp
import numpy as np
from helpers import assert_close

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import expand, hessians
from jaxmpc.problem.trace import trace
from jaxmpc.solver.assessment import assess
from jaxmpc.solver.iterate import new_iterate
from jaxmpc.solver.rounding import hidden

T, GROWTH = 60, 1.5  # amplifies by 4e10


def dynamics(x, u, t, params):
    return GROWTH * x + u + 0.1 * jnp.sin(x)


def cost(x, u, t, params):
    return 0.5 * (x @ x + 0.1 * u @ u)


def under_feedback(x, u, K, added):
    """The cost of u + added + K (x_new − x), in NumPy."""
    state, J = x[0], 0.0
    for t in range(T):
        control = u[t] + added[t] + K[t] @ (state - x[t])
        J += 0.5 * (state @ state + 0.1 * control @ control)
        state = GROWTH * state + control + 0.1 * np.sin(state)
    return J


def test_it_is_that_of_what_is_added_and_its_rounding_does_not_grow():
    rng = np.random.default_rng(0)
    K = np.broadcast_to(-1.2 * np.eye(2), (T, 2, 2))
    x, u = [rng.normal(size=2)], []
    for _ in range(T):
        u.append(-1.2 * x[-1] + 0.1 * rng.normal(size=2))
        x.append(GROWTH * x[-1] + u[-1] + 0.1 * np.sin(x[-1]))
    x, u = np.array(x), np.array(u)
    problem, data, _ = trace(cost, dynamics, jnp.asarray(x[0]), jnp.asarray(u), None)
    at = lanes.any_rank(new_iterate)(problem, data, jnp.asarray(u))._replace(x=jnp.asarray(x))
    expanded = expand(problem, data.theta, at.x, at.u)
    here = lanes.any_rank(assess)(data, at, expanded, data.multipliers, jnp.asarray(K))
    for t in (0, 7, T - 1):
        added = np.zeros((T, 2), complex)
        added[t, 1] = 1e-30j  # a complex step
        assert_close(here.gradient[t, 1], under_feedback(x, u, K, added).imag / 1e-30, 1e-12)

    costate = here.first.costate
    H, H_final = hessians(problem, data.theta, at.x, at.u, expanded, costate, data.multipliers)
    rest = at.x, at.u, costate, here.gradient, H, expanded.F, H_final
    closed, terms = hidden(*rest, jnp.asarray(K))
    opened, _ = hidden(*rest)
    assert np.max(closed) < 1e-13 * np.max(terms)
    assert np.max(opened) > 1e3 * np.max(closed)
