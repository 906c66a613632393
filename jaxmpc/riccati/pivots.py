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

    With L D Lᵀ = Q, L⁻¹ comes out beside D if the identity is eliminated along with Q: no LAPACK
    call, no square root, and an indefinite Q is still inverted, as the sum of l lᵀ / d over the
    rows l of L⁻¹. Where rows with large weights make Q stiff in some directions, that sum keeps
    what the soft ones are: sweeping Q in place, with as many operations, has an error of as many
    roundings as Q's condition number, in every direction.
    """
    m = free.shape[0]
    if m == 1:
        inverse = jnp.where(free, 1 / Q[0], 0)
        return inverse[None], jnp.where(free, Q[0] / scale, 1)[0]
    both = free[:, None] & free[None, :]
    eye = jnp.broadcast_to(lanes.identity(m, Q.ndim - 2).astype(Q.dtype), Q.shape)
    A = jnp.concatenate([jnp.where(both, Q, eye), eye], axis=1)
    relative = jnp.where(free, 1 / scale, 1)
    smallest = jnp.full(A.shape[2:], jnp.inf, Q.dtype)

    def eliminate(k, carry):
        A, inverse, smallest = carry
        pivot = A[k, k]
        below = (jnp.arange(m) > k).reshape((m,) + (1,) * (A.ndim - 2))
        factor = jnp.where(below, A[:, k] / pivot, 0)
        row = A[k, m:]
        inverse = inverse + row[:, None] * (row / pivot)
        return A - factor[:, None] * A[k], inverse, jnp.minimum(smallest, pivot * relative[k])

    carry = A, jnp.zeros_like(Q), smallest
    if m <= _MAX_UNROLLED:
        for k in range(m):
            carry = lanes.materialize(functools.partial(eliminate, k), carry)
    else:
        carry = lax.fori_loop(0, m, eliminate, carry)
    _, inverse, smallest = carry
    return jnp.where(both, inverse, 0), smallest


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


def definite_threshold(dtype) -> float:
    """Pivots below this share of the terms they were computed from have no sign."""
    return 16 * lanes.eps(dtype)


def convex_inverse(Q: Array, free: Array, scale: Array, plain: Array) -> tuple[Array, Array, Array]:
    """``masked_inverse`` of Q + diag(shift), positive definite; that shift [m], and Q's smallest
    pivot. Nothing is shifted where ``plain``.

    A pivot that is not positive is replaced by its absolute value: a direction of negative
    curvature gets the same positive one.

    Source: Gill, Murray and Wright 1981, Practical Optimization, 4.4.2.
    """
    m = free.shape[0]
    both = free[:, None] & free[None, :]
    eye = jnp.broadcast_to(lanes.identity(m, Q.ndim - 2).astype(Q.dtype), Q.shape)
    A = jnp.concatenate([jnp.where(both, Q, eye), eye], axis=1)
    scale = jnp.where(free & (scale > 0), scale, 1)
    threshold, least = definite_threshold(Q.dtype), lanes.eps(Q) ** 0.5

    def eliminate(k, carry):
        A, inverse, smallest, shift = carry
        pivot = A[k, k]
        small = ~(pivot > threshold * scale[k]) & ~plain
        lifted = jnp.where(small, jnp.maximum(jnp.abs(pivot), least * scale[k]), pivot)
        rows = jnp.arange(m).reshape((m,) + (1,) * (A.ndim - 2))
        factor = jnp.where(rows > k, A[:, k] / lifted, 0)
        row = A[k, m:]
        inverse = inverse + row[:, None] * (row / lifted)
        shift = jnp.where(rows == k, lifted - pivot, shift)
        smallest = jnp.minimum(smallest, pivot / scale[k])
        return A - factor[:, None] * A[k], inverse, smallest, shift

    smallest = jnp.full(Q.shape[2:], jnp.inf, Q.dtype)
    carry = A, jnp.zeros_like(Q), smallest, jnp.zeros_like(scale)
    if m <= _MAX_UNROLLED:
        for k in range(m):
            carry = lanes.materialize(functools.partial(eliminate, k), carry)
    else:
        carry = lax.fori_loop(0, m, eliminate, carry)
    _, inverse, smallest, shift = carry
    return jnp.where(both, inverse, 0), jnp.where(free, shift, 0), smallest


@lanes.any_rank
def convex_part(H: Array, sizes: Array) -> Array:
    """H + diag(E), positive definite, for symmetric H [k, k] in variables of the given sizes [k].

    What is definite already stays as it is, and E is of the size of H's negative curvature. A
    variable whose size is not known, 0, gets the one with which it curves as much as the others.

    Source: Gill, Murray and Wright 1981, Practical Optimization, 4.4.2.2.
    """
    k = H.shape[0]
    curvature = jnp.abs(lanes.diagonal(H))
    most = jnp.max(curvature * sizes**2, axis=0)
    own = jnp.where(most > 0, most, 1) / jnp.where(curvature > 0, curvature, jnp.inf)
    sizes = jnp.where(sizes > 0, sizes, jnp.sqrt(own))
    A = H * sizes[:, None] * sizes
    eye = lanes.identity(k, A.ndim - 2)
    largest = jnp.max(jnp.abs(jnp.where(eye, A, 0)), axis=(0, 1))
    beside = jnp.max(jnp.abs(jnp.where(eye, 0, A)), axis=(0, 1))
    bound = jnp.maximum(largest, beside / max(1.0, (k**2 - 1.0) ** 0.5))
    least = lanes.eps(A) ** 0.5 * jnp.maximum(largest, beside)
    rows = jnp.arange(k).reshape((k,) + (1,) * (A.ndim - 2))

    def eliminate(j, carry):
        A, E = carry
        row = lax.dynamic_index_in_dim(A, j, 0, keepdims=False)
        pivot = lax.dynamic_index_in_dim(row, j, 0, keepdims=False)
        after = jnp.where(rows > j, row, 0)
        most = jnp.max(jnp.abs(after), axis=0)
        lifted = jnp.maximum(jnp.abs(pivot), most**2 / jnp.where(bound > 0, bound, 1))
        lifted = jnp.maximum(lifted, least)
        E = jnp.where(rows == j, lifted - pivot, E)
        # A block of zeros stays what it is.
        return A - after[:, None] * (after / jnp.where(lifted > 0, lifted, 1)), E

    _, E = lax.fori_loop(0, k, eliminate, (A, jnp.zeros_like(A[0])))
    E = jnp.maximum(E, 0) / jnp.where(sizes > 0, sizes, jnp.inf) ** 2
    return H + lanes.diagonal_matrix(E)
