"""The gradient of a problem beside differences of re-solved ones, input by input."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.batch import lanes
from jaxmpc.certificate import Certificate, certify
from jaxmpc.mpc import mpc_solve
from jaxmpc.problem.params import split
from jaxmpc.types import Constraints, Cost, Dynamics, Options, Solution, Status, TerminalCost

_ROUNDINGS = 1e3  # of the loss, that a re-solved problem may be off by
_JUMP = 0.01  # of the plan's size: a step of a millionth does not move a smooth plan so far
_KINK = 0.1  # one-sided differences that disagree by this share are no rounding


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
        """Whether all inputs are."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        numbers = ", ".join(
            f"{field.name} {float(getattr(self.certificate, field.name)):.1e}"
            for field in dataclasses.fields(self.certificate)
            if getattr(self.certificate, field.name) is not None
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
    cost: Cost,
    dynamics: Dynamics,
    x_init: ArrayLike,
    u_init: ArrayLike,
    params: Any = None,
    *,
    terminal_cost: TerminalCost | None = None,
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
    floating leaf of params, the finite bounds of controls and states, slack and rate) is moved a
    small step along a random direction and back, and the problem solved again from the plan that it
    had. Where the difference quotient and the gradient disagree, the report names the input and
    why:

    * the solver did not converge, at the plan or beside it: there is no plan to differentiate;
    * a control comes free or is clamped within the step: the plan has a kink there (a certificate
      with a small ``multiplier`` or ``slack`` says so too);
    * the plan jumps: another local minimum, or a discontinuous cost or dynamics;
    * cost or dynamics have a kink at the plan;
    * none of these: a derivative that the user's functions define wrongly (a ``jax.custom_jvp``, a
      ``stop_gradient``), ``Options.backward_hessian="ilqr"``, or ``Options.smoothing`` of the
      gradient alone, which is that of no plan (with ``smoothed="plan"`` it is, and they agree).

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

    Example:
      >>> import jax.numpy as jnp
      >>> def dynamics(x, u, t, weights):  # a cart, in steps of half a second
      ...     position, velocity = x
      ...     return jnp.stack([position + 0.5 * velocity, velocity + 0.5 * u[0]])
      >>> def cost(x, u, t, weights):
      ...     return weights @ x**2 + u @ u
      >>> weights, x_init, u_init = jnp.array([1.0, 1.0]), jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> from jaxmpc import check_gradients
      >>> report = check_gradients(cost, dynamics, x_init, u_init, weights, u_lower=-0.5)
      >>> report.ok
      True
      >>> [check.name for check in report.checks]
      ['params', 'u_lower', 'x_init']
    """
    numbers, whole = split(params)
    inputs: dict[str, Any] = dict(x_init=jnp.asarray(x_init), params=numbers)
    x_checked, u_checked, lower, upper = validation.mpc_arguments(x_init, u_init, u_lower, u_upper)
    bounds = dict(u_lower=lower, u_upper=upper)
    given = dict(u_lower=u_lower, u_upper=u_upper)
    inputs |= {name: bounds[name] for name in bounds if given[name] is not None}
    equal = {name: np.asarray(lower == upper) for name in bounds}
    if constraints is not None:  # The functions have none; slack, rate and bounds of the states do.
        shape = len(u_checked) + 1, len(x_checked)
        x_lower, x_upper = validation.state_bounds(constraints, shape, x_checked.dtype)
        inputs["constraints"] = dataclasses.replace(
            constraints, multipliers=None, x_lower=x_lower, x_upper=x_upper
        )
        if x_lower is not None and x_upper is not None:
            same = np.asarray(x_lower == x_upper)
            equal |= {"constraints.x_lower": same, "constraints.x_upper": same}
    shapes = dict(x=(len(u_checked) + 1, len(x_checked)), u=u_checked.shape, objective=())
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}

    def solve(inputs: dict[str, Any], u_init: Array) -> Solution:
        return mpc_solve(
            cost, dynamics, inputs["x_init"], u_init, whole(inputs["params"]),
            terminal_cost=terminal_cost, u_lower=inputs.get("u_lower"),
            u_upper=inputs.get("u_upper"),
            constraints=inputs.get("constraints"), options=options,
        )  # fmt: skip

    def loss(inputs: dict[str, Any], u_init: Array) -> tuple[ArrayLike, Solution]:
        solution = solve(inputs, u_init)
        terms = [lanes.vdot(weights[name], getattr(solution, name)) for name in weights]
        return sum(terms), solution

    # One program for all that is to be solved: compiling is what takes time.
    loss_and_slopes = jax.jit(jax.value_and_grad(loss, has_aux=True, allow_int=True))
    (_, solution), _ = loss_and_slopes(inputs, u_checked)
    # Warm-started from its own plan, the problem is at a fixed point of the solver.
    (value, solution), slopes = loss_and_slopes(inputs, solution.u)
    value = float(value)
    certificate = certify(
        cost, dynamics, inputs["x_init"], solution, params, terminal_cost=terminal_cost,
        u_lower=u_lower, u_upper=u_upper, constraints=constraints, options=options,
    )  # fmt: skip
    eps = lanes.eps(solution.u)
    step = eps ** (1 / 3) if step is None else step
    rtol = (1e-3 if lanes.is_wide(solution.u) else 2e-2) if rtol is None else rtol

    checks = []
    leaves, tree = jax.tree_util.tree_flatten_with_path(inputs)
    for index, (path, leaf) in enumerate(leaves):
        leaf = np.asarray(jnp.asarray(leaf))  # a Python number has the dtype that JAX gives it
        if not np.issubdtype(leaf.dtype, np.floating) or not np.isfinite(leaf).any():
            continue
        # Every entry by its own size, for a weight of 1e-3 beside one of 1 must stay positive.
        finite = np.where(np.isfinite(leaf), np.abs(leaf), 0.0)
        direction = rng.normal(size=leaf.shape) * np.where(finite > 0, finite, finite.max() or 1.0)
        name = f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
        if name in equal:  # both of an equal pair stay
            direction = np.where(equal[name], 0.0, direction)
        direction = np.where(np.isfinite(leaf), direction, 0.0)

        def moved(
            h: float,
            index: int = index,
            leaf: np.ndarray = leaf,
            direction: np.ndarray = direction,
        ) -> tuple[float, Solution]:
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
        noise = _ROUNDINGS * eps * max(1.0, abs(value)) / step
        ok = abs(gradient - difference) <= rtol * scale + noise
        reason = "" if ok else _reason(solution, before, after, sides, difference, scale)
        if reason and options.smoothing is not None and options.smoothed == "gradient":
            reason = 'smoothed: the gradient of no plan (that of smoothed="plan" is one)'
        checks.append(GradientCheck(name, gradient, difference, sides, bool(ok), reason))
    return GradientReport(tuple(checks), certificate, Status(int(solution.status)))


def _reason(
    solution: Solution,
    before: Solution,
    after: Solution,
    sides: tuple[float, float],
    difference: float,
    scale: float,
) -> str:
    statuses = [Status(int(s.status)) for s in (solution, before, after)]
    failed = [status for status in statuses if status != Status.CONVERGED]
    if failed:
        where = "at the plan" if failed[0] == statuses[0] else "beside it"
        return f"not converged {where} ({failed[0].name})"
    reach = max(float(jnp.max(jnp.abs(s.u - solution.u))) for s in (before, after))
    size = float(jnp.max(jnp.abs(solution.u))) + 1.0
    if reach > _JUMP * size:
        return "the plan jumps: another local minimum, or discontinuous cost or dynamics"
    changed = np.argwhere(
        np.asarray((before.free != solution.free) | (after.free != solution.free))
    )
    if len(changed):
        t, i = changed[0]
        return f"degenerate: u[{t}, {i}] comes free or is clamped within the step"
    if abs(sides[0] - sides[1]) > _KINK * max(scale, abs(difference)):
        return "a kink in cost or dynamics at the plan"
    return "no kink, no jump: is a derivative of cost or dynamics defined by hand?"
