"""Plans with a barrier τ, and what they say of gradients where everything is clamped, against dense
interior solutions of the same τ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constrained_problems import (
    PROBLEMS,
    _lagrangian,
    _weights,
    between,
    outputs,
    promoting,
    rows,
)
from constrained_solves import as_dict, assert_gradients_close, lane, loss, over_starts, value
from helpers import assert_close
from jax.flatten_util import ravel_pytree

from jaxmpc import (
    Options,
    Status,
    certify,
    check_gradients,
    ilqr_unrolled,
    mpc_solve,
    summarize,
)

TAU = 1e-2


def plan(tau, **more):
    return Options(smoothing=tau, smoothed="plan", **more)


@promoting
def interior_residual(problem, inputs, tau, u, multipliers, slack):
    """The conditions of Fiacco and McCormick: every distance times its multiplier is τ."""
    in_u, x = jax.grad(lambda u: _lagrangian(problem, inputs, u, multipliers), has_aux=True)(u)
    lower, upper = inputs["u_lower"], inputs["u_upper"]
    pushed = in_u + tau / (upper - u) - tau / (u - lower)
    missed = {"u": jnp.where(lower == upper, u - 0.5 * (lower + upper), pushed)}
    for name, row in rows(problem, inputs, x, u).items():
        nu = multipliers[name]
        if "inequality" in name:
            linear, quadratic = _weights(inputs, name, row)
            soft, sigma = jnp.isfinite(linear), slack[name]
            linear = jnp.where(soft, linear, 0)
            there = jnp.ones(row.shape, bool)
            if name == "inequality":  # what no control moves counts for nothing
                u_0 = jax.jacobian(problem.inequality, 1)(x[0], u[0], 0, inputs["params"])
                there = there.at[0].set(soft[0] | jnp.any(u_0 != 0, 1))
            over = jnp.where(soft, sigma, 0)
            missed[name] = jnp.where(there, nu * (over - row) - tau, nu)
            missed[f"slack of {name}"] = jnp.where(
                soft, (linear + quadratic * sigma - nu) * sigma - tau, sigma - 1
            )
        elif name in ("rate", "state"):
            low, high = between(inputs, name, row)
            middle = jnp.where(low == high, 0.5 * (low + high), 0)
            pushes = nu - tau / (high - row) + tau / (row - low)
            missed[name] = jnp.where(low == high, row - middle, pushes)
        else:
            missed[name] = row
    return missed


def interior(problem, inputs, tau, u, multipliers):
    """(u, multipliers) by a dense Newton's method from a start nearby, and a function that gives
    the gradient of a loss there."""
    inputs = jax.tree.map(jnp.asarray, inputs)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        _, x = _lagrangian(problem, inputs, u, multipliers)
        slack = {}
        for name, row in rows(problem, inputs, x, u).items():
            if "inequality" in name:
                nu = multipliers[name]
                soft = jnp.isfinite(_weights(inputs, name, row)[0])
                slack[name] = jnp.where(soft, row + tau / jnp.where(nu > 0, nu, 1), 1.0)
    flat, unravel = ravel_pytree((u, multipliers, slack))

    def residual(flat, inputs):
        return ravel_pytree(interior_residual(problem, inputs, tau, *unravel(flat)))[0]

    step = jax.jit(lambda flat: (residual(flat, inputs), jax.jacfwd(residual)(flat, inputs)))
    for _ in range(4):
        missed, jacobian = step(flat)
        flat -= jnp.linalg.solve(jacobian, missed)

    def gradient(loss):
        def total(flat, inputs):
            u, multipliers, _ = unravel(flat)
            return loss(with_price(problem, inputs, u, multipliers))

        in_flat, in_inputs = jax.grad(total, (0, 1))(flat, inputs)
        w = -jnp.linalg.solve(step(flat)[1].T, in_flat)
        more = jax.grad(lambda inputs: jnp.vdot(w, residual(flat, inputs)))(inputs)
        return jax.tree.map(jnp.add, in_inputs, more)

    return *unravel(flat)[:2], gradient


def with_price(problem, inputs, u, multipliers):
    """What a loss sees; the objective has the price of what is violated."""
    _, x = _lagrangian(problem, inputs, u, multipliers)
    paid = {
        name: (row > 0) & jnp.isfinite(_weights(inputs, name, row)[0])
        for name, row in rows(problem, inputs, x, u).items()
        if "inequality" in name
    }
    return outputs(problem, inputs, u, multipliers, paid)


@functools.cache
def solved(name):
    problem = PROBLEMS[name]

    def one(inputs):
        return jax.grad(value, 1, has_aux=True)(problem, inputs, plan(TAU))

    run = jax.jit(jax.vmap(one, (over_starts(problem.inputs),)))
    return run(jax.tree.map(jnp.asarray, problem.at(problem.x_init)))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "everything")) for n in PROBLEMS]
)
def test_the_plan_of_tau_is_the_dense_interior_one_with_its_gradient(name):
    problem, (grads, solutions) = PROBLEMS[name], solved(name)
    assert np.all(np.asarray(solutions.status) == Status.CONVERGED)
    for i, x_init in enumerate(problem.x_init):
        got = lane(solutions, i)
        multipliers = as_dict(got.multipliers)
        u, nu, gradient = interior(problem, problem.at(x_init), TAU, got.u, multipliers)
        assert_close(got.u, u, 1e-9)
        assert_close(multipliers, nu, 1e-8)
        assert_gradients_close(lane(grads, i), gradient(loss), 1e-8)


# The gradient of an exact plan with springs in place of walls.


def box_qp(seed, m=6):
    """½ uᵀ Q u + qᵀ u between bounds that all clamp, as a problem of one stage."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(m, m))
    Q = A @ A.T / m + np.eye(m)
    u = rng.choice([-1.0, 1.0], m)
    return {
        "Q": jnp.asarray(Q),
        "q": jnp.asarray(-Q @ u - u * rng.uniform(0.3, 2.0, m)),
        "lower": -jnp.ones((1, m)),
        "upper": jnp.ones((1, m)),
    }


def solve_box(inputs, options):
    return mpc_solve(
        lambda x, u, t, params: 0.5 * u @ (params["Q"] @ u) + params["q"] @ u,
        lambda x, u, t, params: x,
        jnp.zeros(1, inputs["q"].dtype), jnp.zeros_like(inputs["lower"]),
        {k: inputs[k] for k in "Qq"}, u_lower=inputs["lower"], u_upper=inputs["upper"],
        options=options,
    )  # fmt: skip


def weighted(solution):
    return jnp.vdot(solution.u, jnp.cos(jnp.arange(solution.u.size, dtype=solution.u.dtype)))


@functools.cache
def box_gradient(smoothed):
    def one(inputs, smoothing):
        options = Options(smoothing=smoothing, smoothed=smoothed)
        return jax.grad(lambda inputs: weighted(solve_box(inputs, options)))(inputs)

    return jax.jit(one)


def central_path(inputs, tau):
    """The point of τ on the central path of a box QP, by dense Newton steps; and its Hessian."""
    Q, q = (np.asarray(inputs[k]) for k in "Qq")
    u = np.zeros(len(q))
    for _ in range(200):
        gradient = Q @ u + q + tau / (1 - u) - tau / (1 + u)
        step = -np.linalg.solve(Q + np.diag(tau / (1 - u) ** 2 + tau / (1 + u) ** 2), gradient)
        share = np.max(np.where(step > 0, step / (1 - u), -step / (1 + u)))
        u = u + step * min(1.0, 0.95 / share)
    return u, Q + np.diag(tau / (1 - u) ** 2 + tau / (1 + u) ** 2)


def path_gradient(inputs, tau):
    u, hessian = central_path(inputs, tau)
    w = -np.linalg.solve(hessian, np.cos(np.arange(len(u))))
    return {
        "Q": 0.5 * (np.outer(w, u) + np.outer(u, w)), "q": w,
        "lower": -w[None] * tau / (1 + u) ** 2, "upper": -w[None] * tau / (1 - u) ** 2,
    }  # fmt: skip


def gain(inputs):
    """The most that a bound withholds: λ²/h, or λ times the range."""
    Q, q = (np.asarray(inputs[k]) for k in "Qq")
    u = np.where(-np.linalg.solve(Q, q) > 0, 1.0, -1.0)
    force = np.abs(Q @ u + q)
    return np.max(force * np.minimum(force / np.diag(Q), 2.0))


def cosine(a, b):
    a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(t)]) for t in (a, b))
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b), np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("smoothing, least", [(1e-3, 0.999999), (1e-2, 0.999), (1e-1, 0.99)])
def test_where_all_is_clamped_the_gradient_points_along_the_central_path(smoothing, least):
    found = []
    for seed in range(20):
        inputs = box_qp(seed)
        exact = box_gradient("gradient")(inputs, None)
        assert not np.any(exact["q"])
        got = box_gradient("gradient")(inputs, smoothing)
        found.append(cosine(got, path_gradient(inputs, smoothing * gain(inputs))))
    along, ratio = np.array(found).T
    assert np.min(along) > least
    assert np.max(np.abs(ratio - 1)) < 0.1


def test_the_plan_of_a_box_qp_has_the_gradient_of_the_central_path():
    for seed in range(3):
        inputs = box_qp(seed)
        assert_close(box_gradient("plan")(inputs, 0.03), path_gradient(inputs, 0.03), 1e-9)


@functools.cache
def scalar(smoothed="gradient", derivative="vjp"):
    """du/dq of ½ h u² + q u, u ≥ 0."""

    def u(q, h, smoothing):
        return mpc_solve(
            lambda x, u, t, params: 0.5 * params[0] * u[0] ** 2 + params[1] * u[0],
            lambda x, u, t, params: x,
            jnp.zeros(1), jnp.ones((1, 1)), (h, q), u_lower=0.0,
            options=Options(smoothing=smoothing, smoothed=smoothed, derivative=derivative),
        ).u[0, 0]  # fmt: skip

    return u


def test_one_bound_alone_answers_as_on_the_central_path():
    slope = jax.jit(jax.grad(scalar()))
    for h, q, smoothing in [(2.0, 0.7, 0.3), (0.1, 5.0, 0.01), (1.0, 1.0, 1e6), (3.0, 1.0, 0.0)]:
        tau = smoothing * q**2 / h
        u = (-q + np.sqrt(q**2 + 4 * h * tau)) / (2 * h)
        want = -1 / (h + tau / u**2) if tau else 0.0
        assert_close(slope(q, h, smoothing), want, 1e-9)
    # However much, half of the free answer is left to the bound.
    assert_close(slope(1.0, 1.0, 1e6), -0.5, 1e-3)


def test_nothing_is_smoothed_where_nothing_is_clamped():
    slope = jax.jit(jax.grad(scalar()))
    assert_close(slope(-0.01, 2.0, 0.5), -0.5, 1e-12)


def test_forward_mode_is_the_transpose():
    for smoothed in ("gradient", "plan"):
        args = 0.7, 2.0, 0.1
        reverse = jax.jit(jax.grad(scalar(smoothed), (0, 1)))(*args)
        forward = jax.jit(jax.jacfwd(scalar(smoothed, "jvp"), (0, 1)))(*args)
        assert_close(forward, reverse, 1e-10)


@pytest.mark.parametrize("derivative", ["vjp", "jvp"])
def test_the_gradient_of_no_function_has_no_derivative(derivative):
    slope = jax.grad(scalar(derivative=derivative))
    with pytest.raises(TypeError, match=r'smoothed="plan"'):
        jax.grad(slope)(0.7, 2.0, 0.1)


def test_second_derivatives_of_a_plan_with_a_barrier():
    h, q, tau = 2.0, 0.7, 0.05
    got = jax.jit(jax.grad(jax.grad(scalar("plan"))))(q, h, tau)
    root = np.sqrt(q**2 + 4 * h * tau)  # u = (−q + root) / 2h
    assert_close(got, 4 * h * tau / root**3 / (2 * h), 1e-8)


def test_a_plan_with_a_barrier_passes_check_gradients():
    inputs = box_qp(5)
    report = check_gradients(
        lambda x, u, t, params: 0.5 * u @ (params["Q"] @ u) + params["q"] @ u + x @ x * u[0],
        lambda x, u, t, params: x,
        jnp.full(1, 0.3), jnp.zeros_like(inputs["lower"]), {k: inputs[k] for k in "Qq"},
        u_lower=inputs["lower"], u_upper=inputs["upper"], options=plan(0.02),
    )  # fmt: skip
    assert report.ok, str(report)
    assert len(report.checks) == 5
    assert all(abs(check.gradient) > 1e-3 for check in report.checks)


@pytest.mark.parametrize("smoothed", ["gradient", "plan"])
def test_a_bad_problem_leaves_the_others_of_its_batch_alone(smoothed):
    inputs = [box_qp(seed) for seed in range(3)]
    lost = inputs[1] | {"lower": inputs[1]["lower"].at[0, 0].set(jnp.nan)}
    crossed = inputs[1] | {"lower": inputs[1]["lower"].at[0, 0].set(2.0)}
    batch = jax.tree.map(lambda *a: jnp.stack(a), inputs[0], lost, inputs[2], crossed)

    def total(Q, batch):
        def one(rest):
            return solve_box(rest | {"Q": Q}, Options(smoothing=0.02, smoothed=smoothed))

        solutions = jax.vmap(one)({k: a for k, a in batch.items() if k != "Q"})
        good = jnp.array([True, False, True, False])
        return jnp.sum(jnp.where(good, jax.vmap(weighted)(solutions), 0)), solutions.status

    Q = inputs[0]["Q"]
    slope, status = jax.jit(jax.grad(total, has_aux=True))(Q, batch)
    assert list(status) == [0, 5, 0, 5]
    want = sum(
        np.asarray(box_gradient(smoothed)(a | {"Q": Q}, 0.02)["Q"]) for a in (inputs[0], inputs[2])
    )
    assert_close(slope, want, 1e-9)


def test_float32_has_the_gradients_of_float64():
    for smoothed, smoothing in [("gradient", 1e-4), ("gradient", 0.1), ("plan", 1e-3)]:
        inputs = box_qp(0)
        low = jax.tree.map(lambda a: a.astype(jnp.float32), inputs)
        got = box_gradient(smoothed)(low, jnp.float32(smoothing))
        assert_close(got, box_gradient(smoothed)(inputs, smoothing), 2e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        (Options(smoothing=-1.0), "options.smoothing must be non-negative and finite, got -1.0"),
        (plan(0.0), "options.smoothing must be positive and finite, got 0.0"),
        (Options(smoothed="both"), r"options.smoothed must be one of \('gradient', 'plan'\)"),
    ],
)
def test_what_cannot_be_smoothed_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        solve_box(box_qp(0), options)


def test_a_certificate_says_what_was_smoothed():
    inputs = box_qp(1)

    def certificate(smoothing, smoothed):
        options = Options(smoothing=smoothing, smoothed=smoothed)
        return solve_box(inputs, options), certify(
            lambda x, u, t, params: 0.5 * u @ (params["Q"] @ u) + params["q"] @ u,
            lambda x, u, t, params: x,
            jnp.zeros(1), solve_box(inputs, options), {k: inputs[k] for k in "Qq"},
            u_lower=inputs["lower"], u_upper=inputs["upper"], options=options,
        )  # fmt: skip

    _, found = jax.jit(certificate, static_argnums=1)(0.01, "gradient")
    tau = 0.01 * gain(inputs)
    u, _ = central_path(inputs, tau)
    assert_close(found.barrier, tau, 1e-9)
    assert_close(found.shift, 1 - np.min(np.abs(u)), 0.02)
    assert_close(found.smoothed, 1.0, 1e-12)
    solution, found = jax.jit(certificate, static_argnums=1)(0.01, "plan")
    u, _ = central_path(inputs, 0.01)
    assert_close(solution.u[0], u, 1e-9)
    assert_close(found.barrier, 0.01, 1e-12)
    assert_close(found.shift, 1 - np.min(np.abs(u)), 0.05)
    assert found.smoothed == 0
    assert found.kkt_residual < 1e-9
    assert "smoothed       the plan, by a barrier of 0.01" in summarize(solution)


def test_unrolled_iterations_refuse():
    with pytest.raises(ValueError, match=r"options.smoothing is for mpc_solve"):
        ilqr_unrolled(
            lambda x, u, t, params: u @ u, lambda x, u, t, params: x, jnp.zeros(1),
            jnp.zeros((1, 1)), num_iterations=1, options=Options(smoothing=0.1),
        )  # fmt: skip
