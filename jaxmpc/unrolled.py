"""The unrolled alternative to the fixed-point backward: a fixed number of iterations,
differentiated through (section 4.3 of Amos et al. 2018)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.batch import lanes
from jaxmpc.batch.unchecked import unchecked
from jaxmpc.derivative.refused import no_reverse, refused
from jaxmpc.problem.constraints import for_user
from jaxmpc.problem.expansions import expand, first_order, hessians
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.problem.trace import trace
from jaxmpc.riccati.pivots import definite_threshold, masked_inverse
from jaxmpc.riccati.sequential import factorize
from jaxmpc.solver.assessment import assess, tolerances
from jaxmpc.solver.backward import Box, backward_pass
from jaxmpc.solver.box_qp import box_qp, clamped
from jaxmpc.solver.iterate import Iterate, new_iterate, rounding
from jaxmpc.solver.line_search import Step, line_search, take_step
from jaxmpc.types import Cost, Dynamics, Options, Solution, Status, TerminalCost


def ilqr_unrolled(
    cost: Cost,
    dynamics: Dynamics,
    x_init: ArrayLike,
    u_init: ArrayLike,
    params: Any = None,
    *,
    num_iterations: int,
    terminal_cost: TerminalCost | None = None,
    u_lower: ArrayLike | None = None,
    u_upper: ArrayLike | None = None,
    options: Options = Options(),
) -> Solution:
    """Exactly ``num_iterations`` iterations of the paper's box-iLQR, differentiable through each.

    The same problem and arguments as ``mpc_solve``. Where that differentiates the optimum, this
    differentiates the computation: the surrogate of section 4.3 for problems that reach no fixed
    point (a learned network as dynamics, too few iterations), and the baseline of Fig. 2. Time and
    memory of the backward pass grow with ``num_iterations``.

    Each iteration is Algorithm 2's: cost to second order, dynamics to first, one box QP a stage,
    and the first step length α = 1, γ, γ², … at which the objective falls (none of six does: the
    point stays). What is chosen among alternatives, the active sets and α, is constant to the
    derivative; in ``u_init`` the derivative is that of the iterations, not zero. A problem that
    is not finite gives gradients that are not either: there is no policy for the unconverged.

    Args:
      num_iterations: a Python int, at least 0.
      options: ``tolerance``, ``regularization`` (constant here) and ``line_search_decay`` count.
      (others): as in ``mpc_solve``.

    Returns:
      A ``Solution``; every floating field is differentiable in reverse mode. The
      status is that of the last point: CONVERGED or INDEFINITE where ``mpc_solve`` would say so,
      NONFINITE, INFEASIBLE, or else MAX_ITERATIONS.

    Raises:
      TypeError, ValueError: as ``mpc_solve``; ``num_iterations`` is not an int of at least 0.

    Example:
      >>> import jax.numpy as jnp
      >>> def dynamics(x, u, t, weights):  # a cart, in steps of half a second
      ...     position, velocity = x
      ...     return jnp.stack([position + 0.5 * velocity, velocity + 0.5 * u[0]])
      >>> def cost(x, u, t, weights):
      ...     return weights @ x**2 + u @ u
      >>> weights, x_init, u_init = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> from jaxmpc import ilqr_unrolled
      >>> solution = ilqr_unrolled(cost, dynamics, x_init, u_init, weights, num_iterations=3)
      >>> print(jnp.array_str(solution.u[:4, 0], precision=2))
      [-0.51 -0.09  0.09  0.1 ]
    """
    validation.check_count("num_iterations", num_iterations, least=0)
    problem, data, options = trace(
        cost, dynamics, x_init, u_init, params, terminal_cost=terminal_cost, u_lower=u_lower,
        u_upper=u_upper, options=options,
    )  # fmt: skip
    if options.smoothing is not None:
        raise ValueError("options.smoothing is for mpc_solve: ilqr_unrolled needs none")
    unroll = jax.jit(lambda data, options: _unroll(problem, data, options, num_iterations))
    solution = for_user(problem, data, unchecked(unroll)(data, options))
    return refused(no_reverse(problem))(solution) if problem.forward_only else solution


@lanes.any_rank
def _unroll(problem: Problem, data: Data, options: Options, num_iterations: int) -> Solution:
    lower, upper = data.u_lower, data.u_upper
    dtype = data.x_init.dtype
    decay = lax.stop_gradient(jnp.asarray(options.line_search_decay, dtype))
    regularization = jnp.asarray(options.regularization, dtype)
    no, yes = jnp.array(False), jnp.array(True)

    none = data.multipliers  # there are no rows

    def improve(at: Iterate, nothing: None) -> tuple[Iterate, None]:
        u, x = at.u, at.x
        expanded = expand(problem, data.theta, x, u)
        first = first_order(expanded, none)
        held = clamped(first.control_cost + first.control_pull, u, lower, upper)
        d, free, factors, _, slope, bend = backward_pass(
            expanded.C, expanded.F, first.c, expanded.C_final, first.c_final, at.gaps,
            Box(lower - u, upper - u, held), regularization, no, qp=_differentiable_box_qp,
        )  # fmt: skip
        target = jnp.where(free, u + d, jnp.where(d <= lower - u, lower, upper))
        step = Step(target, jnp.zeros_like(target), factors.K, slope, bend)
        constant = lax.stop_gradient((data, at, step))
        noise = lax.stop_gradient(rounding(at, first.costate, expanded))
        _, length = line_search(problem, *constant, no, yes, noise, decay)
        alpha = jnp.where(length.accepted, length.alpha, 0)
        return take_step(problem, data, at, step, alpha), None

    start = new_iterate(problem, data, jnp.clip(data.u_init, lower, upper))
    at, _ = lax.scan(improve, start, length=num_iterations)
    expanded = expand(problem, data.theta, at.x, at.u)
    end = assess(data, at, expanded, none)
    costate = end.first.costate
    H, H_final = hessians(problem, data.theta, at.x, at.u, expanded, costate, none)
    small = end.residual <= tolerances(options, dtype)[0] * end.size
    factors = factorize(H, expanded.F, H_final, ~end.clamped)
    definite = jnp.all(factors.curvature > definite_threshold(dtype))
    status = jnp.select(
        [
            ~jnp.all(lower <= upper),
            ~(end.finite & jnp.all(jnp.isfinite(H))),
            small & definite,
            small,
        ],
        [Status.INFEASIBLE, Status.NONFINITE, Status.CONVERGED, Status.INDEFINITE],
        Status.MAX_ITERATIONS,
    )
    return Solution(
        x=at.x,
        u=at.u,
        costate=costate,
        K=factors.K,
        free=~end.clamped,
        objective=jnp.sum(at.costs),
        kkt_residual=end.kkt_residual,
        iterations=jnp.int32(num_iterations),
        status=status.astype(jnp.int32),
        multipliers=none,
        violation=jnp.zeros((), dtype),
    )


def _differentiable_box_qp(
    Q: Array, q: Array, lower: Array, upper: Array, scale: Array
) -> tuple[Array, Array, Array]:
    """``box_qp`` with a differentiable minimiser: its free set is constant (eq. 18)."""
    d, _, free = box_qp(*lax.stop_gradient((Q, q, lower, upper, scale)))
    held = jnp.where(free, 0, jnp.where(d <= lower, lower, upper))
    inverse, _ = masked_inverse(Q, free, scale)
    return held - lanes.matvec(inverse, q + lanes.matvec(Q, held)), inverse, free
