"""Certificates against dense autodiff of the rolled-out objective, and re-solved gradients of
problems that are spoiled on purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradient_cases import CASES, T, inputs_of, large_angles, solve, weighted
from helpers import assert_close, rolled_out

from jaxmpc import Constraints, Status, certify, check_gradients, mpc_solve
from jaxmpc.systems import pendulum


def derivatives(system, inputs, u):
    """Gradient and Hessian of the objective in the controls."""

    def objective(u):
        return rolled_out(system.cost, system.dynamics, inputs["x_init"], u, inputs["params"])[0]

    return jax.grad(objective)(u), jax.hessian(objective)(u).reshape(u.size, u.size)


def dense(u, lower, upper, slope, hessian):
    """The four numbers of a certificate that have a dense definition."""
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
        certificate = certify(system.cost, system.dynamics, x_init, solution, params, **bounds)
        return solution, certificate, derivatives(system, inputs, solution.u)

    solution, certificate, derived = both(large_angles(system, 8))
    assert (solution.status == Status.CONVERGED).all()
    for i in range(8):
        plan, slope, hessian = (np.asarray(a[i]) for a in (solution.u, *derived))
        want = dense(plan, -bound, bound, slope, hessian)
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
        assert leaf.dtype == jnp.float32
        assert leaf.shape == ()


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
    unbounded = jax.jit(lambda sign: certify(curved, still, x, pinned, sign))
    assert float(unbounded(-2.0).curvature) == pytest.approx(-2.0)
    assert float(unbounded(3.0).curvature) == pytest.approx(3.0)
    assert float(unbounded(3.0).slack) == np.inf


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

    def objective_and_states(u):
        return rolled_out(cost, dynamics, jnp.zeros(2), u, 0.1)

    @jax.jit
    def run():
        solution = mpc_solve(*problem, jnp.zeros((T, 1)), 0.1, **bounds)
        nu = solution.multipliers.inequality[:, 0]

        def lagrangian(u):
            objective, x = objective_and_states(u)
            return objective + jnp.vdot(nu, x[:-1, 0])

        dense = (
            jax.hessian(lambda u: objective_and_states(u)[0])(solution.u),
            jax.jacobian(lambda u: objective_and_states(u)[1])(solution.u),
            jax.grad(lagrangian)(solution.u),
        )
        return solution, dense

    solution, (hessian, slopes, gradient) = jax.tree.map(np.asarray, run())
    report = check_gradients(*problem, jnp.zeros((T, 1)), 0.1, **bounds)
    certificate = report.certificate
    assert solution.status == Status.CONVERGED

    g = np.asarray(solution.x[:-1, 0] - wall)
    nu, free = np.asarray(solution.multipliers.inequality[:, 0]), np.asarray(solution.free[:, 0])
    active = nu > 0
    assert 0 < active.sum() < T
    assert 0 < free.sum() < T
    rows = slopes[:-1, 0, :, 0][active][:, free]
    tangent = np.linalg.svd(rows)[2][np.linalg.matrix_rank(rows) :].T
    hessian = hessian[:, 0, :, 0][np.ix_(free, free)]
    want = np.linalg.eigvalsh(tangent.T @ hessian @ tangent)[0]
    # By inverse iteration, from above.
    assert want * (1 - 1e-9) <= certificate.curvature <= want * 1.01
    assert certificate.kkt_residual <= 1e-9
    assert certificate.adjoint_residual <= 1e-12
    gradient = gradient[:, 0]
    margin = min(nu[active].min(), np.abs(gradient)[~free].min())
    assert_close(certificate.multiplier, margin, 1e-6)
    distances = (1 - np.abs(np.asarray(solution.u[:, 0])))[free]
    assert_close(certificate.slack, min(-g[~active].max(), distances.min()), 1e-6)
    assert report.ok, str(report)


@pytest.mark.slow
def test_bounds_of_states_are_inputs_to_check():
    """Infinite ones stay where they are, and so does an equal pair."""
    wall = jnp.full((9, 2), jnp.inf).at[1:, 0].set(0.3).at[-1, 1].set(0.1)
    constraints = Constraints(x_lower=jnp.array([-2, 0.1]), x_upper=wall)
    report = check_gradients(
        lambda x, u, t, p: 0.5 * (x[0] - 1) ** 2 + 0.05 * u @ u,
        lambda x, u, t, p: jnp.array([x[0] + 0.3 * x[1], x[1] + 0.3 * u[0]]),
        jnp.array([0.0, 0.0]), jnp.zeros((8, 1)), constraints=constraints,
    )  # fmt: skip
    assert report.ok, str(report)
    found = {c.name: c.gradient for c in report.checks}
    assert list(found) == ["constraints.x_lower", "constraints.x_upper", "x_init"]
    assert min(map(abs, found.values())) > 0.01
