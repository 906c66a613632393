"""The Riccati recursion, one stage after the other: the factorization of the LQR's KKT matrix, and
the substitutions that solve with it."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmpc import entrywise

# Up to this many controls the elimination of one stage is unrolled at trace time.
_MAX_UNROLLED = 8


class Factors(NamedTuple):
    """The Riccati factorization of the KKT matrix; pinned rows of K and Quu_inv are 0."""

    K: Array  # [T, m, n]
    Quu_inv: Array  # [T, m, m], the inverse on the free controls
    V: Array  # [T+1, n, n], the Hessian of the optimal cost-to-go
    curvature: Array  # [T], the smallest pivot of Q_uu on the free controls, relative


class Rhs(NamedTuple):
    """What the KKT system is solved for: the terms of the LQR that C and F do not hold."""

    x_init: Array  # [n]
    c: Array  # [T, n+m]
    f: Array  # [T, n]
    c_final: Array  # [n]


class Point(NamedTuple):
    """A plan with its states and costates: the unknowns of the KKT system."""

    x: Array  # [T+1, n]
    u: Array  # [T, m]
    costate: Array  # [T+1, n]


def masked_inverse(Q, free, scale):
    """The inverse of Q [m,m] on its free rows and columns, 0 elsewhere; and its smallest pivot.

    The pivots are the D of LDLᵀ: positive exactly where Q is positive definite on the free
    controls. They come relative to ``scale`` [m], the size of the terms that were summed in Q's
    diagonal, since a pivot at their rounding level has no sign; pinned rows count as 1.

    Sweeping every pivot of a symmetric matrix leaves −Q⁻¹ in its place, in m rank-one updates:
    no LAPACK call, no square root, and an indefinite Q is still inverted.
    """
    m = free.shape[0]
    if entrywise.is_entrywise(Q):
        one, where = 1.0, jnp.where
        A = np.empty((m, m), object)
        for i, j in np.ndindex(m, m):
            A[i, j] = where(free[i] & free[j], Q[i, j], float(i == j))
        smallest = None
        for k in range(m):
            pivot = where(free[k], A[k, k] / scale[k], one)
            smallest = pivot if smallest is None else jnp.minimum(smallest, pivot)
            A = _sweep_entries(A, k)
        inverse = np.empty((m, m), object)
        for i, j in np.ndindex(m, m):
            inverse[i, j] = where(free[i] & free[j], -A[i, j], 0.0)
        return inverse, smallest

    both = free[:, None] & free[None, :]
    A = jnp.where(both, Q, jnp.eye(m, dtype=Q.dtype))
    relative = jnp.where(free, 1 / scale, 1)

    def eliminate(k, carry):
        A, smallest = carry
        return _sweep(A, k), jnp.minimum(smallest, A[k, k] * relative[k])

    carry = A, jnp.asarray(jnp.inf, Q.dtype)
    if m <= _MAX_UNROLLED:
        for k in range(m):
            carry = eliminate(k, carry)
    else:
        carry = lax.fori_loop(0, m, eliminate, carry)
    A, smallest = carry
    return jnp.where(both, -A, 0), smallest


def _sweep(A, k):
    row = A[k] / A[k, k]
    swept = A - A[:, k][:, None] * row[None, :]
    return swept.at[k, :].set(row).at[:, k].set(row).at[k, k].set(-1 / A[k, k])


def _sweep_entries(A, k):
    m = A.shape[0]
    reciprocal = 1 / A[k, k]
    swept = np.empty_like(A)
    for i, j in np.ndindex(m, m):
        if i == k and j == k:
            swept[i, j] = -reciprocal
        elif i == k or j == k:
            swept[i, j] = A[i, j] * reciprocal
        else:
            swept[i, j] = A[i, j] - A[i, k] * A[k, j] * reciprocal
    return swept


def entrywise_pays(n: int, m: int) -> bool:
    return (n + m) ** 2 <= entrywise.MAX_ENTRIES


def quadratic_form(C, F, V):
    """Q = C + Fᵀ V F, and the size of its diagonal's terms before they cancel."""
    FVF = F.T @ (V @ F)
    return C + FVF, entrywise.diag(abs(C) + abs(FVF))


def value_hessian(Q, K, n):
    """V = Q_xx + Q_xu K + Kᵀ Q_ux + Kᵀ Q_uu K, whose error is second order in that of K."""
    QxuK = Q[:n, n:] @ K
    V = Q[:n, :n] + QxuK + QxuK.T + K.T @ (Q[n:, n:] @ K)
    return (V + V.T) * 0.5


def riccati_stage(C, F, free, V):
    """One stage of the recursion from the next one's V: its ``Factors``, and the size of the terms
    of Q's diagonal."""
    n = V.shape[0]
    Q, size = quadratic_form(C, F, V)
    Quu_inv, curvature = masked_inverse(Q[n:, n:], free, size[n:])
    K = -(Quu_inv @ Q[n:, :n])
    return Factors(K, Quu_inv, value_hessian(Q, K, n), curvature), size


def factorize(C: Array, F: Array, C_final: Array, free: Array) -> Factors:
    """The backward recursion of Algorithm 1 on the matrices alone."""
    n, m = C_final.shape[0], free.shape[1]

    def stage(V, data):
        factors, _ = riccati_stage(*data, V)
        return factors.V, factors

    _, (K, Quu_inv, V, curvature) = entrywise.scan(
        stage, C_final, (C, F, free), entrywise=entrywise_pays(n, m), reverse=True
    )
    return Factors(K, Quu_inv, jnp.concatenate([V, C_final[None]]), curvature)


def substitute(factors: Factors, F: Array, rhs: Rhs) -> tuple[Point, Array]:
    """Back and forward substitution: the plan, and the feedforward terms k."""
    n, m = rhs.x_init.shape[0], factors.K.shape[1]
    entries = entrywise_pays(n, m)

    def backward(v, data):
        K, Quu_inv, V_next, F, c, f = data
        q = c + F.T @ (v + V_next @ f)
        k = -(Quu_inv @ q[n:])
        v = q[:n] + K.T @ q[n:]
        return v, (k, v)

    data = (factors.K, factors.Quu_inv, factors.V[1:], F, rhs.c, rhs.f)
    _, (k, v) = entrywise.scan(backward, rhs.c_final, data, entrywise=entries, reverse=True)

    def forward(x, data):
        K, k, F, f = data
        u = K @ x + k
        return F[:, :n] @ x + F[:, n:] @ u + f, (x, u)

    x_final, (x, u) = entrywise.scan(
        forward, rhs.x_init, (factors.K, k, F, rhs.f), entrywise=entries
    )
    x = jnp.concatenate([x, x_final[None]])
    costate = jnp.einsum("tij,tj->ti", factors.V, x) + jnp.concatenate([v, rhs.c_final[None]])
    return Point(x, u, costate), k
