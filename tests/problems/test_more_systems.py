"""Acrobot, quadrotor and car against mechanics, and through the solver."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close

from jaxmpc import Status, mpc_solve
from jaxmpc.systems import acrobot, car, quadrotor

ACROBOT = acrobot.Physics(9.3, 1.3, 0.7, 1.1, 0.6, 0.4, 0.3, 0.2)
QUADROTOR = quadrotor.Physics(9.3, 0.7, 0.3, 0.02)
CAR = car.Physics(2.2)

SYSTEMS = {"acrobot": (acrobot, 20), "quadrotor": (quadrotor, 30), "car": (car, 40)}  # horizons
# Where trigonometry, division by the speed or a singular angle could give NaN.
SPECIAL = {
    "acrobot": [(a, b, 0.0, 0.0) for a in (0.0, np.pi, -np.pi) for b in (0.0, np.pi, np.pi / 2)],
    "quadrotor": [(0.0, 0.0, a, 0.0, 0.0, 0.0) for a in (0.0, np.pi, -np.pi, np.pi / 2)],
    "car": [(0.0, 0.0, a, 0.0) for a in (0.0, np.pi, -np.pi, np.pi / 2)],
}


@pytest.fixture(params=SYSTEMS)
def system(request):
    return SYSTEMS[request.param][0]


def with_physics(physics):
    return acrobot.Params(physics, None)  # every Params has the same two fields


def random_states(system, num, seed):
    return system.sample_states(jax.random.key(seed), num)


# Mechanics.


def acrobot_links(q, q_dot):
    """Heights, velocities and rates of the links' centres, from their positions in the plane."""
    _, _, _, l_1, c_1, c_2, *_ = ACROBOT

    def centres(q):
        first, second = q[0], q[0] + q[1]
        towards = jnp.array([jnp.sin(first), jnp.cos(first)])
        elbow_to_centre = jnp.array([jnp.sin(second), jnp.cos(second)])
        return jnp.stack((c_1 * towards, l_1 * towards + c_2 * elbow_to_centre))

    position, velocity = jax.jvp(centres, (q,), (q_dot,))
    return position[:, 1], velocity, jnp.cumsum(q_dot)


def acrobot_energies(q, q_dot):
    g, m_1, m_2, _, _, _, i_1, i_2 = ACROBOT
    height, velocity, rate = acrobot_links(q, q_dot)
    masses, inertias = jnp.array([m_1, m_2]), jnp.array([i_1, i_2])
    kinetic = 0.5 * masses @ jnp.sum(velocity**2, axis=1) + 0.5 * inertias @ rate**2
    return kinetic, g * masses @ height


def test_acrobot_obeys_its_lagrangian():
    """d/dt ∂L/∂q̇ − ∂L/∂q = (0, u)."""

    def lagrangian(q, q_dot):
        kinetic, potential = acrobot_energies(q, q_dot)
        return kinetic - potential

    @jax.jit
    def generalised_force(q, q_dot, q_ddot):
        momentum = jax.grad(lagrangian, 1)
        _, momentum_dot = jax.jvp(momentum, (q, q_dot), (q_dot, q_ddot))
        return momentum_dot - jax.grad(lagrangian)(q, q_dot)

    for x, u in zip(2 * random_states(acrobot, 20, 1), np.linspace(-30, 30, 20), strict=True):
        x_dot = acrobot.ode(x, jnp.array([u]), 0, with_physics(ACROBOT))
        np.testing.assert_array_equal(x_dot[:2], x[2:])
        np.testing.assert_allclose(generalised_force(x[:2], x[2:], x_dot[2:]), [0, u], atol=1e-11)


def test_acrobot_without_a_torque_conserves_energy():
    def energy(x):
        return sum(acrobot_energies(x[:2], x[2:]))

    step = jax.jit(acrobot.dynamics)
    x = acrobot.state(2.0, 1.0, 0.5, -0.5)
    first = energy(x)
    for t in range(100):
        x = step(x, jnp.zeros(1), t, with_physics(ACROBOT))
    assert np.max(np.abs(x - acrobot.state(2.0, 1.0, 0.5, -0.5))) > 0.5
    np.testing.assert_allclose(energy(x), first, rtol=1e-3)


@pytest.mark.parametrize("theta_1", [0.0, np.pi])
@pytest.mark.parametrize("theta_2", [0.0, np.pi])
def test_acrobot_rests_where_its_links_are_vertical(theta_1, theta_2):
    x = acrobot.state(theta_1, theta_2, 0.0, 0.0)
    np.testing.assert_allclose(
        acrobot.dynamics(x, jnp.zeros(1), 0, acrobot.default_params()), x, atol=1e-14
    )


def test_acrobot_is_stable_hanging_only():
    def fastest(theta_1):
        x = acrobot.state(theta_1, 0.0, 0.0, 0.0)
        A = jax.jacfwd(acrobot.ode)(x, jnp.zeros(1), 0, acrobot.default_params())
        return np.max(np.linalg.eigvals(np.asarray(A)).real)

    assert fastest(0.0) > 1
    assert abs(fastest(np.pi)) < 1e-6


def test_quadrotor_obeys_newton_and_euler():
    """Forces and moments of the two rotors, from where they sit and where they push."""
    g, m, l, i = QUADROTOR
    for x in random_states(quadrotor, 20, 2):
        u = jnp.array([1.7, 4.1])
        theta = float(x[2])
        across = np.array([np.cos(theta), np.sin(theta)])
        up = np.array([-np.sin(theta), np.cos(theta)])
        forces = [u[0] * up, u[1] * up]
        arms = [l * across, -l * across]
        moment = sum(a[0] * f[1] - a[1] * f[0] for a, f in zip(arms, forces, strict=True))
        want = [*(sum(forces) / m - np.array([0, g])), moment / i]
        x_dot = quadrotor.ode(x, u, 0, with_physics(QUADROTOR))
        np.testing.assert_array_equal(x_dot[:3], x[3:])
        np.testing.assert_allclose(x_dot[3:], want, rtol=1e-12)


def test_quadrotor_hovers_and_falls():
    params = with_physics(QUADROTOR)
    x = quadrotor.state(0.3, -0.2, 0.0, 0.0, 0.0, 0.0)
    np.testing.assert_allclose(
        quadrotor.dynamics(x, quadrotor.hover(QUADROTOR), 0, params), x, atol=1e-15
    )
    x = jnp.array([0.0, 0.0, 0.4, 1.0, 2.0, 3.0])
    for t in range(20):
        x = quadrotor.dynamics(x, jnp.zeros(2), t, params)
    # rk4 is exact on a parabola.
    want = [1, 2 - QUADROTOR.g / 2, 0.4 + 3, 1, 2 - QUADROTOR.g, 3]
    np.testing.assert_allclose(x, want, rtol=1e-13)


def test_quadrotors_default_goal_is_an_equilibrium_of_least_cost():
    params = quadrotor.default_params()
    x, u = params.cost.x_ref, params.cost.u_ref
    np.testing.assert_allclose(quadrotor.dynamics(x, u, 0, params), x, atol=1e-15)
    assert quadrotor.cost(x, u, 0, params) == quadrotor.terminal_cost(x, params) == 0


@pytest.mark.parametrize("steering", [0.4, -0.2])
@pytest.mark.parametrize("speed", [1.5, -2.0])
def test_car_drives_on_a_circle(steering, speed):
    """Of radius l / tan δ about a centre to the left of the rear axle, forwards and in reverse."""
    radius = CAR.l / np.tan(steering)
    start = car.state(1.0, -2.0, 0.7, speed)
    centre = start[:2] + radius * np.array([-np.sin(0.7), np.cos(0.7)])
    step = jax.jit(car.dynamics)
    x = start
    for t in range(40):
        x = step(x, jnp.array([0.0, steering]), t, with_physics(CAR))
        np.testing.assert_allclose(np.linalg.norm(x[:2] - centre), abs(radius), rtol=1e-7)
    turned = speed * 40 * car.DT / radius
    np.testing.assert_allclose(x[2] - start[2], turned, rtol=1e-12)
    want = centre + radius * np.array([np.sin(0.7 + turned), -np.cos(0.7 + turned)])
    np.testing.assert_allclose(x[:2], want, rtol=1e-6)


def test_car_brakes_in_a_straight_line():
    x = car.state(0.0, 0.0, np.pi / 6, 4.0)
    for t in range(10):
        x = car.dynamics(x, jnp.array([-2.0, 0.0]), t, with_physics(CAR))
    way = 4.0 - 0.5 * 2.0
    want = [way * np.cos(np.pi / 6), way * np.sin(np.pi / 6), np.pi / 6, 2.0]
    np.testing.assert_allclose(x, want, rtol=1e-13)


def test_whole_turns_change_nothing(system):
    params = system.default_params()
    u = jnp.linspace(0.1, 0.3, system.M)
    angles = {acrobot: [0, 1], quadrotor: [2], car: [2]}[system]
    for x in random_states(system, 5, 3):
        for i in angles:
            turn = jnp.zeros(system.N).at[i].set(4 * np.pi)
            for fn in (
                lambda x: system.cost(x, u, 0, params),
                lambda x: system.terminal_cost(x, params),
                lambda x, turn=0.0: system.dynamics(x, u, 0, params),
            ):
                shift = turn if np.ndim(fn(x)) else 0.0
                np.testing.assert_allclose(fn(x + turn) - shift, fn(x), rtol=1e-9, atol=1e-12)


# Derivatives.


@pytest.mark.parametrize("name", SPECIAL)
def test_derivatives_are_finite_and_modes_agree_at_special_states(name):
    system, _ = SYSTEMS[name]
    params = system.default_params()

    def everything(tau):
        x, u = tau[: system.N], tau[system.N :]
        costs = system.cost(x, u, 0, params) + system.terminal_cost(x, params)
        return jnp.append(system.dynamics(x, u, 0, params), costs)

    forward = jax.jit(jax.jacfwd(jax.jacfwd(everything)))
    reverse = jax.jit(jax.jacrev(jax.jacrev(everything)))
    gradient = jax.jit(jax.jacrev(lambda p, x: system.dynamics(x, jnp.zeros(system.M), 0, p)))
    for x in SPECIAL[name]:
        tau = jnp.array([*x, *np.zeros(system.M)])
        want = forward(tau)
        assert np.isfinite(want).all()
        np.testing.assert_allclose(reverse(tau), want, atol=1e-11)
        leaves = jax.tree.leaves(gradient(params, jnp.array(x)))
        assert all(np.isfinite(leaf).all() for leaf in leaves)


# Through the solver.


def bounds(system, T):
    return tuple(jnp.broadcast_to(jnp.array(b), (T, system.M)) for b in (
        system.U_LOWER, system.U_UPPER
    ))  # fmt: skip


def solve(system, T, inputs):
    params = inputs["params"]
    u_ref = params.cost.u_ref
    return mpc_solve(
        system.cost, system.dynamics, inputs["x_init"],
        jnp.zeros_like(inputs["u_lower"]) if u_ref is None else jnp.tile(u_ref, (T, 1)), params,
        terminal_cost=system.terminal_cost,
        u_lower=inputs["u_lower"], u_upper=inputs["u_upper"],
    )  # fmt: skip


def loss(out):
    weights = jnp.cos(jnp.arange(out["u"].size)).reshape(out["u"].shape)
    return jnp.sum((out["u"] - weights) ** 2) + 0.3 * jnp.sum(jnp.sin(out["x"]))


@pytest.mark.slow  # the gradients of pendulum and cartpole are quick
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_sampled_start_converges_and_gradients_match_dense_autodiff(name):
    system, T = SYSTEMS[name]
    u_lower, u_upper = bounds(system, T)

    def inputs_of(x_init):
        params = system.default_params()
        return dict(x_init=x_init, params=params, u_lower=u_lower, u_upper=u_upper)

    def value(inputs):
        solution = solve(system, T, inputs)
        return loss({"x": solution.x, "u": solution.u}), solution

    x_inits = random_states(system, 32, 0)
    both = jax.jit(jax.vmap(lambda x: jax.grad(value, has_aux=True)(inputs_of(x))))
    grad, solution = both(x_inits)
    assert np.all(np.asarray(solution.status) == Status.CONVERGED)
    clamped = 1 - np.mean(solution.free, axis=(1, 2))
    assert np.max(clamped) > 0

    mixed = int(np.argmin(np.abs(clamped - 0.25)))
    one = jax.tree.map(lambda a: a[mixed], grad)
    functions = (system.cost, system.dynamics, system.terminal_cost)
    want = jax.jit(lambda u, inputs: oracle.gradient(loss, *functions, u, inputs))(
        solution.u[mixed], inputs_of(x_inits[mixed])
    )
    assert np.max(np.abs(jnp.stack(want["params"].physics))) > 1e-3
    assert_close(one, want, 1e-8, scale=max(map(np.max, map(np.abs, jax.tree.leaves(want)))))
    # The scale of all inputs together would hide errors in the physics alone.
    physics = one["params"].physics, want["params"].physics
    assert_close(*physics, 1e-8, scale=max(map(np.abs, physics[1])))


@pytest.mark.slow  # that of the pendulum is quick
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_sampled_start_converges_in_float32(name):
    system, T = SYSTEMS[name]
    u_lower, u_upper = (b.astype(jnp.float32) for b in bounds(system, T))
    params = system.default_params(jnp.float32)
    given = dict(params=params, u_lower=u_lower, u_upper=u_upper)
    x_inits = random_states(system, 32, 0).astype(jnp.float32)
    solution = jax.jit(jax.vmap(lambda x: solve(system, T, given | dict(x_init=x))))(x_inits)
    assert solution.u.dtype == jnp.float32
    assert np.all(np.asarray(solution.status) == Status.CONVERGED)


# Dtypes, transforms and states.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_kept_under_strict_promotion(system, dtype):
    with jax.numpy_dtype_promotion("strict"):
        params = system.default_params(dtype)
        u = jnp.ones((system.M,), dtype)
        x = system.sample_states(jax.random.key(0), 1, dtype)[0]
        outputs = [
            *jax.tree.leaves(params),
            x,
            system.state(*x),
            system.angle(x),
            system.ode(x, u, 0, params),
            system.dynamics(x, u, 0, params),
            system.cost(x, u, 0, params),
            system.terminal_cost(x, params),
            *jax.tree.leaves(jax.jit(jax.jacfwd(system.dynamics, (0, 1, 3)))(x, u, 0, params)),
        ]
    assert {leaf.dtype for leaf in outputs} == {jnp.dtype(dtype)}


def test_default_dtype_is_the_default_float(system):
    for enabled, dtype in ((True, jnp.float64), (False, jnp.float32)):
        with jax.enable_x64(enabled):
            leaves = jax.tree.leaves(system.default_params())
            leaves.append(system.sample_states(jax.random.key(0), 2))
            leaves.append(system.state(*[0] * system.N))
            assert {leaf.dtype for leaf in leaves} == {jnp.dtype(dtype)}


def test_jit_and_vmap_change_nothing(system):
    params, xs = system.default_params(), random_states(system, 4, 4)
    us = jnp.linspace(0.1, 0.5, 4 * system.M).reshape(4, system.M)
    batched = jax.jit(jax.vmap(system.dynamics, (0, 0, None, None)))(xs, us, 0, params)
    for x, u, want in zip(xs, us, batched, strict=True):
        np.testing.assert_allclose(system.dynamics(x, u, 0, params), want, rtol=1e-12, atol=1e-13)


def test_wrong_shapes_are_refused(system):
    x, u = random_states(system, 1, 5)[0], jnp.zeros(system.M)
    for bad_x, bad_u in ((x[:-1], u), (jnp.append(x, 0.0), u), (x, jnp.zeros(system.M + 1))):
        for fn in (system.dynamics, system.cost):
            with pytest.raises(ValueError, match=r"unpack|shape"):
                fn(bad_x, bad_u, 0, system.default_params())


def test_states(system):
    grid = jnp.linspace(-3.0, 3.0, 7)
    x = system.state(*[0] * (system.N - 1), grid)
    assert x.shape == (7, system.N)
    np.testing.assert_array_equal(x[:, -1], grid)
    np.testing.assert_allclose(system.angle(jnp.full(system.N, 7.0)), 7 - 2 * np.pi, rtol=1e-14)
    xs = random_states(system, 2000, 6)
    high = {
        acrobot: [np.pi, np.pi, 1, 1],
        quadrotor: [1, 1, np.pi / 2, 1, 1, 1],
        car: [5, 5, np.pi, 1],
    }[system]
    assert xs.shape == (2000, system.N)
    np.testing.assert_array_less(np.abs(xs).max(axis=0), high)
    np.testing.assert_allclose(xs.std(axis=0), np.array(high) / np.sqrt(3), rtol=0.05)
    assert not np.array_equal(xs, random_states(system, 2000, 7))
