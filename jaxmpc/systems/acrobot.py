"""Acrobot: two links, a torque at the elbow only, to be swung up and balanced upside down.

The first link hangs from a fixed shoulder, the second from the end of the first; nothing rubs. The
angle θ₁ of the first link is 0 upright and π hanging; the angle θ₂ of the second is relative to the
first, 0 where the links are in line. The state is x = (θ₁, θ₂, θ̇₁, θ̇₂) in rad and rad/s, the
control u = (torque at the elbow,) in N·m, and one step lasts `DT` seconds. Angles are not wrapped:
the dynamics and the cost are 2π-periodic in them.

Source: Spong 1995, The Swing Up Control Problem for the Acrobot, IEEE Control Systems 15(1); the
constants are those of Sutton and Barto 2018, Reinforcement Learning, example 11.3, with a stronger
motor. There θ₁ is 0 hanging.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxmpc import integrators, tracking

N = 4  # states
M = 1  # controls
DT = 0.05  # s
U_LOWER = -10.0  # N·m
U_UPPER = 10.0  # N·m


class Physics(NamedTuple):
    """Constants of the two links.

    Attributes:
        g: gravity, m/s².
        m_1: mass of the first link, kg.
        m_2: mass of the second link, kg.
        l_1: length of the first link, m. (That of the second does not matter.)
        c_1: distance of the first link's centre of mass from the shoulder, m.
        c_2: distance of the second link's centre of mass from the elbow, m.
        i_1: moment of inertia of the first link about its centre of mass, kg·m².
        i_2: moment of inertia of the second link about its centre of mass, kg·m².
    """

    g: ArrayLike
    m_1: ArrayLike
    m_2: ArrayLike
    l_1: ArrayLike
    c_1: ArrayLike
    c_2: ArrayLike
    i_1: ArrayLike
    i_2: ArrayLike


class Params(NamedTuple):
    """Parameters of the control problem.

    Attributes:
        physics: read by the dynamics.
        cost: read by the costs.
    """

    physics: Physics
    cost: tracking.Tracking


def default_params(dtype: Any = None) -> Params:
    """(g, m₁, m₂, l₁, c₁, c₂, i₁, i₂) = (9.8, 1, 1, 1, 0.5, 0.5, 1, 1).

    The goal is to rest upright. Weights (1, 1, 0.1, 0.1; 0.01), at the end (100, 100, 10, 10). The
    leaves are JAX arrays of the given dtype, by default JAX's default float.
    """

    def array(value: float | list[float]) -> Array:
        return jnp.asarray(value, dtype or float)

    return Params(
        Physics(*(array(value) for value in (9.8, 1.0, 1.0, 1.0, 0.5, 0.5, 1.0, 1.0))),
        tracking.Tracking(
            x_ref=array([0.0, 0.0, 0.0, 0.0]),
            Q=array([1.0, 1.0, 0.1, 0.1]),
            R=array([0.01]),
            Q_final=array([100.0, 100.0, 10.0, 10.0]),
            angles=(0, 1),
            angle_error="chord",
        ),
    )


def ode(x: Array, u: Array, t: Any, params: Params) -> Array:
    """The equations of motion, x' of x.

        d₁₁ θ̈₁ + d₁₂ θ̈₂ = h₁ + φ₁,   d₁₂ θ̈₁ + d₂₂ θ̈₂ = h₂ + φ₂ + u

        d₁₁ = m₁ c₁² + i₁ + m₂ (l₁² + c₂² + 2 l₁ c₂ cos θ₂) + i₂
        d₁₂ = m₂ (c₂² + l₁ c₂ cos θ₂) + i₂,   d₂₂ = m₂ c₂² + i₂
        h₁ = m₂ l₁ c₂ sin θ₂ (θ̇₂² + 2 θ̇₁ θ̇₂),   h₂ = −m₂ l₁ c₂ sin θ₂ θ̇₁²
        φ₁ = (m₁ c₁ + m₂ l₁) g sin θ₁ + φ₂,   φ₂ = m₂ c₂ g sin(θ₁ + θ₂)

    Shapes, units and derivatives are those of `dynamics`.
    """
    del t
    theta_1, theta_2, rate_1, rate_2 = x
    (torque,) = u
    g, m_1, m_2, l_1, c_1, c_2, i_1, i_2 = params.physics
    coupling = m_2 * l_1 * c_2 * jnp.cos(theta_2)
    d_22 = m_2 * c_2 * c_2 + i_2
    d_12 = d_22 + coupling
    d_11 = m_1 * c_1 * c_1 + i_1 + m_2 * l_1 * l_1 + d_22 + 2 * coupling
    swirl = m_2 * l_1 * c_2 * jnp.sin(theta_2)
    weight_2 = m_2 * c_2 * g * jnp.sin(theta_1 + theta_2)
    weight_1 = (m_1 * c_1 + m_2 * l_1) * g * jnp.sin(theta_1) + weight_2
    force_1 = swirl * rate_2 * (rate_2 + 2 * rate_1) + weight_1
    force_2 = torque - swirl * rate_1 * rate_1 + weight_2
    determinant = d_11 * d_22 - d_12 * d_12  # of the mass matrix, positive
    return jnp.stack(
        (
            rate_1,
            rate_2,
            (d_22 * force_1 - d_12 * force_2) / determinant,
            (d_11 * force_2 - d_12 * force_1) / determinant,
        )
    )


def dynamics(x: Array, u: Array, t: Any, params: Params) -> Array:
    """One step of `DT` seconds of `ode`, by `integrators.rk4`.

    Args:
        x: [4] state (θ₁, θ₂, θ̇₁, θ̇₂).
        u: [1] torque at the elbow, N·m; not clipped.
        t: time index; the dynamics does not depend on it.
        params: with a `Physics`.

    Returns:
        [4] next state. Differentiable in x, u and params, any number of times and in either mode.
    """
    return integrators.rk4(ode, DT)(x, u, t, params)


def cost(x: Array, u: Array, t: Any, params: Params) -> Array:
    """Stage cost ½ eᵀ Q e + ½ R u², e = (2 sin(θ₁/2), 2 sin(θ₂/2), θ̇₁, θ̇₂) for the default goal.

    See `tracking.cost`; the references and weights are those of `params.cost`.
    """
    return tracking.cost(x, u, t, params.cost)


def terminal_cost(x: Array, params: Params) -> Array:
    """Terminal cost ½ eᵀ Q_final e with the e of `cost`."""
    return tracking.terminal_cost(x, params.cost)


def state(
    theta_1: ArrayLike, theta_2: ArrayLike, theta_1_dot: ArrayLike, theta_2_dot: ArrayLike
) -> Array:
    """The state [..., 4] at angles θ₁, θ₂ (rad) and rates θ̇₁, θ̇₂ (rad/s); inputs broadcast."""
    values = (theta_1, theta_2, theta_1_dot, theta_2_dot)
    dtype = jnp.result_type(*values, 0.0)
    return jnp.stack(
        jnp.broadcast_arrays(*(jnp.asarray(value, dtype) for value in values)), axis=-1
    )


def angle(x: Array) -> Array:
    """The angles (θ₁, θ₂) in [−π, π], rad, of states x [..., 4]: [..., 2]."""
    return tracking.wrap(x[..., :2])


def sample_states(key: Array, num: int, dtype: Any = None) -> Array:
    """Initial states [num, 4], uniform: any θ₁ and θ₂, rates within ±1 rad/s.

    dtype defaults to JAX's default float.
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    high = jnp.asarray((math.pi, math.pi, 1.0, 1.0), dtype)
    return jax.random.uniform(key, (num, 4), dtype, minval=-high, maxval=high)
