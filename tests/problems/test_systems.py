"""The example systems against scalar NumPy code with θ as a state, and against mechanics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmpc.systems import cartpole, pendulum, quadratic

PENDULUM = pendulum.Physics(9.3, 0.7, 1.4)
DAMPED = pendulum.DampedPhysics(9.3, 0.7, 1.4, 0.6, -0.3)
CARTPOLE = cartpole.Physics(9.3, 1.3, 0.4, 0.7)

# name: (module, dynamics, default params, other physics, number of (θ and the like) coordinates)
CASES = {
    "pendulum": (pendulum, pendulum.dynamics, pendulum.default_params, PENDULUM, 2),
    "damped": (pendulum, pendulum.damped_dynamics, pendulum.default_damped_params, DAMPED, 2),
    "cartpole": (cartpole, cartpole.dynamics, cartpole.default_params, CARTPOLE, 4),
}


@pytest.fixture(params=CASES)
def case(request):
    return request.param, *CASES[request.param]


# The oracle: θ is a state, plain scalars, written from the equations.


def numpy_step(name, coordinates, u, physics):
    dt = 0.05
    if name == "pendulum":
        th, thd = coordinates
        g, m, l = physics
        thd_next = thd + dt * (3 * g / (2 * l) * np.sin(th) + 3 * u / (m * l**2))
        return th + dt * thd_next, thd_next
    if name == "damped":
        th, thd = coordinates
        g, m, l, d, b = physics
        thd_next = thd + dt * (3 * g / (2 * l) * np.sin(th + b) + 3 * u / (m * l**2))
        thd_next = thd_next - dt * d * thd
        return th + dt * thd_next, thd_next
    y, yd, th, thd = coordinates
    g, m_c, m_p, l = physics
    total = m_c + m_p
    a = (u + m_p * l * thd**2 * np.sin(th)) / total
    thdd = (g * np.sin(th) - a * np.cos(th)) / (l * (4 / 3 - m_p * np.cos(th) ** 2 / total))
    ydd = a - m_p * l * thdd * np.cos(th) / total
    return y + dt * yd, yd + dt * ydd, th + dt * thd, thd + dt * thdd


def numpy_state(coordinates):
    *cart, th, thd = coordinates
    return np.array([*cart, np.cos(th), np.sin(th), thd])


def random_points(count, width, angle_scale, seed):
    rng = np.random.default_rng(seed)
    points = rng.uniform(-3.0, 3.0, (count, width))
    points[:, -2] *= angle_scale
    return points, rng.uniform(-30.0, 30.0, count)


@functools.partial(jax.jit, static_argnums=0)
def jax_step(dynamics, x, u, physics):
    params = pendulum.Params(physics, None)  # the cartpole's Params has the same two fields
    return dynamics(x, jnp.array([u]), 0, params)


@pytest.mark.parametrize("angle_scale", [0.01, 1.0, 30.0])
def test_step_is_the_equation(case, angle_scale):
    name, module, dynamics, _, physics, width = case
    for point, u in zip(*random_points(50, width, angle_scale, seed=1), strict=True):
        x = module.state(*point)
        np.testing.assert_allclose(x, numpy_state(point), atol=1e-15)
        got = jax_step(dynamics, x, u, physics)
        want = numpy_state(numpy_step(name, point, u, physics))
        assert got.shape == (module.N,)
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_rollout_is_the_equation_and_stays_on_the_circle(case):
    name, module, dynamics, default_params, _, width = case
    params = default_params()
    points, controls = random_points(100, width, 1.0, seed=2)
    point = points[0]
    step = jax.jit(dynamics)
    x = module.state(*point)
    for t, u in enumerate(controls / 30.0):
        x = step(x, jnp.array([u]), t, params)
        point = numpy_step(name, point, u, [float(p) for p in params.physics])
        np.testing.assert_allclose(x, numpy_state(point), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(x[-3] ** 2 + x[-2] ** 2, 1.0, rtol=1e-15)
    np.testing.assert_allclose(
        module.angle(x), math.remainder(point[-2], 2 * math.pi), rtol=1e-9, atol=1e-9
    )


def test_off_the_circle_theta_is_the_angle_of_the_point_and_sin_is_the_coordinate():
    params = pendulum.default_params()
    cos, sin, rate = 0.6, -1.7, 0.4
    got = pendulum.dynamics(jnp.array([cos, sin, rate]), jnp.array([0.5]), 0, params)
    rate_next = rate + 0.05 * (15.0 * sin + 1.5)
    theta_next = np.arctan2(sin, cos) + 0.05 * rate_next
    want = [np.cos(theta_next), np.sin(theta_next), rate_next]
    np.testing.assert_allclose(got, want, rtol=1e-14)


def test_no_clipping():
    for name in CASES:
        module, dynamics, default_params, *_ = CASES[name]
        x = module.state(*([0.3] * CASES[name][-1]))
        inside, outside = (
            jax.jacfwd(dynamics, 1)(x, jnp.array([u]), 0, default_params())[-1]
            for u in (0.0, 3 * module.U_UPPER)
        )
        np.testing.assert_allclose(inside, outside, rtol=1e-12)


# Mechanics.


@pytest.mark.parametrize("name", ["pendulum", "cartpole"])
@pytest.mark.parametrize("theta", [0.0, np.pi, -np.pi])
def test_rests_upright_and_hanging(name, theta):
    module, dynamics, default_params, *_ = CASES[name]
    x0 = module.state(theta, 0.0) if name == "pendulum" else module.state(0.7, 0.0, theta, 0.0)
    x = x0
    for t in range(3):
        x = dynamics(x, jnp.zeros(1), t, default_params())
    np.testing.assert_allclose(x, x0, atol=1e-14)


def test_wind_moves_the_equilibrium():
    params = pendulum.default_damped_params()
    x = pendulum.state(np.pi - params.physics.wind, 0.0)
    next_x = pendulum.damped_dynamics(x, jnp.zeros(1), 0, params)
    np.testing.assert_allclose(next_x, x, atol=1e-14)


def test_upright_is_unstable_and_hanging_is_stable():
    def rate_next(module, *rest):
        x = module.state(*rest)
        return module.dynamics(x, jnp.zeros(1), 0, module.default_params())[-1]

    assert rate_next(pendulum, 0.1, 0.0) > 0
    assert rate_next(pendulum, np.pi - 0.1, 0.0) > 0
    assert rate_next(cartpole, 0.0, 0.0, 0.1, 0.0) > 0
    assert rate_next(cartpole, 0.0, 0.0, np.pi - 0.1, 0.0) > 0


def test_pendulum_gains_the_power_of_the_torque():
    """A rod pivoted at its end: d/dt (½ (m l²/3) θ̇² + m g (l/2) cos θ) = u θ̇."""
    g, m, l = PENDULUM
    for (theta, rate), u in zip(*random_points(20, 2, 1.0, seed=3), strict=True):
        x = pendulum.state(theta, rate)
        acceleration = (jax_step(pendulum.dynamics, x, u, PENDULUM)[2] - rate) / pendulum.DT
        power = m * l**2 / 3 * rate * acceleration - m * g * l / 2 * np.sin(theta) * rate
        np.testing.assert_allclose(power, u * rate, rtol=1e-10, atol=1e-10)


def test_cartpole_obeys_its_lagrangian():
    """d/dt ∂L/∂q̇ − ∂L/∂q = (u, 0) for a rod of half-length l hinged to the cart."""
    g, m_c, m_p, l = CARTPOLE

    def lagrangian(q, q_dot):
        (_, theta), (y_dot, theta_dot) = q, q_dot
        centre = jnp.array(
            [y_dot + l * theta_dot * jnp.cos(theta), -l * theta_dot * jnp.sin(theta)]
        )
        spin = m_p * (2 * l) ** 2 / 12 * theta_dot**2
        kinetic = 0.5 * (m_c * y_dot**2 + m_p * centre @ centre + spin)
        return kinetic - m_p * g * l * jnp.cos(theta)

    @jax.jit
    def generalised_force(q, q_dot, q_ddot):
        momentum = jax.grad(lagrangian, 1)
        _, momentum_dot = jax.jvp(momentum, (q, q_dot), (q_dot, q_ddot))
        return momentum_dot - jax.grad(lagrangian)(q, q_dot)

    for (y, y_dot, theta, theta_dot), u in zip(*random_points(20, 4, 1.0, seed=4), strict=True):
        x = cartpole.state(y, y_dot, theta, theta_dot)
        x_next = jax_step(cartpole.dynamics, x, u, CARTPOLE)
        q_ddot = (x_next - x)[jnp.array([1, 4])] / cartpole.DT
        force = generalised_force(jnp.array([y, theta]), jnp.array([y_dot, theta_dot]), q_ddot)
        np.testing.assert_allclose(force, [u, 0.0], atol=1e-10)


def test_damping_reduces_the_rate():
    for rate in (-2.0, 2.0):
        x = pendulum.state(0.4, rate)
        free, damped = (
            jax_step(pendulum.damped_dynamics, x, 0.3, DAMPED._replace(damping=d))[2]
            for d in (0.0, 1.0)
        )
        np.testing.assert_allclose(damped - free, -pendulum.DT * rate, rtol=1e-12)


def test_damped_pendulum_comes_to_rest():
    params = pendulum.default_damped_params()
    x = pendulum.state(2.0, 1.0)
    step = jax.jit(pendulum.damped_dynamics)
    for t in range(600):
        x = step(x, jnp.zeros(1), t, params)
    np.testing.assert_allclose(x, pendulum.state(np.pi - 0.1, 0.0), atol=1e-5)


def test_damped_without_damping_and_wind_is_the_pendulum():
    x, u = pendulum.state(1.3, -0.7), 1.1
    damped = jax_step(pendulum.damped_dynamics, x, u, DAMPED._replace(damping=0.0, wind=0.0))
    np.testing.assert_allclose(damped, jax_step(pendulum.dynamics, x, u, PENDULUM), rtol=1e-14)


def test_damped_dynamics_refuses_undamped_physics():
    with pytest.raises(TypeError, match="DampedPhysics"):
        jax_step(pendulum.damped_dynamics, pendulum.state(0.1, 0.0), 0.0, PENDULUM)


# Derivatives.


def test_jacobians_match_central_differences(case):
    _, module, dynamics, default_params, *_ = case
    x = module.state(*[0.7, -0.4, 2.5, 1.3][-case[-1] :])
    u = jnp.array([1.3])
    physics = jnp.array(default_params().physics)
    physics_type = type(default_params().physics)

    def step_of(x, u, physics):
        return dynamics(x, u, 0, pendulum.Params(physics_type(*physics), None))

    args, h = jnp.concatenate((x, u, physics)), 1e-5
    step = jax.jit(lambda args: step_of(*jnp.split(args, (module.N, module.N + module.M))))
    forward, reverse = jax.jit(jax.jacfwd(step))(args), jax.jit(jax.jacrev(step))(args)
    np.testing.assert_allclose(reverse, forward, rtol=1e-13, atol=1e-14)
    for i in range(args.size):
        difference = (step(args.at[i].add(h)) - step(args.at[i].add(-h))) / (2 * h)
        np.testing.assert_allclose(forward[:, i], difference, rtol=1e-8, atol=1e-9)


def test_second_derivatives_are_finite_and_modes_agree(case):
    _, module, dynamics, default_params, *_ = case
    params = default_params()

    def step(tau):
        return dynamics(tau[: module.N], tau[module.N :], 0, params)

    forward = jax.jit(jax.jacfwd(jax.jacfwd(step)))
    reverse = jax.jit(jax.jacrev(jax.jacrev(step)))
    for theta in (0.0, 0.5 * np.pi, np.pi, 2.0):
        tau = jnp.append(module.state(*[0.0, 0.0, theta, 0.0][-case[-1] :]), 0.0)
        assert np.isfinite(forward(tau)).all()
        np.testing.assert_allclose(forward(tau), reverse(tau), atol=1e-12)


# Cost.


def test_cost_is_the_equation():
    rng = np.random.default_rng(5)
    for n, m in ((3, 1), (5, 1), (4, 3)):
        q, p, tau = rng.normal(size=(3, n + m))
        want = sum(0.5 * q[i] * tau[i] ** 2 + p[i] * tau[i] for i in range(n + m))
        got = quadratic.cost(
            jnp.array(tau[:n]), jnp.array(tau[n:]), 0, quadratic.QuadraticCost(q, p)
        )
        assert got.shape == ()
        np.testing.assert_allclose(got, want, rtol=1e-13)


def test_default_costs():
    for default in (pendulum.default_params, pendulum.default_damped_params):
        np.testing.assert_array_equal(default().cost.q, [1.0, 1.0, 0.1, 0.001])
        np.testing.assert_array_equal(default().cost.p, [-1.0, 0.0, 0.0, 0.0])
    coefficients = cartpole.default_params().cost
    np.testing.assert_array_equal(coefficients.q, [0.1, 0.1, 1.0, 1.0, 0.1, 0.001])
    np.testing.assert_array_equal(coefficients.p, [0.0, 0.0, -1.0, 0.0, 0.0, 0.0])
    x, u = cartpole.state(2.0, -1.0, 0.5, 3.0), jnp.array([20.0])
    want = 0.5 * (0.4 + 0.1 + 1.0 + 0.9 + 0.4) - np.cos(0.5)
    np.testing.assert_allclose(cartpole.cost(x, u, 0, cartpole.default_params()), want, rtol=1e-13)


def test_default_physics():
    assert pendulum.default_params().physics == (10.0, 1.0, 1.0)
    assert pendulum.default_damped_params().physics == (10.0, 1.0, 1.0, 1.0, 0.1)
    assert cartpole.default_params().physics == (9.8, 1.0, 0.1, 0.5)
    assert (pendulum.U_LOWER, pendulum.U_UPPER) == (-2.0, 2.0)
    assert (cartpole.U_LOWER, cartpole.U_UPPER) == (-100.0, 100.0)


def test_goal_cost_is_least_at_goal_over_root_weight():
    goal, weights = jnp.array([0.3, -2.0]), jnp.array([4.0, 0.25])
    coefficients = quadratic.goal_cost(goal, weights, 0.1, m=2)
    gradient = jax.grad(quadratic.cost)(goal / jnp.sqrt(weights), jnp.zeros(2), 0, coefficients)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-15)
    np.testing.assert_array_equal(coefficients.q, [4.0, 0.25, 0.1, 0.1])
    np.testing.assert_array_equal(coefficients.p, [-0.6, 1.0, 0.0, 0.0])


def test_goal_cost_refuses_unequal_lengths():
    with pytest.raises(ValueError, match=r"goal and goal_weights.*\(2,\) and \(3,\)"):
        quadratic.goal_cost([0.0, 1.0], [1.0, 1.0, 1.0], 0.1)


# Dtypes and transforms.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_kept_under_strict_promotion(case, dtype):
    _, module, dynamics, default_params, _, width = case
    with jax.numpy_dtype_promotion("strict"):
        params = default_params(dtype)
        u = jnp.ones((module.M,), dtype)
        x = module.sample_states(jax.random.key(0), 1, dtype)[0]
        point = jnp.ones((width,), dtype)
        outputs = [
            *jax.tree.leaves(params),
            x,
            module.state(*point),
            module.angle(x),
            dynamics(x, u, 0, params),
            module.cost(x, u, 0, params),
            *jax.tree.leaves(jax.jit(jax.jacfwd(dynamics, (0, 1, 3)))(x, u, 0, params)),
            *quadratic.goal_cost(x, jnp.abs(x), 0.5),
            dynamics(x, u, 0, params._replace(physics=CASES[case[0]][3])),
        ]
    assert all(isinstance(leaf, jax.Array) for leaf in outputs)
    assert [leaf.dtype for leaf in outputs] == [dtype] * len(outputs)


def test_default_dtype_is_the_default_float():
    for module in (pendulum, cartpole):
        for enabled, dtype in ((True, jnp.float64), (False, jnp.float32)):
            with jax.enable_x64(enabled):
                leaves = jax.tree.leaves(module.default_params())
                leaves.append(module.sample_states(jax.random.key(0), 2))
                leaves.append(module.state(*[0] * (module.N - 1)))
                assert all(leaf.dtype == dtype for leaf in leaves)


def test_jit_and_vmap_change_nothing(case):
    _, module, dynamics, default_params, *_ = case
    params = default_params()
    xs = module.sample_states(jax.random.key(1), 4)
    us = jnp.linspace(-1.0, 1.0, 4)[:, None]
    batched = jax.jit(jax.vmap(dynamics, (0, 0, None, None)))(xs, us, 0, params)
    for x, u, want in zip(xs, us, batched, strict=True):
        np.testing.assert_allclose(dynamics(x, u, 0, params), want, rtol=1e-13, atol=1e-14)


def test_wrong_shapes_are_refused(case):
    _, module, dynamics, default_params, *_ = case
    x, u = module.sample_states(jax.random.key(1), 1)[0], jnp.zeros(1)
    for bad_x, bad_u in ((x[:-1], u), (jnp.append(x, 0.0), u), (x, jnp.zeros(2))):
        with pytest.raises(ValueError, match=r"unpack|shape"):
            dynamics(bad_x, bad_u, 0, default_params())


# States.


def test_state_broadcasts_and_angle_inverts_it():
    thetas = jnp.linspace(-3.0, 3.0, 7)
    assert pendulum.state(thetas, 0).shape == (7, 3)
    assert cartpole.state(0, 0.5, thetas, 0).shape == (7, 5)
    np.testing.assert_allclose(pendulum.angle(pendulum.state(thetas, 0)), thetas, rtol=1e-14)
    np.testing.assert_allclose(cartpole.angle(cartpole.state(0, 0, thetas, 0)), thetas, rtol=1e-14)


def test_sampled_states_fill_the_papers_ranges():
    xs = pendulum.sample_states(jax.random.key(2), 2000)
    ys = cartpole.sample_states(jax.random.key(2), 2000)
    assert xs.shape == (2000, 3)
    assert ys.shape == (2000, 5)
    for values, high in (
        (pendulum.angle(xs), np.pi / 2),
        (xs[:, 2], 1.0),
        (ys[:, 0], 0.5),
        (ys[:, 1], 0.5),
        (cartpole.angle(ys), np.pi),
        (ys[:, 4], 1.0),
    ):
        assert -high <= values.min() < -0.99 * high
        assert 0.99 * high < values.max() <= high
        np.testing.assert_allclose(values.std(), high / np.sqrt(3), rtol=0.05)
    off_diagonal = np.corrcoef(np.column_stack([ys[:, [0, 1, 4]], cartpole.angle(ys)]).T) - np.eye(
        4
    )
    assert np.abs(off_diagonal).max() < 0.1
    assert not np.array_equal(xs, pendulum.sample_states(jax.random.key(3), 2000))
