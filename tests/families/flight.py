"""Drones, rockets and satellites; the rockets in newtons, metres and kilograms."""

import numpy as np

from tests.families.family import Family, Rows
from tests.families.parts import (
    around,
    double_integrator,
    held,
    midpoint,
    outside,
    quadratic,
    terminal,
)


def drone_spheres():
    """Among three spheres, with a thrust inside a ball."""
    T, dt = 50, 0.1
    spheres = [(1.5, 0.2, 1.0, 0.5), (2.8, -0.4, 1.2, 0.6), (4.0, 0.4, 0.9, 0.5)]

    def dynamics(lib, x, u, t, p):
        v = [x[3 + i] + dt * (u[i] - 0.2 * x[3 + i]) for i in range(3)]
        return [x[i] + dt * v[i] for i in range(3)] + v

    def thrust(lib, x, u, t, p):
        return [u[0] ** 2 + u[1] ** 2 + u[2] ** 2 - 6]

    def sample(rng, N):
        x = np.append(
            around(rng, N, [0, 0, 1], [0.3, 0.5, 0.4]), around(rng, N, [0, 0, 0], [0.4] * 3), 1
        )
        return x, np.zeros((T, 3)), np.zeros((N, 1))

    goal = [5.5, 0, 1, 0, 0, 0]
    return Family(
        "drone_spheres", 6, 3, T, dynamics,
        quadratic([0.4, 0.4, 0.4, 0.05, 0.05, 0.05], [0.1] * 3, goal), sample,
        terminal([20, 20, 20, 4, 4, 4], goal), u_lower=-2.2, u_upper=2.2,
        rows=(Rows(outside(spheres)), Rows(thrust, "stage")),
    )  # fmt: skip


def planar(mass, arm, inertia):
    """x: y, z, angle and their rates; u: the two thrusts."""

    def ode(lib, x, u, p):
        lift = (u[0] + u[1]) / mass
        turn = arm * (u[0] - u[1]) / inertia
        return [x[3], x[4], x[5], -lift * lib.sin(x[2]), lift * lib.cos(x[2]) - 9.81, turn]

    return ode


def quadrotor_box():
    """Low above the ground, never tilted far and never fast."""
    T, dt, hover = 40, 0.06, 0.5 * 9.81 / 2
    goal = [0, 0.3, 0, 0, 0, 0]

    def cost(lib, x, u, t, p):
        effort = (u[0] - hover) ** 2 + (u[1] - hover) ** 2
        far = x[0] ** 2 + 2 * (x[1] - 0.3) ** 2 + 0.1 * (x[3] ** 2 + x[4] ** 2 + x[5] ** 2)
        return 0.5 * far + 0.1 * effort

    def sample(rng, N):
        x = around(rng, N, [-1.5, 0.5, 0, 0.6, -0.3, 0], [0.8, 0.2, 0.15, 0.4, 0.3, 0.2])
        return x, held(T, [hover, hover]), np.zeros((N, 1))

    return Family(
        "quadrotor_box", 6, 2, T, midpoint(planar(0.5, 0.2, 5e-3), dt), cost, sample,
        terminal([10, 10, 5, 2, 2, 0.5], goal), u_lower=0.0, u_upper=6.0,
        x_lower=[-np.inf, 0.1, -0.35, -1.3, -1, -2], x_upper=[np.inf, 1.5, 0.35, 1.3, 1, 2],
    )  # fmt: skip


def drone_slew():
    """Motors that answer slowly: the rate's limit binds much of the time, and has a price."""
    T, dt, hover = 40, 0.05, 4.905

    def cost(lib, x, u, t, p):
        effort = (u[0] - hover) ** 2 + (u[1] - hover) ** 2
        return (
            1.5 * (x[0] ** 2 + x[1] ** 2)
            + 3 * (1 - lib.cos(x[2]))
            + 0.5 * x[5] ** 2
            + 0.05 * effort
        )

    def end(lib, x, p):
        near = 8 * (x[0] ** 2 + x[1] ** 2) + 15 * (1 - lib.cos(x[2]))
        return near + 2.5 * (x[3] ** 2 + x[4] ** 2 + x[5] ** 2)

    def sample(rng, N):
        x = around(rng, N, [0, 0, 0, 0, 0, 0], [1.5, 0.5, 0.3, 1, 0.5, 0.5])
        return x, held(T, [hover, hover]), np.zeros((N, 1))

    return Family(
        "drone_slew", 6, 2, T, midpoint(planar(1.0, 0.4, 0.08), dt), cost, sample, end,
        u_lower=0.0, u_upper=7.0, previous=[hover, hover], rate_limit=[0.5, 0.5],
        rate_weight=[0.02, 0.02],
    )  # fmt: skip


def gates():
    """Through three gates at given stages: on their plane by an equality, within them by rows."""
    T, dt, stages = 45, 0.1, (12, 24, 36)

    def within(lib, x, u, t, p):
        rows = []
        for k, stage in enumerate(stages):
            for i in range(2):
                off = x[1 + i] - p[2 * k + i]
                rows += [lib.where(t == stage, sign * off - 0.1, -1.0) for sign in (1, -1)]
        return rows

    def plane(lib, x, u, t, p):
        return [lib.where(t == stage, x[0] - 2.0 * (k + 1), 0.0) for k, stage in enumerate(stages)]

    def sample(rng, N):
        x = np.append(
            around(rng, N, [0, 0, 1], [0.3, 0.5, 0.3]),
            around(rng, N, [1, 0, 0], [0.5, 0.3, 0.3]),
            1,
        )
        return x, np.zeros((T, 3)), around(rng, N, [0.5, 1, -0.5, 1.2, 0.3, 0.8], [0.6, 0.4] * 3)

    return Family(
        "gates", 6, 3, T, double_integrator(3, dt),
        quadratic([0, 0.05, 0.05, 0.02, 0.02, 0.02], [0.1] * 3), sample,
        u_lower=-5.0, u_upper=5.0, rows=(Rows(within), Rows(plane, equality=True)),
    )  # fmt: skip


def rocket_landing():
    """Thrust between two norms, a glide slope, kilograms of fuel; 25 tonnes and 430 kN."""
    T, dt, g, isp, force = 40, 0.5, 9.81, 282.0, 4.3e5

    def norm(lib, u):
        return lib.sqrt(u[0] ** 2 + u[1] ** 2 + 1.0)

    def dynamics(lib, x, u, t, p):
        a = [u[0] / x[4], u[1] / x[4] - g]
        moved = [x[i] + dt * x[2 + i] + 0.5 * dt**2 * a[i] for i in range(2)]
        return [*moved, x[2] + dt * a[0], x[3] + dt * a[1], x[4] - dt * norm(lib, u) / (isp * g)]

    def thrust(lib, x, u, t, p):
        return [norm(lib, u) - force, 2.5e5 - norm(lib, u)]

    def slope(lib, x, u, t, p):
        return [x[0] - 0.35 * x[1] - 5, -x[0] - 0.35 * x[1] - 5]

    def sample(rng, N):
        x = around(rng, N, [250, 1130, -15, -90, 2.4e4], [80, 60, 10, 4, 5e2])
        return x, held(T, [0, 3e5]), np.zeros((N, 1))

    return Family(
        "rocket_landing", 5, 2, T, dynamics,
        lambda lib, x, u, t, p: 1e-10 * (u[0] ** 2 + u[1] ** 2), sample,
        lambda lib, x, p: -x[4], x_lower=[-np.inf] * 4 + [1.8e4],
        rows=(
            Rows(thrust, "stage"),
            Rows(slope),
            Rows(lambda lib, x, u, t, p: [x[0], x[1], x[2], x[3]], "terminal", True),
        ),
    )  # fmt: skip


def lander_3d():
    """Two tonnes on Mars: cones of thrust and of glide, in newtons and metres."""
    T, dt, mass, g = 40, 1.0, 1905.0, 3.71

    def dynamics(lib, x, u, t, p):
        a = [u[0] / mass, u[1] / mass, u[2] / mass - g]
        moved = [x[i] + dt * x[3 + i] + 0.5 * dt**2 * a[i] for i in range(3)]
        return moved + [x[3 + i] + dt * a[i] for i in range(3)]

    def thrust(lib, x, u, t, p):
        norm = lib.sqrt(u[0] ** 2 + u[1] ** 2 + u[2] ** 2 + 1.0)
        return [norm - 1.15e4, 3e3 - norm, 0.9 * norm - u[2]]

    def glide(lib, x, u, t, p):
        return [lib.sqrt(x[0] ** 2 + x[1] ** 2 + 1.0) - 0.6 * x[2] - 10.0]

    def cost(lib, x, u, t, p):
        return 1e-8 * (u[0] ** 2 + u[1] ** 2 + u[2] ** 2)

    def sample(rng, N):
        x = around(rng, N, [250, 200, 1150, -10, 5, -45], [150, 100, 80, 8, 8, 6])
        return x, held(T, [0, 0, 7e3]), np.zeros((N, 1))

    return Family(
        "lander_3d", 6, 3, T, dynamics, cost, sample,
        rows=(
            Rows(thrust, "stage"),
            Rows(glide),
            Rows(lambda lib, x, u, t, p: [x[i] for i in range(6)], "terminal", True),
        ),
    )  # fmt: skip


def rocket_vertical():
    """Straight down with the least fuel: the thrust goes from one bound to the other. The step, in
    seconds, is a control beside newtons: chosen at the first stage, repeated at all others."""
    T, g, isp = 25, 9.81, 300.0

    def dynamics(lib, x, u, t, p):
        a, dt = u[0] / x[2] - g, u[1]
        moved = x[0] + dt * x[1] + 0.5 * dt**2 * a
        return [moved, x[1] + dt * a, x[2] - dt * u[0] / (isp * g), dt]

    def same(lib, x, u, t, p):
        return [lib.where(t > 0, u[1] - x[3], 0.0)]

    def sample(rng, N):
        x = around(rng, N, [1300, -90, 2.5e4, 1], [200, 10, 1e3, 0])
        return x, held(T, [2.5e5, 1.0]), np.zeros((N, 1))

    return Family(
        "rocket_vertical", 4, 2, T, dynamics,
        lambda lib, x, u, t, p: 1e-11 * u[0] ** 2 + 1e-2 * u[1] ** 2, sample,
        lambda lib, x, p: -x[2], u_lower=[5e4, 0.2], u_upper=[8e5, 3.0],
        x_lower=[-1.0, -200.0, 2.0e4, -np.inf], x_upper=[np.inf, 5.0, np.inf, np.inf],
        rows=(
            Rows(same, "stage", True),
            Rows(lambda lib, x, u, t, p: [x[0], x[1]], "terminal", True),
        ),
    )  # fmt: skip


def goddard():
    """As high as possible, with a limit of the dynamic pressure; all of order one and below."""
    T, dt = 60, 0.2 / 60

    def ode(lib, x, u, p):
        drag = 310 * x[1] ** 2 * lib.exp(-500 * (x[0] - 1))
        return [x[1], (u[0] - drag) / x[2] - 1 / x[0] ** 2, -2 * u[0]]

    def pressure(lib, x, u, t, p):
        return [310 * x[1] ** 2 * lib.exp(-500 * (x[0] - 1)) - p[0]]

    def sample(rng, N):
        x = around(rng, N, [1.0, 0.005, 1.0], [0, 0, 0.02])
        return x, held(T, [1.5]), rng.uniform(0.45, 0.7, N)

    return Family(
        "goddard", 3, 1, T, midpoint(ode, dt), lambda lib, x, u, t, p: 1e-5 * u[0] ** 2, sample,
        lambda lib, x, p: -100 * (x[0] - 1), u_lower=0.0, u_upper=3.5,
        x_lower=[-np.inf, 0.0, 0.6], rows=(Rows(pressure),),
    )  # fmt: skip


def pointing():
    """A telescope turns past the sun, which it must not see, to rest in a terminal box."""
    T, dt, aperture = 40, 0.5, np.cos(0.35)

    def sun(lib, x, u, t, p):
        seen = lib.cos(x[1]) * p[1] * lib.cos(x[0] - p[0]) + lib.sin(x[1]) * p[2]
        return [seen - aperture]

    def dock(lib, x, u, t, p):
        off = [x[0] - 1.5, x[1] - 0.3, x[2], x[3]]
        return [
            sign * z - w
            for z, w in zip(off, (0.01, 0.01, 1e-3, 1e-3), strict=True)
            for sign in (1, -1)
        ]

    def sample(rng, N):
        x = around(rng, N, [-0.6, 0, 0, 0], [0.3, 0.4, 0.02, 0.02])
        share = rng.uniform(0.4, 0.6, N)
        aside = rng.choice([-1, 1], N) * rng.uniform(0.13, 0.25, N)
        up = share * x[:, 1] + (1 - share) * 0.3 + aside
        azimuth = share * x[:, 0] + (1 - share) * 1.5
        return x, np.zeros((T, 2)), np.column_stack([azimuth, np.cos(up), np.sin(up)])

    return Family(
        "pointing", 4, 2, T, double_integrator(2, dt), quadratic([0, 0, 1, 1], [50, 50]), sample,
        u_lower=-0.03, u_upper=0.03, x_lower=[-np.inf, -1.2, -0.2, -0.2],
        x_upper=[np.inf, 1.2, 0.2, 0.2], rows=(Rows(sun), Rows(dock, "terminal")),
    )  # fmt: skip


FAMILIES = [
    drone_spheres, quadrotor_box, drone_slew, gates, rocket_landing, lander_3d, rocket_vertical,
    goddard, pointing,
]  # fmt: skip
