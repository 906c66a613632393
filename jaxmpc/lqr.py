"""The linear-quadratic regulator with pinned controls, and its derivative (Module 1).

One factorization (the Riccati recursion on C and F) serves every right-hand side: the plan itself,
its derivative (the KKT matrix is symmetric, so the backward pass is one more LQR solve), and the
backward pass of ``mpc_solve``.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import constrained, parallel, riccati, validation
from jaxmpc.batch import lanes
from jaxmpc.batch.batchwise import batchwise
from jaxmpc.constrained import ActiveRows
from jaxmpc.model import Rows
from jaxmpc.riccati import Factors, Point, Rhs
from jaxmpc.types import LQRSolution, RiccatiMethod


def _on_lanes(fn, sizes):
    return batchwise(fn, lanes.last(fn, sizes))


# A whole batch at once under vmap, with the batch on the last axis.
_factorize = _on_lanes(riccati.factorize, lambda C, F, C_final, free: _sizes(F))
_substitute = _on_lanes(riccati.substitute, lambda factors, F, rhs: _sizes(F))
_solve = _on_lanes(riccati.solve, lambda C, F, C_final, free, rhs: _sizes(F))
_solve_constrained = _on_lanes(
    functools.partial(constrained.solve, substitute=riccati.substitute),
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


def _kkt_solve_bwd(method, saved, cotangent):
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


kkt_solve.defvjp(_kkt_solve_fwd, _kkt_solve_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attach_plan(point, factors, C, F, C_final, free, rhs, method):
    """The identity on a solution of ``kkt_solve``, with its derivative."""
    return point


def _attach_plan_fwd(point, factors, C, F, C_final, free, rhs, method):
    point = _attach_plan(point, factors, C, F, C_final, free, rhs, method)
    return point, (factors, C, F, C_final, free, point)


def _attach_plan_bwd(method, saved, cotangent):
    factors, C, F, C_final, free, point = saved
    saved = factors, C, F, C_final, free, None, point
    factors_bar, *matrices_bar, _, rhs_bar = _kkt_solve_bwd(method, saved, cotangent)
    return None, factors_bar, *matrices_bar, rhs_bar


_attach_plan.defvjp(_attach_plan_fwd, _attach_plan_bwd)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attach_gains(gains, C, F, C_final, free, rhs, method):
    """The identity on the gains (K, k); their derivative is that of the recursion itself."""
    return gains


def _attach_gains_fwd(gains, C, F, C_final, free, rhs, method):
    # The gains were computed from constants: only through this function do they move.
    gains = _attach_gains(gains, C, F, C_final, free, rhs, method)
    return gains, (C, F, C_final, free, rhs)


def _attach_gains_bwd(method, saved, cotangent):
    C, F, C_final, free, rhs = saved

    module = parallel if method == "parallel" else riccati

    def recursion(C, F, C_final, rhs):
        factors = module.factorize(C, F, C_final, free)
        return factors.K, module.substitute(factors, F, rhs)[1]

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
    method: RiccatiMethod = "auto",
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
      method: "sequential" goes through the horizon stage by stage; "parallel" does all stages at
        once, in O(log T) steps, forward and backward, for long horizons on hardware that is wide
        enough: it does several times the arithmetic and takes longer to compile. It agrees with
        the sequential result to rounding, and where it would not, that is what comes back, at the
        price of both. "auto" is sequential: on CPU the parallel solve was far slower for a
        batch, and no clear gain for one problem. Other hardware was not measured.

    Returns:
      An ``LQRSolution`` with x [T+1, n], u [T, m], costate [T+1, n], K [T, m, n], k [T, m].

    Differentiable, in reverse mode and to any order, in every array argument but ``free``. The
    backward pass of x, u and costate is one more LQR solve with the forward's factorization.

    Raises:
      TypeError: an argument is not real floating-point (``free``: not boolean).
      ValueError: a shape does not fit the others, or ``method`` is none of the above.

    Source: Amos et al. 2018 (arXiv:1810.13400), Algorithm 1 and Module 1, extended by the terminal
    cost and the mask. The parallel method: Särkkä and García-Fernández 2023 (arXiv:2104.03186).
    """
    validation.check_choice("method", method, get_args(RiccatiMethod))
    args = validation.lqr_arguments(x_init, C, c, F, f, C_final, c_final, free)
    C = (args.C + jnp.swapaxes(args.C, -1, -2)) * 0.5
    C_final = (args.C_final + args.C_final.T) * 0.5
    rhs = Rhs(args.x_init, args.c, args.f, args.c_final)
    system = C, args.F, C_final, args.free
    solve = parallel.solve if method == "parallel" else _solve
    factors, point, k = solve(*lax.stop_gradient((*system, rhs)))
    x, u, costate, _ = _attach_plan(point, factors, *system, rhs, method)
    K, k = _attach_gains((factors.K, k), *system, rhs, method)
    return LQRSolution(x, u, costate, K, k)
