"""The problems of the study ``constrained``, written once for NumPy, JAX and CasADi.

    minimise over u   Σ_{t<T} ½ (x_t − x_ref)ᵀ Q (x_t − x_ref) + ½ (u_t − u_ref)ᵀ R (u_t − u_ref)
                      + ½ (x_T − x_ref)ᵀ Q_end (x_T − x_ref),   Q, R and Q_end diagonal
    subject to        x_{t+1} = dynamics(x_t, u_t),   u_lower ≤ u_t ≤ u_upper,
                      rows(x_t) ≤ 0 at t < T,   x_lower ≤ x_t ≤ x_upper at 1 ≤ t ≤ T

The functions take ``ops``, what the kind of array offers: sin, cos, tan, stack (of entries) and
product (of a matrix and a vector). The peers import this without the library or JAX.
"""

import dataclasses
import types
from collections.abc import Callable

import numpy as np

# Arrays [n, ...]: the first axis is that of the vector, any others are a batch.
NUMPY = types.SimpleNamespace(
    sin=np.sin,
    cos=np.cos,
    tan=np.tan,
    stack=np.stack,
    product=lambda matrix, x: np.tensordot(matrix, x, 1),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    n: int
    m: int
    T: int
    dynamics: Callable  # (ops, x, u) -> the next state
    weights: tuple  # the diagonals of Q, R and Q_end
    x_ref: tuple
    u_ref: tuple  # where every search starts, too
    u_lower: tuple
    u_upper: tuple
    starts: Callable  # (a generator of random numbers) -> x_init
    rows: Callable | None = None  # (ops, x) -> [p]
    x_lower: tuple | None = None
    x_upper: tuple | None = None

    def x_init(self, seed, batch):
        """Start i of a seed is the same whatever the size of the batch."""
        return np.array([self.starts(np.random.default_rng([seed, i])) for i in range(batch)])

    def u_init(self):
        return np.tile(np.array(self.u_ref, float), (self.T, 1))


GRAVITY = 9.81

# A drone as a double integrator in space, on its way among three spheres.

SPHERES = (
    # centre, radius
    ((-1.2, 0.3, 1.1), 0.7),
    ((0.3, -0.6, 0.8), 0.8),
    ((1.4, 0.5, 1.3), 0.6),
)


def drone_dynamics(ops, x, u):
    dt, push = 0.1, (u[0], u[1], u[2] - GRAVITY)
    return ops.stack(
        [x[i] + dt * x[3 + i] + 0.5 * dt**2 * push[i] for i in range(3)]
        + [x[3 + i] + dt * push[i] for i in range(3)]
    )


def outside_spheres(ops, x):
    return ops.stack(
        [
            radius**2 - sum((x[i] - centre[i]) * (x[i] - centre[i]) for i in range(3))
            for centre, radius in SPHERES
        ]
    )


DRONE = Problem(
    n=6,
    m=3,
    T=50,
    dynamics=drone_dynamics,
    rows=outside_spheres,
    weights=((0.2,) * 3 + (0.1,) * 3, (0.05,) * 3, (10.0,) * 3 + (2.0,) * 3),
    x_ref=(3.0, 0.0, 1.0, 0.0, 0.0, 0.0),
    u_ref=(0.0, 0.0, GRAVITY),
    u_lower=(-3.0, -3.0, 5.0),
    u_upper=(3.0, 3.0, 14.0),
    starts=lambda rng: np.array([-3.0, 0, 1, 0.5, 0, 0]) + rng.normal(size=6) * 0.25,
)

# A bicycle past one disc, close to the middle of its way.


def bicycle_ode(ops, x, u):
    _, _, heading, speed = (x[i] for i in range(4))
    return [speed * ops.cos(heading), speed * ops.sin(heading), speed * ops.tan(u[1]), u[0]]


def bicycle_dynamics(ops, x, u):
    dt = 0.1  # the midpoint rule
    first = bicycle_ode(ops, x, u)
    middle = [x[i] + 0.5 * dt * first[i] for i in range(4)]
    slope = bicycle_ode(ops, middle, u)
    return ops.stack([x[i] + dt * slope[i] for i in range(4)])


def outside_disc(ops, x):
    return ops.stack([0.6**2 - (x[0] - 3.0) * (x[0] - 3.0) - (x[1] - 0.02) * (x[1] - 0.02)])


BICYCLE = Problem(
    n=4,
    m=2,
    T=35,
    dynamics=bicycle_dynamics,
    rows=outside_disc,
    weights=((0.2, 1.0, 0.1, 0.2), (0.1, 1.0), (10.0, 10.0, 2.0, 0.0)),
    x_ref=(6.0, 0.0, 0.0, 2.0),
    u_ref=(0.0, 0.0),
    u_lower=(-3.0, -0.6),
    u_upper=(3.0, 0.6),
    starts=lambda rng: np.array([0, 0, 0, 2.0]) + rng.normal(size=4) * [0.05, 0.05, 0.05, 0.2],
)

# A quadrotor in a vertical plane (the constants of jaxmpc.systems.quadrotor) that must not lean,
# nor fly, too much: every state has bounds.


def quadrotor_ode(ops, x, u):
    _, _, roll, y_dot, z_dot, roll_dot = (x[i] for i in range(6))
    lift, m, l, i = u[0] + u[1], 1.0, 0.4, 0.08
    return [
        y_dot,
        z_dot,
        roll_dot,
        -lift * ops.sin(roll) / m,
        lift * ops.cos(roll) / m - GRAVITY,
        l * (u[0] - u[1]) / i,
    ]


def quadrotor_dynamics(ops, x, u):
    dt = 0.05  # the classical Runge-Kutta method
    moved = lambda slope, by: [x[i] + by * dt * slope[i] for i in range(6)]  # noqa: E731
    a = quadrotor_ode(ops, x, u)
    b = quadrotor_ode(ops, moved(a, 0.5), u)
    c = quadrotor_ode(ops, moved(b, 0.5), u)
    d = quadrotor_ode(ops, moved(c, 1.0), u)
    return ops.stack([x[i] + dt / 6 * (a[i] + 2 * b[i] + 2 * c[i] + d[i]) for i in range(6)])


QUADROTOR = Problem(
    n=6,
    m=2,
    T=40,
    dynamics=quadrotor_dynamics,
    weights=((3.0,) * 3 + (1.0,) * 3, (0.1, 0.1), (15.0,) * 3 + (5.0,) * 3),
    x_ref=(0.0, 0.5, 0.0, 0.0, 0.0, 0.0),
    u_ref=(GRAVITY / 2, GRAVITY / 2),
    u_lower=(0.0, 0.0),
    u_upper=(12.0, 12.0),
    x_lower=(-3.0, 0.45, -0.3, -1.0, -0.7, -1.5),
    x_upper=(3.0, 3.0, 0.3, 1.0, 0.7, 1.5),
    starts=lambda rng: (
        np.array([0.0, 1.4, 0.0, 0.0, 0.0, 0.0])
        + rng.uniform(-1, 1, size=6) * [1.8, 0.6, 0.2, 0.5, 0.3, 0.3]
    ),
)

# Four masses in a row, held by springs, each with a force of its own; slow, and never far.

DT = 0.2
STIFFNESS = 2 * np.eye(4) - np.eye(4, k=1) - np.eye(4, k=-1)
# The new velocities move the masses: stable without damping.
VELOCITY = np.hstack([-DT * STIFFNESS, np.eye(4)])
A = np.vstack([np.eye(4, 8) + DT * VELOCITY, VELOCITY])
B = np.vstack([DT**2 * np.eye(4), DT * np.eye(4)])

LINEAR = Problem(
    n=8,
    m=4,
    T=40,
    dynamics=lambda ops, x, u: ops.product(A, x) + ops.product(B, u),
    weights=((1.0,) * 4 + (0.1,) * 4, (0.1,) * 4, (5.0,) * 8),
    x_ref=(0.0,) * 8,
    u_ref=(0.0,) * 4,
    u_lower=(-1.0,) * 4,
    u_upper=(1.0,) * 4,
    x_lower=(-2.0,) * 4 + (-0.4,) * 4,
    x_upper=(2.0,) * 4 + (0.4,) * 4,
    starts=lambda rng: (
        np.repeat(rng.uniform(-1.2, 1.2), 8) * ([1] * 4 + [0] * 4)
        + rng.uniform(-1, 1, size=8) * ([0.4] * 4 + [0.2] * 4)
    ),
)

PROBLEMS = {
    "drone": DRONE,
    "bicycle": BICYCLE,
    "quadrotor": QUADROTOR,
    "linear": LINEAR,
}
