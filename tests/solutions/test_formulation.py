"""The trust region, and problems that are given by matrices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close

from jaxmpc import (
    Affine,
    Options,
    Quadratic,
    Status,
    mpc_solve,
)
from jaxmpc.systems import pendulum


def test_a_trust_region_caps_every_iteration_and_not_the_plan():
    cap, T = 0.3, 20
    params = pendulum.default_params()
    starts = jax.vmap(pendulum.state)(jnp.array([2.0, -1.0, 1.5]), jnp.zeros(3))

    @jax.jit
    def solve(max_iterations, cap):
        def one(x_init):
            return mpc_solve(
                pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params,
                u_lower=-2.0, u_upper=2.0,
                options=Options(max_iterations=max_iterations, trust_region=cap),
            )  # fmt: skip

        return jax.vmap(one)(starts)

    plans = [solve(k, cap).u for k in range(8)]
    moves = [jnp.max(jnp.abs(b - a)) for a, b in itertools.pairwise(plans)]
    assert max(moves) <= cap * (1 + 1e-12)
    assert max(moves) >= cap * (1 - 1e-12)  # at first, the search wants to go further
    # Where it ends is a minimum of the problem without the cap, if not always the nearest.
    capped = solve(200, jnp.array([cap]))
    assert np.all(np.asarray(capped.status) == Status.CONVERGED)
    assert np.all(np.asarray(capped.kkt_residual) <= 1e-9)


@pytest.mark.parametrize(
    "reach, message",
    [(0.0, "options.trust_region must be positive"), (np.ones(3), "must broadcast to .m. = .1.")],
)
def test_a_trust_region_is_positive_and_fits(reach, message):
    with pytest.raises(ValueError, match=message):
        mpc_solve(
            lambda x, u, t, p: x @ x + u @ u, lambda x, u, t, p: x + u, jnp.ones(1),
            jnp.zeros((3, 1)), options=Options(trust_region=reach),
        )  # fmt: skip


N, M, HORIZON = 3, 2, 10


def matrices():
    rng = np.random.default_rng(3)
    half = rng.normal(size=(HORIZON, N + M, N + M))
    return {
        "C": jnp.asarray(half @ np.swapaxes(half, 1, 2) + 0.1 * np.eye(N + M)),
        "c": jnp.asarray(rng.normal(size=(HORIZON, N + M))),
        "F": jnp.asarray(0.5 * rng.normal(size=(HORIZON, N, N + M))),
        "f": jnp.asarray(rng.normal(size=N)),
        "C_final": jnp.asarray(np.eye(N)),
    }


def by_matrices(inputs, **kwargs):
    p = inputs["params"]
    return mpc_solve(
        Quadratic(p["C"], p["c"]), Affine(p["F"], p["f"]), inputs["x_init"],
        jnp.zeros((HORIZON, M)), terminal_cost=Quadratic(p["C_final"]),
        u_lower=inputs["u_lower"], u_upper=inputs["u_upper"], **kwargs,
    )  # fmt: skip


def stage_cost(x, u, t, p):
    z = jnp.concatenate([x, u])
    return 0.5 * z @ p["C"][t] @ z + p["c"][t] @ z


def step(x, u, t, p):
    return p["F"][t] @ jnp.concatenate([x, u]) + p["f"]


def end_cost(x, p):
    return 0.5 * x @ p["C_final"] @ x


def loss(out):
    weights = jnp.cos(jnp.arange(HORIZON * M)).reshape(HORIZON, M)
    return jnp.vdot(weights, out["u"]) + jnp.sum(jnp.sin(out["x"])) + 0.1 * out["objective"]


def test_matrices_give_the_plan_and_gradients_of_the_dense_problem():
    bound = jnp.full((HORIZON, M), 0.7)
    inputs = {"params": matrices(), "u_lower": -bound, "u_upper": bound}

    @jax.jit
    @jax.vmap
    def both(x_init):
        given = inputs | {"x_init": x_init}

        def value(given):
            s = by_matrices(given)
            return loss({"u": s.u, "x": s.x, "objective": s.objective}), s

        grads, solution = jax.grad(value, has_aux=True)(given)
        want = oracle.gradient(loss, stage_cost, step, end_cost, solution.u, given)
        J = jax.grad(
            lambda u: oracle.outputs(stage_cost, step, end_cost, x_init, u, given["params"])[
                "objective"
            ]
        )
        gradient = J(solution.u)
        return grads, want, solution, gradient

    grads, want, solution, gradient = both(
        jnp.asarray(np.random.default_rng(0).normal(size=(4, N)))
    )
    assert np.all(np.asarray(solution.status) == Status.CONVERGED)
    assert 0 < np.mean(solution.free) < 1
    residual = jnp.clip(solution.u - gradient, -bound[None], bound[None]) - solution.u
    assert float(jnp.max(jnp.abs(residual))) <= 1e-9
    # Of C only the symmetric part counts, and so has its gradient.
    for name in ("C", "C_final"):
        a = want["params"][name]
        want["params"][name] = 0.5 * (a + jnp.swapaxes(a, -1, -2))
    assert_close(grads, want, 1e-9)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"C": np.eye(4)}, r"cost.C must have shape \[T, n\+m, n\+m\] = \[10, 5, 5\] or .*got"),
        ({"c": np.ones(3)}, r"cost.c must have shape .* got \[3\]"),
        ({"F": np.ones((3, 4))}, r"dynamics.F must have shape .* got \[3, 4\]"),
        ({"f": np.ones((2, 3))}, r"dynamics.f must have shape .* got \[2, 3\]"),
        ({"C_final": np.eye(5)}, r"terminal_cost.C must have shape \[n, n\] = \[3, 3\], got"),
    ],
)  # fmt: skip
def test_matrices_have_to_fit(changes, message):
    bounds = dict(u_lower=-1.0, u_upper=1.0)
    with pytest.raises(ValueError, match=message):
        by_matrices({"params": matrices() | changes, "x_init": jnp.ones(N), **bounds})
