"""Cart with a pole on it, pushed sideways: the cartpole problem of Amos et al. 2018.

The pole is a uniform rod of mass m_p and half-length l, hinged to a cart of mass m_c; nothing
rubs. The angle θ is 0 upright and π hanging, and grows to the side of positive y. The state is
x = (y, ẏ, cos θ, sin θ, θ̇) in m, m/s and rad/s, the control u = (force on the cart,) in N, and one
step lasts `DT` seconds. The bounds are left to the solver: the dynamics takes any force and never
clips it.

Source: Amos et al. 2018 (arXiv:1810.13400); the constants are those of the paper's published code.
The equations of motion are those of Barto, Sutton and Anderson 1983 without friction.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxmpc.systems import quadratic

N = 5  # states
M = 1  # controls
DT = 0.05  # s
U_LOWER = -100.0  # N
U_UPPER = 100.0  # N


class Physics(NamedTuple):
    """Constants of the cart and the pole.

    Attributes:
        g: gravity, m/s².
        m_c: mass of the cart, kg.
        m_p: mass of the pole, kg.
        l: half the length of the pole, m.
    """

    g: ArrayLike
    m_c: ArrayLike
    m_p: ArrayLike
    l: ArrayLike


class Params(NamedTuple):
    """Parameters of the control problem.

    Attributes:
        physics: read by the dynamics.
        cost: read by the cost; fields q [6] and p [6].
    """

    physics: Physics
    cost: quadratic.QuadraticCost


def default_params(dtype: Any = None) -> Params:
    """The paper's parameters: (g, m_c, m_p, l) = (9.8, 1, 0.1, 0.5), goal (0, 0, 1, 0, 0), weights
    (0.1, 0.1, 1, 1, 0.1; 0.001).

    The leaves are JAX arrays of the given dtype, by default JAX's default float.
    """
    goal = [0.0, 0.0, 1.0, 0.0, 0.0]
    goal_weights = [0.1, 0.1, 1.0, 1.0, 0.1]
    return Params(
        Physics(*(jnp.asarray(value, dtype or float) for value in (9.8, 1.0, 0.1, 0.5))),
        quadratic.goal_cost(goal, goal_weights, 0.001, m=M, dtype=dtype),
    )


def dynamics(x: Array, u: Array, t: Any, params: Params) -> Array:
    """One step of `DT` seconds, explicit Euler.

        a = (u + m_p l θ̇² sin θ) / (m_c + m_p)
        θ̈ = (g sin θ − a cos θ) / (l (4/3 − m_p cos²θ/(m_c + m_p)))
        ÿ = a − m_p l θ̈ cos θ / (m_c + m_p)
        y⁺ = y + dt ẏ,   ẏ⁺ = ẏ + dt ÿ,   θ⁺ = θ + dt θ̇,   θ̇⁺ = θ̇ + dt θ̈

    sin θ and cos θ are read from x, and θ is the angle of the point (cos θ, sin θ). A state beside
    the unit circle is thereby put back on it, and the derivative of θ⁺ in x is that of atan2.

    Args:
        x: [5] state (y, ẏ, cos θ, sin θ, θ̇).
        u: [1] force on the cart, N; not clipped.
        t: time index; the dynamics does not depend on it.
        params: with a `Physics`.

    Returns:
        [5] next state. Differentiable in x, u and params, any number of times and in either mode,
        except in x at cos θ = sin θ = 0, which is no angle: the derivative there is NaN.
    """
    del t
    y, y_dot, cos, sin, theta_dot = x
    (force,) = u
    g, m_c, m_p, l = params.physics
    pole_share = m_p / (m_c + m_p)
    a = force / (m_c + m_p) + pole_share * l * theta_dot * theta_dot * sin
    theta_ddot = (g * sin - a * cos) / (l * (4.0 / 3.0 - pole_share * cos * cos))
    y_ddot = a - pole_share * l * theta_ddot * cos
    theta_next = angle(x) + DT * theta_dot
    return jnp.stack(
        (
            y + DT * y_dot,
            y_dot + DT * y_ddot,
            jnp.cos(theta_next),
            jnp.sin(theta_next),
            theta_dot + DT * theta_ddot,
        )
    )


def cost(x: Array, u: Array, t: Any, params: Params) -> Array:
    """Stage cost ½ τᵀ diag(q) τ + pᵀ τ with τ = (x, u), the coefficients from `params.cost`.

    See `quadratic.cost`.
    """
    return quadratic.cost(x, u, t, params.cost)


def state(y: ArrayLike, y_dot: ArrayLike, theta: ArrayLike, theta_dot: ArrayLike) -> Array:
    """The state [..., 5] at position y (m), velocity ẏ (m/s), angle θ (rad, 0 upright) and rate θ̇
    (rad/s); inputs broadcast."""
    dtype = jnp.result_type(y, y_dot, theta, theta_dot, 0.0)
    y, y_dot, theta, theta_dot = jnp.broadcast_arrays(
        *(jnp.asarray(value, dtype) for value in (y, y_dot, theta, theta_dot))
    )
    return jnp.stack((y, y_dot, jnp.cos(theta), jnp.sin(theta), theta_dot), axis=-1)


def angle(x: Array) -> Array:
    """The angle θ in [−π, π], rad, of states x [..., 5]."""
    return jnp.arctan2(x[..., 3], x[..., 2])


def sample_states(key: Array, num: int, dtype: Any = None) -> Array:
    """Initial states [num, 5], uniform: y within ±0.5 m, ẏ within ±0.5 m/s, any θ, θ̇ within
    ±1 rad/s.

    The distribution is that of the paper's experiments. dtype defaults to JAX's default float.
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    high = jnp.asarray((0.5, 0.5, math.pi, 1.0), dtype)
    return state(*jax.random.uniform(key, (num, 4), dtype, minval=-high, maxval=high).T)
