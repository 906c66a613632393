"""The Riccati recursion, one stage after the other: the factorization of the LQR's KKT matrix, and
the substitutions that solve with it.

For one problem, or for a batch on the last axis of every array (``lanes``).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.pivots import masked_inverse
from jaxmpc.riccati.point import Point, Rhs, Rows


class Factors(NamedTuple):
    """The Riccati factorization of the KKT matrix; pinned rows of K and Quu_inv are 0."""

    K: Array  # [T, m, n]
    Quu_inv: Array  # [T, m, m], the inverse on the free controls
    V: Array  # [T+1, n, n], the Hessian of the optimal cost-to-go
    curvature: Array  # [T], the smallest pivot of Q_uu on the free controls, relative


def quadratic_form(C: Array, F: Array, V: Array) -> tuple[Array, Array]:
    """Q = C + Fᵀ V F, and the size of its diagonal's terms before they cancel."""
    n = V.shape[0]
    VF = lanes.materialize(lanes.matmul, V, F)

    def combine(C, F, VF):
        pull = lanes.sum_of(F[k] * VF[k] for k in range(n))
        size = jnp.abs(lanes.diagonal(C)) + jnp.abs(pull)
        return C + lanes.matmul_t(F, VF), size

    return lanes.materialize(combine, C, F, VF)


def value_hessian(Q: Array, K: Array, n: int) -> Array:
    """V = Q_xx + Q_xu K + Kᵀ Q_ux + Kᵀ Q_uu K, whose error is second order in that of K."""
    half = lanes.materialize(lambda Q, K: Q[n:, :n] + lanes.matmul(Q[n:, n:], K) * 0.5, Q, K)
    S = lanes.materialize(lambda Q, K, half: Q[:n, :n] * 0.5 + lanes.matmul_t(half, K), Q, K, half)
    return lanes.materialize(lambda S: S + lanes.transpose(S), S)


def riccati_stage(C: Array, F: Array, free: Array, V: Array) -> tuple[Factors, Array]:
    """One stage of the recursion from the next one's V: its ``Factors``, and the size of the terms
    of Q's diagonal."""
    n = V.shape[0]
    Q, size = quadratic_form(C, F, V)
    Quu_inv, curvature = masked_inverse(Q[n:, n:], free, size[n:])
    K = gains(Quu_inv, Q)
    return Factors(K, Quu_inv, value_hessian(Q, K, n), curvature), size


def gains(Quu_inv: Array, Q: Array) -> Array:
    """K = −Q_uu⁻¹ Q_ux."""
    m = Quu_inv.shape[0]
    return lanes.materialize(lambda inverse, Q: -lanes.matmul(inverse, Q[-m:, :-m]), Quu_inv, Q)


@lanes.any_rank
def factorize(C: Array, F: Array, C_final: Array, free: Array) -> Factors:
    """The backward recursion of Algorithm 1 on the matrices alone."""

    def stage(V, data):
        factors, _ = riccati_stage(*data, V)
        return factors.V, factors

    _, (K, Quu_inv, V, curvature) = lax.scan(stage, C_final, (C, F, free), reverse=True)
    return Factors(K, Quu_inv, jnp.concatenate([V, C_final[None]]), curvature)


def no_multipliers(rhs: Rhs) -> Rows:
    """Those of the rows in an LQR that does not have them: 0."""
    return jax.tree.map(jnp.zeros_like, rhs.g)


@lanes.any_rank
def substitute(factors: Factors, F: Array, rhs: Rhs) -> tuple[Point, Array]:
    """Back and forward substitution: the plan without rows, and the feedforward terms k."""
    n = rhs.x_init.shape[0]

    def backward(v, data):
        K, Quu_inv, V_next, F, c, f = data
        w = lanes.materialize(lambda v, V, f: v + lanes.matvec(V, f), v, V_next, f)
        q = lanes.materialize(lambda c, F, w: c + lanes.matvec_t(F, w), c, F, w)
        k = -lanes.matvec(Quu_inv, q[n:])
        v = q[:n] + lanes.matvec_t(K, q[n:])
        return v, (k, v)

    data = (factors.K, factors.Quu_inv, factors.V[1:], F, rhs.c, rhs.f)
    _, (k, v) = lax.scan(backward, rhs.c_final, data, reverse=True)

    def forward(x, data):
        K, k, F, f = data
        u = lanes.materialize(lambda K, k, x: lanes.matvec(K, x) + k, K, k, x)
        return lanes.matvec(F[:, :n], x) + lanes.matvec(F[:, n:], u) + f, (x, u)

    x_final, (x, u) = lax.scan(forward, rhs.x_init, (factors.K, k, F, rhs.f))
    x = jnp.concatenate([x, x_final[None]])
    affine = jnp.concatenate([v, rhs.c_final[None]])
    costate = jax.vmap(lanes.matvec)(factors.V, x) + affine
    return Point(x, u, costate, no_multipliers(rhs)), k


@lanes.any_rank
def row_freedom(factors: Factors, F: Array, G: Rows) -> tuple[Rows, Array]:
    """How far each row gives way to a unit of its multiplier: diag(G H⁻¹ Gᵀ), H the Hessian of the
    LQR that the factors are of, among its plans.

    That is the variance of G z where every control is off its feedback by noise of covariance
    Quu⁻¹: x_0 = 0, u = K x + w (the plans of an LQR as a Gauss-Markov process; Kailath, Sayed and
    Hassibi 2000, Linear Estimation, chapter 15). The second is the largest variance of each state
    and control [n+m], likewise.
    """

    def variances(G, covariance):
        return lanes.sum_of(
            G[:, i] * lanes.matvec(G, covariance[i]) for i in range(covariance.shape[0])
        )

    def stage(of_x, data):
        K, Quu_inv, F, G = data
        of_ux = lanes.materialize(lanes.matmul, K, of_x)
        of_u = lanes.materialize(
            lambda of_ux, K, Quu_inv: lanes.matmul(of_ux, lanes.transpose(K)) + Quu_inv,
            of_ux, K, Quu_inv,
        )  # fmt: skip
        upper = jnp.concatenate([of_x, lanes.transpose(of_ux)], axis=1)
        of_z = jnp.concatenate([upper, jnp.concatenate([of_ux, of_u], axis=1)])
        F_of_z = lanes.materialize(lanes.matmul, F, of_z)
        of_x = lanes.materialize(lambda a, F: lanes.matmul(a, lanes.transpose(F)), F_of_z, F)
        return of_x, (variances(G, of_z), lanes.diagonal(of_z))

    data = factors.K, factors.Quu_inv, F, G.stage
    of_x, (stages, of_z) = lax.scan(stage, jnp.zeros_like(factors.V[0]), data)
    return Rows(stages, variances(G.final, of_x)), jnp.max(of_z, axis=0)
