"""The LQR of a Newton step: backward recursion with convex stages, forward substitution.

    minimise over dz   ½ dzᵀ H dz + cᵀ dz   subject to   dx_{t+1} = F dz + gap,  dx_0 = 0

Controls that are not free move by a given offset.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.pivots import convex_inverse
from jaxmpc.riccati.sequential import Factors, gains, quadratic_form, value_hessian


class Direction(NamedTuple):
    dx: Array  # [T+1, n]
    du: Array  # [T, m]
    costate: Array  # [T+1, n], where it leads to
    factors: Factors
    descent: Array  # Σ q k, the slope of the reduced objective


def nowhere(x: Array, u: Array) -> Direction:
    """A step of nothing from the trajectory [T+1, n], [T, m]."""
    T, m, *batch = u.shape
    n = x.shape[1]

    def zeros(*shape):
        return jnp.zeros((*shape, *batch), x.dtype)

    factors = Factors(zeros(T, m, n), zeros(T, m, m), zeros(T + 1, n, n), zeros(T))
    return Direction(jnp.zeros_like(x), jnp.zeros_like(u), jnp.zeros_like(x), factors, zeros())


def newton(
    H: Array,
    H_final: Array,
    F: Array,
    c: Array,
    c_final: Array,
    gaps: Array,
    free: Array,
    offset: Array,
    width: Array,
    regularization: Array,
    plain: Array,
) -> Direction:
    """``width`` [T, m]: a control gets the curvature that its gradient needs to stay within it;
    ``regularization`` multiplies the size of Q_uu; where ``plain``, H is taken as it is."""
    n = c_final.shape[0]

    def invert(Quu, free, size, q, width):
        added = regularization * size + jnp.abs(q) / width
        Quu = Quu + lanes.diagonal_matrix(jnp.where(plain, 0, added))
        inverse, shift, curvature = convex_inverse(Quu, free, size, plain)
        return inverse, Quu + lanes.diagonal_matrix(shift), curvature

    def stage(carry, data):
        V, v = carry
        H, F, c, gap, free, offset, width = data
        Q, size = quadratic_form(H, F, V)
        w = lanes.materialize(lambda v, V, gap: v + lanes.matvec(V, gap), v, V, gap)
        q = lanes.materialize(lambda c, F, w: c + lanes.matvec_t(F, w), c, F, w)
        inverse, Quu, curvature = lanes.materialize(invert, Q[n:, n:], free, size[n:], q[n:], width)
        Q = Q.at[n:, n:].set(Quu)
        offset = jnp.where(free, 0, offset)
        k = offset - lanes.matvec(inverse, q[n:] + lanes.matvec(Quu, offset))
        K = gains(inverse, Q)
        V = value_hessian(Q, K, n)
        v = q[:n] + lanes.matvec_t(K, q[n:] + lanes.matvec(Quu, k)) + lanes.matvec(Q[:n, n:], k)
        return (V, v), (Factors(K, inverse, V, curvature), k, v, lanes.dot(q[n:], k))

    data = H, F, c, gaps, free, offset, width
    _, (factors, k, v, descent) = lax.scan(stage, (H_final, c_final), data, reverse=True)
    factors = factors._replace(V=jnp.concatenate([factors.V, H_final[None]]))
    v = jnp.concatenate([v, c_final[None]])

    def forward(dx, now):
        F, K, k, gap = now
        du = lanes.materialize(lambda K, k, dx: lanes.matvec(K, dx) + k, K, k, dx)
        return lanes.matvec(F[:, :n], dx) + lanes.matvec(F[:, n:], du) + gap, (dx, du)

    dx_final, (dx, du) = lax.scan(forward, jnp.zeros_like(c_final), (F, factors.K, k, gaps))
    dx = jnp.concatenate([dx, dx_final[None]])
    costate = jax.vmap(lanes.matvec)(factors.V, dx) + v
    return Direction(dx, du, costate, factors, jnp.sum(descent, axis=0))
