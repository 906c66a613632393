"""One step of the solver: the backward recursion that proposes it, and the search for its length.

The second halves of Algorithm 2, after Tassa, Mansard and Todorov 2014.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc import augmented
from jaxmpc.augmented import Penalty
from jaxmpc.batch import lanes
from jaxmpc.box_qp import box_qp
from jaxmpc.problem.expansions import constraint_values, rollout, stage_costs, transition
from jaxmpc.problem.problem import Data, Model
from jaxmpc.riccati.pivots import definite_threshold, smallest_pivot
from jaxmpc.riccati.sequential import Factors, gains, quadratic_form, value_hessian

_MAX_TRIES = 6  # step lengths tried in one search
_SUFFICIENT = 1e-4  # share of the predicted decrease that a step has to achieve


class Iterate(NamedTuple):
    """A control sequence, its rollout and what it costs."""

    u: Array  # [T, m]
    x: Array  # [T+1, n]
    costs: Array  # [T+1]
    # Of the constraints, if there are any.
    g: Any = None  # Rows, their values
    penalty: Any = None  # Penalty, what the point is judged by


class Step(NamedTuple):
    """A proposal: u + α (target − u) + K dx, clipped to the bounds; target + K dx where the target
    is nearer than α reach."""

    target: Array  # [T, m]
    reach: Array  # [T, m]
    K: Array  # [T, m, n]
    slope: Array  # the predicted change of the objective is α slope + α² bend
    bend: Array


class Search(NamedTuple):
    """How a line search ended."""

    accepted: Array
    alpha: Array  # the last step length that was tried
    noisy: Array  # the objective changed by rounding only
    hopeless: Array  # if it failed: a shorter step would not succeed either


def backward_pass(
    H, F, c, C_final, c_final, low, high, held, regularization, certify, *, qp=box_qp
):
    """The backward recursion of Algorithm 2 for the change d of the controls, low ≤ d ≤ high.

    A stage's box QP needs a positive definite Q_uu. Where it is not, the controls that are
    ``held`` (clamped at the current point) stay; where that does not suffice, Q_uu is shifted, and
    the stage's ``curvature`` in the factors says so.

    ``certify`` takes Q_uu as it is: with low = high = 0 on the clamped controls and no other
    bounds, the factors are then those of the exact KKT matrix, definite or not.
    """
    n = c_final.shape[0]
    threshold = definite_threshold(F.dtype)

    def convexify(Quu, low, high, held, size):
        # Both at once: of all controls, and of those that are not held.
        sets = jnp.stack([held | ~held, ~held], axis=1)
        pivots = smallest_pivot(Quu[:, :, None], sets, size[:, None])
        whole, curvature = pivots[0], pivots[1]
        stay = held & ~certify & ~(whole > threshold)
        # Gershgorin's bound on the smallest eigenvalue; for one control the shift gives |Q_uu|.
        diagonal = lanes.diagonal(Quu)
        smallest = jnp.min(2 * diagonal - jnp.sum(jnp.abs(Quu), axis=1), axis=0)
        fine = certify | (curvature > threshold)
        shift = jnp.where(fine, 0, 2 * jnp.maximum(-smallest, 0))
        multiple = regularization + jnp.where(fine, 0, 1e-6)
        unit = jnp.where(fine, 0.0, 1.0)
        added = shift + jnp.where(size > 0, multiple * size, unit)
        convex = Quu + lanes.diagonal_matrix(added)
        return convex, jnp.where(stay, 0, low), jnp.where(stay, 0, high), curvature

    def stage(carry, data):
        V, v = carry
        H, F, c, low, high, held = data
        Q, size = quadratic_form(H, F, V)
        q = lanes.materialize(lambda c, F, v: c + lanes.matvec_t(F, v), c, F, v)
        Quu = Q[n:, n:]
        convex, low, high, curvature = lanes.materialize(convexify, Quu, low, high, held, size[n:])
        d, Quu_inv, free = lanes.materialize(qp, convex, q[n:], low, high, size[n:])
        K = gains(Quu_inv, Q)
        V = value_hessian(Q, K, n)
        Quu_d = lanes.matvec(Quu, d)
        v = q[:n] + lanes.matvec_t(K, q[n:] + Quu_d) + lanes.matvec(Q[:n, n:], d)
        slope, bend = lanes.dot(q[n:], d), lanes.dot(d, Quu_d) * 0.5
        return (V, v), (d, K, Quu_inv, free, V, curvature, slope, bend)

    start = C_final, c_final
    data = H, F, c, low, high, held
    _, (d, K, Quu_inv, free, V, curvature, slope, bend) = lax.scan(stage, start, data, reverse=True)
    factors = Factors(K, Quu_inv, jnp.concatenate([V, C_final[None]]), curvature)
    return d, free, factors, jnp.sum(slope, axis=0), jnp.sum(bend, axis=0)


def iterate(model: Model, data: Data, u: Array) -> Iterate:
    """The point that the controls u lead to."""
    x = rollout(model, data.theta, data.x_init, u)
    penalty = None
    if model.constrained:
        penalty = augmented.start(data.multipliers, jnp.zeros_like(x[0, 0]))
    return _iterate(model, data, u, x, penalty)


def _iterate(model: Model, data: Data, u: Array, x: Array, penalty: Penalty | None) -> Iterate:
    costs = stage_costs(model, data.theta, x, u)
    return Iterate(u, x, costs, constraint_values(model, data.theta, x, u), penalty)


def merits(point: Iterate, prices: Any) -> Array:
    """What the search minimises the sum of, [T+1]: the costs, with what the constraints add."""
    if point.penalty is None:
        return point.costs
    stage, final = augmented.values(point.g, point.penalty, prices)
    costs = point.costs
    costs = costs if stage is None else costs.at[:-1].add(jnp.sum(stage, axis=1))
    return costs if final is None else costs.at[-1].add(jnp.sum(final, axis=0))


def apply(model: Model, data: Data, point: Iterate, step: Step, alpha: Array) -> Iterate:
    """The forward recursion of Algorithm 2 on the true dynamics, inside the bounds."""
    transit, at = transition(model, data.theta, point.u)

    def advance(x_new, stage):
        u, target, reach, K, x, lower, upper, now = stage
        # The target itself for a full step: u + (bound − u) may miss the bound by an ulp.
        there = (alpha == 1) | (jnp.abs(target - u) < alpha * reach)
        straight = jnp.where(there, target, u + alpha * (target - u))
        u_new = jnp.clip(straight + lanes.matvec(K, x_new - x), lower, upper)
        return transit(x_new, u_new, now), (x_new, u_new)

    u, x = point.u, point.x
    along = (u, step.target, step.reach, step.K, x[:-1], data.u_lower, data.u_upper, at)
    x_final, (x_new, u_new) = lax.scan(advance, data.x_init, along)
    x_new = jnp.concatenate([x_new, x_final[None]])
    return _iterate(model, data, u_new, x_new, point.penalty)


def line_search(
    model: Model,
    data: Data,
    point: Iterate,
    step: Step,
    escape: Array,
    wanted: Array,
    noise: Array,
    decay: Array,
) -> tuple[Iterate, Search]:
    """Shorten the step until the objective falls; along negative curvature try both directions.

    Nothing is tried unless ``wanted``; with ``escape`` the step is along negative curvature;
    ``noise`` is the size of rounding in the objective.
    """
    # Near a solution the decrease drowns in rounding before the residual does: take the full step,
    # and let the next trip judge by the residual.
    merit = merits(point, data.prices)
    decrease = -(step.slope + step.bend)
    drowned = ~escape & (decrease <= noise)
    eps = jnp.finfo(noise.dtype).eps
    hopeless = escape | (jnp.abs(decrease) <= eps * jnp.sum(jnp.abs(merit), axis=0))
    max_tries = jnp.where(escape, 2 * _MAX_TRIES, _MAX_TRIES)

    def unfinished(carry):
        _, search, tries = carry
        return wanted & ~search.accepted & (tries < max_tries)

    def attempt(carry):
        before, search, tries = carry
        pair = (tries // 2).astype(noise.dtype)
        both_ways = jnp.where(tries % 2 == 0, decay ** (2 * pair), -(decay ** (2 * pair)))
        alpha = jnp.where(escape, both_ways, decay ** tries.astype(noise.dtype))
        new = apply(model, data, point, step, alpha)
        change = jnp.sum(merits(new, data.prices) - merit, axis=0)
        predicted = alpha * step.slope + alpha**2 * step.bend
        enough = change <= _SUFFICIENT * jnp.minimum(predicted, 0)
        falls = jnp.where(escape, change < -noise, enough)
        noisy = ~falls & drowned & (tries == 0) & (jnp.abs(change) <= noise)
        after = new, Search(falls | noisy, alpha, noisy, hopeless)
        return *select(unfinished(carry), after, (before, search)), tries + 1

    no = jnp.zeros_like(wanted)
    start = (point, Search(no, jnp.zeros_like(noise), no, hopeless), jnp.int32(0))
    new, search, _ = lax.while_loop(lambda carry: jnp.any(unfinished(carry)), attempt, start)
    return new, search


def rounding(point: Iterate, costate: Array, prices: Any) -> Array:
    """The size of rounding in the objective: that of the costs, and that of each state, which the
    costates amplify."""
    eps = float(jnp.finfo(point.x.dtype).eps)
    costs, states = jnp.abs(merits(point, prices)), jnp.abs(costate * point.x)
    return eps * (4 * jnp.sum(costs, axis=0) + jnp.sum(states, axis=(0, 1)))


def negative_direction(Q, free):
    """A direction of negative curvature of Q on the free controls, where there is one.

    That of the smallest eigenvalue, by powers of c − Q with c above the largest, from a start with
    no symmetry. The matrix is small and squared in place: no LAPACK call.
    """
    m = free.shape[0]
    both = free[:, None] & free[None, :]
    bound = jnp.max(jnp.sum(jnp.where(both, jnp.abs(Q), 0), axis=1), axis=0)
    bound = jnp.where(bound > 0, bound, 1)
    tiny = jnp.finfo(Q.dtype).tiny
    power = jnp.where(both, jnp.where(lanes.identity(m, bound.ndim), bound, 0) - Q, 0)

    def square(_, power):
        power = power / jnp.maximum(jnp.max(jnp.abs(power), axis=(0, 1)), tiny)
        return lanes.matmul(power, power)

    power = lax.fori_loop(0, 10, square, power)
    start = jnp.cos(jnp.arange(m, dtype=Q.dtype)).reshape((m,) + (1,) * bound.ndim)
    direction = jnp.sum(power * start, axis=1)
    return direction / jnp.maximum(jnp.max(jnp.abs(direction), axis=0), tiny)


def select(condition, a, b):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)
