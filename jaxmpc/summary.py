"""A short text on how solves went: what to print when something looks wrong."""

from typing import Any

import jax
import numpy as np

from jaxmpc.record import lines_of
from jaxmpc.types import Smoothing, Solution, Status

_ADVICE = {
    Status.MAX_ITERATIONS: "raise Options.max_iterations, or start from a better u_init",
    Status.STALLED: "rounding, or cost or dynamics with kinks: try float64, or a shorter horizon",
    Status.NONFINITE: "the first rollout, or a derivative along it, is not finite: pass an x_guess",
    Status.INDEFINITE: "a saddle, or a control that the cost does not see: no implicit gradient",
    Status.INFEASIBLE: "u_lower > u_upper, or constraints that no plan nearby meets",
}
# Of a search that ended although its gradient is far above rounding.
_AT_A_KINK = (
    "at a kink: no step leads down, yet the gradient is far from 0. Write max(g, 0) as a soft "
    "constraint and |u| by two controls (README: Kinks); if all is smooth, the horizon is too long"
)


def summarize(solution: Solution, *, show: int = 5) -> str:
    """Describe one solution, or a batch of them from ``jax.vmap``, in a few lines.

    How many problems ended with which ``Status``; iterations, KKT residuals and objectives; which
    constraints are violated, at which stage most and in how many problems (hard ones past what a
    plan that converged leaves, soft ones too); the share of clamped controls per control dimension;
    and which problems to look at first: those that did not converge, then those that took the most
    iterations. Of one problem with a ``Record``, the last iterations.

    Args:
      solution: what ``mpc_solve``, ``ilqr_box`` or ``ilqr_unrolled`` returned, with any leading
        batch axes; concrete, so outside of ``jit``.
      show: how many problems, constraints or iterations to list.

    Raises:
      TypeError: ``solution`` is not a ``Solution``, or is traced.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine, Quadratic, mpc_solve, summarize
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> cost = Quadratic(jnp.eye(3))
      >>> x_init, u_init = jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> solution = mpc_solve(cost, dynamics, x_init, u_init, u_lower=-0.5, u_upper=0.5)
      >>> print(summarize(solution))
      1 problem, T = 5, n = 2, m = 1, float...
        CONVERGED            1  100.0 %
        iterations     1
        KKT residual   ...
        objective      2.09292
        clamped        u[0] 20.0 %
    """
    if not isinstance(solution, Solution):
        raise TypeError(f"solution must be a jaxmpc.Solution, got {type(solution).__name__}")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(solution)):
        raise TypeError("solution is traced: call summarize outside of jit, vmap and grad")

    batch = np.shape(solution.status)
    T, m = solution.u.shape[-2:]
    n = solution.x.shape[-1]
    status = np.ravel(solution.status)
    iterations = np.ravel(solution.iterations)
    residual = np.ravel(solution.kkt_residual)
    objective = np.ravel(solution.objective)
    total = status.size

    def name(i: int) -> str:
        if not batch:
            return "the problem"
        index = [int(k) for k in np.unravel_index(i, batch)]
        return f"problem {index[0] if len(index) == 1 else tuple(index)}"

    noun = "problem" if total == 1 else "problems"
    lines = [f"{total} {noun}, T = {T}, n = {n}, m = {m}, {solution.u.dtype}"]
    if total == 0:
        return lines[0]
    for kind in Status:
        count = int(np.sum(status == kind))
        if count:
            advice = f"  ({_ADVICE[kind]})" if kind in _ADVICE else ""
            kinks = int(np.sum(_at_a_kink(solution))) if kind == Status.STALLED else 0
            if kinks == count:
                advice = f"  ({_AT_A_KINK})"
            elif kinks:
                advice += f"\n  {'':<15}{kinks:>7}          ({_AT_A_KINK})"
            lines.append(f"  {kind.name:<15}{count:>7} {100 * count / total:6.1f} %{advice}")
    if solution.smoothing is not None:
        lines.append(f"  {'smoothed':<15}{_smoothing(solution.smoothing)}")
    lines.append(_row("iterations", iterations, "{:.0f}"))
    lines.append(_row("KKT residual", residual, "{:.1e}"))
    lines.append(_row("objective", objective, "{:.6g}"))
    if solution.multipliers is not None:
        lines.append(_row("violation", np.ravel(solution.violation), "{:.1e}"))
    if solution.violations is not None:
        initial = np.ravel(solution.initial_violation)
        if np.any(initial > 0):
            lines.append(_row("  of x_init", initial, "{:.1e}") + ", which no plan can lessen")
        lines += _violated(solution, show)
    clamped = 1 - np.asarray(solution.free, float).reshape(-1, m).mean(axis=0)
    shares = "  ".join(f"u[{i}] {100 * share:.1f} %" for i, share in enumerate(clamped))
    lines.append(f"  {'clamped':<15}{shares}")
    if solution.record is not None and total == 1:
        record = jax.tree.map(lambda a: np.reshape(a, np.shape(a)[-1:]), solution.record)
        lines += lines_of(record, show)

    if total > 1:
        # lexsort: the last key counts most; NaN residuals sort as the largest.
        order = np.lexsort((-residual, -iterations, status == Status.CONVERGED))
        lines.append("  slowest" if np.all(status == Status.CONVERGED) else "  look at")
        for i in order[:show]:
            lines.append(
                f"    {name(i)}: {Status(int(status[i])).name} after {iterations[i]} iterations, "
                f"KKT residual {residual[i]:.1e}, objective {objective[i]:.6g}"
            )
        if order.size > show:
            lines.append(f"    … and {order.size - show} more")
    return "\n".join(lines)


def _smoothing(smoothing: Smoothing) -> str:
    values = np.ravel(smoothing.value)
    low, high = np.min(values), np.max(values)
    value = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    if smoothing.smoothed == "plan":
        return f"the plan, by a barrier of {value}"
    return f"the gradient, by {value} of what bounds and rows withhold; the plan is exact"


def _at_a_kink(solution: Solution) -> np.ndarray:
    """Which problems stalled at a kink.

    No step led down, so the objective is at its minimum but for rounding. Along a control with the
    slope r a smooth function has a curvature of r² / 2 rounding there at least, and r vanishes
    within 2 rounding / r. If that is nothing beside the controls, r does not vanish: it jumps.
    """
    eps = float(np.finfo(solution.u.dtype).eps)

    def of_each(a: Any) -> np.ndarray:
        return np.asarray(a, float).reshape(np.size(solution.status), -1)

    x, u, costate = of_each(solution.x), of_each(solution.u), of_each(solution.costate)
    residual = np.ravel(solution.kkt_residual)
    violation = 0.0 if solution.violation is None else np.ravel(solution.violation)
    with np.errstate(all="ignore"):
        rounding = 4 * np.abs(np.ravel(solution.objective)) + np.sum(np.abs(costate * x), axis=1)
        reach = 2 * eps * rounding / residual
        size = np.max(np.abs(u), axis=1)
        sharp = reach < eps**0.5 * np.where(size > 0, size, 1)
        # With constraints the residual is that of the worst row, too.
        stalled = np.ravel(solution.status) == Status.STALLED
        found: np.ndarray = stalled & sharp & ~(violation > 0.1 * residual)
    return found


def _violated(solution: Solution, show: int) -> list[str]:
    """The constraints that are violated most, by name and stage."""
    status, total = np.ravel(solution.status), np.size(solution.status)
    # What a plan that converged leaves of hard constraints is rounding; of others, what is far
    # below the worst.
    share = np.where(status == Status.CONVERGED, 1.0, 1e-3)
    floor = share * np.nan_to_num(np.ravel(solution.violation))
    T, found = solution.u.shape[-2], []
    for name, values in vars(solution.violations).items():
        if values is None:
            continue
        values = np.asarray(values).reshape(total, -1, values.shape[-1])
        values = np.where(np.isfinite(values) & (values > floor[:, None, None]), values, 0.0)
        for i in range(values.shape[-1]):
            worst = values[..., i].max(axis=0, initial=0.0)
            t = T if name.startswith("terminal") else int(np.argmax(worst))
            count = int(np.sum(values[..., i].any(axis=1)))
            if count:
                share_of = f" (in {count} of {total} problems)" if total > 1 else ""
                found.append((worst.max(), f"{name}[{i}] at t = {t}: {worst.max():.2g}{share_of}"))
    found.sort(key=lambda entry: -entry[0])
    texts = [text for _, text in found[:show]]
    if len(found) > show:
        texts.append(f"… and {len(found) - show} more")
    return [f"  {'violated' if k == 0 else '':<15}{text}" for k, text in enumerate(texts)]


def _row(label: str, values: np.ndarray, form: str) -> str:
    finite = values[np.isfinite(values)]
    if values.size == 1:
        return f"  {label:<15}{form.format(values[0])}"
    if not finite.size:
        return f"  {label:<15}not finite"
    text = f"median {form.format(np.median(finite))}, max {form.format(np.max(finite))}"
    missing = values.size - finite.size
    return f"  {label:<15}{text}" + (f", not finite in {missing}" if missing else "")
