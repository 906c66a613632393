"""The backward recursion that proposes a step (Algorithm 2, after Tassa, Mansard and
Todorov 2014)."""

import jax.numpy as jnp
from jax import lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.pivots import definite_threshold, smallest_pivot
from jaxmpc.riccati.sequential import Factors, gains, quadratic_form, value_hessian
from jaxmpc.solver.box_qp import box_qp


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
