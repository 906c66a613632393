"""From an ordinary differential equation to the discrete dynamics that the solvers take.

Each function here turns x' = ode(x, u, t, params) into a `dynamics(x, u, t, params)` that advances
the state by `dt` seconds and goes to `mpc_solve` as it is:

| function            | order | what for                                                         |
| ------------------- | ----- | ---------------------------------------------------------------- |
| `rk4`               | 4     | the first choice: smooth systems that are not stiff              |
| `implicit_midpoint` | 2     | stiff systems; long horizons of systems that conserve energy     |
| `euler`             | 1     | the cheapest; to reproduce results that were made with it        |

The control is held over the step (zero-order hold). So is `t`, which the ode receives as the solver
passes it: the index of the stage, an integer, not seconds. It is there to look up what varies from
stage to stage, for example `params.wind[t]`. A system that depends on time continuously has time
as one more state, with derivative 1; the orders above then hold for it as well.

`dt` is a Python number or a scalar array, in seconds or whatever unit of time the ode uses, and may
be traced. The dynamics is differentiable in x, u, params, dt and what the ode closes over, any
number of times and in either mode, wherever the ode is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.batch import lanes
from jaxmpc.types import Dynamics

Ode = Callable[[Array, Array, Any, Any], Array]  # (x, u, t, params) -> x'

# Newton's method doubles the digits with every step: five are the rule, where it works at all.
_NEWTON_STEPS = 8


def euler(ode: Ode, dt: ArrayLike) -> Dynamics:
    """Explicit Euler: x⁺ = x + dt ode(x, u, t, params). Order 1, one evaluation a step.

    Args:
        ode: (x [n], u [m], t, params) -> x' [n], per unit of time; t is the index of the stage.
        dt: length of a step, a positive scalar.

    Returns:
        The dynamics (x, u, t, params) -> x⁺ [n].

    Raises:
        ValueError: dt is not a scalar, or not positive and finite (checked where it is concrete);
            when the dynamics is called, the ode returns another shape than that of x.
        TypeError: dt is not a real number, or ode is not a callable.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import integrators
        >>> def ode(x, u, t, params):  # a cart: position and velocity
        ...     return jnp.stack([x[1], u[0]])
        >>> dynamics = integrators.euler(ode, dt=0.5)
        >>> print(dynamics(jnp.zeros(2), jnp.ones(1), 0, None))
        [0.  0.5]
    """
    slope, dt = _checked(ode, dt)

    def dynamics(x: Array, u: Array, t: Any, params: Any) -> Array:
        return x + dt * slope(x, u, t, params)

    return dynamics


def rk4(ode: Ode, dt: ArrayLike) -> Dynamics:
    """The classical Runge-Kutta method. Order 4, four evaluations a step.

        k₁ = ode(x),   k₂ = ode(x + dt/2 k₁),   k₃ = ode(x + dt/2 k₂),   k₄ = ode(x + dt k₃)
        x⁺ = x + dt/6 (k₁ + 2 k₂ + 2 k₃ + k₄)

    with u, t and params the same in all four. Arguments, result and errors are those of `euler`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import integrators
        >>> def ode(x, u, t, params):  # a cart: position and velocity
        ...     return jnp.stack([x[1], u[0]])
        >>> dynamics = integrators.rk4(ode, dt=0.5)
        >>> print(jnp.array_str(dynamics(jnp.zeros(2), jnp.ones(1), 0, None), precision=3))
        [0.125 0.5  ]

    Source: Hairer, Nørsett and Wanner 1993, Solving Ordinary Differential Equations I, II.1.
    """
    slope, dt = _checked(ode, dt)

    def dynamics(x: Array, u: Array, t: Any, params: Any) -> Array:
        k1 = slope(x, u, t, params)
        k2 = slope(x + dt / 2 * k1, u, t, params)
        k3 = slope(x + dt / 2 * k2, u, t, params)
        k4 = slope(x + dt * k3, u, t, params)
        return x + dt / 6 * (k1 + 2 * (k2 + k3) + k4)

    return dynamics


def implicit_midpoint(ode: Ode, dt: ArrayLike) -> Dynamics:
    """The implicit midpoint rule: the x⁺ with x⁺ = x + dt ode((x + x⁺)/2, u, t, params).

    Order 2, stable on every stable linear system whatever dt is (A-stable; it does not damp what is
    infinitely stiff, though), symplectic, and it conserves quadratic invariants.

    The equation is solved by 8 steps of Newton's method from x⁺ = x, to the last digits, each with
    n forward derivatives of the ode and a dense n x n system.
    Where that does not converge, dt is too large for a solution to be nearby, and the result is
    NaN: the solver's line search shortens its step, or the status says NONFINITE. Derivatives are
    those of the equation itself, by the implicit function theorem (`lax.custom_root`).

    Arguments, result and errors are those of `euler`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxmpc import integrators
        >>> def ode(x, u, t, params):  # a mass on a spring
        ...     return jnp.stack([x[1], u[0] - x[0]])
        >>> dynamics = integrators.implicit_midpoint(ode, dt=0.5)
        >>> x = dynamics(jnp.array([1.0, 0.0]), jnp.zeros(1), 0, None)
        >>> print(jnp.array_str(x, precision=2))
        [ 0.88 -0.47]
        >>> round(float(x @ x), 3)  # the energy stays what it was
        1.0

    Source: Hairer, Lubich and Wanner 2006, Geometric Numerical Integration, II.1 and IV.2.
    """
    slope, dt = _checked(ode, dt)

    def dynamics(x: Array, u: Array, t: Any, params: Any) -> Array:
        def residual(x_next: Array) -> Array:
            return x_next - x - dt * slope((x + x_next) / 2, u, t, params)

        # A wider dt or parameter widens the result, as in the explicit methods.
        guess = jnp.asarray(x, jax.eval_shape(residual, x).dtype)
        root: Array = lax.custom_root(residual, guess, _newton, _solve_linear)
        return root

    return dynamics


def _newton(residual: Callable[[Array], Array], guess: Array) -> Array:
    """A root of the residual; NaN where Newton's method does not find one.

    The number of steps is fixed, for then the loop can be differentiated in reverse mode: JAX does
    that, dropping the rule of `custom_root`, in reverse over reverse through a `lax.scan`.
    """

    def advance(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        x, _ = state
        step = jnp.linalg.solve(jax.jacfwd(residual)(x), -residual(x))
        return x + step, step

    x, step = lax.fori_loop(0, _NEWTON_STEPS, advance, (guess, jnp.zeros_like(guess)))
    # Half of the digits in the last step: it left all of them right. NaN fails the comparison.
    small = lanes.eps(guess) ** 0.5
    return jnp.where(jnp.max(jnp.abs(step)) <= small * jnp.max(jnp.abs(x)), x, jnp.nan)


def _solve_linear(matvec: Callable[[Array], Array], b: Array) -> Array:
    x: Array = jnp.linalg.solve(jax.jacfwd(matvec)(b), b)
    return x


def _checked(ode: Ode, dt: ArrayLike) -> tuple[Ode, ArrayLike]:
    """The ode with its output's shape checked, for broadcasting would hide a wrong one; and dt."""
    validation.check_callable("ode", ode)
    _check_dt(dt)

    def slope(x: Array, u: Array, t: Any, params: Any) -> Array:
        out = jnp.asarray(ode(x, u, t, params))
        validation.has_shape("what ode returns", out, jnp.shape(x), "[n]")
        return out

    return slope, dt


def _check_dt(dt: ArrayLike) -> None:
    if not (hasattr(dt, "dtype") or isinstance(dt, (int, float))) or isinstance(dt, bool):
        raise TypeError(f"dt must be a real number, got {type(dt).__name__}")
    if np.ndim(dt) != 0:
        raise ValueError(f"dt must be a scalar, got shape {list(np.shape(dt))}")
    known = validation.known(dt)
    if known is not None and not 0 < known < np.inf:
        raise ValueError(f"dt must be positive and finite, got {dt}")
