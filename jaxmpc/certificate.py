"""How far to trust a plan and its gradient: numbers for each problem."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.batch import lanes
from jaxmpc.batch.unchecked import unchecked
from jaxmpc.problem.barrier import with_barrier, with_tau
from jaxmpc.problem.expansions import Expansion, constraint_values, expand, hessians
from jaxmpc.problem.prices import Prices, RowState, add_curvature, margins, slopes
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.problem.trace import trace
from jaxmpc.riccati.constrained import ActiveRows, System, penalised, residual, sizes
from jaxmpc.riccati.kkt import SEQUENTIAL, adjoint_rhs, kkt_solve
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.riccati.point import Point, Rhs, Rows
from jaxmpc.riccati.rows import largest, per_row
from jaxmpc.riccati.sequential import row_freedom
from jaxmpc.solver.assessment import assess
from jaxmpc.solver.inside import towards
from jaxmpc.solver.iterate import Iterate, new_iterate
from jaxmpc.solver.linearization import Linearization
from jaxmpc.solver.springs import around, springs_of, system_with, unit
from jaxmpc.types import Constraints, Cost, Dynamics, Options, Solution, TerminalCost

_INVERSE_ITERATIONS = 30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Certificate:
    """What the gradient of one plan rests on, each number in the units of the problem.

    The plan is within about ``kkt_residual / curvature`` of the exact one. Where that is small
    beside ``slack``, and ``kkt_residual`` beside ``multiplier``, the clamped controls are the right
    ones and the gradient is the derivative of the exact plan, but for an error of the same size.

    Attributes:
      kkt_residual: max |clip(u − ∇_u J, u_lower, u_upper) − u|. Large: the plan is no solution, and
        its gradient belongs to no plan. Raise ``Options.max_iterations``, or start closer.
      multiplier: min |∇_u J| over the clamped controls, but those with equal bounds, and the
        smallest multiplier of an active inequality (of a soft one also its distance from the linear
        weight); inf if there are none. Near 0: that control or row is about to come free, and the
        plan has a kink there, with a gradient on either side. The one that is returned is that of
        the clamped side.
      slack: the smallest distance of a free control from its bounds, and of an inactive inequality
        from 0; inf if there is none. Near 0: that control or row is about to be clamped, with a
        kink as before; the gradient is that of the free side.
      curvature: the smallest eigenvalue of ∇²_u J (with constraints, of the Lagrangian) on the free
        controls, along the active rows, found by inverse iteration and so from above; inf if no
        control is free, and not positive where J is not convex there.
        Near 0: plans far apart cost nearly the same and gradients are huge. Give the controls a
        larger weight.
      adjoint_residual: of the linear system that the backward pass solves, for a cotangent with
        random signs: the relative error of its states, controls, costates and multipliers, as far
        as solving for the residual once more shows it. Large beside the accuracy of the dtype: a
        horizon too long or a system too stiff for it. Take float64.
      barrier: with ``Options.smoothing``, τ, in units of the objective; else None, as are the next.
      shift: how far a control of the plan with that barrier is from the plan without, to first
        order: the largest. Large beside the range of the controls: the gradient is that of another
        plan. Take less smoothing.
      smoothed: the share, in [0, 1], of a gradient that is due to smoothing: for a cotangent of the
        controls with random signs, with w the adjoint solution and w₀ that of the exact plan,
        |w − w₀| / (|w − w₀| + |w₀|). 1: the exact gradient is zero. 0 with ``smoothed="plan"``,
        whose gradient is exact for its plan.
    """

    kkt_residual: Array
    multiplier: Array
    slack: Array
    curvature: Array
    adjoint_residual: Array
    barrier: Array | None = None
    shift: Array | None = None
    smoothed: Array | None = None


def certify(
    cost: Cost,
    dynamics: Dynamics,
    x_init: ArrayLike,
    solution: Solution,
    params: Any = None,
    *,
    terminal_cost: TerminalCost | None = None,
    u_lower: ArrayLike | None = None,
    u_upper: ArrayLike | None = None,
    constraints: Constraints | None = None,
    options: Options = Options(),
) -> Certificate:
    """The ``Certificate`` of a solution of ``mpc_solve``: what to look at before trusting it.

    The arguments are those that ``solution`` was made with; one problem, no batch axis, batch with
    ``jax.vmap``. Of the options only those of smoothing count: with ``smoothed="plan"``, the
    problem is that with the barrier. Of the solution only ``u`` and the multipliers count:
    everything else is computed anew: one expansion of the problem at the plan, one factorization,
    and some thirty back substitutions; with smoothing, up to twenty factorizations. The numbers are
    constants to differentiation.

    Raises:
      TypeError, ValueError: as ``mpc_solve``.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine, Quadratic, certify, mpc_solve
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> cost = Quadratic(jnp.eye(3))
      >>> x_init, u_init = jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> bounds = dict(u_lower=-0.5, u_upper=0.5)
      >>> solution = mpc_solve(cost, dynamics, x_init, u_init, **bounds)
      >>> certificate = certify(cost, dynamics, x_init, solution, **bounds)
      >>> bool(certificate.kkt_residual < 1e-5), bool(certificate.curvature > 0)
      (True, True)
      >>> round(float(certificate.multiplier), 3)  # of the one control that is clamped
      0.022
      >>> round(float(certificate.slack), 3)  # how near to a bound the others come
      0.397

    Source: the conditions of the implicit function theorem for a program with bounds: Fiacco 1976,
    Sensitivity analysis for nonlinear programming using penalty methods, Theorem 2.1.
    """
    if not isinstance(solution, Solution):
        raise TypeError(f"solution must be a jaxmpc.Solution, got {type(solution).__name__}")
    if jnp.ndim(solution.u) > 2:
        raise ValueError(
            f"solution must be that of one problem, with u of shape [T, m], got "
            f"{list(jnp.shape(solution.u))}; batch with jax.vmap"
        )
    validation.has_shape(
        "x_init", validation.floating("x_init", x_init), solution.x.shape[1:], "[n], of solution.x,"
    )
    if constraints is not None:
        constraints = dataclasses.replace(constraints, multipliers=solution.multipliers)
    problem, data, options = trace(
        cost, dynamics, x_init, solution.u, params, terminal_cost=terminal_cost, u_lower=u_lower,
        u_upper=u_upper, constraints=constraints, options=options,
    )  # fmt: skip

    @jax.jit
    def numbers(data: Data, smoothing: ArrayLike | None) -> Certificate:
        if smoothing is None:
            return _certify(problem, data)[0]
        smoothing = jnp.asarray(smoothing, data.u_init.dtype)
        if options.smoothed == "gradient":
            return _of_smoothed_gradient(problem, data, smoothing)
        return _of_smoothed_plan(*with_barrier(problem, data, smoothing), smoothing)

    run: Callable[[Data, ArrayLike | None], Certificate] = unchecked(numbers)
    return run(*lax.stop_gradient((data, options.smoothing)))


class _Basis(NamedTuple):
    """What a certificate is computed from."""

    at: Iterate
    point: Point
    found: Linearization
    system: System


def _certify(problem: Problem, data: Data) -> tuple[Certificate, _Basis]:
    at = new_iterate(problem, data, data.u_init)
    expanded = expand(problem, data.theta, at.x, at.u)
    g = constraint_values(problem, data.theta, at.x, at.u)
    stiffness = _stiffness(expanded)
    state = _row_state(g, data.multipliers, stiffness, data.prices)
    here = assess(data, at, expanded, state.multiplier)
    costate = here.first.costate
    hessian, hessian_final = hessians(
        problem, data.theta, at.x, at.u, expanded, costate, state.multiplier
    )
    H, C_final = add_curvature(hessian, hessian_final, expanded.G, state, data.prices)
    free, lower, upper = ~here.clamped, data.u_lower, data.u_upper
    weights = per_row(lambda stiffness: stiffness / lanes.eps(at.u) ** 0.5, stiffness)
    rows = ActiveRows(expanded.G, state.active, weights)
    C, C_final_penalised = penalised(H, C_final, rows)
    factors = SEQUENTIAL.factorize(C, expanded.F, C_final_penalised, free)
    system = System(factors, H, expanded.F, C_final, free, rows)

    multiplier = jnp.where(free | (lower == upper), jnp.inf, jnp.abs(here.gradient))
    slack = jnp.where(free, jnp.minimum(upper - at.u, at.u - lower), jnp.inf)
    of_rows = margins(g, state, data.prices)
    missed = per_row(lambda g, active: jnp.where(active, jnp.abs(g), 0), g, state.active)
    certificate = Certificate(
        kkt_residual=jnp.maximum(here.kkt_residual, largest(missed)),
        multiplier=jnp.minimum(jnp.min(multiplier), of_rows[0]),
        slack=jnp.minimum(jnp.min(slack), of_rows[1]),
        curvature=_smallest_curvature(system, at.u),
        adjoint_residual=_adjoint_residual(system, at.x, at.u),
    )
    found = Linearization(
        factors, hessian, expanded.F, hessian_final, here.gradient, expanded.G, state, weights
    )
    point = Point(at.x, at.u, costate, state.multiplier)
    return certificate, _Basis(at, point, found, system)


def _of_smoothed_gradient(problem: Problem, data: Data, smoothing: Array) -> Certificate:
    certificate, (at, point, found, system) = _certify(problem, data)
    where = point, data.theta, data.prices
    a = around(problem, data, where, found, system.free, found.state, jnp.array(True))
    tau = smoothing * unit(a, at.x, at.u)
    way, _ = towards(a, tau)
    soft, _ = system_with(a, springs_of(a, a.exact, tau, walls=True))
    none = jax.tree.map(jnp.zeros_like, point)
    signs = jax.random.rademacher(jax.random.key(2), at.u.shape, at.u.dtype)
    cotangent = adjoint_rhs(none._replace(u=signs))
    exact, smooth = (kkt_solve(SEQUENTIAL, s, cotangent).u for s in (system, soft))
    made, own = jnp.linalg.norm(smooth - exact), jnp.linalg.norm(exact)
    share = made / jnp.where(made + own > 0, made + own, 1)
    moved = jnp.where(tau > 0, jnp.max(jnp.abs(way.u)), 0)
    return dataclasses.replace(certificate, barrier=tau, shift=moved, smoothed=share)


def _of_smoothed_plan(problem: Problem, data: Data, tau: Array) -> Certificate:
    certificate, (at, _, _, system) = _certify(problem, data)

    def slopes_at(tau: Array) -> tuple[Array, Array]:
        expanded = expand(problem, with_tau(data.theta, tau), at.x, at.u)
        return expanded.c, expanded.c_final

    _, (c, c_final) = jax.jvp(slopes_at, (tau,), (tau,))
    rhs = Rhs(jnp.zeros_like(at.x[0]), c, jnp.zeros_like(at.x[1:]), c_final, _none(system.rows))
    shift = jnp.max(jnp.abs(kkt_solve(SEQUENTIAL, system, rhs).u))
    zero = jnp.zeros_like(tau)
    return dataclasses.replace(certificate, barrier=tau, shift=shift, smoothed=zero)


def _stiffness(expanded: Expansion) -> Rows:
    """How much of its multiplier each row takes to move by 1, with all controls free."""
    _, C, F, _, C_final, G = expanded
    if not G.num:
        return G
    n, m = F.shape[1], F.shape[2] - F.shape[1]
    # Rounding of the largest price, for controls that nothing prices.
    least = lanes.eps(C) * jnp.maximum(jnp.max(jnp.abs(C)), jnp.max(jnp.abs(C_final)))
    C = C.at[:, n:, n:].add(least * jnp.eye(m, dtype=C.dtype))
    free = jnp.ones((len(F), m), bool)
    freedom = row_freedom(SEQUENTIAL.factorize(C, F, C_final, free), F, G)[0]

    def inverse(freedom: Array) -> Array:
        usable = (freedom != 0) & jnp.isfinite(freedom)
        return 1 / jnp.where(usable, jnp.abs(freedom), 1)

    stiffness: Rows = per_row(inverse, freedom)
    return stiffness


def _row_state(g: Rows, multipliers: Rows, stiffness: Rows, prices: Prices) -> RowState:
    """The pieces that the rows are on, by the multiplier that would close what they miss."""
    wanted = per_row(lambda nu, g, stiffness: nu + stiffness * g, multipliers, g, stiffness)
    active = per_row(
        lambda nu, lower, linear: (nu > lower) & (nu <= linear),
        wanted, prices.lower, prices.linear, dtype=bool,
    )  # fmt: skip
    beyond = per_row(jnp.greater, wanted, prices.linear, dtype=bool)
    state = RowState(multipliers, active, beyond)
    return state._replace(multiplier=slopes(g, state, prices))


def _smallest_curvature(system: System, u: Array) -> Array:
    """The smallest eigenvalue of the reduced Hessian R = ∇²_u J on the free controls.

    A plan from rest that pays the linear term −b on its controls is R⁻¹ b: one back substitution.
    """
    factors, H, F, C_final, free, rows = system
    n = C_final.shape[0]
    rest, none = jnp.zeros(n, u.dtype), _none(rows)

    def inverse(b: Array) -> Array:
        c = jnp.zeros(H.shape[:2], u.dtype).at[:, n:].set(-b)
        rhs = Rhs(x_init=rest, c=c, f=jnp.zeros(F.shape[:2], u.dtype), c_final=rest, g=none)
        return kkt_solve(SEQUENTIAL, system, rhs).u

    def unit(v: Array) -> Array:
        return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(u.dtype).tiny)

    start = jax.random.normal(jax.random.key(0), u.shape, u.dtype)
    v = lax.fori_loop(
        0, _INVERSE_ITERATIONS, lambda _, v: unit(inverse(v)), unit(jnp.where(free, start, 0))
    )
    eigenvalue = 1 / lanes.vdot(v, inverse(v))
    definite = jnp.all(factors.curvature > definite_threshold(u.dtype))
    found = jnp.where(definite, eigenvalue, -jnp.abs(eigenvalue))
    return jnp.where(jnp.any(free), found, jnp.inf)


def _none(rows: ActiveRows) -> Rows:
    """A right-hand side of 0 for every row."""
    none: Rows = jax.tree.map(jnp.zeros_like, rows.weights)
    return none


def _adjoint_residual(system: System, x: Array, u: Array) -> Array:
    """How well M w = −ȳ is solved, M the KKT matrix: the largest, among states, controls, costates
    and multipliers, of the residual relative to its terms and of what solving for it once more
    adds, relative to w."""
    n, rows = system.C_final.shape[0], system.rows
    of_x, of_u, of_costate = jax.random.split(jax.random.key(1), 3)
    x_bar = jax.random.rademacher(of_x, x.shape, x.dtype)
    # Without it, w has no states or controls where rows leave the plan no freedom.
    costate_bar = jax.random.rademacher(of_costate, x.shape, x.dtype)
    u_bar = jax.random.rademacher(of_u, u.shape, u.dtype)
    rhs = adjoint_rhs(Point(x_bar, u_bar, costate_bar, _none(rows)))
    w = kkt_solve(SEQUENTIAL, system, rhs)
    left = residual(system, w, rhs)
    left = left._replace(c=left.c.at[:, n:].set(jnp.where(system.free, left.c[:, n:], 0)))
    missing = kkt_solve(SEQUENTIAL, system, left)
    shares = [
        _largest(part) / jnp.where(_largest(whole) > 0, _largest(whole), 1)
        for part, whole in [
            *zip(left, sizes(system, w, rhs), strict=True),
            *zip(missing, w, strict=True),
        ]
    ]
    return jnp.max(jnp.stack(shares))


def _largest(tree: Any) -> Array:
    found = [jnp.max(jnp.abs(a), initial=0) for a in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(found))
