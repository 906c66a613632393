"""The Riccati recursion of an LQR that need not be convex, made so stage by stage.

Where a stage's Q_uu is not positive definite, its negative curvature is replaced by a positive one
of the same size. What that adds to the controls' curvature is returned: with it in C, the LQR is a
convex one, and the factors are its own.
"""

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.pivots import convex_inverse, masked_inverse
from jaxmpc.riccati.sequential import Factors, gains, quadratic_form, value_hessian


@lanes.any_rank
def factorize(
    C: Array, F: Array, C_final: Array, free: Array, added: Array
) -> tuple[Factors, Array, Array]:
    """The factors with ``added`` [T, m], ≥ 0, in the controls' curvature; what made them convex
    [T, m], ``added`` included; and the curvature that each control sees of its own [T, m].

    Every stage is made convex before anything is added to it.
    """
    n = C_final.shape[0]

    def stage(V, data):
        C, F, free, added = data
        Q, size = quadratic_form(C, F, V)
        Quu, size = Q[n:, n:], size[n:]
        _, shift, _ = convex_inverse(Quu, free, size, jnp.zeros((), bool))
        seen = jnp.abs(lanes.diagonal(Quu) + shift)
        shift = jnp.where(free, shift + added, 0)
        Quu = Quu + lanes.diagonal_matrix(shift)
        inverse, curvature = masked_inverse(Quu, free, jnp.where(size > 0, size + shift, 1))
        Q = Q.at[n:, n:].set(Quu)
        K = gains(inverse, Q)
        V = value_hessian(Q, K, n)
        return V, (Factors(K, inverse, V, curvature), shift, seen)

    _, (factors, shift, seen) = lax.scan(stage, C_final, (C, F, free, added), reverse=True)
    return factors._replace(V=jnp.concatenate([factors.V, C_final[None]])), shift, seen
