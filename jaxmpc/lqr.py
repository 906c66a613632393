"""The linear-quadratic regulator with pinned controls, and its derivative (Module 1)."""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.batch.unchecked import unchecked
from jaxmpc.derivative.isolation import finite, zeros_unless
from jaxmpc.derivative.tied import along, tied
from jaxmpc.riccati import kkt
from jaxmpc.riccati.constrained import System, no_active_rows, residual
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.riccati.point import Point, Rhs, no_rows
from jaxmpc.types import DerivativeRule, LQRSolution, RiccatiMethod, Status

_Gains = tuple[Array, Array]  # K and k


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
    derivative: DerivativeRule = "vjp",
) -> LQRSolution:
    """The finite-horizon linear-quadratic regulator with pinned controls.

        minimise over u   Σ_{t<T} ½ z_tᵀ C_t z_t + c_tᵀ z_t  +  ½ x_Tᵀ C_final x_T + c_finalᵀ x_T
        subject to        x_0 = x_init,  x_{t+1} = F_t z_t + f_t,  u_t = 0 where not free_t,

    with z_t = (x_t, u_t). One problem; batch it with ``jax.vmap``.

    Args:
      x_init: [n].
      C: [T, n+m, n+m]; only its symmetric part counts. The problem needs Q_uu = C_uu + BᵀVB to be
        positive definite on the free controls at every stage; where it is not, what comes back
        is a stationary point that is no minimum (or not finite, where Q_uu is singular), and
        ``status`` says so.
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
      derivative: "vjp" for reverse mode; "jvp" for forward mode too, at one more LQR solve with the
        forward's factorization a tangent. See ``Options.derivative``.

    Returns:
      An ``LQRSolution`` with x [T+1, n], u [T, m], costate [T+1, n], K [T, m, n], k [T, m] and the
      ``status``: CONVERGED (the one minimum), INDEFINITE (a stationary point: some Q_uu is not
      positive definite, or is singular but for rounding) or NONFINITE.

    Differentiable to any order in every array argument but ``free``, in reverse mode, and with
    ``derivative="jvp"`` in forward mode too. The backward pass of x, u and costate is one more LQR
    solve with the forward's factorization. The gradient of a problem that is NONFINITE is zero, and
    the others of its batch do not notice it.

    Raises:
      TypeError: an argument is not real floating-point (``free``: not boolean).
      ValueError: a shape does not fit the others, or ``method`` or ``derivative`` is none of the
        above.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import lqr_solve
      >>> F = jnp.tile(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]), (5, 1, 1))  # a cart
      >>> C, c = jnp.tile(jnp.eye(3), (5, 1, 1)), jnp.zeros((5, 3))
      >>> solution = lqr_solve(jnp.array([1.0, 0.0]), C, c, F)
      >>> print(jnp.array_str(solution.u[:4, 0], precision=2))
      [-0.51 -0.09  0.09  0.1 ]
      >>> print(jnp.array_str(solution.K[0], precision=2))
      [[-0.51 -1.28]]

    Source: Amos et al. 2018 (arXiv:1810.13400), Algorithm 1 and Module 1, extended by the terminal
    cost and the mask. The parallel method: Särkkä and García-Fernández 2023 (arXiv:2104.03186).
    """
    validation.check_choice("method", method, get_args(RiccatiMethod))
    validation.check_choice("derivative", derivative, get_args(DerivativeRule))
    args = validation.lqr_arguments(x_init, C, c, F, f, C_final, c_final, free)
    solve = unchecked(functools.partial(_solve, kkt.METHODS[method], derivative))
    solution: LQRSolution = solve(args)
    return solution


def _solve(
    how: kkt.Method, derivative: DerivativeRule, args: validation.LQRArguments
) -> LQRSolution:
    C = (args.C + jnp.swapaxes(args.C, -1, -2)) * 0.5
    C_final = (args.C_final + args.C_final.T) * 0.5
    F, free = args.F, args.free
    rhs = Rhs(args.x_init, args.c, args.f, args.c_final, no_rows(len(F), F.dtype))
    factors, point, k = how.solve(*lax.stop_gradient((C, F, C_final, free, rhs)))
    sound = finite((point, factors.K, k))
    definite = jnp.all(factors.curvature > definite_threshold(F.dtype))
    status = jnp.where(definite, Status.CONVERGED, Status.INDEFINITE)
    status = jnp.where(sound, status, Status.NONFINITE).astype(jnp.int32)
    system = System(factors, C, F, C_final, free, no_active_rows(F))
    found = point, (factors.K, k)
    (x, u, costate, _), (K, k) = _with_derivatives(how, system, rhs, *found, sound, derivative)
    return LQRSolution(x, u, costate, K, k, status)


def _with_derivatives(
    method: kkt.Method,
    system: System,
    rhs: Rhs,
    point: Point,
    gains: _Gains,
    sound: Array,
    rule: DerivativeRule,
) -> tuple[Point, _Gains]:
    """The plan, which moves as that of ``kkt_solve``, and the gains, which move as those of the
    recursion: both were found from constants. Those of a problem that is not ``sound`` do not."""
    none: Any = None

    def pull_plan(
        cotangent: Point, point: Point, system: System, rhs: Rhs, sound: Array
    ) -> tuple[System, Rhs, None]:
        cotangent, *saved = zeros_unless(sound, (cotangent, system, point))
        return *kkt.solve_cotangents(method, tuple(saved), cotangent), None

    def push_plan(
        tangents: tuple[Any, ...], point: Point, system: System, rhs: Rhs, sound: Array
    ) -> Point:
        point, system, rhs = zeros_unless(sound, (point, system, rhs))

        def left(system: System, rhs: Rhs) -> Rhs:
            return residual(system, point, rhs)

        moved = kkt.linear_kkt_solve(method, system, along(left, (system, rhs), tangents[:2]))
        still: Point = zeros_unless(sound, moved)
        return still

    def regular(system: System, rhs: Rhs, sound: Array) -> tuple[System, Rhs]:
        """Of zeros alone no Q_uu has an inverse."""
        eye = jnp.eye(system.C.shape[-1], dtype=system.C.dtype)
        C = jnp.where(sound, system.C, eye)
        system, rhs = zeros_unless(sound, (system, rhs))
        return system._replace(C=C), rhs

    def recursion(system: System, rhs: Rhs) -> _Gains:
        factorize, substitute = method.recursion
        factors = factorize(system.C, system.F, system.C_final, system.free)
        return factors.K, substitute(factors, system.F, rhs)[1]

    def pull_gains(
        cotangent: _Gains, gains: _Gains, system: System, rhs: Rhs, sound: Array
    ) -> tuple[System, Rhs, None]:
        system, rhs = regular(system, rhs, sound)

        def of_matrices(C: Array, F: Array, C_final: Array, rhs: Rhs) -> _Gains:
            return recursion(system._replace(C=C, F=F, C_final=C_final), rhs)

        _, vjp = jax.vjp(of_matrices, system.C, system.F, system.C_final, rhs)
        C_bar, F_bar, C_final_bar, rhs_bar = vjp(zeros_unless(sound, cotangent))
        return System(none, C_bar, F_bar, C_final_bar, none, none), rhs_bar, None

    def push_gains(
        tangents: tuple[Any, ...], gains: _Gains, system: System, rhs: Rhs, sound: Array
    ) -> _Gains:
        moved: _Gains = along(recursion, regular(system, rhs, sound), tangents[:2])
        still: _Gains = zeros_unless(sound, moved)
        return still

    return (
        tied(pull_plan, push_plan, rule=rule, moves=False)(point, system, rhs, sound),
        tied(pull_gains, push_gains, rule=rule, moves=False)(gains, system, rhs, sound),
    )
