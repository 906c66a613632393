"""The LQR's KKT system: one factorization, every right-hand side, and the derivative (Module 1).

One factorization (the Riccati recursion on C and F) serves every right-hand side: the plan itself,
its derivative (the KKT matrix is symmetric, so the backward pass is one more LQR solve), and the
backward pass of ``mpc_solve``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.flatten_util import ravel_pytree

from jaxmpc.batch import lanes
from jaxmpc.batch.batchwise import batchwise
from jaxmpc.riccati import constrained, convex, parallel, sequential
from jaxmpc.riccati.constrained import ActiveRows, System, residual
from jaxmpc.riccati.point import Point, Rhs, Rows, z_of
from jaxmpc.riccati.sequential import Factors


class Method(NamedTuple):
    """One way to go through the horizon. ``substitute`` also returns the feedforward terms k."""

    # Of constants; in sequence, a whole batch at once under vmap, with the batch on the last axis.
    factorize: Callable[[Array, Array, Array, Array], Factors]  # (C, F, C_final, free)
    substitute: Callable[[Factors, Array, Rhs], tuple[Point, Array]]  # (factors, F, rhs)
    solve: Callable  # both, (C, F, C_final, free, rhs) -> factors, point, k
    solve_rows: Callable[[System, Rhs], Point]
    # The same factorization and substitution as functions that can be differentiated.
    recursion: tuple[Callable, Callable]


def _on_lanes(fn: Callable, F_of: Callable) -> Callable:
    def sizes(*args):
        _, n, both = F_of(*args).shape
        return n, both - n

    return batchwise(fn, lanes.last(fn, sizes))


def _solve(module) -> Callable:
    def solve(C, F, C_final, free, rhs):
        factors = module.factorize(C, F, C_final, free)
        return factors, *module.substitute(factors, F, rhs)

    return solve


def _solve_rows(module) -> Callable:
    return functools.partial(constrained.solve, substitute=module.substitute)


SEQUENTIAL = Method(
    factorize=_on_lanes(sequential.factorize, lambda C, F, C_final, free: F),
    substitute=_on_lanes(sequential.substitute, lambda factors, F, rhs: F),
    solve=_on_lanes(_solve(sequential), lambda C, F, C_final, free, rhs: F),
    solve_rows=_on_lanes(_solve_rows(sequential), lambda system, rhs: system.F),
    recursion=(sequential.factorize, sequential.substitute),
)
PARALLEL = Method(
    factorize=parallel.factorize,
    substitute=parallel.substitute,
    solve=_solve(parallel),
    solve_rows=_solve_rows(parallel),
    recursion=(parallel.factorize, parallel.substitute),
)
# (C, F, C_final, free, added), of an LQR that need not be convex: always in sequence.
factorize_convex = _on_lanes(convex.factorize, lambda C, F, C_final, free, added: F)
# By the names of ``Options.riccati`` and of ``lqr_solve(method=…)``.
METHODS = {"auto": SEQUENTIAL, "sequential": SEQUENTIAL, "parallel": PARALLEL}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def kkt_solve(method: Method, system: System, rhs: Rhs) -> Point:
    """The point where the LQR's Lagrangian is stationary.

        minimise Σ ½ zᵀ C z + cᵀ z + ½ x_Tᵀ C_final x_T + c_finalᵀ x_T,  z = (x, u),
        x_{t+1} = F z + f,  x_0 = x_init,  u = 0 where not free,  G z + g = 0 in active rows.

    With L the Lagrangian and M its Hessian in y = (z, λ, ν), the derivative is dy = −M⁻¹ d(∇L).
    M is symmetric, so for a cotangent ȳ the backward pass solves M w = −ȳ, the same LQR with c = z̄,
    f = λ̄, g = ν̄ and x_init = λ̄_0, and returns the derivative of wᵀ∇L in the data (eq. 8 and 9).
    """
    if system.rows.G.num:
        return method.solve_rows(system, rhs)
    return method.substitute(system.factors, system.F, rhs)[0]


def _kkt_solve_fwd(method, system, rhs):
    # Calling the function itself keeps the saved output differentiable: second derivatives.
    point = kkt_solve(method, system, rhs)
    return point, (system, point)


def solve_cotangents(
    method: Method, saved: tuple[System, Point], cotangent: Point
) -> tuple[System, Rhs]:
    """The cotangents of a system and its right-hand side, from that of its solution."""
    system, point = saved
    w = kkt_solve(method, system, adjoint_rhs(cotangent))
    z, wz = z_of(point.x, point.u), z_of(w.x, w.u)
    (nu, nu_final), (w_nu, w_nu_final) = point.multiplier, w.multiplier
    G = Rows(
        _outer(nu, wz) + _outer(w_nu, z),
        _outer(nu_final, w.x[-1]) + _outer(w_nu_final, point.x[-1]),
    )
    none: Any = None
    system_bar = System(
        factors=none,
        C=_symmetric_outer(wz, z),
        F=_outer(point.costate[1:], wz) + _outer(w.costate[1:], z),
        C_final=_symmetric_outer(w.x[-1], point.x[-1]),
        free=none,
        rows=ActiveRows(G, none, none),
    )
    return system_bar, adjoint_cotangent(w)


kkt_solve.defvjp(_kkt_solve_fwd, solve_cotangents)


def linear_kkt_solve(method: Method, system: System, rhs: Rhs) -> Point:
    """``kkt_solve`` as a linear function of ``rhs`` that is differentiable in both modes.

    In y, with pinned controls and the multipliers of inactive rows held at 0, M is symmetric.
    """
    nothing = jax.tree.map(jnp.zeros_like, rhs)
    # One vector: JAX transposes a solve only where all of its right-hand side is perturbed.
    right, point_of = ravel_pytree(jax.tree.map(jnp.negative, adjoint_point(rhs)))

    def held(point: Point, elsewhere: Point) -> Point:
        u, (multiplier, other) = elsewhere.u, (point.multiplier, elsewhere.multiplier)
        multiplier = jax.tree.map(jnp.where, system.rows.active, multiplier, other)
        return point._replace(u=jnp.where(system.free, point.u, u), multiplier=multiplier)

    def product(y: Array) -> Array:
        point = point_of(y)
        unheld = held(point, jax.tree.map(jnp.zeros_like, point))
        return ravel_pytree(held(adjoint_point(residual(system, unheld, nothing)), point))[0]

    def solve(_, right: Array) -> Array:
        return ravel_pytree(kkt_solve(method, system, adjoint_rhs(point_of(-right))))[0]

    return point_of(lax.custom_linear_solve(product, right, solve, symmetric=True))


def adjoint_point(rhs: Rhs) -> Point:
    """The point that ``adjoint_rhs`` makes this right-hand side of."""
    n = rhs.x_init.shape[0]
    x = jnp.concatenate([rhs.c[:, :n], rhs.c_final[None]])
    return Point(x, rhs.c[:, n:], jnp.concatenate([rhs.x_init[None], rhs.f]), rhs.g)


def adjoint_rhs(cotangent: Point) -> Rhs:
    """The right-hand side of the adjoint system M w = −ȳ, as that of an LQR problem."""
    c, costate = z_of(cotangent.x, cotangent.u), cotangent.costate
    return Rhs(costate[0], c, costate[1:], cotangent.x[-1], cotangent.multiplier)


def adjoint_cotangent(w: Point) -> Rhs:
    """The cotangents of the right-hand side, from the adjoint solution."""
    return Rhs(w.costate[0], z_of(w.x, w.u), w.costate[1:], w.x[-1], w.multiplier)


def _outer(a, b):
    return a[..., :, None] * b[..., None, :]


def _symmetric_outer(a, b):
    return (_outer(a, b) + _outer(b, a)) * 0.5
