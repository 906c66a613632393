"""Cars, unicycles and trailers among obstacles, in corridors and on rings."""

import numpy as np

from tests.families.family import Family, Rows
from tests.families.parts import (
    around,
    double_integrator,
    euler,
    held,
    midpoint,
    outside,
    quadratic,
    terminal,
)

FIELD = [
    (1.2, 0.3, 0.4),
    (2.2, -0.5, 0.5),
    (2.4, 0.9, 0.4),
    (3.4, 0.2, 0.45),
    (1.4, -1.2, 0.5),
    (4.4, -0.4, 0.3),
]


def mass_discs():
    T, dt = 30, 0.15

    def sample(rng, N):
        x = np.append(
            around(rng, N, [-0.5, 0], [0.3, 0.8]), around(rng, N, [0.5, 0], [0.3, 0.2]), 1
        )
        return x, np.zeros((T, 2)), np.zeros((N, 1))

    return Family(
        "mass_discs", 4, 2, T, double_integrator(2, dt),
        quadratic([1, 1, 0.1, 0.1], [0.1, 0.1], [5, 0, 0, 0]), sample,
        terminal([20, 20, 4, 4], [5, 0, 0, 0]), u_lower=-4.0, u_upper=4.0,
        rows=(Rows(outside(FIELD)),),
    )  # fmt: skip


def bicycle(wheelbase):
    """x: position, heading, speed; u: acceleration, steering angle."""

    def ode(lib, x, u, p):
        return [x[3] * lib.cos(x[2]), x[3] * lib.sin(x[2]), x[3] * lib.tan(u[1]) / wheelbase, u[0]]

    return ode


def bicycle_discs():
    T, dt = 35, 0.1
    discs = [(1.5, 0.25, 0.4), (3.0, -0.3, 0.5), (4.5, 0.3, 0.4)]

    def sample(rng, N):
        return (
            around(rng, N, [0, 0, 0, 2], [0.2, 0.3, 0.1, 0.4]),
            np.zeros((T, 2)),
            np.zeros((N, 1)),
        )

    return Family(
        "bicycle_discs", 4, 2, T, midpoint(bicycle(0.5), dt),
        quadratic([0.2, 1, 0.1, 0.2], [0.1, 1], [6, 0, 0, 2]), sample,
        terminal([10, 10, 2, 0], [6, 0, 0, 0]), u_lower=[-3, -0.6], u_upper=[3, 0.6],
        x_lower=[-np.inf, -np.inf, -np.inf, 0.0], x_upper=[np.inf, np.inf, np.inf, 3.0],
        rows=(Rows(outside(discs)),),
    )  # fmt: skip


def swerve_rate():
    """A car whose steering is slow, and a disc in its lane."""
    T, dt = 40, 0.1

    def disc(lib, x, u, t, p):
        return [0.36 - (x[0] - 3) ** 2 - (x[1] - p[0]) ** 2]

    def sample(rng, N):
        x = around(rng, N, [0, -0.4, 0, 1.2], [0.2, 0.2, 0.1, 0.3])
        return x, np.zeros((T, 2)), rng.uniform(-0.4, -0.1, N)

    return Family(
        "swerve_rate", 4, 2, T, midpoint(bicycle(2.5), dt),
        quadratic([0, 5, 0.5, 0.5], [0.05, 0.5], [0, -0.2, 0, 1.2]), sample,
        u_lower=[-3, -0.6], u_upper=[3, 0.6], rows=(Rows(disc),),
        previous=[0, 0], rate_limit=[0.6, 0.12],
    )  # fmt: skip


def unicycle(lib, x, u, p):
    return [u[0] * lib.cos(x[2]), u[0] * lib.sin(x[2]), u[1]]


def unicycle_corridor():
    """Along a winding corridor, whose walls are rows of the states."""
    T, dt, half = 50, 0.15, 0.25

    def walls(lib, x, u, t, p):
        off = x[1] - p[0] * lib.sin(1.5 * x[0])
        return [off - half, -off - half]

    def sample(rng, N):
        x = around(rng, N, [0, 0, 0.8], [0.1, 0.15, 0.3])
        return x, held(T, [0.6, 0.0]), rng.uniform(0.5, 0.9, N)

    return Family(
        "unicycle_corridor", 3, 2, T, midpoint(unicycle, dt),
        quadratic([0.1, 0, 0], [0.1, 0.05], [6, 0, 0]), sample, terminal([10, 1, 0], [6, 0, 0]),
        u_lower=[0, -3], u_upper=[1.5, 3], rows=(Rows(walls),),
    )  # fmt: skip


def unicycle_ring():
    """On the unit circle by an equality a stage, never at rest."""
    T, dt = 25, 0.15

    def cost(lib, x, u, t, p):
        return 0.25 * (u[0] - p[0]) ** 2 + 0.025 * u[1] ** 2 + 0.1 * ((x[0] - 1) ** 2 + x[1] ** 2)

    def sample(rng, N):
        angle, turn = rng.uniform(-2.5, 2.5, N), np.sign(rng.normal(size=N))
        x = np.stack([np.cos(angle), np.sin(angle), angle + turn * np.pi / 2], 1)
        u = np.stack([np.full((N, T), 0.6), np.broadcast_to(0.6 * turn[:, None], (N, T))], -1)
        return x, u, rng.uniform(0.5, 1.5, N)

    return Family(
        "unicycle_ring", 3, 2, T, midpoint(unicycle, dt), cost, sample,
        u_lower=[0.2, -4], u_upper=[2, 4],
        rows=(Rows(lambda lib, x, u, t, p: [x[0] ** 2 + x[1] ** 2 - 1], equality=True),),
    )  # fmt: skip


def car(lib, x, u, p):
    """x: position, heading, speed; u: turn rate, acceleration."""
    return [x[3] * lib.cos(x[2]), x[3] * lib.sin(x[2]), u[0], u[1]]


def wall():
    """Discs that overlap to a wall across the straight guess."""
    T, dt = 40, 0.15

    def discs(lib, x, u, t, p):
        return [p[3] ** 2 - (x[0] - 3) ** 2 - (x[1] - p[i]) ** 2 for i in range(3)]

    def sample(rng, N):
        middle, spacing, radius = (
            rng.uniform(0.05, 0.35, N),
            rng.uniform(0.25, 0.4, N),
            rng.uniform(0.3, 0.4, N),
        )
        y = middle[:, None] + spacing[:, None] * (np.arange(3) - 1)
        swerve = rng.choice([-1, 1], N)[:, None] * np.repeat([0.35, -0.35, 0.0], [8, 16, 16])
        u = np.stack([swerve, np.full((N, T), 0.05)], -1)
        return held(1, [0, 0, 0, 1]).repeat(N, 0), u, np.column_stack([y, radius])

    goal = [6, 0.2, 0, 0]
    return Family(
        "wall", 4, 2, T, euler(car, dt), quadratic([0.04, 0.04, 0, 0], [0.1, 0.1], goal), sample,
        terminal([40, 40, 0, 2], goal), u_lower=-2.0, u_upper=2.0, rows=(Rows(discs),),
    )  # fmt: skip


def duplicated_rows():
    """Each disc twice, in two units, and the bounds of the controls as rows beside."""
    T, dt = 30, 0.15
    twice = outside([*FIELD[:3], *FIELD[:3]])

    def fn(lib, x, u, t, p):
        rows = twice(lib, x, u, t, p)
        return [*rows[:3], *(100 * g for g in rows[3:])]

    def again(lib, x, u, t, p):
        return [u[0] - 2, -u[0] - 2, u[1] - 2, -u[1] - 2]

    def sample(rng, N):
        x = np.append(
            around(rng, N, [-0.5, 0], [0.3, 0.8]), around(rng, N, [0.5, 0], [0.3, 0.2]), 1
        )
        return x, np.zeros((T, 2)), np.zeros((N, 1))

    return Family(
        "duplicated_rows", 4, 2, T, double_integrator(2, dt),
        quadratic([1, 1, 0.1, 0.1], [0.1, 0.1], [4, 0, 0, 0]), sample,
        terminal([20, 20, 4, 4], [4, 0, 0, 0]), u_lower=-2.0, u_upper=2.0,
        rows=(Rows(fn), Rows(again, "stage")),
    )  # fmt: skip


def racing(name="racing", T=60, unit=64):
    """The least time along a track, by its length: a corridor, and a circle of friction."""
    ds = 1.5

    def dynamics(lib, x, u, t, p):
        bend = p[0] * lib.sin(0.2 * ds * t) + p[1] * lib.sin(0.07 * ds * t)
        stretch = (1 - x[0] * bend) / lib.cos(x[1])
        return [
            x[0] + ds * (1 - x[0] * bend) * lib.tan(x[1]),
            x[1] + ds * (u[1] * stretch - bend),
            x[2] + ds * u[0] * stretch / x[2],
        ]

    def cost(lib, x, u, t, p):
        bend = p[0] * lib.sin(0.2 * ds * t) + p[1] * lib.sin(0.07 * ds * t)
        seconds = ds * (1 - x[0] * bend) / (x[2] * lib.cos(x[1]))
        return seconds + 1e-3 * u[0] ** 2 + 2 * u[1] ** 2

    def friction(lib, x, u, t, p):
        return [(u[0] ** 2 + (x[2] ** 2 * u[1]) ** 2 - 64) / unit]

    def sample(rng, N):
        x = around(rng, N, [0, 0, 10], [1.5, 0.05, 2])
        p = np.column_stack([rng.uniform(0.04, 0.09, N), rng.uniform(-0.03, 0.03, N)])
        bends = p[:, :1] * np.sin(0.2 * ds * np.arange(T)) + p[:, 1:] * np.sin(
            0.07 * ds * np.arange(T)
        )
        return x, np.stack([0 * bends, bends], -1), p

    return Family(
        name, 3, 2, T, dynamics, cost, sample,
        u_lower=[-6, -0.25], u_upper=[4, 0.25], x_lower=[-2, -0.6, 3], x_upper=[2, 0.6, 30],
        rows=(Rows(friction, "stage"),),
    )  # fmt: skip


def racing_si():
    """The circle of friction in (m/s²)², as one writes it down: a test of the rows' units."""
    return racing("racing_si", 40, 1)


def trailer():
    """Reversing, which is unstable, into a lane: the hitch must not jackknife."""
    T, dt, wheelbase, length = 50, 0.2, 1.0, 1.5

    def ode(lib, x, u, p):
        # x: position and heading of the tractor, angle of the hitch, steering angle.
        turn = u[0] * lib.tan(x[4]) / wheelbase
        return [
            u[0] * lib.cos(x[2]),
            u[0] * lib.sin(x[2]),
            turn,
            turn - u[0] * lib.sin(x[3]) / length,
            u[1],
        ]

    def lane(lib, x, u, t, p):
        return [
            x[1] - 0.1,
            -x[1] - 0.1,
            x[2] - 0.05,
            -x[2] - 0.05,
            x[3] - 0.05,
            -x[3] - 0.05,
            x[0] - 0.3,
        ]

    def sample(rng, N):
        x = around(rng, N, [6, 0, 0, 0, 0], [0.5, 0.8, 0.2, 0.2, 0.1])
        return x, held(T, [-0.6, 0]), np.zeros((N, 1))

    return Family(
        "trailer", 5, 2, T, midpoint(ode, dt),
        quadratic([0.05, 0.2, 0.1, 0.1, 0.1], [0.1, 0.2]), sample,
        u_lower=[-1, -0.6], u_upper=[1, 0.6], x_lower=[-1, -np.inf, -np.inf, -0.5, -0.5],
        x_upper=[np.inf, np.inf, np.inf, 0.5, 0.5], rows=(Rows(lane, "terminal"),),
    )  # fmt: skip


def soft_hard():
    """A hard disc in a soft lane, at a soft limit of the sideways acceleration."""
    T, dt = 35, 0.1

    def disc(lib, x, u, t, p):
        return [0.25 - (x[0] - 3) ** 2 - (x[1] - p[0]) ** 2]

    def lane(lib, x, u, t, p):
        return [x[1] - 0.35, -x[1] - 0.35]

    def comfort(lib, x, u, t, p):
        sideways = x[3] ** 2 * lib.tan(u[1]) / 1.5
        return [sideways - 1, -sideways - 1]

    def sample(rng, N):
        x = around(rng, N, [0, 0, 0, 2], [0.2, 0.2, 0.1, 0.3])
        return x, np.zeros((T, 2)), rng.choice([-1, 1], N) * rng.uniform(0.05, 0.3, N)

    goal = [6, 0, 0, 2]
    return Family(
        "soft_hard", 4, 2, T, midpoint(bicycle(1.5), dt),
        quadratic([0.1, 1, 0.1, 0.2], [0.1, 1], goal), sample,
        terminal([5, 5, 2, 0], goal), u_lower=[-3, -0.6], u_upper=[3, 0.6],
        rows=(
            Rows(disc),
            Rows(lane, linear=2.0, quadratic=4.0),
            Rows(comfort, "stage", linear=[0.5, 0.5], quadratic=0.0),
        ),
    )  # fmt: skip


def terminal_ball():
    """With the least effort into a ball, at rest, around what stands before it."""
    T, dt = 30, 0.2
    discs = [(2.0, 0.2, 0.6)]

    def ball(lib, x, u, t, p):
        return [(x[0] - p[0]) ** 2 + (x[1] - p[1]) ** 2 - 0.04, x[3] ** 2 - 0.01]

    def sample(rng, N):
        return (
            around(rng, N, [0, 0, 0, 0.5], [0.2, 0.4, 0.3, 0.3]),
            np.zeros((T, 2)),
            around(rng, N, [4, 0], [0.5, 1]),
        )

    return Family(
        "terminal_ball", 4, 2, T, midpoint(car, dt), quadratic([0] * 4, [0.5, 0.5]), sample,
        u_lower=-2.0, u_upper=2.0, rows=(Rows(outside(discs)), Rows(ball, "terminal")),
    )  # fmt: skip


def two_robots():
    """They change places, and keep apart."""
    T, dt = 35, 0.15

    def dynamics(lib, x, u, t, p):
        v = [x[4 + i] + dt * u[i] for i in range(4)]
        return [x[i] + dt * v[i] for i in range(4)] + v

    def apart(lib, x, u, t, p):
        return [0.64 - (x[0] - x[2]) ** 2 - (x[1] - x[3]) ** 2]

    def sample(rng, N):
        x = np.append(
            around(rng, N, [-2, 0.2, 2, -0.2], [0.3] * 4), around(rng, N, [0] * 4, [0.2] * 4), 1
        )
        return x, np.zeros((T, 4)), np.zeros((N, 1))

    goal = [2, 0, -2, 0, 0, 0, 0, 0]
    return Family(
        "two_robots", 8, 4, T, dynamics, quadratic([1] * 4 + [0.1] * 4, [0.2] * 4, goal), sample,
        terminal([20] * 4 + [5] * 4, goal), u_lower=-2.0, u_upper=2.0, rows=(Rows(apart),),
    )  # fmt: skip


def crossing():
    """A unicycle among two discs that move, with a band of speeds."""
    T, dt = 40, 0.1

    def discs(lib, x, u, t, p):
        rows = []
        for i in range(2):
            y = p[2 * i] + p[2 * i + 1] * dt * t
            rows.append(0.2 - (x[0] - 1.2 - 1.2 * i) ** 2 - (x[1] - y) ** 2)
        return rows

    def sample(rng, N):
        p = np.column_stack([
            rng.uniform(-1.6, -1.0, N), rng.uniform(0.8, 1.2, N),
            rng.uniform(1.4, 2.2, N), rng.uniform(-1.0, -0.6, N),
        ])  # fmt: skip
        return around(rng, N, [0, 0, 0], [0.2, 0.3, 0.3]), held(T, [0.9, 0]), p

    return Family(
        "crossing", 3, 2, T, midpoint(unicycle, dt),
        quadratic([0.3, 0.5, 0.1], [0.05, 0.05], [3.6, 0, 0]), sample,
        terminal([10, 10, 1], [3.6, 0, 0]), u_lower=[0.1, -2], u_upper=[1.4, 2],
        rows=(Rows(discs),),
    )  # fmt: skip


def infeasible_goal():
    """The end is to be where a disc is."""
    T, dt = 25, 0.15

    def sample(rng, N):
        x = around(rng, N, [0, 0, 0, 0.5], [0.2, 0.4, 0.3, 0.3])
        return x, np.zeros((T, 2)), around(rng, N, [2, 0], [0.2, 0.2])

    return Family(
        "infeasible_goal", 4, 2, T, midpoint(car, dt), quadratic([0] * 4, [0.5, 0.5]), sample,
        u_lower=-2.0, u_upper=2.0,
        rows=(
            Rows(outside([(2.0, 0.0, 0.7)])),
            Rows(lambda lib, x, u, t, p: [x[0] - p[0], x[1] - p[1]], "terminal", True),
        ),
        infeasible=True,
    )  # fmt: skip


def infeasible_reach():
    """The terminal ball is further away than the fastest unicycle comes."""
    T, dt = 20, 0.1

    def ball(lib, x, u, t, p):
        return [(x[0] - p[0]) ** 2 + (x[1] - p[1]) ** 2 - 0.04]

    def sample(rng, N):
        angle = rng.uniform(-0.8, 0.8, N)
        goal = 3 * np.stack([np.cos(angle), np.sin(angle)], 1)
        return around(rng, N, [0, 0, 0], [0.1, 0.1, 0.5]), held(T, [0.5, 0]), goal

    return Family(
        "infeasible_reach", 3, 2, T, midpoint(unicycle, dt), quadratic([0] * 3, [0.1, 0.1]), sample,
        u_lower=[0, -2], u_upper=[1, 2],
        rows=(Rows(ball, "terminal"),), infeasible=True,
    )  # fmt: skip


FAMILIES = [
    mass_discs, bicycle_discs, swerve_rate, unicycle_corridor, unicycle_ring, wall,
    duplicated_rows, racing, racing_si, trailer, soft_hard, terminal_ball, two_robots, crossing,
    infeasible_goal, infeasible_reach,
]  # fmt: skip
