"""What the solver tries next: the minimum of a convex model around the iterate (Algorithm 2)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import Expansion
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver.assessment import Assessment
from jaxmpc.solver.backward import Box, Recursion, backward_pass
from jaxmpc.solver.iterate import Iterate
from jaxmpc.solver.line_search import Step
from jaxmpc.types import Options

# Nearer than this to a bound is next to it, in units of the largest control or, where that is
# less, of the distance between the bounds.
_NEXT_TO = 1e-2


def propose(
    data: Data,
    at: Iterate,
    here: Assessment,
    expanded: Expansion,
    H: Array,
    H_final: Array,
    options: Options,
    regularization: Array,
    certify: Array,
    bending: Array,
    drowned: Array,
    exact_at: Callable[[Array], tuple[Array, Array]],
) -> tuple[Step, Factors, Array, Recursion]:
    """The step with the exact Hessian where every stage stays convex, else with a blend; and the
    factors with the exact one. Then whether it was the blend, and the recursion that was used.

    Away from a solution the costates of a rollout are those of nobody's plan: along an unstable one
    they grow without end, and the curvature λᵀ∇²dynamics with them. So the blend takes the costates
    of the plan that the Gauss-Newton step proposes, under its feedback, as ``exact_at`` gives the
    Hessian at any; and of that curvature the share ``bending``, the rest being ∇²cost.

    ``hessian="ilqr"`` takes ∇²cost. Where the objective has ``drowned`` in rounding only the
    residual is left to fall, which ∇²cost does not promise: there it takes the exact Hessian.
    Either stands in where the other is not convex, and it is.

    With ``certify`` nothing is regularized, the active set is that of the iterate, and the factors
    are those of its exact KKT matrix.
    """
    u, lower, upper = at.u, data.u_lower, data.u_upper
    box = Box(
        jnp.where(certify, jnp.where(here.clamped, 0, -jnp.inf), lower - u),
        jnp.where(certify, jnp.where(here.clamped, 0, jnp.inf), upper - u),
        here.clamped,
    )
    convex, exact = (expanded.C, expanded.C_final), (H, H_final)
    if options.hessian != "exact":
        exact = lanes.select(certify | drowned, exact, convex)

    def recursion(hessian: Array, final: Array) -> Recursion:
        added = jnp.where(certify, 0, regularization)
        c, c_final = here.first.c, here.first.c_final
        return backward_pass(hessian, expanded.F, c, final, c_final, at.gaps, box, added, certify)

    with_exact = recursion(*exact)
    factors = with_exact.factors
    gaping = ~lanes.every(at.gaps == 0, 2)
    fine = certify | (definite(factors) & ~gaping)

    def blended() -> Recursion:
        if options.hessian != "exact":
            other = recursion(*lanes.select(drowned | gaping, convex, (H, H_final)))
            return lanes.select(definite(other.factors), other, with_exact)

        def again(before: Recursion, share: Array) -> tuple[Recursion, None]:
            share = jnp.where(gaping, 0, share * bending)
            bent = exact_at(before.v)
            model = jax.tree.map(
                lambda c, h: jnp.where(share > 0, c + share * (h - c), c), convex, bent
            )
            return recursion(*model), None

        return lax.scan(again, with_exact, jnp.arange(2, dtype=u.dtype))[0]

    found = lax.cond(
        jnp.all(fine), lambda: with_exact, lambda: lanes.select(fine, with_exact, blended())
    )
    d, free, used, _, slope, bend = found
    bound = jnp.where(d <= lower - u, lower, upper)
    target = jnp.where(free, jnp.clip(u + d, lower, upper), bound)
    step = Step(target, _reach(data, u, here, target), used.K, slope, bend)
    return step, factors, ~fine & ~gaping, found


def definite(factors: Factors) -> Array:
    """Whether Q_uu is positive definite at every stage."""
    return lanes.every(factors.curvature > definite_threshold(factors.curvature.dtype))


def _reach(data: Data, u: Array, here: Assessment, target: Array) -> Array:
    """From how far away a control goes all the way to its bound, if the gradient holds it there.

    With a share of every step it would come nearer for ever, and count as free all the way
    (Bertsekas 1982, Projected Newton methods for optimization problems with simple constraints).
    """
    lower, upper = data.u_lower, data.u_upper
    width = jnp.minimum(upper - lower, jnp.max(jnp.abs(u), axis=0))
    outward = jnp.where(here.gradient > 0, target == lower, target == upper)
    return jnp.where(outward, _NEXT_TO * width, 0)
