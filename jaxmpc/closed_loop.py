"""Receding-horizon control: solve, apply the first control, shift the plan, repeat."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.batch.unchecked import axes_of, manual_axes, unchecked, vary
from jaxmpc.derivative.isolation import finite, isolated
from jaxmpc.derivative.refused import no_reverse, refused
from jaxmpc.mpc import mpc_solve
from jaxmpc.problem.constraints import FUNCTIONS, named_multipliers
from jaxmpc.problem.inside import inner, inner_bounds
from jaxmpc.problem.trace import has_kinks_in_u, hoist, trace
from jaxmpc.types import (
    Constraints,
    Cost,
    Dynamics,
    Episode,
    Options,
    Status,
    TerminalCost,
)
from jaxmpc.warm_start import WarmStart, shift

# The state of the plant, and where the next solve starts.
_Carry = tuple[Array, WarmStart]


def receding_horizon(
    cost: Cost,
    dynamics: Dynamics,
    x_init: ArrayLike,
    u_init: ArrayLike,
    params: Any = None,
    *,
    num_steps: int,
    x_guess: ArrayLike | None = None,
    plant: Dynamics | None = None,
    terminal_cost: TerminalCost | None = None,
    u_lower: ArrayLike | None = None,
    u_upper: ArrayLike | None = None,
    constraints: Constraints | None = None,
    options: Options = Options(),
) -> Episode:
    """Control a plant in closed loop with ``mpc_solve``.

    At step k = 0 … num_steps−1 the controller solves

        minimise over u   Σ_{i<T} cost(z_i, u_i, k+i, params) + terminal_cost(z_T, params)
        subject to        z_0 = x_k,  z_{i+1} = dynamics(z_i, u_i, k+i, params),
                          u_lower ≤ u_i ≤ u_upper,  and the ``constraints``,

    applies the first control, x_{k+1} = plant(x_k, u_0, k, params), and starts the next solve from
    its plan shifted by one stage, the last control repeated. The stage index that the functions
    see is that of the episode: a reference trajectory in ``params`` is read at t = k+i, so it
    needs num_steps + T entries (of a shorter one, JAX repeats the last).

    Args:
      x_init: [n], the plant's first state.
      u_init: [T, m], where the first solve starts.
      num_steps: N, a Python int, at least 1.
      x_guess: [T+1, n], the states that the first solve starts from beside u_init; the others then
        start from those of the plan before, shifted likewise, the last one repeated.
      plant: (x, u, t, params) -> next state of shape [n]; ``dynamics`` by default. Any JAX function
        will do: other physics than the model's, disturbances indexed by t, a learned residual.
      u_lower, u_upper: broadcast to [T, m]: bounds of the T stages of every plan.
      constraints: those of every plan; t = k+i in their functions, too. Of a ``Rate``, previous is
        the control before the episode; later on it is the one that was applied. x_lower and x_upper
        bound the T+1 states of every plan. Multipliers are shifted as the plan is. Where noise, or
        a plant that is not the model, takes x_k past a hard limit, no step is lost: what x_k alone
        breaks no plan can meet, and it is left out (see ``Constraints``).
      (others): as in ``mpc_solve``.

    Returns:
      An ``Episode`` with the plant's states [N+1, n], the controls [N, m], the stage costs [N] of
      what happened, and per solve its status, iterations and KKT residual [N]. The status is
      NONFINITE, too, where the plant left what is finite. In an episode of a batch whose status is
      CONVERGED at all N steps, everything is finite.

    Differentiable, by the rule that ``options`` name, in whatever ``mpc_solve`` and the plant are:
    x and u with respect to x_init, params and everything that the functions close over. A step
    whose solve did not converge contributes what ``Options.unconverged`` says. So does the plant
    where what it does, the stage cost, or one of their derivatives in x and u is NaN or infinite
    (nothing, unless that is "nan"), whatever the loss makes of that row. One bad episode of a batch
    changes neither the values nor the gradients of the others: mask it by its status in the loss.
    A plant with effects (``jax.debug.print``, say) is called as it is, once a step, and without
    this protection.

    Raises:
      TypeError, ValueError: as ``mpc_solve``; ``num_steps`` is not an int of at least 1; the plant
        returns another shape than [n].

    Example:
      >>> import jax.numpy as jnp
      >>> def dynamics(x, u, t, weights):  # a cart, in steps of half a second
      ...     position, velocity = x
      ...     return jnp.stack([position + 0.5 * velocity, velocity + 0.5 * u[0]])
      >>> def cost(x, u, t, weights):
      ...     return weights @ x**2 + u @ u
      >>> weights, x_init, u_init = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> from jaxmpc import Status, receding_horizon
      >>> episode = receding_horizon(cost, dynamics, x_init, u_init, weights, num_steps=20)
      >>> episode.x.shape, episode.u.shape
      ((21, 2), (20, 1))
      >>> bool(jnp.all(episode.status == Status.CONVERGED))
      True
      >>> bool(jnp.all(jnp.abs(episode.x[-1]) < 0.01))  # the cart rests at 0
      True

    Source: Amos et al. 2018 (arXiv:1810.13400), section 2 (receding-horizon use of eq. 1).
    """
    validation.check_count("num_steps", num_steps, least=1)
    plant = dynamics if plant is None else plant
    validation.check_callable("plant", plant)
    problem, data, options = trace(
        cost, dynamics, x_init, u_init, params, x_guess=x_guess, terminal_cost=terminal_cost,
        u_lower=u_lower, u_upper=u_upper, constraints=constraints, options=options,
    )  # fmt: skip
    dtype, n = data.x_init.dtype, problem.num_states

    def happens(x: Array, u: Array, k: Array) -> tuple[Array, ...]:
        """The next state, and what an episode records: where it came from, and the stage cost."""
        x_next = validation.one_array("plant", validation.call("plant", plant, x, u, k, params))
        validation.has_shape("the state that plant returns", x_next, x.shape, "[n]")
        return x_next.astype(dtype), x, u, jnp.asarray(cost(x, u, k, params), dtype)

    function = hoist(happens, data.x_init[:n], data.u_init[0], jnp.int32(0))
    theta: tuple[Any, ...] = (function.constants,)
    if (u_lower is not None or u_upper is not None) and has_kinks_in_u(function):
        theta += tuple(a[0] for a in inner_bounds(data.u_lower, data.u_upper))

    def happen(x: Array, u: Array, k: Array, theta: tuple[Any, ...]) -> Any:
        return function.call(theta[0], x, u, k)

    def inside(x: Array, u: Array, k: Array, theta: tuple[Any, ...]) -> Any:
        return function.call(theta[0], x, inner(u, *theta[1:]) if theta[1:] else u, k)

    # Effects are to happen once; and what has no gradient needs no isolation.
    effects = function.jaxpr is not None and function.jaxpr.effects
    if not effects and not problem.forward_only:
        blank = jnp.nan if options.unconverged == "nan" else 0.0
        happen = unchecked(isolated(happen, inside, blank, options.derivative))

    def step(carry: _Carry, k: Array) -> tuple[_Carry, tuple[Array, ...]]:
        x, begin = carry
        solution = mpc_solve(
            lambda x, u, i, params: cost(x, u, k + i, params),
            lambda x, u, i, params: dynamics(x, u, k + i, params),
            x,
            begin.u_init,
            params,
            x_guess=begin.x_guess,
            terminal_cost=terminal_cost,
            u_lower=data.u_lower,
            u_upper=data.u_upper,
            constraints=begin.constraints(_at(constraints, k)),
            options=options,
        )
        after = shift(solution)
        if begin.x_guess is None:
            after = dataclasses.replace(after, x_guess=None)
        happened = happen(x, after.previous, k, theta)
        fails = (solution.status == Status.CONVERGED) & ~finite(happened)
        x_next, *row = happened
        return (x_next, after), (
            *row,
            jnp.where(fails, jnp.int32(Status.NONFINITE), solution.status),
            solution.iterations,
            solution.kkt_residual,
        )

    @jax.jit
    def run(start: _Carry) -> Episode:
        (x_final, _), (x, *rest) = lax.scan(step, start, jnp.arange(num_steps, dtype=jnp.int32))
        return Episode(jnp.concatenate([x, x_final[None]]), *rest)

    multipliers = None
    if problem.constrained:
        multipliers = lax.stop_gradient(named_multipliers(problem, data.multipliers))
    # Behind the state stands the control before, if there is a rate; else nothing.
    previous = data.x_init[n:] if len(data.x_init) > n else data.u_init[0]
    guess = None if data.x_guess is None else data.x_guess[:, :n]
    start = data.x_init[:n], WarmStart(data.u_init, guess, previous, multipliers)
    if manual_axes():  # The carry of the scan varies along what anything does.
        moved = jax.eval_shape(lambda: plant(data.x_init[:n], previous, jnp.int32(0), params))
        start = vary(start, axes_of((data, moved)))
    episode: Episode = run(start)
    return refused(no_reverse(problem))(episode) if problem.forward_only else episode


def _at(constraints: Constraints | None, k: Array) -> Constraints | None:
    """The constraints of the plan that is made at step k."""
    if constraints is None:
        return None
    changes: dict[str, Any] = {}
    for name, kind in FUNCTIONS.items():
        fn = getattr(constraints, name)
        if fn is not None and not kind.final:
            changes[name] = lambda x, u, i, params, fn=fn: fn(x, u, k + i, params)
    return dataclasses.replace(constraints, **changes)
