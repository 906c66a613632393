"""Control-limited differential dynamic programming: the forward solver alone (Algorithm 2)."""

from typing import Any

import jax
from jax import lax
from jax.typing import ArrayLike

from jaxmpc.batch.unchecked import unchecked
from jaxmpc.derivative.refused import refused
from jaxmpc.problem.constraints import for_user
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.problem.trace import trace
from jaxmpc.smoothed import solving
from jaxmpc.types import Constraints, Cost, Dynamics, Options, Solution, TerminalCost


def ilqr_box(
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
    """Control-limited iLQR with second-order steps: the forward solver alone.

        minimise over u   Σ_{t<T} cost(x_t, u_t, t, params) + terminal_cost(x_T, params)
        subject to        x_0 = x_init,  x_{t+1} = dynamics(x_t, u_t, t, params),
                          u_lower ≤ u_t ≤ u_upper,  and the ``constraints``, if there are any

    The arguments, the result and the errors are those of ``mpc_solve``, which differentiates the
    solution; this does not, and says so: reverse mode through it is a TypeError, forward mode too.

    Without constraints, every iteration expands cost and dynamics at the current rollout, solves a
    box-constrained quadratic program at each stage backward in time, and rolls the resulting policy
    out, with a step length at which the true objective falls. The quadratic model has the exact
    Hessian of the Hamiltonian cost + λᵀ dynamics wherever that leaves every stage's Q_uu positive
    definite. Elsewhere λ are the costates of the plan that ∇²cost alone proposes, under its
    feedback, and the dynamics' curvature counts with a share that grows while Q_uu stays definite
    and falls while it does not (``Options.hessian="ilqr"``: with none). Q_uu is regularized,
    relative to its own size, more when steps fail and less when they succeed. The solver stops by
    the scaled KKT residual and the curvature, never by the step's length; at a small residual
    without positive curvature it leaves along negative curvature, or ends INDEFINITE. The objective
    never rises, up to rounding, so the last iterate is the best.

    From an ``x_guess`` the dynamics have gaps at first: each step closes a share of them, and a
    full one closes them for good. Where the rollout of u_init overflows, or a step fails from
    where the plan still costs more than standing still would, the search begins again, once, with
    all states at x_init.

    Constraints are dealt with by a primal-dual interior-point method with a filter. On its way the
    states are unknowns beside the controls (multiple shooting): the dynamics hold in the end. Where
    no step lowers violation or objective, the violation is minimised alone, and where that comes to
    rest above the tolerance the problem ends INFEASIBLE. Once the barrier shows which rows are
    active, Newton's method finds the plan of that active set, on rollouts and to rounding.

    Example:
      >>> import jax.numpy as jnp
      >>> def dynamics(x, u, t, weights):  # a cart, in steps of half a second
      ...     position, velocity = x
      ...     return jnp.stack([position + 0.5 * velocity, velocity + 0.5 * u[0]])
      >>> def cost(x, u, t, weights):
      ...     return weights @ x**2 + u @ u
      >>> weights, x_init, u_init = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> from jaxmpc import ilqr_box
      >>> solution = ilqr_box(cost, dynamics, x_init, u_init, weights, u_lower=-0.5, u_upper=0.5)
      >>> print(jnp.array_str(solution.u[:4, 0], precision=2))
      [-0.5  -0.1   0.08  0.1 ]

    Source: Amos et al. 2018 (arXiv:1810.13400), Algorithm 2; the box QP and the regularization
    after Tassa, Mansard and Todorov, Control-limited differential dynamic programming, ICRA 2014;
    the gaps after Mastalli et al., Crocoddyl, ICRA 2020;
    with constraints: Wächter and Biegler, Mathematical Programming 106, 2006.
    """
    problem, data, options = trace(
        cost, dynamics, x_init, u_init, params, x_guess=x_guess, terminal_cost=terminal_cost,
        u_lower=u_lower, u_upper=u_upper, constraints=constraints, options=options,
    )  # fmt: skip
    return without_gradient(
        problem, data, options,
        "ilqr_box is the forward solver alone and not differentiable in reverse mode: use "
        "jaxmpc.mpc_solve, which takes the same arguments, or jax.lax.stop_gradient its result",
    )  # fmt: skip


def without_gradient(problem: Problem, data: Data, options: Options, message: str) -> Solution:
    """The solution, of which reverse mode is a TypeError with that message."""
    solve = solving(problem, options, lambda _, solver: lambda *args: solver(*args)[0])
    run = jax.jit(lambda data, options: for_user(problem, data, solve(data, options)))
    solution: Solution = unchecked(run)(lax.stop_gradient(data), options)
    refusing: Solution = refused(message)(solution, data)
    return refusing
