"""Arms, pendulums, cranes and contacts."""

import numpy as np

from tests.families.family import Family, Rows
from tests.families.parts import around, held, midpoint, quadratic


def arm_2():
    """A two-link arm, whose tip comes to rest at a point: as many equalities as states."""
    T, dt = 40, 0.05

    def dynamics(lib, x, u, t, p):
        c, s = lib.cos(x[1]), lib.sin(x[1])
        a, b, d = 1.67 + c, 0.33 + 0.5 * c, 0.33
        h = 0.5 * s
        r1 = u[0] + h * (2 * x[2] * x[3] + x[3] ** 2) - 0.1 * x[2]
        r2 = u[1] - h * x[2] ** 2 - 0.1 * x[3]
        det = a * d - b**2
        w1 = x[2] + dt * (d * r1 - b * r2) / det
        w2 = x[3] + dt * (a * r2 - b * r1) / det
        return [x[0] + dt * w1, x[1] + dt * w2, w1, w2]

    def tip(lib, x, u, t, p):
        along = lib.cos(x[0]) + lib.cos(x[0] + x[1]) - p[0]
        across = lib.sin(x[0]) + lib.sin(x[0] + x[1]) - p[1]
        return [along, across, x[2], x[3]]

    def sample(rng, N):
        x = around(rng, N, [0, 1.2, 0, 0], [1, 0.6, 0.3, 0.3])
        angle = x[:, 0] + x[:, 1] / 2 + rng.uniform(-1.2, 1.2, N)
        reach = rng.uniform(0.7, 1.8, N)
        return x, np.zeros((T, 2)), np.stack([reach * np.cos(angle), reach * np.sin(angle)], 1)

    return Family(
        "arm_2", 4, 2, T, dynamics, quadratic([0, 0, 0.02, 0.02], [0.02, 0.02]), sample,
        u_lower=[-2.2, -0.9], u_upper=[2.2, 0.9], x_lower=[-np.inf, -2.6, -4, -4],
        x_upper=[np.inf, 2.6, 4, 4], rows=(Rows(tip, "terminal", True),),
    )  # fmt: skip


def arm_3():
    """Three joints, accelerated, below a ceiling; the tip has a position and an angle to reach."""
    T, dt, lengths = 30, 0.1, (0.6, 0.5, 0.3)

    def joints(lib, x):
        along = across = angle = 0.0
        places = []
        for i, length in enumerate(lengths):
            angle = angle + x[i]
            along = along + length * lib.cos(angle)
            across = across + length * lib.sin(angle)
            places.append((along, across, angle))
        return places

    def dynamics(lib, x, u, t, p):
        w = [x[3 + i] + dt * u[i] for i in range(3)]
        return [x[i] + dt * w[i] for i in range(3)] + w

    def ceiling(lib, x, u, t, p):
        return [across - 0.9 for _, across, _ in joints(lib, x)]

    def pose(lib, x, u, t, p):
        tip = joints(lib, x)[-1]
        return [*(tip[i] - p[i] for i in range(3)), x[3], x[4], x[5]]

    def sample(rng, N):
        def poses(shoulder):
            return around(rng, N, [shoulder, 0.2, -0.2], [0.3, 0.4, 0.5])

        x = np.append(poses(2.5), np.zeros((N, 3)), 1)
        goal = joints(np, poses(0.6).T)[-1]
        return x, np.zeros((T, 3)), np.stack([goal[0], np.minimum(goal[1], 0.85), goal[2]], 1)

    return Family(
        "arm_3", 6, 3, T, dynamics, quadratic([0, 0, 0, 0.1, 0.1, 0.1], [0.02] * 3), sample,
        u_lower=-4.0, u_upper=4.0, rows=(Rows(ceiling), Rows(pose, "terminal", True)),
    )  # fmt: skip


def crane():
    """A cart near the end of its rails carries a load that may hardly swing, and comes to rest."""
    T, dt = 50, 0.1

    def dynamics(lib, x, u, t, p):
        v = x[1] + dt * u[0]
        w = x[3] - dt * (9.81 * lib.sin(x[2]) + u[0] * lib.cos(x[2]) + 0.02 * x[3]) / p[1]
        return [x[0] + dt * v, v, x[2] + dt * w, w]

    def sample(rng, N):
        x = around(rng, N, [-0.6, 0, 0, 0], [0.3, 0.1, 0.05, 0.05])
        return (
            x,
            np.zeros((T, 1)),
            np.column_stack([rng.uniform(0.8, 0.99, N), rng.uniform(0.6, 1.5, N)]),
        )

    return Family(
        "crane", 4, 1, T, dynamics, lambda lib, x, u, t, p: (x[0] - p[0]) ** 2 + 0.05 * u[0] ** 2,
        sample, u_lower=-2.0, u_upper=2.0,
        x_lower=[-1, -0.8, -0.12, -np.inf], x_upper=[1, 0.8, 0.12, np.inf],
        rows=(Rows(lambda lib, x, u, t, p: [x[0] - p[0], x[1], x[2], x[3]], "terminal", True),),
    )  # fmt: skip


def cartpole():
    """Swing-up on a short track."""
    T, dt, cart, pole, length = 60, 0.05, 1.0, 0.2, 0.5

    def ode(lib, x, u, p):
        s, c = lib.sin(x[1]), lib.cos(x[1])
        total = cart + pole * s**2
        a = (u[0] + pole * s * (length * x[3] ** 2 + 9.81 * c)) / total
        b = (-u[0] * c - pole * length * x[3] ** 2 * c * s - (cart + pole) * 9.81 * s) / (
            length * total
        )
        return [x[2], x[3], a, b]

    def cost(lib, x, u, t, p):
        return 0.1 * (x[0] ** 2 + 5 * (1 + lib.cos(x[1])) + 0.1 * u[0] ** 2)

    def end(lib, x, p):
        return 20 * (x[0] ** 2 + 4 * (1 + lib.cos(x[1]))) + 2 * (x[2] ** 2 + x[3] ** 2)

    def sample(rng, N):
        u = 3 * np.sin(np.arange(T) * dt * 4.0)[None, :, None] * rng.choice([-1, 1], (N, 1, 1))
        return around(rng, N, [0, 0, 0, 0], [0.2, 0.5, 0.1, 0.3]), u, np.zeros((N, 1))

    return Family(
        "cartpole", 4, 1, T, midpoint(ode, dt), cost, sample, end, u_lower=-10.0, u_upper=10.0,
        x_lower=[-0.6, -np.inf, -np.inf, -np.inf], x_upper=[0.6, np.inf, np.inf, np.inf],
    )  # fmt: skip


def pendulum():
    """Swing-up with less torque than its weight, upright and at rest at the end."""
    T, dt = 60, 0.05

    def dynamics(lib, x, u, t, p):
        w = x[1] + dt * (-9.81 * lib.sin(x[0]) + u[0] - 0.05 * x[1])
        return [x[0] + dt * w, w]

    def end(lib, x, u, t, p):
        return [x[0] - np.pi, x[1]]

    def sample(rng, N):
        u = np.where(np.arange(T) < 24, -p_torque, p_torque)[None, :, None] * np.ones((N, 1, 1))
        return around(rng, N, [0, 0], [0.5, 1]), u, np.zeros((N, 1))

    p_torque = 2.0
    return Family(
        "pendulum", 2, 1, T, dynamics, lambda lib, x, u, t, p: 0.05 * u[0] ** 2, sample,
        u_lower=-5.0, u_upper=5.0, rows=(Rows(end, "terminal", True),),
    )  # fmt: skip


def rail_pendulum():
    """A cart and its load in their own coordinates; the rod's force is a control that an equality
    at every stage decides."""
    T, dt, cart, load, length = 40, 0.05, 1.0, 0.5, 0.8

    def dynamics(lib, x, u, t, p):
        lean = x[1] - x[0]
        v = [
            x[3] + dt * (u[0] + u[1] * lean) / cart,
            x[4] - dt * u[1] * lean / load,
            x[5] - dt * (u[1] * x[2] / load + 9.81),
        ]
        return [x[i] + dt * v[i] for i in range(3)] + v

    def rod(lib, x, u, t, p):
        return [(x[1] - x[0]) ** 2 + x[2] ** 2 - length**2]

    def cost(lib, x, u, t, p):
        return (
            (x[0] - p[0]) ** 2
            + 0.5 * (x[1] - p[0]) ** 2
            + 0.02 * u[0] ** 2
            + 1e-3 * (u[1] - 6) ** 2
        )

    def end(lib, x, p):
        return 10 * ((x[0] - p[0]) ** 2 + (x[1] - p[0]) ** 2) + x[3] ** 2 + x[4] ** 2

    def sample(rng, N):
        lean, s = rng.uniform(-0.6, 0.6, N), rng.uniform(-0.5, 0.5, N)
        x = [s, s + length * np.sin(lean), -length * np.cos(lean), 0 * s, 0 * s, 0 * s]
        return np.stack(x, 1), held(T, [0, load * 9.81 / length]), rng.uniform(-0.89, 0.89, N)

    return Family(
        "rail_pendulum", 6, 2, T, dynamics, cost, sample, end, u_lower=[-5, -60], u_upper=[5, 60],
        x_lower=[-0.9, *[-np.inf] * 5], x_upper=[0.9, *[np.inf] * 5],
        rows=(Rows(rod, equality=True),),
    )  # fmt: skip


def grasp():
    """Two fingers lift a box: friction cones, and forces that only their cost makes unique."""
    T, dt, mass = 25, 0.08, 0.8

    def dynamics(lib, x, u, t, p):
        force = [u[0] - u[3], u[1] + u[4], u[2] + u[5] - mass * 9.81]
        v = [x[3 + i] + dt * force[i] / mass for i in range(3)]
        return [x[i] + dt * v[i] for i in range(3)] + v

    def cones(lib, x, u, t, p):
        return [lib.sqrt(u[i + 1] ** 2 + u[i + 2] ** 2 + 1e-3) - p[3] * u[i] for i in (0, 3)]

    def sample(rng, N):
        x = np.append(
            around(rng, N, [0, 0, 0], [0.3, 0.3, 0.1]), around(rng, N, [0, 0, 0], [0.3] * 3), 1
        )
        goal = np.column_stack(
            [around(rng, N, [0, 0, 0.6], [0.4, 0.4, 0.2]), rng.uniform(0.4, 0.8, N)]
        )
        return x, held(T, [8, 0, 3.9, 8, 0, 3.9]), goal

    return Family(
        "grasp", 6, 6, T, dynamics, quadratic([0, 0, 0, 0.5, 0.5, 0.5], [0.01] * 6), sample,
        u_lower=[0, -20, -20, 0, -20, -20], u_upper=[25, 20, 20, 25, 20, 20],
        rows=(
            Rows(cones, "stage"),
            Rows(
                lambda lib, x, u, t, p: [*(x[i] - p[i] for i in range(3)), x[3], x[4], x[5]],
                "terminal", True,
            ),
        ),
    )  # fmt: skip


def hop():
    """One foot pushes a mass up a slope of steps: a cone on the ground, a reach of the leg."""
    T, dt, mass = 30, 0.05, 30.0

    def dynamics(lib, x, u, t, p):
        v = [x[2] + dt * u[0] / mass, x[3] + dt * (u[1] / mass - 9.81)]
        return [x[0] + dt * v[0], x[1] + dt * v[1], *v]

    def ground(lib, x, u, t, p):
        return [u[0] - p[0] * u[1], -u[0] - p[0] * u[1]]

    def leg(lib, x, u, t, p):
        return [x[0] ** 2 + x[1] ** 2 - 0.8**2, 0.35 - x[1]]

    def cost(lib, x, u, t, p):
        return 1e-6 * (u[0] ** 2 + (u[1] - 294) ** 2) + 0.1 * (x[1] - 0.6) ** 2

    def end(lib, x, u, t, p):
        return [(x[0] - p[1]) ** 2 + (x[1] - 0.6) ** 2 - 0.05**2, x[3] - 0.3, 1.1 - x[2]]

    def sample(rng, N):
        x = around(rng, N, [-0.3, 0.6, 0.5, 0], [0.1, 0.08, 0.2, 0.3])
        return (
            x,
            held(T, [0, 294]),
            np.column_stack([rng.uniform(0.1, 0.2, N), rng.uniform(0.3, 0.5, N)]),
        )

    return Family(
        "hop", 4, 2, T, dynamics, cost, sample, u_lower=[-400, 0], u_upper=[400, 900],
        rows=(Rows(ground, "stage"), Rows(leg), Rows(end, "terminal")),
    )  # fmt: skip


FAMILIES = [arm_2, arm_3, crane, cartpole, pendulum, rail_pendulum, grasp, hop]
