"""The linear-quadratic regulator with pinned controls, and its derivative (Module 1).

One factorization (the Riccati recursion on C and F) serves every right-hand side: the plan itself,
its derivative (the KKT matrix is symmetric, so the backward pass is one more LQR solve), and the
backward pass of ``mpc_solve``.
"""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.riccati import kkt, parallel, sequential
from jaxmpc.riccati.sequential import Rhs
from jaxmpc.types import LQRSolution, RiccatiMethod


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
    factors_bar, *matrices_bar, _, rhs_bar = kkt.solve_cotangents(method, saved, cotangent)
    return None, factors_bar, *matrices_bar, rhs_bar


_attach_plan.defvjp(_attach_plan_fwd, _attach_plan_bwd)


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

    module = parallel if method == "parallel" else sequential

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
    solve = parallel.solve if method == "parallel" else kkt.solve
    factors, point, k = solve(*lax.stop_gradient((*system, rhs)))
    x, u, costate, _ = _attach_plan(point, factors, *system, rhs, method)
    K, k = _attach_gains((factors.K, k), *system, rhs, method)
    return LQRSolution(x, u, costate, K, k)
