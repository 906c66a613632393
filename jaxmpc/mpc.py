"""Differentiable MPC: the forward solver with the fixed-point KKT backward attached (Module 2)."""

from typing import Any

import jax
from jax.typing import ArrayLike

from jaxmpc.batch.unchecked import unchecked
from jaxmpc.derivative.implicit import differentiable
from jaxmpc.derivative.refused import no_reverse
from jaxmpc.ilqr import without_gradient
from jaxmpc.problem.constraints import for_user
from jaxmpc.problem.trace import trace
from jaxmpc.smoothed import solving
from jaxmpc.types import Constraints, Cost, Dynamics, Options, Solution, TerminalCost


def mpc_solve(
    cost: Cost,
    dynamics: Dynamics,
    x_init: ArrayLike,
    u_init: ArrayLike,
    params: Any = None,
    *,
    x_guess: ArrayLike | None = None,
    terminal_cost: TerminalCost | None = None,
    u_lower: ArrayLike | None = None,
    u_upper: ArrayLike | None = None,
    constraints: Constraints | None = None,
    options: Options = Options(),
) -> Solution:
    """Model predictive control whose plan is differentiable in everything that shaped it.

        minimise over u   Σ_{t<T} cost(x_t, u_t, t, params) + terminal_cost(x_T, params)
        subject to        x_0 = x_init,  x_{t+1} = dynamics(x_t, u_t, t, params),
                          u_lower ≤ u_t ≤ u_upper,  and the ``constraints``, if there are any

    One problem, no batch axis: batch with ``jax.vmap``. Call it under ``jax.jit``: outside of one,
    every call compiles anew, which takes seconds.

    Args:
      cost: (x [n], u [m], t, params) -> scalar, twice differentiable; t is an int32 scalar.
      dynamics: (x [n], u [m], t, params) -> the next state [n], twice differentiable.
      x_init: [n].
      u_init: [T, m], where the search starts, clipped into the bounds; its length is the horizon.
        Of several local minima the search finds one nearby: warm-start, or try several starts.
      params: any pytree, given to all functions: physical constants, a network's weights, a
        reference trajectory that they index by t. Leaves that are no arrays and no floats
        (functions, as in modules of networks, strings, flags, counts) are static: the functions
        see them as they are. The functions may close over traced values too.
      x_guess: [T+1, n], states to start from beside u_init, which the dynamics need not hold for:
        for horizons that are long, and plants so unstable that the rollout of u_init says nothing
        or overflows. Its first row is x_init whatever it says. None: that rollout.
      terminal_cost: (x [n], params) -> scalar; none by default.
      u_lower, u_upper: broadcast to [T, m]; ±inf and equal bounds are legal; none by default.
      constraints: on states and controls, hard or soft, bounds of the states, and the controls'
        rate: see ``Constraints``.
      options: see ``Options``.

    Returns:
      A ``Solution``. Look at ``solution.status`` (one ``Status`` per problem, never an exception),
      or print ``summarize(solution)``.

    Differentiable in reverse mode in x_init, params, everything that the functions close over,
    u_lower, u_upper and the numbers in ``constraints``, to any order (``jax.jacrev(jax.jacrev(f))``
    for a Hessian: forward mode, and so ``jax.hessian``, is a TypeError, for it takes another rule:
    ``Options(derivative="jvp")``, where all modes work). ``x``, ``u`` and
    ``costate`` have the derivative of the solution by the implicit function theorem, ``objective``
    by the envelope theorem, ``K`` that of its recursion; ``kkt_residual`` counts as a constant. The
    gradient in u_init, x_guess and options is zero. With ``Options.unconverged="zero"``, the
    default, so is every gradient of a problem whose status is not CONVERGED: log the share that
    converged, and mask those that are NONFINITE in the loss itself, whose values are NaN.

    The user's functions are differentiated twice and in forward mode: inside them,
    ``lax.custom_root`` or ``jax.custom_jvp``, not ``jax.custom_vjp``. Those that have forward mode
    alone (a ``lax.while_loop``, a simulator's contact solver) are solved for, at n + m forward
    derivatives for each that reverse mode would have given; the gradient is then a TypeError. Where
    they have a kink at a bound of the controls, because a plant clips them to the same range,
    derivatives are those from inside the bounds: plan and gradient are the same as without.

    Inside a ``jax.shard_map`` that checks what varies, as it does by default, there are plans and
    gradients, but second derivatives need ``check_vma=False``.

    All floating arguments are promoted to one dtype together with what the functions return.
    Products have the digits of that dtype on every device, also in the functions: by default GPUs
    and TPUs multiply float32 with those of bfloat16 or TF32. In the functions (not in the solver)
    a ``precision`` argument or a ``jax.default_matmul_precision`` around the call counts; products
    in derivative rules of their own should name one.

    Raises:
      TypeError: an argument or a returned value of the wrong kind (an integer x_init, say).
      ValueError: a shape that does not fit, concrete bounds with u_lower > u_upper, or an option
        out of its range (inside of ``jit`` too, where the number itself is concrete). Messages
        name the argument, what came and what was expected.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Status, mpc_solve
      >>> def dynamics(x, u, t, weights):  # a cart, in steps of half a second
      ...     position, velocity = x
      ...     return jnp.stack([position + 0.5 * velocity, velocity + 0.5 * u[0]])
      >>> def cost(x, u, t, weights):
      ...     return weights @ x**2 + u @ u
      >>> weights, x_init, u_init = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> @jax.jit
      ... def plan(weights):
      ...     return mpc_solve(cost, dynamics, x_init, u_init, weights, u_lower=-0.5, u_upper=0.5)
      >>> solution = plan(weights)
      >>> Status(int(solution.status)).name
      'CONVERGED'
      >>> print(jnp.array_str(solution.u[:4, 0], precision=2))
      [-0.5  -0.1   0.08  0.1 ]

      How where the cart ends depends on the weights:

      >>> def end(weights):
      ...     return plan(weights).x[-1, 0]
      >>> print(jnp.array_str(jax.jit(jax.grad(end))(weights), precision=2))
      [-0.17  0.17]

    Source: Amos et al. 2018 (arXiv:1810.13400), eq. (10), Module 2 and eq. (19), with the exact
    Hessian of the Hamiltonian in place of ∇²cost (``Options.backward_hessian``), which for
    nonlinear dynamics the derivative of the solution needs. With constraints the solver is a
    primal-dual interior-point method, after Wächter and Biegler 2006: see ``ilqr_box``.
    """
    problem, data, options = trace(
        cost, dynamics, x_init, u_init, params, x_guess=x_guess, terminal_cost=terminal_cost,
        u_lower=u_lower, u_upper=u_upper, constraints=constraints, options=options,
    )  # fmt: skip
    if problem.forward_only:
        return without_gradient(problem, data, options, no_reverse(problem))
    solve = solving(problem, options, differentiable)
    run = jax.jit(lambda data, options: for_user(problem, data, solve(data, options)))
    solution: Solution = unchecked(run)(data, options)
    return solution
