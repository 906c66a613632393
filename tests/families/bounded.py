"""Strongly nonlinear, with bounds on the controls alone: swing-ups, flight, wheels, chains."""

import itertools

import numpy as np

from tests.families.family import Family
from tests.families.parts import around, held, midpoint

STARTS = 64


def solved_for(M, r):
    """M⁻¹ r by elimination, for M symmetric and positive definite, as lists."""
    k = len(r)
    M, r = [list(row) for row in M], list(r)
    for i in range(k):
        for j in range(i + 1, k):
            factor = M[j][i] / M[i][i]
            M[j] = [a - factor * b for a, b in zip(M[j], M[i], strict=True)]
            r[j] = r[j] - factor * r[i]
    for i in reversed(range(k)):
        r[i] = (r[i] - sum(M[i][j] * r[j] for j in range(i + 1, k))) / M[i][i]
    return r


def links(masses, lengths, cart=None, friction=0.0, gravity=9.81):
    """q: the place of the cart, if there is one, and each link's angle from upright; u: the forces
    on q, in a link's case the torque between it and the one before."""
    beyond = np.cumsum(np.asarray(masses)[::-1])[::-1]
    k = len(masses)

    def rates(lib, q, v, forces):
        angle, spin = (a if cart is None else a[1:] for a in (q, v))
        torque = forces if cart is None else forces[1:]
        s, c = [lib.sin(a) for a in angle], [lib.cos(a) for a in angle]
        M = [[0.0] * k for _ in range(k)]
        r = [0.0] * k
        for i in range(k):
            r[i] = torque[i] - (torque[i + 1] if i + 1 < k else 0.0) - friction * spin[i]
            r[i] = r[i] + beyond[i] * lengths[i] * gravity * s[i]
            for j in range(k):
                inertia = beyond[max(i, j)] * lengths[i] * lengths[j]
                M[i][j] = inertia * (c[i] * c[j] + s[i] * s[j])
                r[i] = r[i] - inertia * (s[i] * c[j] - c[i] * s[j]) * spin[j] ** 2
        if cart is None:
            return solved_for(M, r)
        beside = [beyond[i] * lengths[i] * c[i] for i in range(k)]
        push = forces[0] + sum(beyond[i] * lengths[i] * s[i] * spin[i] ** 2 for i in range(k))
        M = [[cart + beyond[0], *beside]] + [[b, *row] for b, row in zip(beside, M, strict=True)]
        return solved_for(M, [push, *r])

    return rates


def semi_implicit(rates, forces, dt):
    """x: places, then rates."""

    def dynamics(lib, x, u, t, p):
        k = len(forces(u))
        a = rates(lib, [x[i] for i in range(k)], [x[k + i] for i in range(k)], forces(u))
        v = [x[k + i] + dt * a[i] for i in range(k)]
        return [x[i] + dt * v[i] for i in range(k)] + v

    return dynamics


def off_upright(lib, angle):
    return (lib.cos(angle) - 1) ** 2 + lib.sin(angle) ** 2


def swing(name, rates, forces, bound, T, dt, *, cart, links, effort, spin, final, hanging):
    """Links to be balanced upright, half of the starts near hanging."""
    first = 1 if cart else 0
    k = first + links
    m = len(np.atleast_1d(bound))

    def state_cost(lib, x):
        up = sum(off_upright(lib, x[i]) for i in range(first, k))
        return (
            up + spin * sum(x[i] ** 2 for i in range(k, 2 * k)) + (0.5 * x[0] ** 2 if cart else 0)
        )

    def cost(lib, x, u, t, p):
        return 0.5 * (state_cost(lib, x) + effort * sum(u[i] ** 2 for i in range(m)))

    def sample(rng, N):
        spread = [0.3] * first + [0.8] * links + [0.3] * first + [0.5] * links
        x = rng.normal(size=(N, 2 * k)) * spread
        x[rng.random(N) < hanging, first:k] += np.pi
        return x, np.zeros((T, m)), np.zeros((N, 1))

    return Family(
        name, 2 * k, m, T, semi_implicit(rates, forces, dt), cost, sample,
        lambda lib, x, p: 0.5 * final * state_cost(lib, x),
        u_lower=-np.asarray(bound), u_upper=np.asarray(bound), num_starts=STARTS,
    )  # fmt: skip


def cart_double():
    return swing(
        "cart_double", links([0.3, 0.2], [0.5, 0.4], 1.0), lambda u: [u[0], 0.0, 0.0], [30.0],
        50, 0.04, cart=True, links=2, effort=1e-3, spin=0.01, final=20, hanging=0.5,
    )  # fmt: skip


def cart_triple():
    return swing(
        "cart_triple", links([0.2, 0.15, 0.1], [0.5, 0.4, 0.3], 1.0, 1e-3),
        lambda u: [u[0], 0.0, 0.0, 0.0], [40.0], 50, 0.03, cart=True, links=3, effort=1e-3,
        spin=0.01, final=10, hanging=0.0,
    )  # fmt: skip


def cart_swing():
    """One pole, from hanging, with a force that is too weak to do it at once."""
    return swing(
        "cart_swing", links([0.2], [0.5], 1.0), lambda u: [u[0], 0.0], [6.0],
        60, 0.04, cart=True, links=1, effort=1e-2, spin=0.02, final=20, hanging=1.0,
    )  # fmt: skip


def acrobot():
    return swing(
        "acrobot", links([1.0, 1.0], [0.5, 0.5], None, 0.05), lambda u: [0.0, u[0]], [10.0],
        60, 0.04, cart=False, links=2, effort=1e-2, spin=0.02, final=20, hanging=0.5,
    )  # fmt: skip


def pendubot():
    return swing(
        "pendubot", links([0.5, 0.4], [0.5, 0.5], None, 0.02), lambda u: [u[0], 0.0], [8.0],
        60, 0.04, cart=False, links=2, effort=1e-2, spin=0.02, final=20, hanging=0.5,
    )  # fmt: skip


def arm_2_reach():
    """Up against gravity with weak motors: it has to swing."""
    return swing(
        "arm_2_reach", links([1.0, 0.7], [0.5, 0.5], None, 0.1), lambda u: [u[0], u[1]],
        [5.0, 3.0], 50, 0.04, cart=False, links=2, effort=1e-2, spin=0.02, final=20, hanging=0.7,
    )  # fmt: skip


def arm_3_reach():
    return swing(
        "arm_3_reach", links([0.6, 0.5, 0.4], [0.4, 0.4, 0.3], None, 0.05),
        lambda u: [u[0], u[1], u[2]], [6.0, 4.0, 2.0], 40, 0.04, cart=False, links=3, effort=1e-2,
        spin=0.02, final=20, hanging=0.5,
    )  # fmt: skip


def furuta():
    """A pendulum at the end of a driven arm that turns in the plane."""
    T, dt, J, m, r, l, g = 50, 0.04, 0.02, 0.1, 0.25, 0.3, 9.81

    def rates(lib, q, v, f):
        s, c = lib.sin(q[1]), lib.cos(q[1])
        M = [[J + m * r**2 + m * l**2 * s**2, m * r * l * c], [m * r * l * c, m * l**2]]
        h = m * l**2 * s * c
        turn = f[0] - 2 * h * v[0] * v[1] + m * r * l * s * v[1] ** 2 - 0.002 * v[0]
        return solved_for(M, [turn, h * v[0] ** 2 + m * g * l * s - 0.001 * v[1]])

    def state_cost(lib, x):
        return off_upright(lib, x[1]) + 0.1 * x[0] ** 2 + 0.01 * (x[2] ** 2 + x[3] ** 2)

    def sample(rng, N):
        x = rng.normal(size=(N, 4)) * [0.5, 0.7, 0.5, 0.5]
        x[N // 2 :, 1] += np.pi
        return x, np.zeros((T, 1)), np.zeros((N, 1))

    return Family(
        "furuta", 4, 1, T, semi_implicit(rates, lambda u: [u[0], 0.0], dt),
        lambda lib, x, u, t, p: 0.5 * (state_cost(lib, x) + 0.5 * u[0] ** 2), sample,
        lambda lib, x, p: 10 * state_cost(lib, x), u_lower=-0.5, u_upper=0.5, num_starts=STARTS,
    )  # fmt: skip


def turned(q, v):
    """v by the rotation of a quaternion q, whatever its length."""
    w, x, y, z = q
    a = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return [sum(a[i][j] * v[j] for j in range(3)) for i in range(3)]


def spun(q, w):
    """The rate of q at the angular velocity w in the body's frame."""
    return [
        0.5 * (-q[1] * w[0] - q[2] * w[1] - q[3] * w[2]),
        0.5 * (q[0] * w[0] + q[2] * w[2] - q[3] * w[1]),
        0.5 * (q[0] * w[1] - q[1] * w[2] + q[3] * w[0]),
        0.5 * (q[0] * w[2] + q[1] * w[1] - q[2] * w[0]),
    ]


def tumbling(w, torque, inertia):
    a, b, c = inertia
    return [
        (torque[0] + (b - c) * w[1] * w[2]) / a,
        (torque[1] + (c - a) * w[2] * w[0]) / b,
        (torque[2] + (a - b) * w[0] * w[1]) / c,
    ]


def random_attitudes(rng, N, spread):
    axis = rng.normal(size=(N, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    half = 0.5 * rng.uniform(0, spread, (N, 1))
    return np.concatenate([np.cos(half), np.sin(half) * axis], 1)


def quadrotor_3d():
    """Thrown, at any attitude. x: place, velocity, quaternion and its rate; u: four thrusts."""
    T, dt, mass, arm, drag, hover = 40, 0.05, 0.5, 0.17, 0.02, 0.5 * 9.81 / 4
    inertia = (4e-3, 4e-3, 7e-3)

    def ode(lib, x, u, p):
        q, w = [x[6 + i] for i in range(4)], [x[10 + i] for i in range(3)]
        lift = turned(q, [0.0, 0.0, (u[0] + u[1] + u[2] + u[3]) / mass])
        torque = [arm * (u[1] - u[3]), arm * (u[2] - u[0]), drag * (u[0] - u[1] + u[2] - u[3])]
        return [
            x[3],
            x[4],
            x[5],
            lift[0],
            lift[1],
            lift[2] - 9.81,
            *spun(q, w),
            *tumbling(w, torque, inertia),
        ]

    def state_cost(lib, x):
        place, speed = (sum(x[j + i] ** 2 for i in range(3)) for j in (0, 3))
        tilt = x[7] ** 2 + x[8] ** 2 + x[9] ** 2 + (x[6] ** 2 - 1) ** 2
        return place + 0.1 * speed + tilt + 0.01 * sum(x[10 + i] ** 2 for i in range(3))

    def cost(lib, x, u, t, p):
        return 0.5 * state_cost(lib, x) + 0.05 * sum((u[i] - hover) ** 2 for i in range(4))

    def sample(rng, N):
        x = np.concatenate([
            around(rng, N, [0] * 6, [2, 2, 2, 1, 1, 1]), random_attitudes(rng, N, np.pi),
            around(rng, N, [0] * 3, [2, 2, 1]),
        ], 1)  # fmt: skip
        return x, held(T, [hover] * 4), np.zeros((N, 1))

    return Family(
        "quadrotor_3d", 13, 4, T, midpoint(ode, dt), cost, sample,
        lambda lib, x, p: 5 * state_cost(lib, x), u_lower=0.0, u_upper=3.0, num_starts=STARTS,
    )  # fmt: skip


def satellite():
    """Tumbling, to rest in a given attitude, with weak wheels."""
    T, dt, inertia = 50, 0.5, (1.0, 1.6, 2.2)

    def ode(lib, x, u, p):
        q, w = [x[i] for i in range(4)], [x[4 + i] for i in range(3)]
        return spun(q, w) + tumbling(w, [u[0], u[1], u[2]], inertia)

    def state_cost(lib, x):
        tilt = x[1] ** 2 + x[2] ** 2 + x[3] ** 2 + (x[0] ** 2 - 1) ** 2
        return tilt + 0.1 * sum(x[4 + i] ** 2 for i in range(3))

    def sample(rng, N):
        x = np.append(random_attitudes(rng, N, np.pi), around(rng, N, [0] * 3, [0.4] * 3), 1)
        return x, np.zeros((T, 3)), np.zeros((N, 1))

    return Family(
        "satellite", 7, 3, T, midpoint(ode, dt),
        lambda lib, x, u, t, p: (
            0.5 * state_cost(lib, x) + 0.5 * (u[0] ** 2 + u[1] ** 2 + u[2] ** 2)
        ),
        sample, lambda lib, x, p: 10 * state_cost(lib, x), u_lower=-0.1, u_upper=0.1,
        num_starts=STARTS,
    )  # fmt: skip


def trailers():
    """A car parks two trailers; x: place and heading of the last, and the angles of those ahead."""
    T, dt = 50, 0.2

    def ode(lib, x, u, p):
        first = u[0]
        second = first * lib.cos(x[4] - x[3])
        last = second * lib.cos(x[3] - x[2])
        return [
            last * lib.cos(x[2]), last * lib.sin(x[2]), second * lib.sin(x[3] - x[2]),
            first * lib.sin(x[4] - x[3]), first * lib.tan(u[1]) / 0.6,
        ]  # fmt: skip

    def state_cost(lib, x):
        return x[0] ** 2 + 2 * x[1] ** 2 + sum(off_upright(lib, x[i]) for i in (2, 3, 4))

    def sample(rng, N):
        heading = rng.uniform(-1.5, 1.5, N)
        x = np.column_stack(
            [around(rng, N, [0, 0], [3, 2]), heading]
            + [heading + rng.uniform(-0.5, 0.5, N) for _ in range(2)]
        )
        return x, np.tile([0.1, 0.0], (T, 1)), np.zeros((N, 1))

    return Family(
        "trailers", 5, 2, T, midpoint(ode, dt),
        lambda lib, x, u, t, p: 0.05 * state_cost(lib, x) + 0.05 * (u[0] ** 2 + u[1] ** 2), sample,
        lambda lib, x, p: 10 * state_cost(lib, x), u_lower=[-1.5, -0.6], u_upper=[1.5, 0.6],
        num_starts=STARTS,
    )  # fmt: skip


def rocket_tail():
    """Down on its tail, by a gimballed engine that cannot throttle far; x: place, velocity, pitch,
    its rate, mass; in tonnes, decametres and seconds."""
    T, dt, g = 50, 0.25, 0.981

    def ode(lib, x, u, p):
        along = u[0] / x[6]
        return [
            x[2], x[3], -along * lib.sin(x[4] + u[1]), along * lib.cos(x[4] + u[1]) - g, x[5],
            -1.5 * along * lib.sin(u[1]), -0.03 * u[0],
        ]  # fmt: skip

    def state_cost(lib, x):
        still = x[2] ** 2 + x[3] ** 2 + 2 * x[5] ** 2
        return 0.2 * (x[0] ** 2 + x[1] ** 2) + still + 2 * off_upright(lib, x[4])

    def sample(rng, N):
        x = around(rng, N, [0, 20, 0, -3, 0, 0, 1.2], [8, 4, 1.5, 1, 1.4, 0.3, 0.1])
        return x, held(T, [1.2, 0.0]), np.zeros((N, 1))

    return Family(
        "rocket_tail", 7, 2, T, midpoint(ode, dt),
        lambda lib, x, u, t, p: (
            0.01 * state_cost(lib, x) + 0.05 * (u[0] - 1) ** 2 + 0.5 * u[1] ** 2
        ),
        sample, lambda lib, x, p: 10 * state_cost(lib, x), u_lower=[0.4, -0.3],
        u_upper=[2.2, 0.3], num_starts=STARTS,
    )  # fmt: skip


def chain_20():
    """Five masses on springs in a vertical plane, hung from 0; the last is pulled. To rest.

    Source: Wirsching, Bock and Diehl 2006, Fast NMPC of a chain of masses connected by springs."""
    T, dt, k, length, mass = 40, 0.1, 4.0, 0.15, 0.1

    def pull(lib, dx, dy):
        share = k * (1 - length / lib.sqrt(dx**2 + dy**2 + 1e-4))
        return share * dx, share * dy

    def dynamics(lib, x, u, t, p):
        places = [(0.0, 0.0)] + [(x[2 * i], x[2 * i + 1]) for i in range(5)]
        speeds = [(x[10 + 2 * i], x[11 + 2 * i]) for i in range(5)]
        forces = [pull(lib, b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(places)]
        out = []
        for i in range(5):
            ahead = forces[i + 1] if i < 4 else (0.0, 0.0)
            for j in range(2):
                force = ahead[j] - forces[i][j] - 0.1 * speeds[i][j]
                if i == 4:
                    force = force + u[j]
                out.append(speeds[i][j] + dt * (force / mass - (2.0 if j == 1 else 0.0)))
        return [x[i] + dt * out[i] for i in range(10)] + out

    def cost(lib, x, u, t, p):
        far = (x[8] - p[0]) ** 2 + (x[9] - p[1]) ** 2
        return (
            2.5 * far
            + 0.05 * sum(x[10 + i] ** 2 for i in range(10))
            + 0.05 * (u[0] ** 2 + u[1] ** 2)
        )

    def sample(rng, N):
        along = np.linspace(0, 1, 6)[1:]
        end = around(rng, N, [0.6, -0.4], [0.8, 0.5])
        rest = end[:, None] * along[:, None] - [0, 0.4] * (along * (1 - along))[:, None]
        rest = rest + 0.1 * rng.normal(size=rest.shape)
        x = np.append(rest.reshape(N, 10), 0.5 * rng.normal(size=(N, 10)), 1)
        return x, held(T, [0, 0.5]), around(rng, N, [-0.3, 0.2], [1.2, 1.0])

    return Family(
        "chain_20", 20, 2, T, dynamics, cost, sample,
        lambda lib, x, p: 10 * cost(lib, x, [0.0, 0.0], T, p), u_lower=-2.0, u_upper=2.0,
        num_starts=STARTS,
    )  # fmt: skip


def network():
    """A network of random weights as dynamics."""
    T, dt, n, m, hidden = 40, 0.2, 4, 2, 16
    rng = np.random.default_rng(7)
    A, b = rng.normal(size=(hidden, n + m)), rng.normal(size=hidden)
    B = 0.5 * rng.normal(size=(n, hidden))

    def ode(lib, x, u, p):
        z = [x[i] for i in range(n)] + [u[i] for i in range(m)]
        return lib.affine(B, np.zeros(n), [lib.tanh(y) for y in lib.affine(A, b, z)])

    def cost(lib, x, u, t, p):
        return sum((x[i] - p[i]) ** 2 for i in range(n)) + 0.05 * sum(u[i] ** 2 for i in range(m))

    def sample(rng, N):
        return rng.normal(size=(N, n)), np.zeros((T, m)), rng.normal(size=(N, n))

    return Family(
        "network", n, m, T, midpoint(ode, dt), cost, sample,
        lambda lib, x, p: 10 * cost(lib, x, [0.0] * m, T, p), u_lower=-2.0, u_upper=2.0,
        num_starts=STARTS,
    )  # fmt: skip


def hills():
    """A unicycle between soft hills of cost."""
    T, dt = 50, 0.15
    rng = np.random.default_rng(3)
    tops = [(a, b) for a in (1.0, 2.2, 3.4) for b in (-1.2, 0.0, 1.2)]
    tops = np.array(tops) + 0.25 * rng.normal(size=(9, 2))

    def ode(lib, x, u, p):
        return [x[3] * lib.cos(x[2]), x[3] * lib.sin(x[2]), u[1], u[0]]

    def cost(lib, x, u, t, p):
        hills = sum(
            lib.exp(-4 * ((x[0] - float(a)) ** 2 + (x[1] - float(b)) ** 2)) for a, b in tops
        )
        return 4 * hills + 0.1 * (u[0] ** 2 + u[1] ** 2) + 0.02 * x[3] ** 2

    def sample(rng, N):
        x = around(rng, N, [0, 0, 0, 0.5], [0.4, 1.5, 0.8, 0.3])
        return x, np.zeros((T, 2)), around(rng, N, [4.5, 0], [0.3, 1.5])

    return Family(
        "hills", 4, 2, T, midpoint(ode, dt), cost, sample,
        lambda lib, x, p: 10 * ((x[0] - p[0]) ** 2 + (x[1] - p[1]) ** 2 + 0.1 * x[3] ** 2),
        u_lower=[-2.0, -2.0], u_upper=[2.0, 2.0], num_starts=STARTS,
    )  # fmt: skip


FAMILIES = [
    cart_double, cart_triple, cart_swing, acrobot, pendubot, arm_2_reach, arm_3_reach, furuta,
    quadrotor_3d, satellite, trailers, rocket_tail, chain_20, network, hills,
]  # fmt: skip
