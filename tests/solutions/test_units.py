"""Plans that do not depend on a unit: of a control, of rows, of a row far off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Constraints, Status, mpc_solve


@pytest.mark.slow  # the unit of a force goes the same way
@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(terminal_equality=lambda x, b: x - 1),
        Constraints(terminal_inequality=lambda x, b: 1 - x),
    ],
    ids=["equality", "inequality"],
)
def test_the_gain_of_a_control(constraints):
    """Five equal pushes b u of 1/5 lead to 1, however weak a unit of u is."""

    @jax.jit
    @jax.vmap
    def run(b):
        return mpc_solve(
            lambda x, u, t, b: 0.5 * jnp.sum(u**2), lambda x, u, t, b: x + b * u,
            jnp.zeros(1), jnp.zeros((5, 1)), b, constraints=constraints,
        )  # fmt: skip

    b = 10.0 ** -jnp.arange(6.0)
    z = run(b)
    assert np.all(np.asarray(z.status) == Status.CONVERGED)
    assert_close(z.u[:, :, 0] * b[:, None], np.full((6, 5), 0.2), 1e-7)
    assert np.all(np.asarray(z.iterations) <= 25)


def test_the_unit_of_a_force():
    """A lift of 25 t comes to rest 1200 m below, by at most 800 kN: in MN, kN, N or mN."""
    mass, most, gravity = 2.5e4, 8e5, 9.81

    @jax.jit
    @jax.vmap
    def run(unit):
        def dynamics(x, u, t, p):
            a = u[0] * unit / mass - gravity
            return jnp.stack([x[0] + x[1] + 0.5 * a, x[1] + a])

        return mpc_solve(
            lambda x, u, t, p: jnp.sum((u * unit / most) ** 2), dynamics,
            jnp.array([1200.0, -90.0]), jnp.full((20, 1), 3e5) / unit,
            u_lower=0.0, u_upper=most / unit,
            constraints=Constraints(terminal_equality=lambda x, p: x),
        )  # fmt: skip

    unit = jnp.array([8e5, 1e4, 1e2, 1.0, 1e-3])
    z = run(unit)
    force = z.u[:, :, 0] * unit[:, None] / most
    assert np.all(np.asarray(z.status) == Status.CONVERGED)
    for i in range(1, 5):
        assert_close(force[i], force[0], 1e-7)
    assert np.all(np.asarray(z.iterations) <= 25)
    # Least squares within bounds: some are at a bound, and the others on a line in t.
    free = np.asarray((force[0] > 1e-9) & (force[0] < 1 - 1e-9))
    t, f = np.arange(20.0)[free], np.asarray(force[0])[free]
    assert_close(np.polyval(np.polyfit(t, f, 1), t), f, 1e-7)


LANDING = -0.82543383  # by IPOPT, multiple shooting


@pytest.mark.slow  # small problems with other units of their rows are in test_invariance
def test_the_unit_of_rows():
    """A rocket lands with what fuel it can save; its thrust is between two circles."""
    T, dt, gravity, impulse = 40, 0.5, 9.81, 282.0
    length, speed, heavy, strong = 1e3, 1e2, 2.5e4, 8e5

    def dynamics(x, u, t, s):
        force, mass = strong * u, heavy * x[4]
        a = force / mass - jnp.array([0.0, gravity])
        burnt = dt * jnp.sqrt(force @ force + 1) / (impulse * gravity)
        position = length * x[:2] + dt * speed * x[2:4] + 0.5 * dt**2 * a
        moving = speed * x[2:4] + dt * a
        return jnp.concatenate([position / length, moving / speed, (mass - burnt)[None] / heavy])

    def thrust(x, u, t, s):
        return s * jnp.stack([u @ u - 1, 1 / 64 - u @ u])

    @jax.jit
    @jax.vmap
    def run(s):
        return mpc_solve(
            lambda x, u, t, s: 0.01 * u @ u, dynamics, jnp.array([0.4, 1.2, -0.2, -0.9, 1.0]),
            jnp.tile(jnp.array([0.0, 0.375]), (T, 1)), s, terminal_cost=lambda x, s: -x[4],
            constraints=Constraints(inequality=thrust, terminal_equality=lambda x, s: x[:4]),
        )  # fmt: skip

    z = run(jnp.array([1.0, 1e-6, 1e-3, 1e3, 1e6, 1e9]))
    assert np.all(np.asarray(z.status) == Status.CONVERGED)
    assert_close(z.objective, np.full(6, LANDING), 1e-7)
    for i in range(1, 6):
        assert_close(z.u[i], z.u[0], 1e-6)
        assert abs(int(z.iterations[i]) - int(z.iterations[0])) <= max(3, z.iterations[0] / 5)


@pytest.mark.slow  # small problems with a row that is far off are in test_invariance
def test_a_row_that_is_far_off():
    """A bicycle passes a disc; that it stays within a kilometre is written in other units."""
    T, centre, goal = 35, jnp.array([3.0, 0.02]), jnp.array([6.0, 0.0])
    weights = jnp.array([0.2, 1.0, 0.1, 0.2, 0.1, 1.0])
    aim = jnp.array([6.0, 0.0, 0.0, 2.0, 0.0, 0.0])

    def ode(x, u):
        along = jnp.stack([jnp.cos(x[2]), jnp.sin(x[2]), jnp.tan(u[1])])
        return jnp.concatenate([x[3] * along, u[:1]])

    def rows(x, u, t, p):
        radius, s = p
        return jnp.stack([radius**2 - jnp.sum((x[:2] - centre) ** 2), s * (x[0] - 1000)])

    @jax.jit
    @jax.vmap
    def run(x_init, radius, s):
        return mpc_solve(
            lambda x, u, t, p: 0.5 * weights @ (jnp.concatenate([x, u]) - aim) ** 2,
            lambda x, u, t, p: x + 0.1 * ode(x + 0.05 * ode(x, u), u),
            x_init, jnp.zeros((T, 2)), (radius, s),
            terminal_cost=lambda x, p: 5 * jnp.sum((x[:2] - goal) ** 2) + x[2] ** 2,
            u_lower=jnp.array([-3.0, -0.6]), u_upper=jnp.array([3.0, 0.6]),
            constraints=Constraints(inequality=rows),
        )  # fmt: skip

    rng, N, factors = np.random.default_rng(0), 8, (1.0, 1e3, 1e6)
    starts = np.array([0, 0, 0, 2.0]) + rng.normal(size=(N, 4)) * [0.05, 0.05, 0.05, 0.2]
    radii = rng.uniform(0.3, 0.9, N)
    z = run(np.tile(starts, (3, 1)), np.tile(radii, 3), np.repeat(factors, N))
    assert np.all(np.asarray(z.status) == Status.CONVERGED)
    u, iterations = z.u.reshape(3, N, T, 2), z.iterations.reshape(3, N)
    for i in (1, 2):
        assert_close(u[i], u[0], 1e-7)
        assert np.all(np.abs(iterations[i] - iterations[0]) <= np.maximum(3, iterations[0] / 5))


def test_states_held_on_a_circle():
    """A unicycle that never rests, on the unit circle by an equality a stage. On it, with the
    heading along the circle, each step turns by the same angle as the way around does."""
    T, dt, N = 25, 0.15, 16

    def dynamics(x, u, t, p):
        heading = x[2] + 0.5 * dt * u[1]
        return x + dt * jnp.stack([u[0] * jnp.cos(heading), u[0] * jnp.sin(heading), u[1]])

    def cost(x, u, t, speed):
        away = jnp.sum((x[:2] - jnp.array([1.0, 0.0])) ** 2)
        return 0.25 * (u[0] - speed) ** 2 + 0.025 * u[1] ** 2 + 0.1 * away

    @jax.jit
    @jax.vmap
    def run(x_init, u_init, speed):
        return mpc_solve(
            cost, dynamics, x_init, u_init, speed,
            u_lower=jnp.array([0.2, -4.0]), u_upper=jnp.array([2.0, 4.0]),
            constraints=Constraints(equality=lambda x, u, t, p: jnp.sum(x[:2] ** 2)[None] - 1),
        )  # fmt: skip

    rng = np.random.default_rng(0)
    angle, speed = rng.uniform(-2.5, 2.5, N), rng.uniform(0.5, 1.5, N)
    turn = np.sign(rng.normal(size=N))
    starts = np.stack([np.cos(angle), np.sin(angle), angle + turn * np.pi / 2], 1)
    guess = np.stack([np.full((N, T), 0.6), np.broadcast_to(0.6 * turn[:, None], (N, T))], -1)
    z = run(starts, guess, speed)
    assert np.all(np.asarray(z.status) == Status.CONVERGED)
    assert np.max(np.abs(np.sum(z.x[:, :-1, :2] ** 2, -1) - 1)) <= 1e-9
    assert np.mean(z.iterations) <= 25
    chord = dt * z.u[:, :-1, 0]
    around = 2 * np.arcsin(chord / 2)
    there = np.unwrap(np.arctan2(z.x[:, :-1, 1], z.x[:, :-1, 0]), axis=1)
    assert_close(np.abs(np.diff(there, axis=1)), around, 1e-7)
