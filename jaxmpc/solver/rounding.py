"""What rounding hides of ∇_u J: the part of a residual that no plan of this dtype can be held to.

Every value along a trajectory is off by a rounding of the terms that it was computed from; the
dynamics carry the errors of the states forward, and the costates carry all of them back. What
arrives in the gradient has no bound worth having: magnitudes alone grow along an oscillation that
does not. So it is sampled: one rounding of every value, with random signs, goes through the
linearization.

Source: Vignes 1993, A stochastic arithmetic for reliable scientific computation (two or three
samples show the size of an error).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.point import z_of

_SAMPLES = 3


@lanes.any_rank
def hidden(
    x: Array,
    u: Array,
    costate: Array,
    gradient: Array,
    H: Array,
    F: Array,
    H_final: Array,
    feedback: Array | None = None,
) -> tuple[Array, Array]:
    """[T, m], the size of rounding in the gradient ∇_u J of a trajectory, with the Hessian H of
    its Hamiltonian; and the size of all terms that cancel in it, or in the costates before it.

    With ``feedback`` [T, m, n] the controls answer by these gains: on the way there the errors grow
    as the closed loop's do, and so they do on the way back.
    """
    (T, n), eps = F.shape[:2], lanes.eps(x)
    K = jnp.zeros((T, u.shape[1], n, *x.shape[2:]), x.dtype) if feedback is None else feedback
    # The samples are an axis before the batch.
    shape = (T + 1, x.shape[1] + F.shape[2], _SAMPLES, *[1] * (x.ndim - 2))
    signs = jnp.asarray(np.random.default_rng(0).choice([-eps, eps], shape), x.dtype)

    def forward(dx, stage):
        F, K, z, signs = stage
        error = signs[:n] * lanes.matvec(jnp.abs(F), jnp.abs(z))[:, None]
        dz = jnp.concatenate([dx, lanes.matvec(K[:, :, None], dx)])
        return lanes.matvec(F[:, :, None], dz) + error, dz

    def backward(later, stage):
        dcostate, size_next = later
        F, H, K, z, dz, costate, costate_next, gradient, signs = stage
        # The terms of ∇ of the Hamiltonian; its own in states and controls are not larger.
        size = lanes.matvec_t(jnp.abs(F), jnp.abs(costate_next))
        size = size + lanes.matvec(jnp.abs(H), jnp.abs(z))
        size = size + jnp.concatenate([jnp.abs(costate), jnp.abs(gradient)])
        error = lanes.matvec_t(F[:, :, None], dcostate) + lanes.matvec(H[:, :, None], dz)
        error = error + signs[n:] * size[:, None]
        dcostate = error[:n] + lanes.matvec_t(K[:, :, None], error[n:])
        terms = size[n:] + lanes.matvec_t(jnp.abs(F[:, n:]), size_next)
        return (dcostate, size[:n]), (jnp.max(jnp.abs(error[n:]), axis=1), terms)

    z = z_of(x, u)
    dx_final, dz = lax.scan(forward, signs[T, :n] * jnp.abs(x[0])[:, None], (F, K, z, signs[:T]))
    size = jnp.abs(costate[T]) + lanes.matvec(jnp.abs(H_final), jnp.abs(x[T]))
    dcostate = lanes.matvec(H_final[:, :, None], dx_final) + signs[T, n : 2 * n] * size[:, None]
    stages = F, H, K, z, dz, costate[:-1], costate[1:], gradient, signs[:T]
    _, (noise, terms) = lax.scan(backward, (dcostate, size), stages, reverse=True)
    return noise, terms
