"""How far to trust a plan and its gradient: numbers for each problem, and a check by re-solving."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.mpc import mpc_solve, priced
from jaxmpc.problem.expansions import expand, hessians
from jaxmpc.problem.prices import margins
from jaxmpc.problem.problem import Data, Model
from jaxmpc.problem.trace import trace
from jaxmpc.riccati.constrained import ActiveRows, penalised
from jaxmpc.riccati.kkt import adjoint_rhs, factorize, kkt_solve
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.riccati.rows import add_pull
from jaxmpc.riccati.sequential import Point, Rhs
from jaxmpc.solver import augmented
from jaxmpc.solver.assessment import assess
from jaxmpc.solver.iterate import iterate
from jaxmpc.types import Constraints, Options, Solution, Status

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
        random signs, relative to its terms. Large beside the accuracy of the dtype: a horizon too
        long or a system too stiff for it. Take float64.
    """

    kkt_residual: Array
    multiplier: Array
    slack: Array
    curvature: Array
    adjoint_residual: Array


def certify(
    cost,
    dynamics,
    x_init: ArrayLike,
    solution: Solution,
    params: Any = None,
    *,
    terminal_cost=None,
    u_lower: ArrayLike | None = None,
    u_upper: ArrayLike | None = None,
    constraints: Constraints | None = None,
) -> Certificate:
    """The ``Certificate`` of a solution of ``mpc_solve``: what to look at before trusting it.

    The arguments are those that ``solution`` was made with; one problem, no batch axis, batch with
    ``jax.vmap``. Of the solution only ``u`` and the multipliers count: everything else is computed
    anew: one expansion of the problem at the plan, one factorization, and some thirty back
    substitutions. The numbers are constants to differentiation.

    Raises:
      TypeError, ValueError: as ``mpc_solve``.

    Source: the conditions of the implicit function theorem for a program with bounds: Fiacco 1976,
    Sensitivity analysis for nonlinear programming using penalty methods, Theorem 2.1.
    """
    if constraints is not None:
        constraints = dataclasses.replace(constraints, multipliers=solution.multipliers)
    model, data = trace(
        cost, dynamics, x_init, solution.u, params, terminal_cost, u_lower, u_upper, constraints
    )
    return jax.jit(_certify, static_argnums=0)(model, lax.stop_gradient(data))


def _certify(model: Model, data: Data) -> Certificate:
    at = iterate(model, data, data.u_init)
    expanded = expand(model, data.theta, at.x, at.u)
    constrained = at.penalty is not None
    if constrained:
        penalty, (largest_rho, _) = augmented.begin(at.penalty, expanded)
        at = at._replace(penalty=penalty)
    here = assess(data, at, expanded)
    nu = here.rows.multiplier if constrained else None
    H, C_final = hessians(model, data.theta, at.x, at.u, expanded, here.first.costate, nu)
    F = expanded.F
    free, lower, upper = ~here.held, data.u_lower, data.u_upper
    rows = None
    matrices = H, C_final
    if constrained:
        rows = ActiveRows(expanded.G, here.rows.active, largest_rho)
        H, C_final = priced(H, C_final, expanded.G, here.rows, data.prices)
        matrices = penalised(H, C_final, rows)
    factors = factorize(matrices[0], F, matrices[1], free)
    system = factors, H, F, C_final, free, rows

    multiplier = jnp.where(free | (lower == upper), jnp.inf, jnp.abs(here.gradient))
    slack = jnp.where(free, jnp.minimum(upper - at.u, at.u - lower), jnp.inf)
    multiplier, slack = jnp.min(multiplier), jnp.min(slack)
    if constrained:
        of_rows = margins(at.g, here.rows, data.prices)
        multiplier, slack = jnp.minimum(multiplier, of_rows[0]), jnp.minimum(slack, of_rows[1])
    return Certificate(
        kkt_residual=here.kkt_residual,
        multiplier=multiplier,
        slack=slack,
        curvature=_smallest_curvature(system, at.u),
        adjoint_residual=_adjoint_residual(system, at.x, at.u),
    )


def _smallest_curvature(system, u: Array) -> Array:
    """The smallest eigenvalue of the reduced Hessian R = ∇²_u J on the free controls.

    A plan from rest that pays the linear term −b on its controls is R⁻¹ b: one back substitution.
    """
    factors, H, F, C_final, free, rows = system
    n = C_final.shape[0]
    rest = jnp.zeros(n, u.dtype)

    def inverse(b):
        c = jnp.zeros(H.shape[:2], u.dtype).at[:, n:].set(-b)
        rhs = Rhs(x_init=rest, c=c, f=jnp.zeros(F.shape[:2], u.dtype), c_final=rest, g=_zeros(rows))
        return kkt_solve(*system, rhs).u

    def unit(v):
        return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(u.dtype).tiny)

    start = jax.random.normal(jax.random.key(0), u.shape, u.dtype)
    v = lax.fori_loop(
        0, _INVERSE_ITERATIONS, lambda _, v: unit(inverse(v)), unit(jnp.where(free, start, 0))
    )
    eigenvalue = 1 / jnp.vdot(v, inverse(v))
    definite = jnp.all(factors.curvature > definite_threshold(u.dtype))
    found = jnp.where(definite, eigenvalue, -jnp.abs(eigenvalue))
    return jnp.where(jnp.any(free), found, jnp.inf)


def _zeros(rows: ActiveRows | None):
    """A right-hand side of 0 for every row."""
    return (
        None
        if rows is None
        else jax.tree.map(lambda a: jnp.zeros(a.shape, rows.rho.dtype), rows.active)
    )


def _adjoint_residual(system, x: Array, u: Array) -> Array:
    """How well M w = −ȳ is solved, M the KKT matrix, relative to the largest of the terms."""
    _, H, F, C_final, free, rows = system
    n = C_final.shape[0]
    of_x, of_u = jax.random.split(jax.random.key(1))
    x_bar = jax.random.rademacher(of_x, x.shape, x.dtype)
    u_bar = jax.random.rademacher(of_u, u.shape, u.dtype)
    rhs = adjoint_rhs(Point(x_bar, u_bar, jnp.zeros_like(x), _zeros(rows)))
    w = kkt_solve(*system, rhs)
    z = jnp.concatenate([w.x[:-1], w.u], axis=1)
    Hz = jnp.einsum("tij,tj->ti", H, z)
    pull = jnp.einsum("tij,ti->tj", F, w.costate[1:])
    end, held = C_final @ w.x[-1] + rhs.c_final - w.costate[-1], []
    if rows is not None:
        pull, end = add_pull(pull, end, rows.G, w.multiplier)
        g = [(rows.G.stage, rows.active.stage, z), (rows.G.final, rows.active.final, w.x[-1])]
        held = [
            jnp.where(active, jnp.einsum("...ij,...j->...i", G, z), 0)
            for G, active, z in g
            if G is not None
        ]
    stationary = (Hz + pull + rhs.c).at[:, :n].add(-w.costate[:-1])
    counts = jnp.concatenate([jnp.ones_like(w.x[:-1], bool), free], axis=1)
    moved = jnp.einsum("tij,tj->ti", F, z)
    errors = [
        jnp.where(counts, stationary, 0),
        w.x[1:] - moved,
        end,
        *held,
    ]
    terms = [Hz, pull, rhs.c, moved, w.costate]
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(a)) for a in errors]))
    return largest / jnp.max(jnp.stack([jnp.max(jnp.abs(a)) for a in terms]))


@dataclasses.dataclass(frozen=True)
class GradientCheck:
    """What ``check_gradients`` found for one input.

    Attributes:
      name: of the input: "x_init", "params['net'][0]", "u_lower" …
      gradient: the derivative of the loss along a random direction, by ``mpc_solve``.
      difference: the same by central differences of re-solved problems.
      one_sided: those by differences to either side.
      ok: whether they agree.
      reason: "" or, where they do not, what is the matter.
    """

    name: str
    gradient: float
    difference: float
    one_sided: tuple[float, float]
    ok: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """What ``check_gradients`` returns; print it."""

    checks: tuple[GradientCheck, ...]
    certificate: Certificate
    status: Status

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        numbers = ", ".join(
            f"{field.name} {float(getattr(self.certificate, field.name)):.1e}"
            for field in dataclasses.fields(self.certificate)
        )
        lines = [f"{self.status.name}: {numbers}"]
        width = max([5, *(len(check.name) for check in self.checks)])
        lines.append(f"  {'input':<{width}}  {'gradient':>12}  {'re-solved':>12}")
        for check in self.checks:
            verdict = "ok" if check.ok else f"WRONG: {check.reason}"
            lines.append(
                f"  {check.name:<{width}}  {check.gradient:12.5g}  {check.difference:12.5g}  "
                + verdict
            )
        return "\n".join(lines)


def check_gradients(
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
    step: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
) -> GradientReport:
    """Compare the gradients of one problem with those of re-solved problems, input by input.

    The loss is a random linear function of x, u and the objective. Every input (x_init, each
    floating leaf of params, the finite bounds, slack and rate) is moved a small step along a random
    direction and back, and the problem solved again from the plan that it had. Where the difference
    quotient and the gradient disagree, the report names the input and why:

    * the solver did not converge, at the plan or beside it: there is no plan to differentiate;
    * a control comes free or is clamped within the step: the plan has a kink there (a certificate
      with a small ``multiplier`` or ``slack`` says so too);
    * the plan jumps: another local minimum, or a discontinuous cost or dynamics;
    * cost or dynamics have a kink at the plan;
    * none of these: a derivative that the user's functions define wrongly (a ``jax.custom_jvp``, a
      ``stop_gradient``), or ``Options.backward_hessian="ilqr"``.

    For a look from outside of jit, in float64 if it can be: in float32 re-solved differences have
    two or three digits.

    Args:
      step: relative to each entry of an input; by default the cube root of the dtype's eps.
      rtol: what counts as agreement, relative to the larger of the two; by default 1e-3 in float64
        and 2e-2 in narrower types.
      seed: of the random directions and of the loss.
      The others are those of ``mpc_solve``.

    Returns:
      A ``GradientReport``: print it, or ask for its ``ok``.

    Raises:
      TypeError, ValueError: as ``mpc_solve``.
    """
    inputs: dict[str, Any] = dict(x_init=jnp.asarray(x_init), params=params)
    x_checked, u_checked, lower, upper = validation.mpc_arguments(x_init, u_init, u_lower, u_upper)
    bounds = dict(u_lower=lower, u_upper=upper)
    given = dict(u_lower=u_lower, u_upper=u_upper)
    inputs |= {name: bounds[name] for name in bounds if given[name] is not None}
    if constraints is not None:  # The functions have none; slack and rate do.
        inputs["constraints"] = dataclasses.replace(constraints, multipliers=None)
    shapes = dict(x=(len(u_checked) + 1, len(x_checked)), u=u_checked.shape, objective=())
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def solve(inputs, u_init):
        return mpc_solve(
            cost, dynamics, inputs["x_init"], u_init, inputs["params"], terminal_cost=terminal_cost,
            u_lower=inputs.get("u_lower"), u_upper=inputs.get("u_upper"),
            constraints=inputs.get("constraints"), options=options,
        )  # fmt: skip

    def loss(inputs, u_init):
        solution = solve(inputs, u_init)
        terms = [jnp.vdot(weights[name], getattr(solution, name)) for name in weights]
        return sum(terms), solution

    # One program for all that is to be solved: compiling is what takes time.
    loss_and_slopes = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))
    (_, solution), _ = loss_and_slopes(inputs, u_checked)
    # Warm-started from its own plan, the problem is at a fixed point of the solver.
    (value, solution), slopes = loss_and_slopes(inputs, solution.u)
    value = float(value)
    certificate = certify(
        cost, dynamics, inputs["x_init"], solution, params, terminal_cost=terminal_cost,
        u_lower=u_lower, u_upper=u_upper, constraints=constraints,
    )  # fmt: skip
    eps = float(jnp.finfo(solution.u.dtype).eps)
    step = eps ** (1 / 3) if step is None else step
    rtol = (1e-3 if eps < 1e-12 else 2e-2) if rtol is None else rtol

    checks = []
    leaves, tree = jax.tree_util.tree_flatten_with_path(inputs)
    for index, (path, leaf) in enumerate(leaves):
        leaf = np.asarray(leaf)
        if not np.issubdtype(leaf.dtype, np.floating) or not np.isfinite(leaf).any():
            continue
        # Every entry by its own size, for a weight of 1e-3 beside one of 1 must stay positive.
        finite = np.where(np.isfinite(leaf), np.abs(leaf), 0.0)
        direction = rng.normal(size=leaf.shape) * np.where(finite > 0, finite, finite.max() or 1.0)
        if path[0].key in bounds:  # infinite ones stay, and so do both of an equal pair
            direction = np.where(np.isfinite(leaf) & np.asarray(lower < upper), direction, 0.0)

        def moved(h, index=index, leaf=leaf, direction=direction):
            changed = [value for _, value in leaves]
            changed[index] = jnp.asarray(leaf + h * direction, leaf.dtype)
            (result, there), _ = loss_and_slopes(jax.tree.unflatten(tree, changed), solution.u)
            return float(result), there

        (above, after), (below, before) = moved(step), moved(-step)
        slope = jax.tree.leaves(slopes)[index]
        gradient = float(np.vdot(np.asarray(slope, float), direction))
        sides = (above - value) / step, (value - below) / step
        difference = (above - below) / (2 * step)
        scale = max(abs(gradient), abs(difference))
        # What rounding and the solver's tolerance leave of a difference.
        noise = 1e3 * eps * max(1.0, abs(value)) / step
        ok = abs(gradient - difference) <= rtol * scale + noise
        reason = "" if ok else _reason(solution, before, after, sides, difference, scale)
        name = jax.tree_util.keystr(path[1:])
        label = f"{path[0].key}{name}"
        checks.append(GradientCheck(label, gradient, difference, sides, bool(ok), reason))
    return GradientReport(tuple(checks), certificate, Status(int(solution.status)))


def _reason(solution, before, after, sides, difference, scale) -> str:
    statuses = [Status(int(s.status)) for s in (solution, before, after)]
    failed = [status for status in statuses if status != Status.CONVERGED]
    if failed:
        where = "at the plan" if failed[0] == statuses[0] else "beside it"
        return f"not converged {where} ({failed[0].name})"
    reach = max(float(jnp.max(jnp.abs(s.u - solution.u))) for s in (before, after))
    size = float(jnp.max(jnp.abs(solution.u))) + 1.0
    if reach > 0.01 * size:
        return "the plan jumps: another local minimum, or discontinuous cost or dynamics"
    changed = np.argwhere(
        np.asarray((before.free != solution.free) | (after.free != solution.free))
    )
    if len(changed):
        t, i = changed[0]
        return f"degenerate: u[{t}, {i}] comes free or is clamped within the step"
    if abs(sides[0] - sides[1]) > 0.1 * max(scale, abs(difference)):
        return "a kink in cost or dynamics at the plan"
    return "no kink, no jump: is a derivative of cost or dynamics defined by hand?"
