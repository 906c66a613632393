"""The pivots of a small symmetric matrix: its inverse, and whether it is positive definite."""

import functools

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes

# Up to this many controls the elimination of one stage is unrolled at trace time: faster to run,
# but what is unrolled has to be compiled.
_MAX_UNROLLED = 8


def masked_inverse(Q: Array, free: Array, scale: Array) -> tuple[Array, Array]:
    """The inverse of Q [m,m] on its free rows and columns, 0 elsewhere; and its smallest pivot.

    The pivots are the D of LDLᵀ: positive exactly where Q is positive definite on the free
    controls. They come relative to ``scale`` [m], the size of the terms that were summed in Q's
    diagonal, since a pivot at their rounding level has no sign; pinned rows count as 1.

    Sweeping every pivot of a symmetric matrix leaves −Q⁻¹ in its place, in m rank-one updates:
    no LAPACK call, no square root, and an indefinite Q is still inverted.
    """
    m = free.shape[0]
    if m == 1:
        inverse = jnp.where(free, 1 / Q[0], 0)
        return inverse[None], jnp.where(free, Q[0] / scale, 1)[0]
    both = free[:, None] & free[None, :]
    A = jnp.where(both, Q, lanes.identity(m, Q.ndim - 2).astype(Q.dtype))
    relative = jnp.where(free, 1 / scale, 1)
    smallest = jnp.full(A.shape[2:], jnp.inf, Q.dtype)

    def eliminate(k, carry):
        A, smallest = carry
        return _sweep(A, k), jnp.minimum(smallest, A[k, k] * relative[k])

    if m <= _MAX_UNROLLED:
        for k in range(m):
            A, smallest = lanes.materialize(functools.partial(eliminate, k), (A, smallest))
    else:
        A, smallest = lax.fori_loop(0, m, eliminate, (A, smallest))
    return jnp.where(both, -A, 0), smallest


def smallest_pivot(Q: Array, free: Array, scale: Array) -> Array:
    """The one that ``masked_inverse`` finds, without the inverse."""
    m = free.shape[0]
    if not 1 < m <= _MAX_UNROLLED:
        return masked_inverse(Q, free, scale)[1]
    both = free[:, None] & free[None, :]
    A = jnp.where(both, Q, lanes.identity(m, both.ndim - 2).astype(Q.dtype))
    relative = jnp.where(free, 1 / scale, 1)

    def eliminate(A):
        return A[1:, 1:] - A[1:, 0, None] * (A[0, 1:] / A[0, 0])

    pivots = []
    for _ in range(m):
        pivots.append(A[0, 0])
        A = lanes.materialize(eliminate, A)
    return jnp.min(jnp.stack(pivots) * relative, axis=0)


def _sweep(A, k):
    here = (jnp.arange(A.shape[0]) == k).reshape((-1,) + (1,) * (A.ndim - 1))
    row, column = here, here.reshape((1, -1) + (1,) * (A.ndim - 2))
    reciprocal = 1 / A[k, k]
    scaled = A[k] * reciprocal
    rest = A - A[:, k, None] * scaled
    return jnp.where(
        row & column,
        -reciprocal,
        jnp.where(row, scaled, jnp.where(column, scaled[:, None], rest)),
    )


def definite_threshold(dtype) -> float:
    """Pivots below this share of the terms they were computed from have no sign."""
    return 16 * lanes.eps(dtype)
