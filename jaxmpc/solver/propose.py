"""What the solver tries next: the minimum of a convex model around the iterate.

Without rows the model is a box QP a stage (Algorithm 2). With rows it is quadratic in pieces
(``row_model``).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import Expansion
from jaxmpc.problem.prices import RowState
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver import interior
from jaxmpc.solver.assessment import Assessment
from jaxmpc.solver.backward import Box, backward_pass
from jaxmpc.solver.iterate import Iterate
from jaxmpc.solver.line_search import Step
from jaxmpc.solver.row_model import RowModel, Solved
from jaxmpc.types import Options

# Nearer than this to a bound is next to it, in units of the largest control or, where that is
# less, of the distance between the bounds.
_NEXT_TO = 1e-2


class Proposal(NamedTuple):
    step: Step
    factors: Factors  # those with the exact Hessian
    ahead: RowState  # the rows as the model has them at its end


def propose(
    data: Data,
    at: Iterate,
    here: Assessment,
    expanded: Expansion,
    H: Array,
    H_final: Array,
    rho: Array,
    options: Options,
    regularization: Array,
    certify: Array,
) -> Proposal:
    """The step with the exact Hessian where every stage stays convex, else with ∇²cost.

    With ``certify`` nothing is regularized, the active set is that of the iterate, and the factors
    are those of its exact KKT matrix, with ρ GᵀG of the active rows in it.
    """
    u, lower, upper = at.u, data.u_lower, data.u_upper
    box = Box(
        jnp.where(certify, jnp.where(here.clamped, 0, -jnp.inf), lower - u),
        jnp.where(certify, jnp.where(here.clamped, 0, jnp.inf), upper - u),
        here.clamped,
    )

    def solve(
        c: Array, c_final: Array, box: Box, squares: Callable, curved: Array | bool, inside: Array
    ) -> Solved:
        """``squares`` adds to a Hessian, and ``inside`` it regularizes it, too; the exact one is
        tried where ``curved``."""
        convex, exact = squares(expanded.C, expanded.C_final), squares(H, H_final)
        if options.hessian != "exact":
            curved = certify
        exact = lanes.select(curved, exact, convex)

        def recursion(hessian, final):
            added = jnp.where(certify | inside, 0, regularization)
            return backward_pass(hessian, expanded.F, c, final, c_final, box, added, certify)

        with_exact = recursion(*exact)
        factors = with_exact.factors
        fine = certify | lanes.every(factors.curvature > definite_threshold(u.dtype))
        chosen = lax.cond(
            jnp.all(fine),
            lambda: with_exact,
            lambda: lanes.select(fine, with_exact, recursion(*convex)),
        )
        return Solved(chosen, factors, fine)

    inside, ahead = jnp.zeros_like(certify), here.state
    if at.g.num:
        low, high = lower - u, upper - u
        sides = interior.sides(at.g, at.penalty, data.prices, low, high)
        model = RowModel(
            at, here, expanded, data.prices, rho, regularization, certify,
            low, high, box, sides, solve,
        )  # fmt: skip
        solved, ahead, inside = model.search()
    else:
        first = here.first
        solved = solve(first.c, first.c_final, box, lambda *hessian: hessian, True, inside)
    d, free, used, slope, bend = solved.recursion
    bound = jnp.where(d <= lower - u, lower, upper)
    target = jnp.where(free, jnp.clip(u + d, lower, upper), bound)
    # From the interior, d is within the bounds together with K dx only.
    target = jnp.where(inside, u + d, target)
    step = Step(target, _reach(data, u, here, target), used.K, slope, bend)
    return Proposal(step, solved.exact, ahead)


def _reach(data: Data, u: Array, here: Assessment, target: Array) -> Array:
    """From how far away a control goes all the way to its bound, if the gradient holds it there.

    With a share of every step it would come nearer for ever, and count as free all the way
    (Bertsekas 1982, Projected Newton methods for optimization problems with simple constraints).
    """
    lower, upper = data.u_lower, data.u_upper
    width = jnp.minimum(upper - lower, jnp.max(jnp.abs(u), axis=0))
    outward = jnp.where(here.gradient > 0, target == lower, target == upper)
    return jnp.where(outward, _NEXT_TO * width, 0)
