"""Constrained problems with an oracle that has no code of the library: IPOPT for the plans and
multipliers, dense autodiff of the rolled-out KKT conditions for the gradients.

The functions of a problem run on JAX's arrays and on CasADi's symbols alike.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import casadi as ca
import jax
import jax.numpy as jnp
import numpy as np
from helpers import rolled_out
from jax.flatten_util import ravel_pytree


@dataclasses.dataclass(frozen=True)
class Problem:
    """``inputs`` holds all that the solution depends on: x_init, params, u_lower, u_upper, and
    x_lower and x_upper (both [T+1, n]), slack and terminal_slack (linear, quadratic) and rate
    (previous, limit, weight) if it has them.

    ``x_init`` has further starts, so that active sets differ.
    """

    cost: Callable
    dynamics: Callable
    inputs: dict
    u_init: np.ndarray
    x_init: np.ndarray  # [starts, n]
    terminal_cost: Callable | None = None
    inequality: Callable | None = None
    equality: Callable | None = None
    terminal_inequality: Callable | None = None
    terminal_equality: Callable | None = None

    def at(self, x_init):
        return {**self.inputs, "x_init": x_init}


# For both, JAX and CasADi.


def _of_either(name):
    def call(a):
        return getattr(ca if isinstance(a, ca.SX) else jnp, name)(a)

    return call


sin, cos, sqrt, exp = map(_of_either, ("sin", "cos", "sqrt", "exp"))


def like(x, t):
    """The index t as a number of the same kind as x."""
    return t if isinstance(x, ca.SX) else jnp.asarray(t, x.dtype)


def stack(entries):
    symbolic = any(isinstance(entry, ca.SX) for entry in entries)
    return ca.vertcat(*entries) if symbolic else jnp.stack(entries)


# The problems.

DT = 0.1


def obstacle_dynamics(x, u, t, params):
    dt = 0.2
    push = (u[0], u[1])
    return stack(
        [x[i] + dt * x[2 + i] + 0.5 * dt**2 * push[i] for i in range(2)]
        + [x[2 + i] + dt * push[i] for i in range(2)]
    )


def obstacle_cost(x, u, t, params):
    goal = params["goal"]
    distance = (x[0] - goal[0]) ** 2 + (x[1] - goal[1]) ** 2
    return 0.5 * distance + 0.05 * (x[2] ** 2 + x[3] ** 2) + 0.05 * (u[0] ** 2 + u[1] ** 2)


def obstacle_terminal_cost(x, params):
    goal = params["goal"]
    return 3 * ((x[0] - goal[0]) ** 2 + (x[1] - goal[1]) ** 2) + x[2] ** 2 + x[3] ** 2


def outside_obstacles(x, u, t, params):
    return stack(
        [
            params["radii"][i] ** 2
            - (x[0] - params["centres"][i, 0]) ** 2
            - (x[1] - params["centres"][i, 1]) ** 2
            for i in range(2)
        ]
    )


OBSTACLE = Problem(
    cost=obstacle_cost,
    dynamics=obstacle_dynamics,
    terminal_cost=obstacle_terminal_cost,
    inequality=outside_obstacles,
    inputs={
        "x_init": np.array([-2.0, 0.1, 0.0, 0.0]),
        "params": {
            "centres": np.array([[-0.8, -0.2], [0.7, 0.35]]),
            "radii": np.array([0.5, 0.6]),
            "goal": np.array([2.0, 0.0]),
        },
        "u_lower": np.full((18, 2), -2.0),
        "u_upper": np.full((18, 2), 2.0),
        "rate": {"previous": np.array([0.2, 0.1]), "weight": np.array([0.02, 0.01])},
    },
    # Above the first and below the second: one local minimum of four.
    u_init=np.stack([np.repeat([1.0, -1.0], 9), np.repeat([0.4, -0.4, 0.3], [4, 7, 7])], axis=1),
    x_init=np.array([[-2.0, 0.1, 0.0, 0.0], [-2.1, 0.15, 0.4, 0.0], [-1.8, 0.25, 0.8, -0.1]]),
)


def pendulum_dynamics(x, u, t, params):
    rate = x[1] + DT * (params["gravity"] * sin(x[0]) + u[0] - 0.1 * x[1])
    return stack([x[0] + DT * rate, rate])


def pendulum_cost(x, u, t, params):
    return 2 * (1 - cos(x[0])) + 0.05 * x[1] ** 2 + 0.02 * u[0] ** 2


def pendulum_terminal_cost(x, params):
    return 5 * (1 - cos(x[0])) + 0.5 * x[1] ** 2


def slow(x, u, t, params):
    return stack([x[1] - params["fastest"], -x[1] - params["fastest"]])


def upright(x, params):
    """Within an angle of 0, and with little energy."""
    return stack([x[0] - params["angle"], -x[0] - params["angle"], x[1] ** 2 - params["speed"]])


STATE_BOX = Problem(
    cost=pendulum_cost,
    dynamics=pendulum_dynamics,
    terminal_cost=pendulum_terminal_cost,
    inequality=slow,
    terminal_inequality=upright,
    inputs={
        "x_init": np.array([2.0, 0.0]),
        "params": {"gravity": 3.0, "fastest": 1.4, "angle": 0.02, "speed": 0.01},
        "u_lower": np.full((20, 1), -5.0),
        "u_upper": np.full((20, 1), 5.0),
    },
    u_init=np.zeros((20, 1)),
    x_init=np.array([[2.0, 0.0], [-1.7, -0.5], [1.3, 0.8]]),
)

# A hard row beside a soft one, with weights that differ from stage to stage.
SOFT = dataclasses.replace(
    STATE_BOX,
    inputs={
        **STATE_BOX.inputs,
        "slack": {
            "linear": np.stack([np.full(20, np.inf), np.linspace(0.7, 0.9, 20)], axis=1),
            "quadratic": np.array([0.0, 0.5]),
        },
        "terminal_slack": {
            "linear": np.array([1.0, 6.0, 5.0]),
            "quadratic": np.array([30.0, 5.0, 0.0]),
        },
    },
)


def contact_dynamics(x, u, t, params):
    """A mass that a contact pushes, with drag and gravity."""
    speed = sqrt(x[3] ** 2 + x[4] ** 2 + x[5] ** 2 + 0.01)
    weight = (0.0, 0.0, 9.81)
    velocity = [
        x[3 + i] + DT * (u[i] / params["mass"] - weight[i] - params["drag"] * speed * x[3 + i])
        for i in range(3)
    ]
    return stack([x[i] + DT * velocity[i] for i in range(3)] + velocity)


def contact_cost(x, u, t, params):
    goal = params["goal"]
    distance = sum((x[i] - goal[i]) ** 2 for i in range(3))
    return distance + 0.1 * sum(x[3 + i] ** 2 + 0.01 * u[i] ** 2 for i in range(3))


def contact_terminal_cost(x, params):
    goal = params["goal"]
    return sum(5 * (x[i] - goal[i]) ** 2 + x[3 + i] ** 2 for i in range(3))


def friction_cone(x, u, t, params):
    tangential = sqrt(u[0] ** 2 + u[1] ** 2 + 1e-3)
    return stack([tangential - params["mu"] * u[2]])


FRICTION_CONE = Problem(
    cost=contact_cost,
    dynamics=contact_dynamics,
    terminal_cost=contact_terminal_cost,
    inequality=friction_cone,
    inputs={
        "x_init": np.array([1.0, -0.5, 0.2, 0.0, 0.0, 0.0]),
        "params": {"mass": 1.2, "drag": 0.3, "mu": 0.4, "goal": np.array([0.0, 0.1, 0.3])},
        "u_lower": np.tile([-4.0, -4.0, 0.0], (15, 1)),
        "u_upper": np.tile([4.0, 4.0, 14.0], (15, 1)),
    },
    u_init=np.tile([0.0, 0.0, 11.0], (15, 1)),
    x_init=np.array(
        [
            [1.0, -0.5, 0.2, 0.0, 0.0, 0.0],
            [-0.6, 0.3, 0.0, 0.5, 0.5, -0.5],
            [0.3, 1.2, 0.5, -1.0, 0.2, 0.3],
        ]
    ),
)


def arrived(x, params):
    return stack([x[0] - params["target"][0], x[1] - params["target"][1]])


TERMINAL_EQUALITY = Problem(
    cost=pendulum_cost,
    dynamics=pendulum_dynamics,
    terminal_equality=arrived,
    inputs={
        "x_init": np.array([2.0, 0.0]),
        "params": {"gravity": 3.0, "target": np.array([0.1, -0.2])},
        "u_lower": np.full((20, 1), -5.0),
        "u_upper": np.full((20, 1), 5.0),
    },
    u_init=np.zeros((20, 1)),
    x_init=np.array([[2.0, 0.0], [-1.0, 0.4], [0.5, 1.0]]),
)


def driven_dynamics(x, u, t, params):
    """A pendulum with two motors, of which the second pulls through a spring's angle."""
    drive = u[0] + u[1] * cos(x[0])
    rate = x[1] + DT * (params["gravity"] * sin(x[0]) + drive)
    return stack([x[0] + DT * rate, rate])


def driven_cost(x, u, t, params):
    return pendulum_cost(x, u, t, params) + 0.1 * u[1] ** 2 + 0.01 * like(x, t) * x[0]


def shared_load(x, u, t, params):
    return stack([u[1] - params["share"] * u[0] + sin(x[0]) - params["load"]])


STAGE_EQUALITY = Problem(
    cost=driven_cost,
    dynamics=driven_dynamics,
    terminal_cost=pendulum_terminal_cost,
    equality=shared_load,
    inputs={
        "x_init": np.array([1.0, 0.0]),
        "params": {"gravity": 3.0, "share": 0.5, "load": 0.3},
        "u_lower": np.full((15, 2), -2.5),
        "u_upper": np.full((15, 2), 2.5),
        "rate": {"previous": np.zeros(2), "limit": np.array(1.6)},
    },
    u_init=np.zeros((15, 2)),
    x_init=np.array([[1.0, 0.0], [-1.0, 0.3], [0.7, -1.0]]),
)


def huber_cost(x, u, t, params):
    far = sqrt(1 + 4 * (x[0] - params["goal"]) ** 2)
    return far + 0.1 * x[1] ** 2 + 0.02 * exp(0.5 * u[0]) + 0.02 * u[0] ** 2 + 0.05 * u[1] ** 2


RATE = Problem(
    cost=huber_cost,
    dynamics=driven_dynamics,
    terminal_cost=pendulum_terminal_cost,
    inputs={
        "x_init": np.array([1.0, 0.0]),
        "params": {"gravity": 3.0, "goal": 0.2},
        "u_lower": np.tile([-4.0, -2.0], (18, 1)),
        "u_upper": np.tile([4.0, 2.0], (18, 1)),
        "rate": {
            "previous": np.array([0.5, -0.3]),
            "limit": np.tile([1.4, 0.6], (18, 1)),
            "weight": np.array([0.01, 0.02]),
        },
    },
    u_init=np.zeros((18, 2)),
    x_init=np.array([[1.2, 0.0], [-1.0, -0.5], [0.8, 1.0]]),
)


def drone_dynamics(x, u, t, params):
    """A planar drone, semi-implicit: y, z, angle and their rates; u the two thrusts."""
    dt = 0.05
    lift, turn = u[0] + u[1], u[0] - u[1]
    rates = [
        x[3] - dt * lift * sin(x[2]) / params["mass"],
        x[4] + dt * (lift * cos(x[2]) / params["mass"] - 9.81),
        x[5] + dt * params["arm"] * turn / params["inertia"],
    ]
    return stack([x[i] + dt * rates[i] for i in range(3)] + rates)


def drone_cost(x, u, t, params):
    effort = sum((u[i] - 4.9) ** 2 for i in range(2))
    return 1.5 * (x[0] ** 2 + x[1] ** 2) + 3 * (1 - cos(x[2])) + 0.5 * x[5] ** 2 + 0.05 * effort


def drone_terminal_cost(x, params):
    near = 8 * (x[0] ** 2 + x[1] ** 2) + 15 * (1 - cos(x[2]))
    return near + 2.5 * (x[3] ** 2 + x[4] ** 2 + x[5] ** 2)


# Limits so tight that the plan is at one of them a fifth to a third of the time.
SLEW = Problem(
    cost=drone_cost,
    dynamics=drone_dynamics,
    terminal_cost=drone_terminal_cost,
    inputs={
        "x_init": np.array([-1.5, 0.1, 0.0, 0.0, 0.0, 0.0]),
        "params": {"mass": 1.0, "arm": 0.4, "inertia": 0.08},
        "u_lower": np.zeros((30, 2)),
        "u_upper": np.full((30, 2), 6.5),
        "rate": {"previous": np.full(2, 4.905), "limit": np.array([0.35, 0.3])},
    },
    u_init=np.full((30, 2), 4.905),
    x_init=np.array(
        [
            [-1.5, 0.1, 0.0, 0.0, 0.0, 0.0],
            [1.0, -0.5, 0.3, 0.5, 0.0, 0.0],
            [0.2, 0.4, 0.0, -1.5, 0.5, -0.5],
        ]
    ),
)


def car_dynamics(x, u, t, params):
    """x: position, heading and speed; u: acceleration and the steering angle's tangent."""
    dt = 0.1
    rates = [x[3] * cos(x[2]), x[3] * sin(x[2]), x[3] * u[1] / params["wheelbase"], u[0]]
    return stack([x[i] + dt * rates[i] for i in range(4)])


def car_cost(x, u, t, params):
    s = 0.1 * like(x, t)
    on_the_road = 5 * ((x[0] - s) ** 2 + (x[1] - sin(s)) ** 2) + 0.5 * (x[2] - cos(s)) ** 2
    return on_the_road + 0.5 * (x[3] - 1) ** 2 + 0.05 * u[0] ** 2 + 0.5 * u[1] ** 2


def beside_the_disc(x, u, t, params):
    (along, across), radius = params["disc"], params["radius"]
    return stack([radius**2 - (x[0] - along) ** 2 - (x[1] - across) ** 2])


# The disc is where the car would drive, and it cannot steer away at once: multipliers reach 180.
SWERVE = Problem(
    cost=car_cost,
    dynamics=car_dynamics,
    inequality=beside_the_disc,
    inputs={
        "x_init": np.array([0.0, -0.5, 0.0, 0.5]),
        "params": {"wheelbase": 2.5, "disc": np.array([2.8, -0.1]), "radius": 0.3},
        "u_lower": np.tile(np.array([-3.0, -0.6]), (40, 1)),
        "u_upper": np.tile(np.array([3.0, 0.6]), (40, 1)),
        "rate": {"previous": np.zeros(2), "limit": np.array([1.0, 0.2])},
    },
    u_init=np.zeros((40, 2)),
    x_init=np.array([[0.0, -0.5, 0.0, 0.5], [0.0, -0.4, 0.1, 0.8], [0.2, -0.5, 0.0, 0.3]]),
)


def reached(x, params):
    return stack([x[0] - params["goal"]])


def slow_at_the_end(x, params):
    return stack([x[1] ** 2 - params["speed"]])


EVERYTHING = Problem(
    cost=huber_cost,
    dynamics=driven_dynamics,
    terminal_cost=pendulum_terminal_cost,
    inequality=slow,
    equality=shared_load,
    terminal_inequality=slow_at_the_end,
    terminal_equality=reached,
    inputs={
        "x_init": np.array([1.0, 0.0]),
        "params": {
            "gravity": 3.0,
            "goal": 0.2,
            "share": 0.5,
            "load": 0.3,
            "fastest": 0.7,
            "speed": 0.01,
        },
        "u_lower": np.tile([-4.0, -2.0], (18, 1)),
        "u_upper": np.tile([4.0, 2.0], (18, 1)),
        "slack": {"linear": np.array([0.6, np.inf]), "quadratic": np.array([0.5, 0.0])},
        "terminal_slack": {"linear": np.array([0.1]), "quadratic": np.array(0.2)},
        "rate": {
            "previous": np.array([-0.5, 0.3]),
            "limit": np.array([1.5, np.inf]),
            "weight": np.array(0.02),
        },
    },
    u_init=np.zeros((18, 2)),
    x_init=np.array([[0.9, 0.0], [-1.0, 0.3], [0.8, 0.2]]),
)

# A cart that is slowed down on its way, stops at a given place (equal bounds), and starts beyond a
# bound that begins to hold a stage later; with a soft limit inside of the bounds.
INF = np.inf
STATE_BOUNDS = Problem(
    cost=driven_cost,
    dynamics=driven_dynamics,
    inequality=slow,
    inputs={
        "x_init": np.array([1.0, 0.0]),
        "params": {"gravity": 3.0, "fastest": 0.9},
        "u_lower": np.tile([-5.0, -1.0], (12, 1)),
        "u_upper": np.tile([5.0, 1.0], (12, 1)),
        "x_lower": np.array(
            [[INF, INF]] * 1
            + [[-INF, -1.4]] * 5
            + [[-INF, -0.6]] * 2
            + [[-INF, -INF]] * 4
            + [[0.1, -0.3]]
        ),
        "x_upper": np.array([[0.0, 0.0]] + [[1.5, INF]] * 8 + [[0.3, INF]] * 3 + [[0.1, 0.4]]),
        "slack": {"linear": np.array(0.05), "quadratic": np.array(0.1)},
        "rate": {"previous": np.array([0.5, 0.0]), "limit": np.array([4.0, np.inf])},
    },
    u_init=np.zeros((12, 2)),
    x_init=np.array([[1.0, 0.0], [0.8, -0.7], [0.5, -0.2]]),
)

PROBLEMS = {
    "obstacle": OBSTACLE,
    "state box": STATE_BOX,
    "friction cone": FRICTION_CONE,
    "terminal equality": TERMINAL_EQUALITY,
    "stage equality": STAGE_EQUALITY,
    "soft": SOFT,
    "rate": RATE,
    "slew": SLEW,
    "everything": EVERYTHING,
    "state bounds": STATE_BOUNDS,
}


# The plan, by IPOPT.


class Plan(NamedTuple):
    """``multipliers`` has the fields of ``jaxmpc.Multipliers`` that the problem has."""

    x: np.ndarray
    u: np.ndarray
    costate: np.ndarray
    objective: float
    multipliers: dict


def ipopt(problem, inputs, u_init=None):
    """The local minimum that IPOPT finds from the rollout of ``u_init``: states and slacks are
    variables of their own, and every constraint is a row."""
    inputs = jax.tree.map(np.asarray, inputs)
    u_init = problem.u_init if u_init is None else np.asarray(u_init)
    x_init, params = inputs["x_init"], inputs["params"]
    (T, m), (n,) = u_init.shape, x_init.shape
    x, u = ca.SX.sym("x", n, T + 1), ca.SX.sym("u", m, T)
    slacks, slack_starts, rows = [], [], []  # a row: its name, expression and bounds
    J = 0

    def constrain(name, row, lower, upper):
        rows.append((name, ca.vec(row), np.ravel(lower), np.ravel(upper)))

    def inequality(name, row, weights, start):
        """With a slack for every soft row, at its price."""
        size = row.numel()
        linear = np.full(size, np.inf) if weights is None else weights[0]
        price = 0
        for i in np.flatnonzero(np.isfinite(linear)):
            s = ca.SX.sym("s")
            slacks.append(s)
            slack_starts.append(max(float(start[i]), 0.0))
            price += linear[i] * s + 0.5 * weights[1][i] * s**2
            row[i] -= s
        constrain(name, row, np.full(size, -np.inf), np.zeros(size))
        return price

    def weights_of(name, shape):
        if name not in inputs:
            return None
        pair = (inputs[name]["linear"], inputs[name]["quadratic"])
        return np.stack([np.broadcast_to(a, shape) for a in pair], axis=-2)

    x_start = _rollout(problem, x_init, u_init, params)
    constrain("costate", x_init - x[:, 0], np.zeros(n), np.zeros(n))
    for t in range(T):
        at = x[:, t], u[:, t], t, params
        started = jnp.asarray(x_start[t]), jnp.asarray(u_init[t]), t, params
        J += problem.cost(*at)
        constrain("costate", problem.dynamics(*at) - x[:, t + 1], np.zeros(n), np.zeros(n))
        if problem.equality is not None:
            h = problem.equality(*at)
            constrain("equality", h, np.zeros(h.numel()), np.zeros(h.numel()))
        if problem.inequality is not None:
            g = problem.inequality(*at)
            weights = weights_of("slack", (T, g.numel()))
            weights = None if weights is None else weights[t]
            J += inequality("inequality", g, weights, problem.inequality(*started))
    at, started = (x[:, T], params), (jnp.asarray(x_start[T]), params)
    if problem.terminal_cost is not None:
        J += problem.terminal_cost(*at)
    if problem.terminal_equality is not None:
        h = problem.terminal_equality(*at)
        constrain("terminal_equality", h, np.zeros(h.numel()), np.zeros(h.numel()))
    if problem.terminal_inequality is not None:
        g = problem.terminal_inequality(*at)
        weights = weights_of("terminal_slack", (g.numel(),))
        J += inequality("terminal_inequality", g, weights, problem.terminal_inequality(*started))
    if "rate" in inputs:
        rate = {k: v for k, v in inputs["rate"].items() if v is not None}
        change = u - ca.horzcat(rate["previous"], u[:, :-1])
        if "weight" in rate:
            J += 0.5 * ca.sum(ca.vec(np.broadcast_to(rate["weight"], (T, m)).T * change**2))
        if "limit" in rate:
            limit = np.broadcast_to(rate["limit"], (T, m))
            constrain("rate", change, -limit, limit)
    if "x_lower" in inputs:
        constrain("state", x[:, 1:], inputs["x_lower"][1:], inputs["x_upper"][1:])

    slacks = ca.vertcat(*slacks)
    variables = ca.vertcat(ca.vec(u), ca.vec(x), slacks)
    silent = {"print_time": False, "ipopt.print_level": 0, "ipopt.sb": "yes"}
    tight = {
        "ipopt.tol": 1e-12,
        "ipopt.dual_inf_tol": 1e-10,
        "ipopt.constr_viol_tol": 1e-12,
        "ipopt.compl_inf_tol": 1e-12,
        "ipopt.bound_relax_factor": 0.0,
        "ipopt.honor_original_bounds": "no",
        "ipopt.max_iter": 1000,
    }
    constraints = ca.vertcat(*(row for _, row, _, _ in rows))
    solver = ca.nlpsol("ipopt", "ipopt", {"x": variables, "f": J, "g": constraints}, silent | tight)
    far = np.full(x.numel(), np.inf)
    found = solver(
        x0=np.concatenate([u_init.ravel(), x_start.ravel(), slack_starts]),
        lbx=np.concatenate([inputs["u_lower"].ravel(), -far, np.zeros(len(slack_starts))]),
        ubx=np.concatenate([inputs["u_upper"].ravel(), far, np.full(len(slack_starts), np.inf)]),
        lbg=np.concatenate([lower for _, _, lower, _ in rows]),
        ubg=np.concatenate([upper for _, _, _, upper in rows]),
    )
    status = solver.stats()["return_status"]
    assert status in ("Solve_Succeeded", "Solved_To_Acceptable_Level"), status

    point, multiplier = (np.asarray(found[key]).ravel() for key in ("x", "lam_g"))
    names = np.repeat([name for name, *_ in rows], [row.numel() for _, row, _, _ in rows])
    multipliers = {name: multiplier[names == name] for name in dict.fromkeys(names)}
    costate = multipliers.pop("costate").reshape(T + 1, n)
    per_stage = {k: v for k, v in multipliers.items() if not k.startswith("terminal")}
    multipliers |= {k: v.reshape(T, -1) for k, v in per_stage.items()}
    if "state" in multipliers:
        multipliers["state"] = np.concatenate([np.zeros((1, n)), multipliers["state"]])
    u_found, x_found, _ = np.split(point, [T * m, T * m + (T + 1) * n])
    return Plan(
        x_found.reshape(T + 1, n), u_found.reshape(T, m), costate, float(found["f"]), multipliers
    )


def _rollout(problem, x_init, u, params):
    def step(x, now):
        x = problem.dynamics(x, *now, params)
        return x, x

    now = (jnp.asarray(u), jnp.arange(len(u)))
    _, x = jax.lax.scan(step, jnp.asarray(x_init), now)
    return np.concatenate([x_init[None], x])


# Its derivative, by dense autodiff.


def promoting(fn):
    """The oracle is no part of the library: it may leave promotion to JAX."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return fn(*args, **kwargs)

    return call


def rows(problem, inputs, x, u):
    """All that is constrained beside u: g ≤ 0, h = 0, |u_t − u_{t−1}| ≤ limit, and x."""
    params = inputs["params"]
    found = {}
    for name in ("inequality", "equality"):
        if (fn := getattr(problem, name)) is not None:
            found[name] = jax.vmap(fn, (0, 0, 0, None))(x[:-1], u, jnp.arange(len(u)), params)
    for name in ("terminal_inequality", "terminal_equality"):
        if (fn := getattr(problem, name)) is not None:
            found[name] = fn(x[-1], params)
    if inputs.get("rate", {}).get("limit") is not None:
        found["rate"] = _change(inputs, u)
    if "x_lower" in inputs:
        found["state"] = x
    return found


def between(inputs, name, row):
    """The bounds of a row that has two: of the rate, or of the states but the first."""
    if name == "rate":
        limit = jnp.broadcast_to(inputs["rate"]["limit"], row.shape)
        return -limit, limit
    lower, upper = (jnp.asarray(inputs[key]) for key in ("x_lower", "x_upper"))
    return lower.at[0].set(-jnp.inf), upper.at[0].set(jnp.inf)


def _change(inputs, u):
    return u - jnp.concatenate([inputs["rate"]["previous"][None], u[:-1]])


def _weights(inputs, name, row):
    """linear and quadratic of an inequality's slack, (inf, 0) where it is hard."""
    slack = inputs.get({"inequality": "slack", "terminal_inequality": "terminal_slack"}[name])
    slack = slack or {"linear": jnp.inf, "quadratic": 0.0}
    return [jnp.broadcast_to(slack[key], row.shape) for key in ("linear", "quadratic")]


@promoting
def _lagrangian(problem, inputs, u, multipliers, push=None):
    """The rolled-out cost with the rate's price and Σ νᵀ g; and the states."""
    J, x = rolled_out(
        problem.cost, problem.dynamics, inputs["x_init"], u, inputs["params"],
        problem.terminal_cost, push,
    )  # fmt: skip
    if inputs.get("rate", {}).get("weight") is not None:
        J += 0.5 * jnp.sum(inputs["rate"]["weight"] * _change(inputs, u) ** 2)
    constrained = rows(problem, inputs, x, u)
    return J + sum(jnp.vdot(multipliers[name], row) for name, row in constrained.items()), x


@promoting
def outputs(problem, inputs, u, multipliers, paid):
    """What a loss sees. The price of the inequalities that are ``paid`` for is in the objective."""
    zeros = jax.tree.map(jnp.zeros_like, multipliers)
    objective, x = _lagrangian(problem, inputs, u, zeros)
    for name, row in rows(problem, inputs, x, u).items():
        if name in paid:
            linear, quadratic = _weights(inputs, name, row)
            linear = jnp.where(paid[name], linear, 0)
            objective += jnp.sum(jnp.where(paid[name], linear * row + 0.5 * quadratic * row**2, 0))
    push = jnp.zeros((len(u) + 1, *x.shape[1:]), u.dtype)
    costate = jax.grad(lambda push: _lagrangian(problem, inputs, u, multipliers, push)[0])(push)
    return {"x": x, "u": u, "costate": costate, "objective": objective, "multipliers": multipliers}


@promoting
def kkt_errors(problem, inputs, u, multipliers):
    """By how much the plan misses stationarity and, per constraint, feasibility and
    complementarity: 0 for all of them just at a KKT point."""
    in_u, x = jax.grad(lambda u: _lagrangian(problem, inputs, u, multipliers), has_aux=True)(u)
    errors = {"stationarity": u - jnp.clip(u - in_u, inputs["u_lower"], inputs["u_upper"])}
    for name, row in rows(problem, inputs, x, u).items():
        nu = multipliers[name]
        if "inequality" in name:
            linear, quadratic = _weights(inputs, name, row)
            errors[name] = nu - jnp.clip(nu + row, 0, linear + quadratic * jnp.maximum(row, 0))
        elif name in ("rate", "state"):
            errors[name] = row - jnp.clip(row + nu, *between(inputs, name, row))
        else:
            errors[name] = row
    return jax.tree.map(lambda e: jnp.max(jnp.abs(e)), errors)


class ActiveSet(NamedTuple):
    at_lower: jax.Array  # [T, m], controls that a multiplier holds at their bound
    at_upper: jax.Array
    held: dict  # rows that hold with equality
    paid: dict  # inequalities with a slack


@promoting
def active_set(problem, inputs, u, multipliers, margin=1e-6):
    """Told by the multipliers; ``margin`` allows for those of an interior-point method."""
    in_u, x = jax.grad(lambda u: _lagrangian(problem, inputs, u, multipliers), has_aux=True)(u)
    at_lower = (u <= inputs["u_lower"] + margin) & (in_u > 0)
    at_upper = (u >= inputs["u_upper"] - margin) & (in_u < 0)
    held, paid = {}, {}
    for name, row in rows(problem, inputs, x, u).items():
        nu = multipliers[name]
        if "inequality" in name:
            linear, _ = _weights(inputs, name, row)
            paid[name] = (nu >= linear - margin) & (row > 0)
            held[name] = (nu > margin) & ~paid[name]
        elif name in ("rate", "state"):
            lower, upper = between(inputs, name, row)
            held[name] = (jnp.abs(nu) > margin) | (lower == upper)
        else:
            held[name] = jnp.ones(row.shape, bool)
    return ActiveSet(at_lower, at_upper, held, paid)


@promoting
def gradient(loss, problem, u, multipliers, inputs):
    """∂loss/∂inputs at a KKT point: implicit differentiation of stationarity in the free controls,
    of the bounds of the clamped ones, and of the rows that hold, with a dense Jacobian."""
    at_lower, at_upper, held, paid = active_set(problem, inputs, u, multipliers)
    flat, unravel = ravel_pytree((u, multipliers))

    def residual(flat, inputs):
        u, multipliers = unravel(flat)
        in_u, x = jax.grad(lambda u: _lagrangian(problem, inputs, u, multipliers), has_aux=True)(u)
        in_u = jnp.where(at_lower, u - inputs["u_lower"], in_u)
        in_u = jnp.where(at_upper, u - inputs["u_upper"], in_u)
        missed = {}
        for name, row in rows(problem, inputs, x, u).items():
            nu = released = multipliers[name]
            if name in ("rate", "state"):
                lower, upper = (jnp.where(held[name], b, 0) for b in between(inputs, name, row))
                above = unravel(flat_at)[1][name] > 0
                # Half of what moves a state between equal bounds comes from either.
                share = jnp.where(lower == upper, 0.5, jnp.where(above, 1, 0))
                row -= share * upper + (1 - share) * lower
            if name in paid:
                linear, quadratic = _weights(inputs, name, row)
                released = jnp.where(paid[name], nu - linear - quadratic * row, nu)
            missed[name] = jnp.where(held[name], row, released)
        return ravel_pytree((in_u, missed))[0]

    def total(flat, inputs):
        return loss(outputs(problem, inputs, *unravel(flat), paid))

    flat_at = jax.lax.stop_gradient(flat)
    in_flat, in_inputs = jax.grad(total, (0, 1))(flat, inputs)
    w = -jnp.linalg.solve(jax.jacfwd(residual)(flat, inputs).T, in_flat)
    more = jax.grad(lambda inputs: jnp.vdot(w, residual(flat, inputs)))(inputs)
    return jax.tree.map(jnp.add, in_inputs, more)
