"""Pendulum with a torque at its pivot: the swing-up problem of Amos et al. 2018.

The pendulum is a uniform rod of mass m and length l that hangs from one end, so its moment of
inertia is m l²/3. The angle θ is 0 upright and π hanging. The state is x = (cos θ, sin θ, θ̇) with
θ̇ in rad/s, the control u = (torque,) in N·m, and one step lasts `DT` seconds.

The pendulum is too weak to be lifted in one go: within |u| ≤ 2 it has to swing. The bounds are
left to the solver: the dynamics takes any torque and never clips it.

Source: Amos et al. 2018 (arXiv:1810.13400); the constants are those of the paper's published code.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxmpc.systems import quadratic

N = 3  # states
M = 1  # controls
DT = 0.05  # s
U_LOWER = -2.0  # N·m
U_UPPER = 2.0  # N·m


class Physics(NamedTuple):
    """Constants of the frictionless pendulum.

    Attributes:
        g: gravity, m/s².
        m: mass, kg.
        l: length, m.
    """

    g: ArrayLike
    m: ArrayLike
    l: ArrayLike


class DampedPhysics(NamedTuple):
    """Constants of the pendulum with damping and wind.

    Attributes:
        g: gravity, m/s².
        m: mass, kg.
        l: length, m.
        damping: angular deceleration per angular rate, 1/s.
        wind: angle by which the direction of gravity is turned, rad.
    """

    g: ArrayLike
    m: ArrayLike
    l: ArrayLike
    damping: ArrayLike
    wind: ArrayLike


class Params(NamedTuple):
    """Parameters of the control problem.

    Attributes:
        physics: read by the dynamics: `Physics` by `dynamics`, `DampedPhysics` by
            `damped_dynamics`.
        cost: read by the cost; fields q [4] and p [4].
    """

    physics: Physics | DampedPhysics
    cost: quadratic.QuadraticCost


def _default_cost(dtype: Any) -> quadratic.QuadraticCost:
    return quadratic.goal_cost([1.0, 0.0, 0.0], [1.0, 1.0, 0.1], 0.001, m=M, dtype=dtype)


def default_params(dtype: Any = None) -> Params:
    """The paper's parameters: (g, m, l) = (10, 1, 1), goal (1, 0, 0), weights (1, 1, 0.1; 0.001).

    The leaves are JAX arrays of the given dtype, by default JAX's default float.
    """
    physics = Physics(*(jnp.asarray(value, dtype or float) for value in (10.0, 1.0, 1.0)))
    return Params(physics, _default_cost(dtype))


def default_damped_params(dtype: Any = None) -> Params:
    """`default_params` with damping 1 1/s and wind 0.1 rad, for `damped_dynamics`."""
    physics = DampedPhysics(
        *(jnp.asarray(value, dtype or float) for value in (10.0, 1.0, 1.0, 1.0, 0.1))
    )
    return Params(physics, _default_cost(dtype))


def dynamics(x: Array, u: Array, t: Any, params: Params) -> Array:
    """One step of `DT` seconds, semi-implicit Euler.

        θ̇⁺ = θ̇ + dt (3g/(2l) sin θ + 3u/(m l²)),   θ⁺ = θ + dt θ̇⁺

    sin θ is read from x, and θ is the angle of the point (cos θ, sin θ). A state beside the unit
    circle is thereby put back on it, and the derivative of θ⁺ in x is that of atan2.

    Args:
        x: [3] state (cos θ, sin θ, θ̇).
        u: [1] torque, N·m; not clipped.
        t: time index; the dynamics does not depend on it.
        params: with a `Physics`, or anything else with fields g, m and l.

    Returns:
        [3] next state. Differentiable in x, u and params, any number of times and in either mode,
        except in x at cos θ = sin θ = 0, which is no angle: the derivative there is NaN.
    """
    del t
    _, sin, _ = x
    return _step(x, _acceleration(sin, u, params.physics))


def damped_dynamics(x: Array, u: Array, t: Any, params: Params) -> Array:
    """One step of `DT` seconds with damping d and wind b, semi-implicit Euler.

        θ̇⁺ = θ̇ + dt (3g/(2l) sin(θ + b) + 3u/(m l²) − d θ̇),   θ⁺ = θ + dt θ̇⁺

    The damping acts on the angular rate; the paper's published code multiplies the angle instead.
    Without damping and wind this is `dynamics` on the unit circle. Shapes and differentiability are
    those of `dynamics`; params holds a `DampedPhysics`.
    """
    del t
    _, _, theta_dot = x
    physics = params.physics
    if not isinstance(physics, DampedPhysics):
        raise TypeError(
            "damped_dynamics needs params.physics to be a pendulum.DampedPhysics, "
            f"got {type(physics).__name__}"
        )
    acceleration = _acceleration(jnp.sin(angle(x) + physics.wind), u, physics)
    return _step(x, acceleration - physics.damping * theta_dot)


def _acceleration(sin: Array, u: Array, physics: Physics | DampedPhysics) -> Array:
    """Angular acceleration from gravity and torque, rad/s²."""
    (torque,) = u
    g, m, l = physics.g, physics.m, physics.l
    acceleration: Array = 1.5 * g / l * sin + 3.0 * torque / (m * l * l)
    return acceleration


def _step(x: Array, acceleration: Array) -> Array:
    _, _, theta_dot = x
    theta_dot_next = theta_dot + DT * acceleration
    theta_next = angle(x) + DT * theta_dot_next
    return jnp.stack((jnp.cos(theta_next), jnp.sin(theta_next), theta_dot_next))


def cost(x: Array, u: Array, t: Any, params: Params) -> Array:
    """Stage cost ½ τᵀ diag(q) τ + pᵀ τ with τ = (x, u), the coefficients from `params.cost`.

    See `quadratic.cost`.
    """
    return quadratic.cost(x, u, t, params.cost)


def state(theta: ArrayLike, theta_dot: ArrayLike) -> Array:
    """The state [..., 3] at angle θ (rad, 0 upright) and rate θ̇ (rad/s); inputs broadcast."""
    dtype = jnp.result_type(theta, theta_dot, 0.0)
    theta, theta_dot = jnp.broadcast_arrays(
        jnp.asarray(theta, dtype), jnp.asarray(theta_dot, dtype)
    )
    return jnp.stack((jnp.cos(theta), jnp.sin(theta), theta_dot), axis=-1)


def angle(x: Array) -> Array:
    """The angle θ in [−π, π], rad, of states x [..., 3]."""
    return jnp.arctan2(x[..., 1], x[..., 0])


def sample_states(key: Array, num: int, dtype: Any = None) -> Array:
    """Initial states [num, 3], uniform: θ within ±π/2 rad and θ̇ within ±1 rad/s.

    The distribution is that of the paper's experiments. dtype defaults to JAX's default float.
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    high = jnp.asarray((math.pi / 2, 1.0), dtype)
    theta, theta_dot = jax.random.uniform(key, (num, 2), dtype, minval=-high, maxval=high).T
    return state(theta, theta_dot)
