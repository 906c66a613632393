"""What the definitions of the families share."""

import numpy as np


def around(rng, N, centre, spread):
    """[N, n], uniform."""
    centre = np.asarray(centre, float)
    return centre + rng.uniform(-1, 1, (N, len(centre))) * np.asarray(spread, float)


def held(T, control):
    """One control at all stages."""
    return np.tile(np.asarray(control, float), (T, 1))


def euler(ode, dt):
    def dynamics(lib, x, u, t, p):
        return [x[i] + dt * d for i, d in enumerate(ode(lib, x, u, p))]

    return dynamics


def midpoint(ode, dt):
    """The explicit midpoint rule, of ``ode``: (lib, x, u, p) -> list."""

    def dynamics(lib, x, u, t, p):
        half = [x[i] + dt / 2 * d for i, d in enumerate(ode(lib, x, u, p))]
        return [x[i] + dt * d for i, d in enumerate(ode(lib, half, u, p))]

    return dynamics


def double_integrator(d, dt, mass=1.0):
    """d axes: positions, then speeds; the controls are forces."""

    def dynamics(lib, x, u, t, p):
        a = [u[i] / mass for i in range(d)]
        moved = [x[i] + dt * x[d + i] + 0.5 * dt**2 * a[i] for i in range(d)]
        return moved + [x[d + i] + dt * a[i] for i in range(d)]

    return dynamics


def quadratic(weights_x, weights_u, goal=None):
    """½ Σ weights · (z − goal)²; the goal of the controls is 0."""

    def cost(lib, x, u, t, p):
        aim = np.zeros(len(weights_x)) if goal is None else goal
        J = sum(float(w) * (x[i] - float(aim[i])) ** 2 for i, w in enumerate(weights_x) if w)
        return 0.5 * (J + sum(float(w) * u[i] ** 2 for i, w in enumerate(weights_u) if w))

    return cost


def terminal(weights, goal=None):
    stage = quadratic(weights, (), goal)
    return lambda lib, x, p: stage(lib, x, None, None, p)


def outside(discs):
    """One row a disc (or ball) of (centre …, radius): at most 0 outside."""

    def fn(lib, x, u, t, p):
        return [
            float(disc[-1]) ** 2 - sum((x[i] - float(c)) ** 2 for i, c in enumerate(disc[:-1]))
            for disc in discs
        ]

    return fn
