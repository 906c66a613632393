"""Car: the kinematic bicycle, to be parked.

Wheels roll and never slip; the two of an axle are taken together. The state is x = (p_x, p_y, ψ, v)
in m, rad and m/s: the middle of the rear axle, the heading ψ, 0 along p_x and growing
counterclockwise, and the speed v along it, negative in reverse. The control is
u = (acceleration, steering angle) in m/s² and rad, and one step lasts `DT` seconds. ψ is not
wrapped: the dynamics and the cost are 2π-periodic in it.

Source: LaValle 2006, Planning Algorithms, 13.1.2.1 (a simple car), with the acceleration in place
of the speed as the control.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxmpc import integrators, tracking

N = 4  # states
M = 2  # controls
DT = 0.1  # s
U_LOWER = (-3.0, -0.6)  # m/s², rad
U_UPPER = (3.0, 0.6)  # m/s², rad


class Physics(NamedTuple):
    """Constants of the car.

    Attributes:
        l: wheelbase, the distance between the axles, m.
    """

    l: ArrayLike


class Params(NamedTuple):
    """Parameters of the control problem.

    Attributes:
        physics: read by the dynamics.
        cost: read by the costs.
    """

    physics: Physics
    cost: tracking.Tracking


def default_params(dtype: Any = None) -> Params:
    """A wheelbase of 2.5 m; standing at the origin with heading 0 is the goal.

    Weights (0.1, 0.1, 0.1, 0.1; 0.1, 1), at the end (10, 10, 10, 10). The leaves are JAX arrays of
    the given dtype, by default JAX's default float.
    """

    def array(value: float | list[float]) -> Array:
        return jnp.asarray(value, dtype or float)

    return Params(
        Physics(array(2.5)),
        tracking.Tracking(
            x_ref=array([0.0, 0.0, 0.0, 0.0]),
            Q=array([0.1, 0.1, 0.1, 0.1]),
            R=array([0.1, 1.0]),
            Q_final=array([10.0, 10.0, 10.0, 10.0]),
            angles=(2,),
            angle_error="chord",
        ),
    )


def ode(x: Array, u: Array, t: Any, params: Params) -> Array:
    """The equations of motion, x' of x, for u = (a, δ).

        p_x' = v cos ψ,   p_y' = v sin ψ,   ψ' = v tan(δ) / l,   v' = a

    Shapes, units and derivatives are those of `dynamics`.
    """
    del t
    _, _, heading, speed = x
    acceleration, steering = u
    return jnp.stack(
        (
            speed * jnp.cos(heading),
            speed * jnp.sin(heading),
            speed * jnp.tan(steering) / params.physics.l,
            acceleration,
        )
    )


def dynamics(x: Array, u: Array, t: Any, params: Params) -> Array:
    """One step of `DT` seconds of `ode`, by `integrators.rk4`.

    Args:
        x: [4] state (p_x, p_y, ψ, v).
        u: [2] acceleration, m/s², and steering angle, rad, beside ±π/2; not clipped.
        t: time index; the dynamics does not depend on it.
        params: with a `Physics`.

    Returns:
        [4] next state. Differentiable in x, u and params, any number of times and in either mode.
    """
    return integrators.rk4(ode, DT)(x, u, t, params)


def cost(x: Array, u: Array, t: Any, params: Params) -> Array:
    """Stage cost ½ eᵀ Q e + ½ uᵀ R u with e = (p_x, p_y, 2 sin(ψ/2), v) for the default goal.

    See `tracking.cost`; the references and weights are those of `params.cost`.
    """
    return tracking.cost(x, u, t, params.cost)


def terminal_cost(x: Array, params: Params) -> Array:
    """Terminal cost ½ eᵀ Q_final e with the e of `cost`."""
    return tracking.terminal_cost(x, params.cost)


def state(p_x: ArrayLike, p_y: ArrayLike, heading: ArrayLike, speed: ArrayLike) -> Array:
    """The state [..., 4] at place p_x, p_y (m), heading ψ (rad) and speed v (m/s); inputs
    broadcast."""
    values = (p_x, p_y, heading, speed)
    dtype = jnp.result_type(*values, 0.0)
    return jnp.stack(
        jnp.broadcast_arrays(*(jnp.asarray(value, dtype) for value in values)), axis=-1
    )


def angle(x: Array) -> Array:
    """The heading ψ in [−π, π], rad, of states x [..., 4]."""
    return tracking.wrap(x[..., 2])


def sample_states(key: Array, num: int, dtype: Any = None) -> Array:
    """Initial states [num, 4], uniform: p_x and p_y within ±5 m, any heading, speed within ±1 m/s.

    dtype defaults to JAX's default float.
    """
    dtype = jnp.result_type(float) if dtype is None else dtype
    high = jnp.asarray((5.0, 5.0, math.pi, 1.0), dtype)
    return jax.random.uniform(key, (num, 4), dtype, minval=-high, maxval=high)
