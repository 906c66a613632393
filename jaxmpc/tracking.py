"""Quadratic tracking: the cost of being away from a reference, angles measured the short way round.

    cost:           ½ eᵀ Q_t e + ½ (u − u_ref_t)ᵀ R_t (u − u_ref_t),   e = x ⊖ x_ref_t
    terminal cost:  ½ eᵀ Q_final e,                                    e = x ⊖ x_ref at the end

`cost` and `terminal_cost` go to the solver as they are. They find their `Tracking` in the params:
params itself, or its entry or attribute `tracking`, beside whatever else the params hold:

    task = Tracking(x_ref, Q=jnp.array([10.0, 10.0, 1.0]), R=jnp.array([0.1]), angles=(2,))
    mpc_solve(tracking.cost, dynamics, x_init, u_init, {"tracking": task, "mass": 1.3})
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxmpc import validation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tracking:
    """References and weights of a quadratic tracking cost; a pytree, to be carried in params.

    A weight is a diagonal [n], a symmetric matrix [n, n] or matrices [T, n, n], one a stage (of
    diagonals that vary, `jax.vmap(jnp.diag)` makes those: [T, n] would be taken for [n, n] where
    T = n). What varies with time is read at the stage t; of too few stages the last is repeated.

    Attributes:
        x_ref: [n], or [T+1, n] for one reference a stage. Its last row is the reference of the
            terminal cost, so pass exactly T+1 rows where there is one. (In `receding_horizon`,
            where t goes on from plan to plan and a terminal cost knows no t, let Q of the stages do
            the work of the terminal cost unless x_ref is constant in the end.)
        Q: weights of the states.
        R: weights of the controls, with m in place of n.
        u_ref: [m] or [T, m]; None is 0.
        Q_final: [n] or [n, n], the weights of the terminal cost; None where there is none.
        angles: the coordinates of x that are angles, in rad: static, a tuple of indices.
        angle_error: how an angle differs from its reference: "wrap", the difference itself, by the
            short way round, or "chord", 2 sin(difference/2) in size, for a cost that is smooth
            everywhere. See `wrap` and `chord`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import Affine, mpc_solve, tracking
        >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
        >>> task = tracking.Tracking(
        ...     x_ref=jnp.array([1.0, 0.0]), Q=jnp.array([1.0, 0.1]), R=jnp.array([0.1])
        ... )
        >>> solution = mpc_solve(tracking.cost, dynamics, jnp.zeros(2), jnp.zeros((5, 1)), task)
        >>> print(jnp.array_str(solution.x[:, 0], precision=2))
        [0.   0.   0.4  0.75 1.   1.19]
    """

    x_ref: ArrayLike
    Q: ArrayLike
    R: ArrayLike
    u_ref: ArrayLike | None = None
    Q_final: ArrayLike | None = None
    angles: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    angle_error: Literal["wrap", "chord"] = dataclasses.field(
        default="wrap", metadata=dict(static=True)
    )


def wrap(angle: Array) -> Array:
    """The angle in [−π, π] rad that differs by a multiple of 2π: angle − 2π round(angle / 2π).

    Its derivative is exactly 1 and its second derivative 0. At the cut, ±π, the value jumps by 2π:
    the square is continuous there, and has a ridge from which it falls to either side with slope
    2π. A ridge is never a minimum, but a solver that starts on it sees one of its sides only. (A
    weight matrix that couples an angle to another state makes the cost itself jump at the cut.)

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import tracking
        >>> print(jnp.array_str(tracking.wrap(jnp.array([0.5, 3.5])), precision=2))
        [ 0.5  -2.78]
    """
    turn = 2 * jnp.pi
    return angle - turn * jnp.round(angle / turn)


def chord(angle: Array) -> Array:
    """2 sin(wrap(angle) / 2): the signed length of the chord of the unit circle, in [−2, 2].

    Equal to the angle up to its third order, with a square, 2 (1 − cos angle), that is smooth and
    2π-periodic. The price: the square bends down beyond ±π/2, and at ±π its slope is 0: a solver
    that starts there is on a saddle, from which it has to find a way down. Written as a sine it
    keeps its digits near 0, where 1 − cos loses them.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import tracking
        >>> print(jnp.array_str(tracking.chord(jnp.array([0.1, 2.0])), precision=2))
        [0.1  1.68]
    """
    return 2 * jnp.sin(wrap(angle) / 2)


def error(x: Array, x_ref: Array, angles: tuple[int, ...] = (), angle_error: str = "wrap") -> Array:
    """x ⊖ x_ref [..., n]: the difference, of angles as `wrap` or `chord` measures it.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import tracking
        >>> x, x_ref = jnp.array([3.0, 1.0]), jnp.array([-3.0, 0.5])
        >>> print(jnp.array_str(tracking.error(x, x_ref, angles=(0,)), precision=2))
        [-0.28  0.5 ]
    """
    difference = x - x_ref
    if not angles:
        return difference
    measured = {"wrap": wrap, "chord": chord}[angle_error](difference)
    return jnp.where(np.isin(np.arange(x.shape[-1]), angles), measured, difference)


def cost(x: Array, u: Array, t: Any, params: Any) -> Array:
    """Stage cost ½ eᵀ Q_t e + ½ dᵀ R_t d with e = x ⊖ x_ref_t and d = u − u_ref_t.

    Args:
        x: [n] state.
        u: [m] control.
        t: the stage's index.
        params: a `Tracking`, or what holds one as its entry or attribute `tracking`.

    Returns:
        The cost, a scalar. Differentiable in x, u, references and weights, any number of times and
        in either mode; at the cut of an angle see `wrap`. The gradient in a weight matrix is the
        full one, symmetric, as if its entries were independent.

    Raises:
        TypeError: params is no `Tracking` and holds none.
        ValueError: an array of the `Tracking` does not fit x and u.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import tracking
        >>> task = tracking.Tracking(jnp.zeros(2), Q=jnp.array([1.0, 0.1]), R=jnp.array([0.1]))
        >>> x, u = jnp.array([2.0, 0.0]), jnp.array([1.0])
        >>> round(float(tracking.cost(x, u, 0, task)), 2)
        2.05
    """
    task = _task(params)
    n, m = x.shape[0], u.shape[0]
    e = _error(task, x, _vector("x_ref", task.x_ref, n, "n", "T+1", t))
    d = u if task.u_ref is None else u - _vector("u_ref", task.u_ref, m, "m", "T", t)
    return _quadratic(_weight("Q", task.Q, n, "n", t), e) + _quadratic(
        _weight("R", task.R, m, "m", t), d
    )


def terminal_cost(x: Array, params: Any) -> Array:
    """Terminal cost ½ eᵀ Q_final e with e = x ⊖ x_ref, of which the last row counts.

    Arguments, derivatives and errors are those of `cost`; a ValueError if Q_final is None.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import tracking
        >>> Q, R = jnp.array([1.0, 0.1]), jnp.array([0.1])
        >>> task = tracking.Tracking(jnp.zeros(2), Q, R, Q_final=5 * Q)
        >>> x = jnp.array([2.0, 0.0])
        >>> round(float(tracking.terminal_cost(x, task)), 2)
        10.0
    """
    task = _task(params)
    n = x.shape[0]
    if task.Q_final is None:
        raise ValueError("terminal_cost needs Q_final, of shape [n] or [n, n], got None")
    e = _error(task, x, _vector("x_ref", task.x_ref, n, "n", "T+1", -1))
    return _quadratic(_weight("Q_final", task.Q_final, n, "n"), e)


def _task(params: Any) -> Tracking:
    task = params
    if isinstance(params, Mapping):
        task = params.get("tracking")
    elif not isinstance(params, Tracking):
        task = getattr(params, "tracking", None)
    if not isinstance(task, Tracking):
        raise TypeError(
            "params must be a Tracking or hold one as its entry or attribute 'tracking', "
            f"got {type(params).__name__}"
        )
    return task


def _error(task: Tracking, x: Array, x_ref: Array) -> Array:
    n = x.shape[0]
    validation.check_choice("angle_error", task.angle_error, ("wrap", "chord"))
    if not all(isinstance(i, int) and 0 <= i < n for i in task.angles):
        raise ValueError(f"angles must be indices of states, from 0 to {n - 1}, got {task.angles}")
    return error(x, x_ref, task.angles, task.angle_error)


def _vector(name: str, value: ArrayLike, size: int, letter: str, rows: str, t: Any) -> Array:
    array = jnp.asarray(value)
    if array.shape[-1:] != (size,) or array.ndim > 2:
        raise ValueError(
            f"{name} must have shape [{letter}] = [{size}] or [{rows}, {letter}] = "
            f"[{rows}, {size}], got {list(array.shape)}"
        )
    return array if array.ndim == 1 else array[t]


def _weight(name: str, value: ArrayLike, size: int, letter: str, t: Any = None) -> Array:
    array = jnp.asarray(value)
    allowed = [f"[{letter}] = [{size}]", f"[{letter}, {letter}] = [{size}, {size}]"]
    if t is not None:
        allowed.append(f"[T, {letter}, {letter}] = [T, {size}, {size}]")
    fits = array.shape in ((size,), (size, size))
    if not fits and not (t is not None and array.ndim == 3 and array.shape[1:] == (size, size)):
        raise ValueError(f"{name} must have shape {' or '.join(allowed)}, got {list(array.shape)}")
    return array[t] if array.ndim == 3 else array


def _quadratic(weight: Array, e: Array) -> Array:
    """½ eᵀ W e, of a matrix or of its diagonal."""
    return 0.5 * e @ (weight * e if weight.ndim == 1 else weight @ e)
