"""Linear dynamics: chains, Bryson-Denham, carts, batteries, and starts outside of a set."""

import numpy as np

from tests.families.family import Family, Rows
from tests.families.parts import around, double_integrator, held, quadratic, terminal


def bryson_denham():
    T, dt = 40, 1 / 40

    def sample(rng, N):
        x = np.stack([np.zeros(N), 1 + 0.1 * rng.normal(size=N)], 1)
        return x, np.zeros((T, 1)), rng.uniform(0.06, 0.2, N)

    return Family(
        "bryson_denham", 2, 1, T, double_integrator(1, dt),
        lambda lib, x, u, t, p: dt / 2 * u[0] ** 2, sample,
        rows=(
            Rows(lambda lib, x, u, t, p: [x[0] - p[0]]),
            Rows(lambda lib, x, u, t, p: [x[0], x[1] + 1], "terminal", True),
        ),
    )  # fmt: skip


def min_effort():
    """A mass in the plane, from rest to rest, slower than a given speed in any direction."""
    T, dt = 30, 0.1

    def sample(rng, N):
        return (
            np.append(around(rng, N, [0, 0], [0.5, 0.5]), np.zeros((N, 2)), 1),
            np.zeros((T, 2)),
            np.column_stack([around(rng, N, [1.5, 1], [0.5, 0.5]), rng.uniform(0.85, 1.1, N)]),
        )

    return Family(
        "min_effort", 4, 2, T, double_integrator(2, dt),
        lambda lib, x, u, t, p: dt * (u[0] ** 2 + u[1] ** 2), sample,
        u_lower=-6.0, u_upper=6.0,
        rows=(
            Rows(lambda lib, x, u, t, p: [x[2] ** 2 + x[3] ** 2 - p[2] ** 2]),
            Rows(lambda lib, x, u, t, p: [x[0] - p[0], x[1] - p[1], x[2], x[3]], "terminal", True),
        ),
    )  # fmt: skip


def chain():
    """Four carts on springs, pushed at both ends, within narrow tracks; n = 8."""
    T, dt = 40, 0.15

    def dynamics(lib, x, u, t, p):
        ends = [0.0, *(x[i] for i in range(4)), 0.0]
        push = [u[0], 0.0, 0.0, u[1]]
        v = []
        for i in range(4):
            pull = ends[i] - 2 * ends[i + 1] + ends[i + 2]
            v.append(x[4 + i] + dt * (pull - 0.05 * x[4 + i] + push[i]))
        return [x[i] + dt * v[i] for i in range(4)] + v

    def sample(rng, N):
        x = around(rng, N, np.zeros(8), [0.17] * 4 + [0.05] * 4)
        return x, np.zeros((T, 2)), np.zeros((N, 1))

    return Family(
        "chain", 8, 2, T, dynamics, quadratic([4.0] * 4 + [0.4] * 4, [0.02] * 2), sample,
        u_lower=-1.0, u_upper=1.0, x_lower=[-0.36] * 4 + [-0.22] * 4,
        x_upper=[0.36] * 4 + [0.22] * 4,
    )  # fmt: skip


def linear_8_4():
    """Rotations, slowly unstable, in a box of states whose corner the cost draws beyond."""
    n, m, T = 8, 4, 40
    rng = np.random.default_rng(7)
    Q, A = np.linalg.qr(rng.normal(size=(n, n)))[0], np.zeros((n, n))
    for i, angle in enumerate((0.1, 0.25, 0.4, 0.7)):
        c, s = np.cos(angle), np.sin(angle)
        A[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = 1.01 * np.array([[c, -s], [s, c]])
    goal = [1.2, -1.2, 1.0, 0, 0, 0, 0, 0]
    A = np.round(Q @ A @ Q.T, 6)
    B = np.round(0.12 * rng.normal(size=(n, m)), 6)

    def dynamics(lib, x, u, t, p):
        return [
            sum(float(A[i, j]) * x[j] for j in range(n))
            + sum(float(B[i, j]) * u[j] for j in range(m))
            for i in range(n)
        ]

    def sample(rng, N):
        return around(rng, N, np.zeros(n), np.full(n, 0.7)), np.zeros((T, m)), np.zeros((N, 1))

    return Family(
        "linear_8_4", n, m, T, dynamics, quadratic([1.0] * n, [0.1] * m, goal), sample,
        terminal([1.0] * n, goal), u_lower=-1.2, u_upper=1.2, x_lower=[-0.8] * n, x_upper=[0.8] * n,
    )  # fmt: skip


def battery():
    """Buying and selling against a price that varies by the hour; kWh and kW. Nearly linear."""
    T, dt, through = 48, 0.5, 0.95

    def cost(lib, x, u, t, p):
        buy = (
            p[0] + p[1] * lib.sin(2 * np.pi / 24 * dt * t) + p[2] * lib.sin(4 * np.pi / 24 * dt * t)
        )
        return dt * (buy * (u[0] - u[1]) + 2e-3 * (u[0] ** 2 + u[1] ** 2))

    def dynamics(lib, x, u, t, p):
        return [x[0] + dt * (through * u[0] - u[1] / through)]

    def sample(rng, N):
        price = np.column_stack([rng.uniform(0.2, 0.4, N), rng.uniform(0.05, 0.2, (N, 2))])
        return rng.uniform(10, 90, (N, 1)), held(T, [1, 1]), price

    return Family(
        "battery", 1, 2, T, dynamics, cost, sample,
        u_lower=[0, 0], u_upper=[20, 20], x_lower=[5.0], x_upper=[95.0],
        rows=(
            Rows(lambda lib, x, u, t, p: [40 - x[0]], "terminal"),
            Rows(lambda lib, x, u, t, p: [u[0] + u[1] - 22], "stage"),
        ),
    )  # fmt: skip


def outside_soft():
    """Twice as fast as allowed at the start, which is paid for until the brakes have done."""
    T, dt = 30, 0.1

    def sample(rng, N):
        x = np.append(around(rng, N, [-4, 0], [1, 1]), around(rng, N, [3, 1.5], [0.8, 0.8]), 1)
        return x, np.zeros((T, 2)), np.zeros((N, 1))

    return Family(
        "outside_soft", 4, 2, T, double_integrator(2, dt),
        quadratic([1, 1, 0.1, 0.1], [0.05, 0.05]), sample, terminal([20, 20, 5, 5]),
        u_lower=-4.0, u_upper=4.0,
        rows=(
            Rows(
                lambda lib, x, u, t, p: [x[2] ** 2 + x[3] ** 2 - 4, x[1] - 0.3, -x[1] - 0.3],
                linear=[2.0, 5.0, 5.0], quadratic=[1.0, 0.0, 20.0],
            ),
        ),
    )  # fmt: skip


def outside_hard():
    """The start breaks a limit of speed at once and stands in a zone that is closed from stage 12
    on: only later stages can mend it."""
    T, dt, closed = 30, 0.1, 12

    def leave(lib, x, u, t, p):
        zone = 1.0 - (x[0] - p[0]) ** 2 - (x[1] - p[1]) ** 2
        return [lib.where(t >= closed, zone, -1.0)]

    def sample(rng, N):
        x = np.append(around(rng, N, [0, 0], [0.5, 0.5]), around(rng, N, [0, 0], [2.2, 2.2]), 1)
        return x, np.zeros((T, 2)), around(rng, N, [0, 0], [0.3, 0.3])

    return Family(
        "outside_hard", 4, 2, T, double_integrator(2, dt),
        quadratic([1, 1, 0.1, 0.1], [0.05, 0.05], [0.3, 0.2, 0, 0]), sample,
        u_lower=-8.0, u_upper=8.0, x_lower=[-np.inf, -np.inf, -1.5, -1.5],
        x_upper=[np.inf, np.inf, 1.5, 1.5], rows=(Rows(leave),),
    )  # fmt: skip


def dependent_equalities():
    """All that is asked of the end is asked twice, and every stage's share of the load as well."""
    T, dt = 25, 0.15

    def end(lib, x, u, t, p):
        rows = [x[0] - p[0], x[1] - p[1], x[2], x[3]]
        return [*rows, x[0] + x[1] - p[0] - p[1], 2 * x[2] - x[3]]

    def share(lib, x, u, t, p):
        return [u[0] + u[1] - u[2], 2 * u[0] + 2 * u[1] - 2 * u[2]]

    def cost(lib, x, u, t, p):
        return 0.05 * (x[2] ** 2 + x[3] ** 2) + 0.1 * (u[0] ** 2 + u[1] ** 2 + 0.5 * u[2] ** 2)

    def sample(rng, N):
        return (
            around(rng, N, [0, 0, 0, 0], [1, 1, 1, 1]),
            np.zeros((T, 3)),
            around(rng, N, [1, 2], [1, 1]),
        )

    return Family(
        "dependent_equalities", 4, 3, T, double_integrator(2, dt), cost, sample,
        u_lower=-3.0, u_upper=3.0,
        rows=(Rows(end, "terminal", True), Rows(share, "stage", True)),
    )  # fmt: skip


def min_time_cart():
    """The step is a control of the first stage, kept in the state, that all others repeat."""
    T = 30

    def dynamics(lib, x, u, t, p):
        return [x[0] + u[1] * x[1] + 0.5 * u[1] ** 2 * u[0], x[1] + u[1] * u[0], u[1]]

    def same(lib, x, u, t, p):
        return [lib.where(t > 0, u[1] - x[2], 0.0)]

    def sample(rng, N):
        x = np.append(around(rng, N, [0, 0], [1, 1]), np.zeros((N, 1)), 1)
        return x, held(T, [0.0, 0.15]), rng.uniform(2, 5, N)

    return Family(
        "min_time_cart", 3, 2, T, dynamics,
        lambda lib, x, u, t, p: u[1] + 1e-3 * u[0] ** 2, sample,
        u_lower=[-2.0, 0.01], u_upper=[2.0, 0.5], x_lower=[-np.inf, -1.8, -np.inf],
        x_upper=[np.inf, 1.8, np.inf],
        rows=(
            Rows(same, "stage", True),
            Rows(lambda lib, x, u, t, p: [x[0] - p[0], x[1]], "terminal", True),
        ),
    )  # fmt: skip


def rendezvous():
    """Clohessy-Wiltshire in metres and newtons: into a docking box, within a cone of sight."""
    T, dt, mass, w = 40, 15.0, 480.0, 1.13e-3

    def dynamics(lib, x, u, t, p):
        vx = x[2] + dt * (3 * w**2 * x[0] + 2 * w * x[3] + u[0] / mass)
        vy = x[3] + dt * (-2 * w * x[2] + u[1] / mass)
        return [x[0] + dt * vx, x[1] + dt * vy, vx, vy]

    def dock(lib, x, u, t, p):
        return [
            x[0] - 0.5,
            -x[0] - 0.5,
            x[1] - 2.0,
            0.5 - x[1],
            x[2] - 0.02,
            -x[2] - 0.02,
            x[3] - 0.05,
            -x[3] - 0.05,
        ]

    def sight(lib, x, u, t, p):
        return [x[0] - 0.25 * x[1] - 0.4, -x[0] - 0.25 * x[1] - 0.4]

    def sample(rng, N):
        y = rng.uniform(120, 200, N)
        x = np.column_stack(
            [0.22 * y * rng.uniform(-1, 1, N), y, around(rng, N, [0, 0], [0.1, 0.1])]
        )
        return x, np.zeros((T, 2)), np.zeros((N, 1))

    return Family(
        "rendezvous", 4, 2, T, dynamics, lambda lib, x, u, t, p: u[0] ** 2 + u[1] ** 2, sample,
        u_lower=-4.0, u_upper=4.0, rows=(Rows(dock, "terminal"), Rows(sight)),
    )  # fmt: skip


def infeasible_rows():
    """Two rows that contradict each other, from stage 10 on."""
    T, dt = 25, 0.1

    def fn(lib, x, u, t, p):
        return [lib.where(t >= 10, 1 - x[0], -1.0), x[0] - 1 + p[0]]

    def sample(rng, N):
        return around(rng, N, [-1, 0], [0.5, 0.5]), np.zeros((T, 1)), rng.uniform(0.2, 0.8, N)

    return Family(
        "infeasible_rows", 2, 1, T, double_integrator(1, dt), quadratic([1, 0.1], [0.05]), sample,
        u_lower=-10.0, u_upper=10.0, rows=(Rows(fn),), infeasible=True,
    )  # fmt: skip


FAMILIES = [
    bryson_denham, min_effort, chain, linear_8_4, battery, outside_soft, outside_hard,
    dependent_equalities, min_time_cart, rendezvous, infeasible_rows,
]  # fmt: skip
