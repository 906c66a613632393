"""Quadrotor in a vertical plane: two rotors that only push, to be flown to a place and held there.

A rigid body of mass m with a rotor at each end of its arms. The state is
x = (y, z, θ, ẏ, ż, θ̇) in m, rad, m/s and rad/s: y to the right, z up, and the roll θ,
counterclockwise, 0 where level. The control is u = (thrust of the right rotor, thrust of the left
rotor) in N, each at least 0, and one step lasts `DT` seconds. θ is not wrapped: the dynamics and
the cost are 2π-periodic in it.

Source: Tedrake, Underactuated Robotics (underactuated.mit.edu), 3.3.1, the planar quadrotor. The
constants are those of a larger one, with half of its kilogram at the rotors: what turns about too
fast for the step leaves float32 too few digits.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxmpc import integrators, tracking

N = 6  # states
M = 2  # controls
DT = 0.05  # s
U_LOWER = 0.0  # N
U_UPPER = 12.0  # N; 2.4 times what hovering takes


class Physics(NamedTuple):
    """Constants of the quadrotor.

    Attributes:
        g: gravity, m/s².
        m: mass, kg.
        l: length of an arm, from the centre of mass to a rotor, m.
        i: moment of inertia, kg·m².
    """

    g: ArrayLike
    m: ArrayLike
    l: ArrayLike
    i: ArrayLike


class Params(NamedTuple):
    """Parameters of the control problem.

    Attributes:
        physics: read by the dynamics.
        cost: read by the costs.
    """

    physics: Physics
    cost: tracking.Tracking


def default_params(dtype: Any = None) -> Params:
    """(g, m, l, i) = (9.81, 1, 0.4, 0.08); hovering at y = z = 0 is the goal.

    Weights (3, 3, 3, 1, 1, 1; 0.1, 0.1), at the end five times those of the states; u_ref is the
    `hover` of these constants. The leaves are JAX arrays of the given dtype, by default JAX's
    default float.
    """

    def array(value: float | list[float]) -> Array:
        return jnp.asarray(value, dtype or float)

    physics = Physics(*(array(value) for value in (9.81, 1.0, 0.4, 0.08)))
    weights = array([3.0, 3.0, 3.0, 1.0, 1.0, 1.0])
    return Params(
        physics,
        tracking.Tracking(
            x_ref=jnp.zeros_like(weights),
            Q=weights,
            R=array([0.1, 0.1]),
            u_ref=hover(physics),
            Q_final=5 * weights,
            angles=(2,),
            angle_error="chord",
        ),
    )


def hover(physics: Physics) -> Array:
    """The thrusts [2] that keep the level quadrotor where it is: m g / 2 each, N."""
    thrust = jnp.asarray(physics.m * physics.g / 2)
    return jnp.stack((thrust, thrust))


def ode(x: Array, u: Array, t: Any, params: Params) -> Array:
    """The equations of motion, x' of x, for u = (u_r, u_l).

        ÿ = −(u_r + u_l) sin θ / m,   z̈ = (u_r + u_l) cos θ / m − g,   θ̈ = l (u_r − u_l) / i

    Shapes, units and derivatives are those of `dynamics`.
    """
    del t
    _, _, theta, y_dot, z_dot, theta_dot = x
    right, left = u
    g, m, l, i = params.physics
    lift = (right + left) / m
    return jnp.stack(
        (
            y_dot,
            z_dot,
            theta_dot,
            -lift * jnp.sin(theta),
            lift * jnp.cos(theta) - g,
            l * (right - left) / i,
        )
    )


def dynamics(x: Array, u: Array, t: Any, params: Params) -> Array:
    """One step of `DT` seconds of `ode`, by `integrators.rk4`.

    Args:
        x: [6] state (y, z, θ, ẏ, ż, θ̇).
        u: [2] thrusts of the right and the left rotor, N; not clipped.
        t: time index; the dynamics does not depend on it.
        params: with a `Physics`.

    Returns:
        [6] next state. Differentiable in x, u and params, any number of times and in either mode.
    """
    return integrators.rk4(ode, DT)(x, u, t, params)


def cost(x: Array, u: Array, t: Any, params: Params) -> Array:
    """Stage cost ½ eᵀ Q e + ½ dᵀ R d with e = (y, z, 2 sin(θ/2), ẏ, ż, θ̇) for the default goal and
    d = u − u_ref.

    See `tracking.cost`; the references and weights are those of `params.cost`.
    """
    return tracking.cost(x, u, t, params.cost)


def terminal_cost(x: Array, params: Params) -> Array:
    """Terminal cost ½ eᵀ Q_final e with the e of `cost`."""
    return tracking.terminal_cost(x, params.cost)


def state(
    y: ArrayLike,
    z: ArrayLike,
    theta: ArrayLike,
    y_dot: ArrayLike,
    z_dot: ArrayLike,
    theta_dot: ArrayLike,
) -> Array:
    """The state [..., 6] at place y, z (m), roll θ (rad), velocity ẏ, ż (m/s) and rate θ̇ (rad/s);
    inputs broadcast."""
    values = (y, z, theta, y_dot, z_dot, theta_dot)
    dtype = jnp.result_type(*values, 0.0)
    return jnp.stack(
        jnp.broadcast_arrays(*(jnp.asarray(value, dtype) for value in values)), axis=-1
    )


def angle(x: Array) -> Array:
    """The roll θ in [−π, π], rad, of states x [..., 6]."""
    return tracking.wrap(x[..., 2])


def sample_states(key: Array, num: int, dtype: Any = None) -> Array:
    """Initial states [num, 6], uniform: y and z within ±1 m, θ within ±π/2 rad, ẏ and ż within
    ±1 m/s, θ̇ within ±1 rad/s.

    dtype defaults to JAX's default float.
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    high = jnp.asarray((1.0, 1.0, math.pi / 2, 1.0, 1.0, 1.0), dtype)
    return jax.random.uniform(key, (num, 6), dtype, minval=-high, maxval=high)
