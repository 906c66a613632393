"""The derivative of a solution by the implicit function theorem (Module 2).

How the derivative is attached, in three steps:

1. ``fixed`` runs the solver. To the innermost differentiation it is a constant.
2. At its point, the gradient of the Lagrangian is evaluated as a function of everything that shapes
   the solution (params, closures, x_init, bounds). This is ordinary JAX code outside any custom
   rule, so JAX differentiates it natively: for weights that a batch shares, straight into one array
   of their size.
3. The point is ``tied`` to that gradient: the backward pass maps the cotangent of the point to that
   of the gradient, by one masked LQR solve with the forward pass's factorization (eq. 19). With
   ``Options(derivative="jvp")`` it is the tangents that are mapped, by the same solve.

Second derivatives: the rule of ``fixed`` returns the differentiable solution itself as its primal
value with a zero tangent, so an outer differentiation sees the point move: every order is right.

With ``Options.smoothing`` the linear system is another one (``solver.springs``), and there is
nothing of which that would be the derivative: second ones are refused.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from jaxmpc.batch import lanes
from jaxmpc.derivative import lagrangian
from jaxmpc.derivative.isolation import Policy, by_policy, stand_in, zeros_unless
from jaxmpc.derivative.refused import SMOOTHED_TWICE, undifferentiable
from jaxmpc.derivative.tied import along, materialized, tied
from jaxmpc.problem.expansions import constraint_values
from jaxmpc.problem.prices import Prices, RowState, add_curvature, slopes
from jaxmpc.problem.problem import Data, Problem, Theta
from jaxmpc.riccati.constrained import ActiveRows, System, penalised, residual
from jaxmpc.riccati.kkt import (
    METHODS,
    Method,
    adjoint_cotangent,
    adjoint_rhs,
    kkt_solve,
    linear_kkt_solve,
)
from jaxmpc.riccati.point import Point, Rhs, Rows
from jaxmpc.solver.linearization import Linearization
from jaxmpc.solver.springs import (
    Springs,
    around,
    completed,
    eliminated,
    springs_of,
    system_with,
    unit,
    with_springs,
)
from jaxmpc.types import DerivativeRule, Options, Solution, Status

Solver = Callable[[Data, Options], tuple[Solution, Linearization]]


def traced_once(solver: Solver) -> Solver:
    """``solver``, which the differentiations around it do not trace anew, for ``jit`` keeps it.

    It keeps one for each mesh of devices, and takes none and an empty one for two.
    """
    solve = jax.jit(solver)

    def call(data: Data, options: Options) -> tuple[Solution, Linearization]:
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return solve(data, options)

    return call


def differentiable(problem: Problem, solver: Solver) -> Callable[[Data, Options], Solution]:
    """The solution that ``solver`` finds as a differentiable function of (data, options)."""

    @jax.custom_jvp
    def fixed(data: Data, options: Options) -> tuple[Solution, Linearization]:
        return solver(data, options)

    def fixed_rule(primals, _):
        out = solved(*primals)
        if primals[1].smoothing is not None:
            out = undifferentiable(SMOOTHED_TWICE)(out)
        return out, jax.tree.map(SymbolicZero.from_primal_value, out)

    fixed.defjvp(fixed_rule, symbolic_zeros=True)

    def solved(data, options):
        solution, linearization = fixed(data, options)
        return _with_derivatives(problem, data, options, solution, linearization), linearization

    return lambda data, options: solved(data, options)[0]


def _with_derivatives(
    problem: Problem,
    data: Data,
    options: Options,
    solution: Solution,
    linearization: Linearization,
) -> Solution:
    """``solution`` with its derivatives: x, u and costate by the implicit function theorem,
    the objective by the envelope theorem, the gains by that of their recursion."""
    solved, policy, blank = policy_of(solution, options)
    used = policy.used
    method, rule = METHODS[options.riccati], options.derivative

    # User code is differentiated below and 0 · NaN = NaN, so where there is no point to
    # differentiate at, another one has to stand in.
    point = Point(solution.x, solution.u, solution.costate, solution.multipliers)
    safe, theta, prices = stand_in(solved, (point, data.theta, data.prices), blank)
    # The pieces that its rows are on belong to its own point and prices.
    free, state = solution.free, zeros_unless(solved, linearization.state)

    at, found = (safe, theta, prices), zeros_unless(used, linearization)
    system, bound_multiplier = _kkt_system(problem, data, options, at, found, free, state)
    to_bound = _to_bound(data, safe.u, free, bound_multiplier)
    # What is pinned to its bound, the pieces that rows are on, and their springs, if there are any.
    pinned, pieces, springs = to_bound, state, None
    if options.smoothing is not None:
        boundaries = around(problem, data, at, found, free, state, used)
        tau = jnp.asarray(options.smoothing, safe.u.dtype) * unit(boundaries, safe.x, safe.u)
        springs = lax.stop_gradient(springs_of(boundaries, boundaries.exact, tau, walls=True))
        system, pieces = lax.stop_gradient(system_with(boundaries, springs))
        pinned = jnp.where(system.free, 0, to_bound)
    gradient = lagrangian.gradient(problem, theta, prices, data.x_init, safe, pieces)
    if springs is not None:
        gradient = with_springs(gradient, springs, data, prices)
    moving = _tied_point(method, point, gradient, pinned, system, springs, policy, rule)
    value = lagrangian.value(problem, theta, prices, data.x_init, safe, state)
    objective = _tied_value(solution.objective, value, to_bound, bound_multiplier, policy, rule)
    solution = dataclasses.replace(
        solution, x=moving.x, u=moving.u, costate=moving.costate, objective=objective
    )
    moving = lanes.select(solved, moving, safe)
    K = _tied_gains(
        problem, method, solution.K, (moving, theta, prices), state, linearization.weights, free,
        policy, rule,
    )  # fmt: skip
    g = constraint_values(problem, theta, moving.x, moving.u)
    found = slopes(g, pieces._replace(multiplier=moving.multiplier), prices)
    multipliers = lanes.select(solved, by_policy(found, policy, rule), solution.multipliers)
    return dataclasses.replace(solution, K=K, multipliers=multipliers)


def policy_of(solution: Solution, options: Options) -> tuple[Array, Policy, float]:
    """Whether there is a point to differentiate at, what the gradient is, and what it is if it is
    not that of the solution."""
    solved = (solution.status != Status.NONFINITE) & (solution.status != Status.INFEASIBLE)
    implicit = options.unconverged == "implicit"
    used = solved if implicit else solution.status == Status.CONVERGED
    blank = jnp.nan if options.unconverged == "nan" else 0.0
    return solved, Policy(used, jnp.asarray(blank, solution.u.dtype)), blank


def _kkt_system(
    problem: Problem,
    data: Data,
    options: Options,
    at: tuple[Point, Theta, Prices],
    linearization: Linearization,
    free: Array,
    state: RowState,
) -> tuple[System, Array]:
    """The system of the backward pass, and ∇_u L, the multipliers of the bounds: those that the
    solver left, with the derivative that they have as functions of the point."""
    exact = options.backward_hessian == "exact"
    safe, theta, prices = _constant(at, data)
    C, C_final = add_curvature(
        linearization.hessian, linearization.C_final, linearization.G, linearization.state, prices
    )
    found = C, linearization.F, C_final, linearization.G, linearization.gradient

    def matrices(state, point, theta, prices):
        return lagrangian.matrices(problem, theta, prices, point, state, exact)

    def pull(cotangent, found, state, *at):
        _, vjp = jax.vjp(functools.partial(matrices, state), *at)
        return None, *vjp(cotangent)

    def push(tangents, found, *at):
        return along(matrices, at, tangents)

    tie = tied(pull, push, rule=options.derivative, moves=False)
    C, F, C_final, G, bound_multiplier = tie(found, state, safe, theta, prices)
    rows = ActiveRows(G, state.active, linearization.weights)
    factors = linearization.factors
    if not exact:
        C_, F_, C_final_, rows_ = lax.stop_gradient((C, F, C_final, rows))
        C_, C_final_ = penalised(C_, C_final_, rows_)
        factors = METHODS[options.riccati].factorize(C_, F_, C_final_, free)
    return System(factors, C, F, C_final, free, rows), bound_multiplier


def _to_bound(data: Data, u: Array, free: Array, multiplier: Array) -> Array:
    """0, as a function of the bounds: how far each clamped control is from the bound that holds
    it, the one that the multiplier's sign names (half each at zero, for equal bounds)."""
    lower, upper = data.u_lower, data.u_upper
    middle = jnp.where(lower == upper, (lower + upper) * 0.5, u)
    bound = jnp.where(multiplier > 0, lower, jnp.where(multiplier < 0, upper, middle))
    return jnp.where(free, 0, bound - u)


def _tied_point(
    method: Method,
    point: Point,
    gradient: Rhs,
    to_bound: Array,
    system: System,
    springs: Springs | None,
    policy: Policy,
    rule: DerivativeRule,
) -> Point:
    """``point``, as a function of ∇L and of the bounds; with springs, where there are some.

    With M the Hessian of the Lagrangian in y = (x, u, λ, ν), free controls and active rows only,
    dy = −M⁻¹ d(∇L): the backward pass solves M w = −ȳ, the LQR problem (19) with λ̄ in place of f
    and ν̄ in that of g, and w is the cotangent of ∇L. A clamped control moves with its bound; the
    rest answers. Forward mode solves M dy = −d(∇L), with what those controls make of it.
    """

    def pull(cotangent, point, gradient, to_bound, system, springs, policy):
        given = adjoint_rhs(zeros_unless(policy.used, cotangent))
        rhs = given if springs is None else eliminated(springs, given)
        w = kkt_solve(method, system, rhs)
        n = system.C_final.shape[0]
        holds = residual(system, w, rhs).c[:, n:]
        w = w if springs is None else completed(springs, w, given)
        pulled = adjoint_cotangent(w), jnp.where(system.free, 0, holds)
        return *policy(pulled), None, None, None

    def push(tangents, point, gradient, to_bound, system, springs, policy):
        given, moved = materialized(tangents[:2])
        rhs = given if springs is None else eliminated(springs, given)
        clamped = jax.tree.map(jnp.zeros_like, point)._replace(u=moved)
        answer = linear_kkt_solve(method, system, residual(system, clamped, rhs))
        answer = jax.tree.map(jnp.add, answer, clamped)
        answer = answer if springs is None else completed(springs, answer, given)
        return policy.along(answer)

    tie = tied(pull, push, rule=rule, moves=True)
    return tie(point, gradient, to_bound, system, springs, policy)


def _tied_value(
    value: Array,
    lagrangian: Array,
    to_bound: Array,
    bound_multiplier: Array,
    policy: Policy,
    rule: DerivativeRule,
) -> Array:
    """The optimal value; its derivative is the Lagrangian's (envelope theorem)."""

    def pull(cotangent, value, lagrangian, to_bound, bound_multiplier, policy):
        cotangent = policy(cotangent)
        return cotangent, policy(bound_multiplier * cotangent), None, None

    def push(tangents, value, lagrangian, to_bound, bound_multiplier, policy):
        slope, moved = materialized(tangents[:2])
        return policy.along(slope + jnp.sum(bound_multiplier * moved))

    tie = tied(pull, push, rule=rule, moves=True)
    return tie(value, lagrangian, to_bound, bound_multiplier, policy)


def _tied_gains(
    problem: Problem,
    method: Method,
    K: Array,
    at: tuple[Point, Theta, Prices],
    state: RowState,
    weights: Rows,
    free: Array,
    policy: Policy,
    rule: DerivativeRule,
) -> Array:
    """The gains, as the function that the recursion is of the matrices, and these of the point."""
    factorize, _ = method.recursion

    def gains(state, weights, free, point, theta, prices):
        C, F, C_final, G, _ = lagrangian.matrices(problem, theta, prices, point, state)
        C, C_final = penalised(C, C_final, ActiveRows(G, state.active, weights))
        return factorize(C, F, C_final, free).K

    def pull(cotangent, K, at, state, weights, free, policy):
        _, vjp = jax.vjp(functools.partial(gains, state, weights, free), *at)
        return vjp(policy(cotangent)), None, None, None, None

    def push(tangents, K, at, state, weights, free, policy):
        return policy.along(along(functools.partial(gains, state, weights, free), at, tangents[0]))

    tie = tied(pull, push, rule=rule, moves=False)
    return tie(K, at, state, weights, free, policy)


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
