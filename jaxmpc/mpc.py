"""Differentiable MPC: the forward solver with the fixed-point KKT backward attached (Module 2).

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
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.problem.constraints import for_user
from jaxmpc.problem.expansions import (
    constraint_values,
    expand,
    first_order,
    hessians,
    stage_costs,
    stages,
)
from jaxmpc.problem.prices import Prices, RowState, priced, row_terms
from jaxmpc.problem.problem import Data, Model
from jaxmpc.problem.trace import trace
from jaxmpc.riccati import parallel, sequential
from jaxmpc.riccati.constrained import ActiveRows, penalised
from jaxmpc.riccati.kkt import adjoint_cotangent, adjoint_rhs, factorize, kkt_solve
from jaxmpc.riccati.rows import Rows, total
from jaxmpc.riccati.sequential import Point, Rhs
from jaxmpc.solver.linearization import Linearization
from jaxmpc.solver.loop import solver
from jaxmpc.types import Constraints, Options, RiccatiMethod, Solution, Status


def mpc_solve(
    cost,
    dynamics,
    x_init: ArrayLike,
    u_init: ArrayLike,
    params: Any = None,
    *,
    terminal_cost=None,
    u_lower: ArrayLike | None = None,
    u_upper: ArrayLike | None = None,
    constraints: Constraints | None = None,
    options: Options = Options(),
) -> Solution:
    """Model predictive control whose plan is differentiable in everything that shaped it.

        minimise over u   Σ_{t<T} cost(x_t, u_t, t, params) + terminal_cost(x_T, params)
        subject to        x_0 = x_init,  x_{t+1} = dynamics(x_t, u_t, t, params),
                          u_lower ≤ u_t ≤ u_upper,  and the ``constraints``, if there are any

    One problem, no batch axis: batch with ``jax.vmap``. Call it under ``jax.jit``: outside of one,
    every call compiles anew, which takes seconds.

    Args:
      cost: (x [n], u [m], t, params) -> scalar, twice differentiable; t is an int32 scalar.
      dynamics: (x [n], u [m], t, params) -> the next state [n], twice differentiable.
      x_init: [n].
      u_init: [T, m], where the search starts, clipped into the bounds; its length is the horizon.
        Of several local minima the search finds one nearby: warm-start, or try several starts.
      params: any pytree of arrays and numbers, given to all functions: physical constants, a
        network's weights, a reference trajectory that they index by t. The functions may close
        over traced values too.
      terminal_cost: (x [n], params) -> scalar; none by default.
      u_lower, u_upper: broadcast to [T, m]; ±inf and equal bounds are legal; none by default.
      constraints: on states and controls, hard or soft, and on the rate: see ``Constraints``.
      options: see ``Options``.

    Returns:
      A ``Solution``. Look at ``solution.status`` (one ``Status`` per problem, never an exception),
      or print ``summarize(solution)``.

    Differentiable in reverse mode in x_init, params, everything that the functions close over,
    u_lower and u_upper, to any order (``jax.jacrev(jax.jacrev(f))`` for a Hessian: forward mode,
    and so ``jax.hessian``, is a TypeError). ``x``, ``u`` and ``costate`` have the derivative of the
    solution by the implicit function theorem, ``objective`` by the envelope theorem, ``K`` that of
    its recursion; ``kkt_residual`` counts as a constant. The gradient in u_init and in options is
    zero. With ``Options.unconverged="zero"``, the default, so is every gradient of a problem whose
    status is not CONVERGED: log the share that converged, and mask those that are NONFINITE in
    the loss itself, whose values are NaN.

    The user's functions are differentiated twice and in forward mode: inside them,
    ``lax.custom_root`` or ``jax.custom_jvp``, not ``jax.custom_vjp``.

    All floating arguments are promoted to one dtype together with what the functions return.

    Raises:
      TypeError: an argument or a returned value of the wrong kind (an integer x_init, say).
      ValueError: a shape that does not fit, concrete bounds with u_lower > u_upper, or an option
        out of its range. Messages name the argument, what came and what was expected.

    Source: Amos et al. 2018 (arXiv:1810.13400), eq. (10), Module 2 and eq. (19), with the exact
    Hessian of the Hamiltonian in place of ∇²cost (``Options.backward_hessian``), which for
    nonlinear dynamics the derivative of the solution needs.
    """
    validation.check_options(options)
    model, data = trace(
        cost, dynamics, x_init, u_init, params, terminal_cost, u_lower, u_upper, constraints
    )
    options = validation.with_trust_region(options, data.u_init)
    return for_user(model, jax.jit(_differentiable(model))(data, options))


def _differentiable(model: Model):
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
    safe, theta, prices = _stand_in(solved, (point, data.theta, data.prices))
    free, state = solution.free, linearization.rows

    exact = options.backward_hessian == "exact"
    used_linearization = _zeros_unless(used, linearization)
    system = _system(used_linearization, _constant(prices, data))
    at = _constant((safe, theta, prices), data)
    *matrices, G, multiplier = _attach_expansion(model, state, exact)(system, *at)
    active = None
    if state is not None:
        active = ActiveRows(G, state.active, used_linearization.rho)
    factors = used_linearization.factors
    if not exact:
        C, F, C_final = lax.stop_gradient(matrices)
        if active is not None:
            C, C_final = penalised(C, C_final, lax.stop_gradient(active))
        factors = factorize(C, F, C_final, free, options.riccati)

    gap = _bound_gap(data, safe.u, free, multiplier)
    residual = _kkt_residual(model, theta, prices, data.x_init, safe, state)
    moving = _attach(point, residual, gap, factors, matrices, free, active, policy, options.riccati)
    lagrangian = _lagrangian(model, theta, prices, data.x_init, safe, state)
    objective = _attach_value(solution.objective, lagrangian, gap, multiplier, policy)
    solution = dataclasses.replace(
        solution, x=moving.x, u=moving.u, costate=moving.costate, objective=objective
    )
    moving = jax.tree.map(lambda a, b: jnp.where(solved, a, b), moving, safe)
    gains = _attach_gains(model, state, linearization.rho, options.riccati)
    K = gains(solution.K, moving, theta, prices, free, policy)
    if state is None:
        return dataclasses.replace(solution, K=K)
    values = _follow(_multipliers(model, theta, prices, moving, state), policy)
    multipliers = jax.tree.map(lambda a, b: jnp.where(solved, a, b), values, solution.multipliers)
    return dataclasses.replace(solution, K=K, multipliers=multipliers)


@jax.custom_vjp
def _follow(tree, policy):
    """The identity, with the derivative that ``Options.unconverged`` says."""
    return tree


def _follow_bwd(policy, cotangent):
    used, blank = policy
    return jax.tree.map(lambda a: jnp.where(used, a, blank), cotangent), None


_follow.defvjp(lambda tree, policy: (_follow(tree, policy), policy), _follow_bwd)


def _kkt_residual(model: Model, theta, prices: Any, x_init: Array, point: Point, state: Any) -> Rhs:
    """∇L, L the Lagrangian: 0 at a solution, where its derivatives shape those of the solution."""
    x, u, costate, multiplier = point
    n = x_init.shape[0]
    # Of every row, what ``row_terms`` takes beside its value.
    row = (multiplier, state.active, state.beyond, prices.linear, prices.quadratic) if state else ()
    stage, final = ([part[i] for part in row] for i in range(2))

    def hamiltonian(z, t, costate, stage):
        x, u = z[:n], z[n:]
        x_next = model.dynamics(x, u, t, theta)
        value, g = model.cost(x, u, t, theta) + costate @ x_next, None
        if model.constraint is not None:
            g = model.constraint(x, u, t, theta)
            value += jnp.sum(row_terms(g, *stage))
        return value, (x_next, g)

    def end(x):
        value, g = jnp.zeros((), x.dtype), None
        if model.terminal_cost is not None:
            value += model.terminal_cost(x, theta)
        if model.final_constraint is not None:
            g = model.final_constraint(x, theta)
            value += jnp.sum(row_terms(g, *final))
        return value, g

    z = jnp.concatenate([x[:-1], u], axis=1)
    of_stage = stage if model.constraint is not None else None
    c, (x_next, g) = jax.vmap(jax.grad(hamiltonian, has_aux=True))(
        z, stages(u), costate[1:], of_stage
    )
    c_final, g_final = jax.grad(end, has_aux=True)(x[-1])
    held = None
    if state is not None:
        values = Rows(g, g_final)
        held = jax.tree.map(lambda g, active: jnp.where(active, g, 0), values, state.active)
    return Rhs(
        x_init=x_init - x[0],
        c=c.at[:, :n].add(-costate[:-1]),
        f=x_next - x[1:],
        c_final=c_final - costate[-1],
        g=held,
    )


def _lagrangian(model: Model, theta, prices: Any, x_init: Array, point: Point, state: Any) -> Array:
    """The objective plus costates times dynamics and multipliers times constraints, without the
    term of the bounds."""
    x, u, costate, multiplier = point
    x_next = jax.vmap(model.dynamics, (0, 0, 0, None))(x[:-1], u, stages(u), theta)
    value = (
        jnp.sum(stage_costs(model, theta, x, u))
        + jnp.vdot(costate[1:], x_next - x[1:])
        + costate[0] @ (x_init - x[0])
    )
    if state is None:
        return value
    g = constraint_values(model, theta, x, u)
    row = multiplier, state.active, state.beyond, prices.linear, prices.quadratic
    return value + total(jax.tree.map(row_terms, g, *row))


def _multipliers(model: Model, theta, prices: Prices, point: Point, state: RowState) -> Rows:
    """ν of every row: an unknown of the KKT system where it is active, given by its price where it
    has slack."""
    g = constraint_values(model, theta, point.x, point.u)

    def value(multiplier, active, beyond, g, linear, quadratic):
        priced = jnp.where(beyond, jnp.where(beyond, linear, 0) + quadratic * g, 0)
        return jnp.where(active, multiplier, priced)

    row = point.multiplier, state.active, state.beyond, g, prices.linear, prices.quadratic
    return jax.tree.map(value, *row)


def _bound_gap(data: Data, u: Array, free: Array, multiplier: Array) -> Array:
    """0, as a function of the bounds: how far each clamped control is from the bound that holds
    it, the one that the multiplier's sign names (half each at zero, for equal bounds)."""
    lower, upper = data.u_lower, data.u_upper
    middle = jnp.where(lower == upper, (lower + upper) * 0.5, u)
    bound = jnp.where(multiplier > 0, lower, jnp.where(multiplier < 0, upper, middle))
    return jnp.where(free, 0, bound - u)


def _system(at: Linearization, prices: Any) -> list:
    """[C, F, C_final, G, ∇_u J] of the KKT system; rows with slack are part of the cost."""
    if at.rows is None:
        return [at.hessian, at.F, at.C_final, None, at.gradient]
    C, C_final = priced(at.hessian, at.C_final, at.G, at.rows, prices)
    return [C, at.F, C_final, at.G, at.gradient]


def _attach_expansion(model: Model, state: Any, exact: bool):
    """The identity on the ``_system`` at a point, as a function of it, of theta and the prices."""

    @jax.custom_vjp
    def attach(system, state, point, theta, prices):
        return system

    def bwd(saved, cotangent):
        state, *at = saved

        def system(point, theta, prices):
            return _expanded_system(model, point, theta, prices, state, exact)

        _, vjp = jax.vjp(system, *at)
        return None, None, *vjp(cotangent)

    attach.defvjp(lambda system, *at: (attach(system, *at), at), bwd)
    return lambda system, *at: attach(system, state, *at)


def _expanded_system(model, point: Point, theta, prices, state: Any, exact=True) -> list:
    """``_system`` from the user's functions."""
    x, u, costate, multiplier = point
    expanded = expand(model, theta, x, u)
    first = first_order(expanded, multiplier)
    C, C_final = expanded.C, expanded.C_final
    if exact:
        C, C_final = hessians(model, theta, x, u, expanded, costate, multiplier)
    if state is not None:
        C, C_final = priced(C, C_final, expanded.G, state, prices)
    gradient = first.control_cost + first.control_pull
    return [C, expanded.F, C_final, expanded.G, gradient]


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
    cotangent = _zeros_unless(used, cotangent)
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
            C, F, C_final, G, _ = _expanded_system(model, point, theta, prices, state)
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


def _zeros_unless(used: Array, tree):
    return jax.tree.map(lambda a: jnp.where(used, a, 0), tree)


@jax.custom_jvp
def _stand_in(solved: Array, tree):
    """``tree``, but for a problem without a solution that of one in its batch that has one: any
    constant is singular for somebody's cost. To first order the identity."""
    return _borrow(solved, tree)


@_stand_in.defjvp
def _stand_in_jvp(primals, tangents):
    solved, tree = primals
    some = _anywhere(solved)

    def mask(tangent):  # Where no problem has a solution, nothing has a derivative.
        return tangent if tangent.dtype == jax.dtypes.float0 else jnp.where(some, tangent, 0)

    return _stand_in(solved, tree), jax.tree.map(mask, tangents[1])


@custom_vmap
def _borrow(solved, tree):
    """Ones where there is nobody to borrow from; under ``vmap``, what each problem has of its own
    is replaced. What the batch shares stays shared: a copy per problem would not fit into memory.
    """

    def one(leaf):
        inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        return jnp.where(solved, leaf, jnp.ones_like(leaf)) if inexact else leaf

    return jax.tree.map(one, tree)


@_borrow.def_vmap
def _borrow_batched(size, batched, solved, tree):
    solved_batched, tree_batched = batched
    solved = solved if solved_batched else jnp.broadcast_to(solved, size)
    first = jnp.min(jnp.where(solved, jnp.arange(size), size), initial=size)
    donor = jnp.arange(size) == first

    def pick(a):  # Of a batch that is spread over devices, an index would gather all of it.
        if not jnp.issubdtype(a.dtype, jnp.number):
            return a[jnp.argmax(donor)]
        mine = jnp.where(donor.reshape(size, *[1] * (a.ndim - 1)), a, jnp.zeros((), a.dtype))
        return jnp.sum(mine, 0, dtype=a.dtype)

    lent = jax.tree.map(lambda a, own: pick(a) if own else a, tree, tree_batched)
    lent = _borrow(jnp.any(solved), lent)  # an outer batch may have somebody

    def one(leaf, lent, own):
        if not own:
            return lent
        return jnp.where(solved.reshape(size, *[1] * (leaf.ndim - 1)), leaf, lent)

    return jax.tree.map(one, tree, lent, tree_batched), tree_batched


@custom_vmap
def _anywhere(solved):
    """Whether any problem of the batch has a solution: one value for all of it."""
    return solved


@_anywhere.def_vmap
def _anywhere_batched(size, batched, solved):
    return _anywhere(jnp.any(solved)), False
