"""The linear-quadratic regulator with pinned controls, and its derivative (Module 1).

One factorization (the Riccati recursion on C and F) serves every right-hand side: the plan itself,
its derivative (the KKT matrix is symmetric, so the backward pass is one more LQR solve), and the
backward pass of ``mpc_solve``.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import lanes, validation
from jaxmpc.batching import batchwise
from jaxmpc.types import LQRSolution

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
    if m == 1:
        inverse = jnp.where(free, 1 / Q[0], 0)
        return inverse[None], jnp.where(free, Q[0] / scale, 1)[0]
    both = free[:, None] & free[None, :]
    A = jnp.where(both, Q, lanes.identity(m, Q.ndim - 2))
    relative = jnp.where(free, 1 / scale, 1)
    smallest = jnp.full(Q.shape[2:], jnp.inf, Q.dtype)

    def eliminate(k, carry):
        A, smallest = carry
        return _sweep(A, k), jnp.minimum(smallest, A[k, k] * relative[k])

    if m <= _MAX_UNROLLED:
        for k in range(m):
            A, smallest = lanes.materialize(functools.partial(eliminate, k), (A, smallest))
    else:
        A, smallest = lax.fori_loop(0, m, eliminate, (A, smallest))
    return jnp.where(both, -A, 0), smallest


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


def quadratic_form(C, F, V):
    """Q = C + Fᵀ V F, and the size of the terms in the diagonal of Q_uu before they cancel."""
    n = V.shape[0]
    VF = lanes.materialize(lanes.matmul, V, F)

    def combine(C, F, VF):
        pull = lanes.sum_of(F[k, n:] * VF[k, n:] for k in range(n))
        size = jnp.abs(lanes.diagonal(C[n:, n:])) + jnp.abs(pull)
        return C + lanes.matmul_t(F, VF), size

    return lanes.materialize(combine, C, F, VF)


def value_hessian(Q, K, n):
    """V = Q_xx + Q_xu K + Kᵀ Q_ux + Kᵀ Q_uu K, whose error is second order in that of K."""

    def combine(Q, K, half):
        V = Q[:n, :n] + lanes.matmul_t(half, K) + lanes.matmul_t(K, half)
        return (V + lanes.transpose(V)) * 0.5

    half = lanes.materialize(lambda Q, K: Q[n:, :n] + lanes.matmul(Q[n:, n:], K) * 0.5, Q, K)
    return lanes.materialize(combine, Q, K, half)


def factorize(C: Array, F: Array, C_final: Array, free: Array) -> Factors:
    """The backward recursion of Algorithm 1 on the matrices alone."""
    n = C_final.shape[0]

    def stage(V, data):
        C, F, free = data
        Q, size = quadratic_form(C, F, V)
        Quu_inv, curvature = masked_inverse(Q[n:, n:], free, size)
        K = lanes.materialize(lambda inverse, Q: -lanes.matmul(inverse, Q[n:, :n]), Quu_inv, Q)
        V = value_hessian(Q, K, n)
        return V, (K, Quu_inv, V, curvature)

    _, (K, Quu_inv, V, curvature) = lax.scan(stage, C_final, (C, F, free), reverse=True)
    return Factors(K, Quu_inv, jnp.concatenate([V, C_final[None]]), curvature)


def substitute(factors: Factors, F: Array, rhs: Rhs) -> tuple[Point, Array]:
    """Back and forward substitution: the plan, and the feedforward terms k."""
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
    return Point(x, u, costate), k


# Under vmap the whole batch at once, with the batch on the last axis.
_factorize = batchwise(factorize, lanes.last(factorize))
_substitute = batchwise(substitute, lanes.last(substitute))


@jax.custom_vjp
def kkt_solve(
    factors: Factors, C: Array, F: Array, C_final: Array, free: Array, rhs: Rhs
) -> tuple[Point, Array]:
    """The point where the LQR's Lagrangian is stationary, and the feedforward terms.

        minimise Σ ½ zᵀ C z + cᵀ z + ½ x_Tᵀ C_final x_T + c_finalᵀ x_T,  z = (x, u),
        x_{t+1} = F z + f,  x_0 = x_init,  u = 0 where not free.

    ``factors`` are those of (C, F, C_final, free); C is symmetric. With L the Lagrangian and M its
    Hessian in y = (z, λ), the derivative is dy = −M⁻¹ d(∇L). M is symmetric, so for a cotangent ȳ
    the backward pass solves M w = −ȳ, the same LQR with c = z̄, f = λ̄ and x_init = λ̄_0, and
    returns the derivative of wᵀ∇L in the data (eq. 8 and 9). The feedforward terms are not
    differentiable here.
    """
    return _substitute(factors, F, rhs)


def _kkt_solve_fwd(factors, C, F, C_final, free, rhs):
    # Calling the function itself keeps the saved output differentiable: second derivatives.
    out = kkt_solve(factors, C, F, C_final, free, rhs)
    return out, (factors, C, F, C_final, free, out[0])


def _kkt_solve_bwd(saved, cotangent):
    factors, C, F, C_final, free, point = saved
    w, _ = kkt_solve(factors, C, F, C_final, free, adjoint_rhs(cotangent[0]))
    z = jnp.concatenate([point.x[:-1], point.u], axis=1)
    wz = jnp.concatenate([w.x[:-1], w.u], axis=1)
    C_bar = _symmetric_outer(wz, z)
    F_bar = _outer(point.costate[1:], wz) + _outer(w.costate[1:], z)
    C_final_bar = _symmetric_outer(w.x[-1], point.x[-1])
    return None, C_bar, F_bar, C_final_bar, None, adjoint_cotangent(w)


kkt_solve.defvjp(_kkt_solve_fwd, _kkt_solve_bwd)


def adjoint_rhs(cotangent: Point) -> Rhs:
    """The right-hand side of the adjoint system M w = −ȳ, as that of an LQR problem."""
    c = jnp.concatenate([cotangent.x[:-1], cotangent.u], axis=1)
    return Rhs(cotangent.costate[0], c, cotangent.costate[1:], cotangent.x[-1])


def adjoint_cotangent(w: Point) -> Rhs:
    """The cotangents of the right-hand side, from the adjoint solution."""
    c = jnp.concatenate([w.x[:-1], w.u], axis=1)
    return Rhs(w.costate[0], c, w.costate[1:], w.x[-1])


def _outer(a, b):
    return a[..., :, None] * b[..., None, :]


def _symmetric_outer(a, b):
    return (_outer(a, b) + _outer(b, a)) * 0.5


@jax.custom_vjp
def _attach_gains(gains, C, F, C_final, free, rhs):
    """The identity on the gains (K, k); their derivative is that of the recursion itself."""
    return gains


def _attach_gains_fwd(gains, C, F, C_final, free, rhs):
    # The gains were computed from constants: only through this function do they move.
    gains = _attach_gains(gains, C, F, C_final, free, rhs)
    return gains, (C, F, C_final, free, rhs)


def _attach_gains_bwd(saved, cotangent):
    C, F, C_final, free, rhs = saved

    def recursion(C, F, C_final, rhs):
        factors = factorize(C, F, C_final, free)
        return factors.K, substitute(factors, F, rhs)[1]

    _, vjp = jax.vjp(recursion, C, F, C_final, rhs)
    C_bar, F_bar, C_final_bar, rhs_bar = vjp(cotangent)
    return None, C_bar, F_bar, C_final_bar, None, rhs_bar


_attach_gains.defvjp(_attach_gains_fwd, _attach_gains_bwd)


def lqr_solve(
    x_init: ArrayLike,
    C: ArrayLike,
    c: ArrayLike,
    F: ArrayLike,
    f: ArrayLike | None = None,
    *,
    C_final: ArrayLike | None = None,
    c_final: ArrayLike | None = None,
    free: ArrayLike | None = None,
) -> LQRSolution:
    """The finite-horizon linear-quadratic regulator with pinned controls.

        minimise over u   Σ_{t<T} ½ z_tᵀ C_t z_t + c_tᵀ z_t  +  ½ x_Tᵀ C_final x_T + c_finalᵀ x_T
        subject to        x_0 = x_init,  x_{t+1} = F_t z_t + f_t,  u_t = 0 where not free_t,

    with z_t = (x_t, u_t). One problem; batch it with ``jax.vmap``.

    Args:
      x_init: [n].
      C: [T, n+m, n+m]; only its symmetric part counts. The problem needs Q_uu = C_uu + BᵀVB to be
        positive definite on the free controls at every stage; where it is not, what comes back
        is a stationary point that is no minimum (or not finite, where Q_uu is singular).
      c: [T, n+m].
      F: [T, n, n+m], the matrices (A, B) side by side.
      f: [T, n], 0 by default.
      C_final: [n, n], 0 by default; only its symmetric part counts.
      c_final: [n], 0 by default.
      free: [T, m] bool, all True by default; False pins that control to 0.

    Returns:
      An ``LQRSolution`` with x [T+1, n], u [T, m], costate [T+1, n], K [T, m, n], k [T, m].

    Differentiable, in reverse mode and to any order, in every array argument but ``free``. The
    backward pass of x, u and costate is one more LQR solve with the forward's factorization.

    Raises:
      TypeError: an argument is not real floating-point (``free``: not boolean).
      ValueError: a shape does not fit the others.

    Source: Amos et al. 2018 (arXiv:1810.13400), Algorithm 1 and Module 1, extended by the terminal
    cost and the mask.
    """
    args = validation.lqr_arguments(x_init, C, c, F, f, C_final, c_final, free)
    C = (args.C + jnp.swapaxes(args.C, -1, -2)) * 0.5
    C_final = (args.C_final + args.C_final.T) * 0.5
    rhs = Rhs(args.x_init, args.c, args.f, args.c_final)
    factors = _factorize(*lax.stop_gradient((C, args.F, C_final)), args.free)
    (x, u, costate), k = kkt_solve(factors, C, args.F, C_final, args.free, rhs)
    K, k = _attach_gains((factors.K, k), C, args.F, C_final, args.free, rhs)
    return LQRSolution(x, u, costate, K, k)
