"""The backward recursion that proposes a step: a box QP a stage, from the last to the first.

Source: Amos et al. 2018 (arXiv:1810.13400), Algorithm 2, after Tassa, Mansard and Todorov 2014.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.pivots import definite_threshold, smallest_pivot
from jaxmpc.riccati.sequential import Factors, gains, quadratic_form, value_hessian
from jaxmpc.solver.box_qp import box_qp

# What a Q_uu that is not definite gets at least, so that it is beyond the rounding of float32.
_LEAST = 1e-6


class Box(NamedTuple):
    """What a stage's QP may do with the controls."""

    low: Array  # [T, m], of their change
    high: Array
    clamped: Array  # [T, m], those that stay where Q_uu is not positive definite


class Recursion(NamedTuple):
    """What the backward recursion found."""

    d: Array  # [T, m], the change of the controls is d + K dx
    free: Array  # [T, m]
    factors: Factors
    v: Array  # [T+1, n], the gradient of the cost-to-go under the feedback K
    slope: Array  # the predicted change of the objective is α slope + α² bend
    bend: Array


def backward_pass(
    H: Array,
    F: Array,
    c: Array,
    H_final: Array,
    c_final: Array,
    gaps: Array,
    box: Box,
    regularization: Array,
    certify: Array,
    *,
    qp: Callable = box_qp,
) -> Recursion:
    """The backward recursion of Algorithm 2 for the change d of the controls, within the box, and
    a change of the states that closes the gaps.

    A stage's box QP needs a positive definite Q_uu. Where it is not, the controls that are
    ``clamped`` at the current point stay; where that does not suffice, Q_uu is shifted, and the
    stage's ``curvature`` in the factors says so.

    ``certify`` takes Q_uu as it is: with low = high = 0 on the clamped controls and no other
    bounds, the factors are then those of the exact KKT matrix, definite or not.
    """
    n = c_final.shape[0]
    threshold = definite_threshold(F.dtype)

    def convexify(Quu, low, high, clamped, size):
        # Both at once: of all controls, and of those that are not clamped.
        sets = jnp.stack([clamped | ~clamped, ~clamped], axis=1)
        pivots = smallest_pivot(Quu[:, :, None], sets, size[:, None])
        whole, curvature = pivots[0], pivots[1]
        stay = clamped & ~certify & ~(whole > threshold)
        # Gershgorin's bound on the smallest eigenvalue; for one control the shift gives |Q_uu|.
        diagonal = lanes.diagonal(Quu)
        smallest = jnp.min(2 * diagonal - jnp.sum(jnp.abs(Quu), axis=1), axis=0)
        fine = certify | (curvature > threshold)
        # Twice it, so that a direction of negative curvature gets the same positive one.
        shift = jnp.where(fine, 0, 2 * jnp.maximum(-smallest, 0))
        # A share of the terms that Q_uu was summed from; of a control that nothing prices, 1.
        multiple = regularization + jnp.where(fine, 0, _LEAST)
        added = shift + jnp.where(size > 0, multiple * size, jnp.where(fine, 0.0, 1.0))
        convex = Quu + lanes.diagonal_matrix(added)
        return convex, jnp.where(stay, 0, low), jnp.where(stay, 0, high), curvature

    def stage(carry, data):
        V, v_next = carry
        H, F, c, gap, low, high, clamped = data
        Q, size = quadratic_form(H, F, V)
        w = lanes.materialize(lambda v, V, gap: v + lanes.matvec(V, gap), v_next, V, gap)
        q = lanes.materialize(lambda c, F, w: c + lanes.matvec_t(F, w), c, F, w)
        Quu = Q[n:, n:]
        convex, low, high, curvature = lanes.materialize(
            convexify, Quu, low, high, clamped, size[n:]
        )
        d, Quu_inv, free = lanes.materialize(qp, convex, q[n:], low, high, size[n:])
        K = gains(Quu_inv, Q)
        V = value_hessian(Q, K, n)
        Quu_d = lanes.matvec(Quu, d)
        v = q[:n] + lanes.matvec_t(K, q[n:] + Quu_d) + lanes.matvec(Q[:n, n:], d)
        slope, bend = lanes.dot(q[n:], d), lanes.dot(d, Quu_d) * 0.5
        slope = slope + 0.5 * lanes.dot(v_next + w, gap)
        return (V, v), (d, K, Quu_inv, free, V, curvature, v, slope, bend)

    start = H_final, c_final
    data = H, F, c, gaps, *box
    _, found = lax.scan(stage, start, data, reverse=True)
    d, K, Quu_inv, free, V, curvature, v, slope, bend = found
    factors = Factors(K, Quu_inv, jnp.concatenate([V, H_final[None]]), curvature)
    v = jnp.concatenate([v, c_final[None]])
    return Recursion(d, free, factors, v, jnp.sum(slope, axis=0), jnp.sum(bend, axis=0))
