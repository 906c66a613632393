"""The LQR's KKT system: one factorization, every right-hand side, and the derivative (Module 1).

One factorization (the Riccati recursion on C and F) serves every right-hand side: the plan itself,
its derivative (the KKT matrix is symmetric, so the backward pass is one more LQR solve), and the
backward pass of ``mpc_solve``.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.batch.batchwise import batchwise
from jaxmpc.riccati import constrained, parallel, sequential
from jaxmpc.riccati.constrained import ActiveRows
from jaxmpc.riccati.rows import Rows
from jaxmpc.riccati.sequential import Factors, Point, Rhs
from jaxmpc.types import RiccatiMethod


def _on_lanes(fn, sizes):
    return batchwise(fn, lanes.last(fn, sizes))


# A whole batch at once under vmap, with the batch on the last axis.
_factorize = _on_lanes(sequential.factorize, lambda C, F, C_final, free: _sizes(F))


_substitute = _on_lanes(sequential.substitute, lambda factors, F, rhs: _sizes(F))


solve = _on_lanes(sequential.solve, lambda C, F, C_final, free, rhs: _sizes(F))


_solve_constrained = _on_lanes(
    functools.partial(constrained.solve, substitute=sequential.substitute),
    lambda factors, C, F, C_final, free, rows, rhs: _sizes(F),
)


def _sizes(F) -> tuple[int, int]:
    _, n, both = F.shape
    return n, both - n


def factorize(
    C: Array, F: Array, C_final: Array, free: Array, method: RiccatiMethod = "auto"
) -> Factors:
    """The Riccati factorization of the LQR's KKT matrix, by the ``method`` of ``lqr_solve``.

    Of constants: what is differentiated calls that of the module itself.
    """
    if method == "parallel":
        return parallel.factorize(C, F, C_final, free)
    return _factorize(C, F, C_final, free)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def kkt_solve(
    factors: Factors,
    C: Array,
    F: Array,
    C_final: Array,
    free: Array,
    rows: ActiveRows | None,
    rhs: Rhs,
    method: RiccatiMethod = "auto",
) -> Point:
    """The point where the LQR's Lagrangian is stationary.

        minimise Σ ½ zᵀ C z + cᵀ z + ½ x_Tᵀ C_final x_T + c_finalᵀ x_T,  z = (x, u),
        x_{t+1} = F z + f,  x_0 = x_init,  u = 0 where not free,  G z + g = 0 in active rows.

    ``factors`` are those of (C, F, C_final, free), with active rows those of ``penalised`` C and
    C_final; C is symmetric. With L the Lagrangian and M its Hessian in y = (z, λ, ν), the
    derivative is dy = −M⁻¹ d(∇L). M is symmetric, so for a cotangent ȳ the backward pass solves
    M w = −ȳ, the same LQR with c = z̄, f = λ̄, g = ν̄ and x_init = λ̄_0, and returns the derivative
    of wᵀ∇L in the data (eq. 8 and 9). ``method`` is that of ``lqr_solve``, for the backward pass
    too.
    """
    if rows is not None:
        system = factors, C, F, C_final, free, rows, rhs
        if method == "parallel":
            return constrained.solve(*system, parallel.substitute)
        return _solve_constrained(*system)
    substitute = parallel.substitute if method == "parallel" else _substitute
    return substitute(factors, F, rhs)[0]


def _kkt_solve_fwd(factors, C, F, C_final, free, rows, rhs, method):
    # Calling the function itself keeps the saved output differentiable: second derivatives.
    point = kkt_solve(factors, C, F, C_final, free, rows, rhs, method)
    return point, (factors, C, F, C_final, free, rows, point)


def solve_cotangents(method, saved, cotangent):
    factors, C, F, C_final, free, rows, point = saved
    w = kkt_solve(factors, C, F, C_final, free, rows, adjoint_rhs(cotangent), method)
    z = jnp.concatenate([point.x[:-1], point.u], axis=1)
    wz = jnp.concatenate([w.x[:-1], w.u], axis=1)
    C_bar = _symmetric_outer(wz, z)
    F_bar = _outer(point.costate[1:], wz) + _outer(w.costate[1:], z)
    C_final_bar = _symmetric_outer(w.x[-1], point.x[-1])
    rows_bar = None
    if rows is not None:
        (nu, nu_final), (w_nu, w_nu_final) = point.multiplier, w.multiplier
        stage = None if nu is None else _outer(nu, wz) + _outer(w_nu, z)
        final = nu_final
        if final is not None:
            final = _outer(nu_final, w.x[-1]) + _outer(w_nu_final, point.x[-1])
        rows_bar = ActiveRows(Rows(stage, final), None, None)
    return None, C_bar, F_bar, C_final_bar, None, rows_bar, adjoint_cotangent(w)


kkt_solve.defvjp(_kkt_solve_fwd, solve_cotangents)


def adjoint_rhs(cotangent: Point) -> Rhs:
    """The right-hand side of the adjoint system M w = −ȳ, as that of an LQR problem."""
    c = jnp.concatenate([cotangent.x[:-1], cotangent.u], axis=1)
    costate, g = cotangent.costate, cotangent.multiplier
    return Rhs(costate[0], c, costate[1:], cotangent.x[-1], g)


def adjoint_cotangent(w: Point) -> Rhs:
    """The cotangents of the right-hand side, from the adjoint solution."""
    c = jnp.concatenate([w.x[:-1], w.u], axis=1)
    return Rhs(w.costate[0], c, w.costate[1:], w.x[-1], w.multiplier)


def _outer(a, b):
    return a[..., :, None] * b[..., None, :]


def _symmetric_outer(a, b):
    return (_outer(a, b) + _outer(b, a)) * 0.5
