"""Certificates against dense autodiff of the rolled-out objective, and re-solved gradients of
problems that are spoiled on purpose."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, rolled_out
from test_gradients import CASES, T, inputs_of, large_angles, solve, weighted

from jaxmpc import Constraints, Options, Status, certify, check_gradients, mpc_solve
from jaxmpc.systems import pendulum

pytestmark = pytest.mark.usefixtures("compile_quickly")


def dense(system, inputs, u):
    """The four numbers of a certificate that have a dense definition."""

    def objective(u):
        return rolled_out(system.cost, system.dynamics, inputs["x_init"], u, inputs["params"])[0]

    lower, upper = np.asarray(inputs["u_lower"]), np.asarray(inputs["u_upper"])
    slope = np.asarray(jax.grad(objective)(u))
    hessian = np.asarray(jax.hessian(objective)(u)).reshape(u.size, u.size)
    u = np.asarray(u)
    held = ((u <= lower) & (slope > 0)) | ((u >= upper) & (slope < 0))
    free = ~held.ravel()
    smallest = np.linalg.eigvalsh(hessian[np.ix_(free, free)])[0] if free.any() else np.inf
    return dict(
        kkt_residual=np.max(np.abs(np.clip(u - slope, lower, upper) - u)),
        multiplier=np.min(np.abs(slope), where=held, initial=np.inf),
        slack=np.min(np.minimum(upper - u, u - lower), where=~held, initial=np.inf),
        curvature=smallest,
    )


@pytest.mark.parametrize(
    "case",
    ["pendulum at any angle", pytest.param("cartpole with some bounds", marks=pytest.mark.slow)],
)
def test_certificates_match_dense_autodiff(case):
    system, control_weight, bound = CASES[case]
    params = weighted(system, control_weight)

    @jax.jit
    @jax.vmap
    def both(x_init):
        inputs = inputs_of(system, params, bound, x_init)
        solution = solve(system, inputs)
        bounds = {name: inputs[name] for name in ("u_lower", "u_upper")}
        return solution, certify(
            system.cost, system.dynamics, x_init, solution, params, **bounds
        )  # fmt: skip

    x_init = large_angles(system, 8)
    solution, certificate = both(x_init)
    assert (solution.status == Status.CONVERGED).all()
    for i in range(8):
        inputs = inputs_of(system, params, bound, x_init[i])
        want = dense(system, inputs, solution.u[i])
        got = {name: float(getattr(certificate, name)[i]) for name in want}
        assert got.pop("kkt_residual") == pytest.approx(want.pop("kkt_residual"), abs=1e-12)
        # Inverse iteration is slow where the two smallest eigenvalues are close, and then harmless.
        curvature = want.pop("curvature")
        assert curvature * (1 - 1e-9) <= got.pop("curvature") <= 1.05 * curvature
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=1e-9), name
        assert float(certificate.adjoint_residual[i]) < 1e-12
        assert float(certificate.adjoint_residual[i]) > 0


def test_in_float32_the_adjoint_is_worse():
    params = jax.tree.map(lambda a: a.astype("float32"), weighted(pendulum, 0.1))
    x_init = pendulum.state(jnp.float32(2.0), jnp.float32(0.0))
    zeros = jnp.zeros((T, 1), "float32")
    solution = mpc_solve(pendulum.cost, pendulum.dynamics, x_init, zeros, params)
    certificate = certify(pendulum.cost, pendulum.dynamics, x_init, solution, params)
    assert 1e-9 < float(certificate.adjoint_residual) < 1e-4
    for leaf in jax.tree.leaves(certificate):
        assert leaf.dtype == jnp.float32 and leaf.shape == ()


def test_without_free_controls_and_without_convexity():
    u = jnp.zeros((3, 1))

    def curved(x, u, t, sign):
        return 0.5 * sign * u[0] ** 2 + 0.5 * jnp.sum(x**2)

    def still(x, u, t, sign):
        return 0.5 * x

    x = jnp.ones(2)
    pinned = mpc_solve(curved, still, x, u, 1.0, u_lower=0.0, u_upper=0.0)
    got = certify(curved, still, x, pinned, 1.0, u_lower=0.0, u_upper=0.0)
    assert [float(got.multiplier), float(got.slack), float(got.curvature)] == [np.inf] * 3
    got = certify(curved, still, x, pinned, -2.0)
    assert float(got.curvature) == pytest.approx(-2.0)
    got = certify(curved, still, x, pinned, 3.0)
    assert float(got.curvature) == pytest.approx(3.0)
    assert float(got.slack) == np.inf


# Gradients, re-solved.

x_init = pendulum.state(1.2, -0.5)
params = weighted(pendulum, 0.1)
check = partial(
    check_gradients, pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params
)


def test_good_gradients_pass():
    report = check(u_lower=-2.0, u_upper=2.0)
    assert report.ok, str(report)
    names = [c.name for c in report.checks]
    assert names == [
        "params.physics.g", "params.physics.m", "params.physics.l",
        "params.cost.q", "params.cost.p", "u_lower", "u_upper", "x_init",
    ]  # fmt: skip
    # Not for want of something to compare.
    assert max(abs(c.gradient) for c in report.checks) > 0.1
    assert "CONVERGED" in str(report) and "WRONG" not in str(report)
    for c in report.checks:
        assert c.gradient == pytest.approx(c.difference, rel=1e-4, abs=1e-6)


def reasons(report):
    assert not report.ok
    assert "WRONG" in str(report)
    return {c.name: c.reason for c in report.checks if not c.ok}


def test_the_papers_hessian_is_found_out():
    found = reasons(check(u_lower=-2.0, u_upper=2.0, options=Options(backward_hessian="ilqr")))
    assert "params.physics.g" in found
    assert all("defined by hand" in reason for reason in found.values())


def test_a_plan_that_is_none():
    report = check(u_lower=-2.0, u_upper=2.0, options=Options(max_iterations=1))
    assert report.status == Status.MAX_ITERATIONS
    assert "not converged at the plan" in reasons(report)["params.physics.g"]


def scalar(cost, theta, **kwargs):
    """One stage whose plan is the minimiser of cost(u, theta)."""
    return check_gradients(
        lambda x, u, t, theta: cost(u[0], theta["a"]) + 0.5 * x[0] ** 2,
        lambda x, u, t, theta: 0.5 * x,
        jnp.ones(1), jnp.zeros((1, 1)), {"a": theta}, **kwargs,
    )  # fmt: skip


def test_a_bound_just_where_the_plan_would_be():
    report = scalar(lambda u, a: 0.5 * (u - a) ** 2, 1.0, u_upper=1.0)
    assert "degenerate: u[0, 0]" in reasons(report)["params['a']"]
    certificate = report.certificate
    assert min(float(certificate.multiplier), float(certificate.slack)) < 1e-12


def test_a_jump():
    report = scalar(lambda u, a: 0.5 * (u - jnp.where(a > 1.0, 3.0, 1.0)) ** 2, 1.0)
    assert "jumps" in reasons(report)["params['a']"]


def test_a_kink():
    report = scalar(lambda u, a: 0.5 * (u - jnp.abs(a - 1.0)) ** 2, 1.0)
    assert "kink in cost" in reasons(report)["params['a']"]


def test_a_wrong_rule_and_what_is_left_alone():
    @jax.custom_jvp
    def wrong(a):
        return a**2

    wrong.defjvp(lambda primals, tangents: (wrong(*primals), 3.0 * tangents[0]))
    found = reasons(scalar(lambda u, a: 0.5 * (u - wrong(a)) ** 2, 1.0))
    assert list(found) == ["params['a']"] and "defined by hand" in found["params['a']"]


def test_infinite_bounds_integers_and_equal_bounds():
    report = check_gradients(
        lambda x, u, t, p: 0.5 * jnp.sum((u - p["a"] * p["k"]) ** 2) + 0.5 * x[0] ** 2,
        lambda x, u, t, p: 0.5 * x + u[:1],
        jnp.ones(1), jnp.zeros((2, 2)), {"a": 0.3, "k": 2},
        u_lower=jnp.array([-jnp.inf, 0.1]), u_upper=jnp.array([0.2, 0.1]),
    )  # fmt: skip
    assert report.ok, str(report)
    assert [c.name for c in report.checks] == ["params['a']", "u_lower", "u_upper", "x_init"]
    assert dataclasses.asdict(report.checks[0])["ok"] is True


def test_the_certificate_of_a_constrained_plan_is_that_of_the_dense_problem():
    """A double integrator with a wall: the reduced Hessian on what the active rows leave free."""
    T, wall = 8, 0.3

    def cost(x, u, t, params):
        return 0.5 * (x[0] - 1) ** 2 + 0.5 * params * u @ u

    def dynamics(x, u, t, params):
        return jnp.array([x[0] + 0.3 * x[1], x[1] + 0.3 * u[0]])

    constraints = Constraints(inequality=lambda x, u, t, params: x[:1] - wall)
    problem = cost, dynamics, jnp.zeros(2)
    bounds = dict(u_lower=-1.0, u_upper=1.0, constraints=constraints)
    solution = mpc_solve(*problem, jnp.zeros((T, 1)), 0.1, **bounds)
    assert solution.status == Status.CONVERGED
    certificate = certify(*problem, solution, 0.1, **bounds)

    def states(u):
        return rolled_out(cost, dynamics, jnp.zeros(2), u, 0.1)[1]

    g = np.asarray(solution.x[:-1, 0] - wall)
    nu, free = np.asarray(solution.multipliers.inequality[:, 0]), np.asarray(solution.free[:, 0])
    active = nu > 0
    assert 0 < active.sum() < T and 0 < free.sum() < T
    hessian = jax.hessian(lambda u: rolled_out(cost, dynamics, jnp.zeros(2), u, 0.1)[0])(solution.u)
    rows = np.asarray(jax.jacobian(states)(solution.u))[:-1, 0, :, 0][active][:, free]
    tangent = np.linalg.svd(rows)[2][np.linalg.matrix_rank(rows) :].T
    hessian = np.asarray(hessian)[:, 0, :, 0][np.ix_(free, free)]
    want = np.linalg.eigvalsh(tangent.T @ hessian @ tangent)[0]
    # By inverse iteration, from above.
    assert want * (1 - 1e-9) <= certificate.curvature <= want * 1.01
    assert certificate.kkt_residual <= 1e-9
    assert certificate.adjoint_residual <= 1e-12
    gradient = jax.grad(
        lambda u: (
            rolled_out(cost, dynamics, jnp.zeros(2), u, 0.1)[0] + jnp.vdot(nu, states(u)[:-1, 0])
        )
    )(solution.u)[:, 0]
    margin = min(nu[active].min(), np.abs(gradient)[~free].min())
    assert_close(certificate.multiplier, margin, 1e-6)
    distances = (1 - np.abs(np.asarray(solution.u[:, 0])))[free]
    assert_close(certificate.slack, min(-g[~active].max(), distances.min()), 1e-6)
    report = check_gradients(*problem, jnp.zeros((T, 1)), 0.1, **bounds)
    assert report.ok, str(report)
