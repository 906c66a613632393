"""One step of the solver: the backward recursion that proposes it, and the search for its length.

The second halves of Algorithm 2, after Tassa, Mansard and Todorov 2014.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc import entrywise
from jaxmpc.box_qp import box_qp
from jaxmpc.expansions import rollout, stage_costs, stages
from jaxmpc.lqr import Factors, entrywise_pays, masked_inverse, quadratic_form, value_hessian
from jaxmpc.problem import Data, Model

_MAX_TRIES = 6  # step lengths tried in one search
_SUFFICIENT = 1e-4  # share of the predicted decrease that a step has to achieve


class Iterate(NamedTuple):
    """A control sequence, its rollout and what it costs."""

    u: Array  # [T, m]
    x: Array  # [T+1, n]
    costs: Array  # [T+1]


class Step(NamedTuple):
    """A proposal: u + α (target − u) + K dx, clipped to the bounds."""

    target: Array  # [T, m]
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
    m = low.shape[1]
    threshold = definite_threshold(F.dtype)

    def stage(carry, data):
        V, v = carry
        H, F, c, low, high, held = data
        Q, size = quadratic_form(H, F, V)
        Quu, size = Q[n:, n:], size[n:]
        q = c + F.T @ v

        _, whole = masked_inverse(Quu, held | ~held, size)
        _, curvature = masked_inverse(Quu, ~held, size)
        unsafe = ~certify & ~(whole > threshold)
        stay = entrywise.elementwise(lambda held: held & unsafe, held)
        low, high = entrywise.where(stay, 0, low), entrywise.where(stay, 0, high)
        # Gershgorin's bound on the smallest eigenvalue; for one control the shift gives |Q_uu|.
        smallest = entrywise.min(2 * entrywise.diag(Quu) - abs(Quu).sum(axis=1))
        fine = certify | (curvature > threshold)
        shift = jnp.where(fine, 0, 2 * jnp.maximum(-smallest, 0))
        multiple = regularization + jnp.where(fine, 0, 1e-6)
        unit = jnp.where(fine, 0, 1)
        added = entrywise.elementwise(
            lambda size: shift + jnp.where(size > 0, multiple * size, unit), size
        )
        convex = Quu + entrywise.diag(added)

        d, Quu_inv, free = qp(convex, q[n:], low, high, size)
        K = -(Quu_inv @ Q[n:, :n])
        V = value_hessian(Q, K, n)
        Quu_d = Quu @ d
        v = q[:n] + K.T @ (q[n:] + Quu_d) + Q[:n, n:] @ d
        return (V, v), (d, K, Quu_inv, free, V, curvature, q[n:] @ d, (d @ Quu_d) * 0.5)

    _, (d, K, Quu_inv, free, V, curvature, slope, bend) = entrywise.scan(
        stage,
        (C_final, c_final),
        (H, F, c, low, high, held),
        entrywise=entrywise_pays(n, m),
        reverse=True,
    )
    factors = Factors(K, Quu_inv, jnp.concatenate([V, C_final[None]]), curvature)
    return d, free, factors, jnp.sum(slope), jnp.sum(bend)


def definite_threshold(dtype) -> float:
    """Pivots below this share of the terms they were computed from have no sign."""
    return 16 * float(jnp.finfo(dtype).eps)


def iterate(model: Model, data: Data, u: Array) -> Iterate:
    """The point that the controls u lead to."""
    x = rollout(model, data.theta, data.x_init, u)
    return Iterate(u, x, stage_costs(model, data.theta, x, u))


def apply(model: Model, data: Data, point: Iterate, step: Step, alpha: Array) -> Iterate:
    """The forward recursion of Algorithm 2 on the true dynamics, inside the bounds."""

    def advance(x_new, now):
        u, target, K, x, lower, upper, t = now
        # The target itself for a full step: u + (bound − u) may miss the bound by an ulp.
        straight = jnp.where(alpha == 1, target, u + alpha * (target - u))
        u_new = jnp.clip(straight + K @ (x_new - x), lower, upper)
        return model.dynamics(x_new, u_new, t, data.theta), (x_new, u_new)

    u, x, _ = point
    now = (u, step.target, step.K, x[:-1], data.u_lower, data.u_upper, stages(u))
    x_final, (x_new, u_new) = lax.scan(advance, data.x_init, now)
    x_new = jnp.concatenate([x_new, x_final[None]])
    return Iterate(u_new, x_new, stage_costs(model, data.theta, x_new, u_new))


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
    decrease = -(step.slope + step.bend)
    drowned = ~escape & (decrease <= noise)
    hopeless = escape | (decrease <= jnp.finfo(decay.dtype).eps * jnp.sum(jnp.abs(point.costs)))
    max_tries = jnp.where(escape, 2 * _MAX_TRIES, _MAX_TRIES)

    def wants_more(carry):
        _, search, tries = carry
        return wanted & ~search.accepted & (tries < max_tries)

    def attempt(carry):
        *_, tries = carry
        pair = (tries // 2).astype(decay.dtype)
        both_ways = jnp.where(tries % 2 == 0, decay ** (2 * pair), -(decay ** (2 * pair)))
        alpha = jnp.where(escape, both_ways, decay ** tries.astype(decay.dtype))
        new = apply(model, data, point, step, alpha)
        change = jnp.sum(new.costs - point.costs)
        predicted = alpha * step.slope + alpha**2 * step.bend
        enough = change <= _SUFFICIENT * jnp.minimum(predicted, 0)
        falls = jnp.where(escape, change < -noise, enough)
        noisy = ~falls & drowned & (tries == 0) & (jnp.abs(change) <= noise)
        return new, Search(falls | noisy, alpha, noisy, hopeless), tries + 1

    no = jnp.array(False)
    start = (point, Search(no, jnp.zeros_like(decay), no, no), jnp.int32(0))
    new, search, _ = lax.while_loop(wants_more, attempt, start)
    return new, search


def rounding(point: Iterate, costate: Array) -> Array:
    """The size of rounding in the objective: that of the costs, and that of each state, which the
    costates amplify."""
    eps = float(jnp.finfo(point.x.dtype).eps)
    return eps * (4 * jnp.sum(jnp.abs(point.costs)) + jnp.sum(jnp.abs(costate * point.x)))


def negative_direction(Q, free):
    """A direction of negative curvature of Q on the free controls, where there is one.

    That of the smallest eigenvalue, by powers of c − Q with c above the largest, from a start with
    no symmetry. The matrix is small and squared in place: no LAPACK call.
    """
    m = free.shape[0]
    both = free[:, None] & free[None, :]
    bound = jnp.max(jnp.sum(jnp.where(both, jnp.abs(Q), 0), axis=1))
    bound = jnp.where(bound > 0, bound, 1)
    power = jnp.where(both, bound * jnp.eye(m, dtype=Q.dtype) - Q, 0)

    def square(_, power):
        power = power / jnp.maximum(jnp.max(jnp.abs(power)), jnp.finfo(Q.dtype).tiny)
        return power @ power

    power = lax.fori_loop(0, 10, square, power)
    direction = power @ jnp.cos(jnp.arange(m, dtype=Q.dtype))
    return direction / jnp.maximum(jnp.max(jnp.abs(direction)), jnp.finfo(Q.dtype).tiny)
