"""The derivative of a solution by the implicit function theorem (Module 2).

How the derivative is attached, in three steps:

1. ``fixed`` runs the solver. To the innermost differentiation it is a constant.
2. At its point, the KKT residual of the problem is evaluated as a function of everything that
   shapes the solution (params, closures, x_init, bounds). This is ordinary JAX code outside any
   custom rule, so JAX differentiates it natively: for weights that a batch shares, straight into
   one array of their size.
3. ``_attach`` is the identity on the point, and a ``jax.custom_vjp``: its backward pass maps the
   cotangent of the point to that of the KKT residual, by one masked LQR solve with the forward
   pass's factorization (eq. 19).

Second derivatives: the rule of ``fixed`` returns the differentiable solution itself as its primal
value with a zero tangent, so an outer differentiation sees the point move: every order is right.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxmpc.derivative.isolation import by_policy, stand_in, zeros_unless
from jaxmpc.derivative.lagrangian import (
    attach_expansion,
    bound_gap,
    expanded_system,
    kkt_residual,
    kkt_system,
    lagrangian,
    row_multipliers,
)
from jaxmpc.problem.problem import Data, Model
from jaxmpc.riccati import kkt, parallel, sequential
from jaxmpc.riccati.constrained import ActiveRows, penalised
from jaxmpc.riccati.kkt import adjoint_cotangent, adjoint_rhs, kkt_solve
from jaxmpc.riccati.sequential import Point, Rhs
from jaxmpc.solver.linearization import Linearization
from jaxmpc.solver.loop import solver
from jaxmpc.types import Options, RiccatiMethod, Solution, Status


def differentiable(model: Model):
    """The solution of ``model`` as a differentiable function of (data, options)."""

    @jax.custom_jvp
    def fixed(data: Data, options: Options) -> tuple[Solution, Linearization]:
        return solver(model)(data, options)

    def fixed_rule(primals, _):
        out = solved(*primals)
        return out, jax.tree.map(SymbolicZero.from_primal_value, out)

    fixed.defjvp(fixed_rule, symbolic_zeros=True)

    def solved(data, options):
        solution, linearization = fixed(data, options)
        return _with_derivatives(model, data, options, solution, linearization), linearization

    return lambda data, options: solved(data, options)[0]


def _with_derivatives(
    model: Model, data: Data, options: Options, solution: Solution, linearization: Linearization
) -> Solution:
    """``solution`` with its derivatives: x, u and costate by the implicit function theorem,
    the objective by the envelope theorem, the gains by that of their recursion."""
    solved = (solution.status != Status.NONFINITE) & (solution.status != Status.INFEASIBLE)
    implicit = options.unconverged == "implicit"
    used = solved if implicit else solution.status == Status.CONVERGED
    blank = jnp.nan if options.unconverged == "nan" else 0.0
    policy = used, jnp.asarray(blank, solution.u.dtype)

    # User code is differentiated below and 0 · NaN = NaN, so where there is no point to
    # differentiate at, another one has to stand in.
    point = Point(solution.x, solution.u, solution.costate, solution.multipliers)
    safe, theta, prices = stand_in(solved, (point, data.theta, data.prices))
    free, state = solution.free, linearization.rows

    exact = options.backward_hessian == "exact"
    used_linearization = zeros_unless(used, linearization)
    system = kkt_system(used_linearization, _constant(prices, data))
    at = _constant((safe, theta, prices), data)
    *matrices, G, multiplier = attach_expansion(model, state, exact)(system, *at)
    active = None
    if state is not None:
        active = ActiveRows(G, state.active, used_linearization.rho)
    factors = used_linearization.factors
    if not exact:
        C, F, C_final = lax.stop_gradient(matrices)
        if active is not None:
            C, C_final = penalised(C, C_final, lax.stop_gradient(active))
        factors = kkt.factorize(C, F, C_final, free, options.riccati)

    gap = bound_gap(data, safe.u, free, multiplier)
    residual = kkt_residual(model, theta, prices, data.x_init, safe, state)
    moving = _attach(point, residual, gap, factors, matrices, free, active, policy, options.riccati)
    value = lagrangian(model, theta, prices, data.x_init, safe, state)
    objective = _attach_value(solution.objective, value, gap, multiplier, policy)
    solution = dataclasses.replace(
        solution, x=moving.x, u=moving.u, costate=moving.costate, objective=objective
    )
    moving = jax.tree.map(lambda a, b: jnp.where(solved, a, b), moving, safe)
    gains = _attach_gains(model, state, linearization.rho, options.riccati)
    K = gains(solution.K, moving, theta, prices, free, policy)
    if state is None:
        return dataclasses.replace(solution, K=K)
    values = by_policy(row_multipliers(model, theta, prices, moving, state), policy)
    multipliers = jax.tree.map(lambda a, b: jnp.where(solved, a, b), values, solution.multipliers)
    return dataclasses.replace(solution, K=K, multipliers=multipliers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(8,))
def _attach(
    point: Point, residual: Rhs, gap: Array, factors, matrices, free, active, policy, method
) -> Point:
    """The identity on ``point``, as a function of the KKT residual and the bounds.

    With M the Hessian of the Lagrangian in y = (x, u, λ, ν), free controls and active rows only,
    dy = −M⁻¹ d(∇L): the backward pass solves M w = −ȳ, the LQR problem (19) with λ̄ in place of f
    and ν̄ in that of g, and w is the cotangent of ∇L. A clamped control moves with its bound; the
    rest answers.
    """
    return point


def _attach_fwd(point, residual, gap, factors, matrices, free, active, policy, method):
    return point, (factors, matrices, free, active, policy)


def _attach_bwd(method, saved, cotangent: Point):
    factors, (C, F, C_final), free, active, (used, blank) = saved
    n = C_final.shape[0]
    cotangent = zeros_unless(used, cotangent)
    w = kkt_solve(factors, C, F, C_final, free, active, adjoint_rhs(cotangent), method)
    residual_bar = adjoint_cotangent(w)
    pull = jnp.einsum("tij,tj->ti", C[:, n:], residual_bar.c)
    pull += jnp.einsum("tij,ti->tj", F[:, :, n:], w.costate[1:])
    if active is not None and active.G.stage is not None:
        pull += jnp.einsum("tij,ti->tj", active.G.stage[:, :, n:], w.multiplier.stage)
    gap_bar = jnp.where(free, 0, cotangent.u + pull)
    residual_bar, gap_bar = jax.tree.map(
        lambda a: jnp.where(used, a, blank), (residual_bar, gap_bar)
    )
    return None, residual_bar, gap_bar, None, None, None, None, None


_attach.defvjp(_attach_fwd, _attach_bwd)


@jax.custom_vjp
def _attach_value(value: Array, lagrangian: Array, gap: Array, multiplier: Array, policy):
    """The identity on the optimal value; its derivative is the Lagrangian's (envelope theorem)."""
    return value


def _attach_value_fwd(value, lagrangian, gap, multiplier, policy):
    return value, (multiplier, policy)


def _attach_value_bwd(saved, cotangent):
    multiplier, (used, blank) = saved
    cotangent = jnp.where(used, cotangent, blank)
    gap_bar = jnp.where(used, multiplier * cotangent, blank)
    return None, cotangent, gap_bar, None, None


_attach_value.defvjp(_attach_value_fwd, _attach_value_bwd)


def _attach_gains(model: Model, state: Any, rho, method: RiccatiMethod):
    module = parallel if method == "parallel" else sequential

    @jax.custom_vjp
    def attach(K, state, rho, point, theta, prices, free, policy):
        return K

    def bwd(saved, cotangent):
        state, rho, point, theta, prices, free, (used, blank) = saved

        def gains(point, theta, prices):
            C, F, C_final, G, _ = expanded_system(model, point, theta, prices, state)
            if state is not None:
                C, C_final = penalised(C, C_final, ActiveRows(G, state.active, rho))
            return module.factorize(C, F, C_final, free).K

        _, vjp = jax.vjp(gains, point, theta, prices)
        return None, None, None, *vjp(jnp.where(used, cotangent, blank)), None, None

    attach.defvjp(lambda K, *rest: (attach(K, *rest), rest), bwd)
    return lambda K, *rest: attach(K, state, rho, *rest)


@jax.custom_jvp
def _constant(tree, data: Data):
    """``tree``, a constant to the innermost differentiation and to no other: for what enters the
    linear system's matrices, whose derivative multiplies a residual of zero.

    The innermost one is that in ``data``, of which it may perturb what ``tree`` does not depend on.
    """
    return tree


_constant.defjvp(
    lambda primals, _: (primals[0], jax.tree.map(SymbolicZero.from_primal_value, primals[0])),
    symbolic_zeros=True,
)
