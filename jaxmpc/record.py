"""A search to look at: what ``Options.record`` wrote down, as lines of text and as a picture."""

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmpc.types import Action, Record, Solution

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_record(solution: Solution) -> "Figure":
    """Draw how a search went: objective, residual and violation, step lengths and regularization,
    τ, and what was active, over the iterations; the actions are the colours of the steps.

    Args:
      solution: that of one problem, solved with ``Options(record=N)``; of a batch take one first,
        ``jax.tree.map(lambda a: a[i], solution)``.

    Returns:
      A matplotlib ``Figure`` (``figure.savefig("search.png")``); needs matplotlib.

    Raises:
      TypeError: ``solution`` is not a ``Solution``. ValueError: it has no record, or is a batch.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine, Options, Quadratic, mpc_solve, plot_record
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> x_init, u_init = jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> solution = mpc_solve(
      ...     Quadratic(jnp.eye(3)), dynamics, x_init, u_init, u_lower=-0.5, u_upper=0.5,
      ...     options=Options(record=20),
      ... )
      >>> len(plot_record(solution).axes)
      4
    """
    from matplotlib.figure import Figure

    record = _one_record(solution)
    count = _number_of_entries(record)
    k = np.arange(count)
    value = {name: np.asarray(a, float)[:count] for name, a in vars(record).items()}
    actions = value["action"].astype(int)
    figure = Figure(figsize=(7, 8), layout="constrained")
    objective, residual, step, active = figure.subplots(4, 1, sharex=True)
    objective.plot(k, value["objective"], ".-")
    objective.set_ylabel("objective")
    for name, label in (("residual", "KKT residual"), ("violation", "violation"), ("barrier", "τ")):
        positive = np.where(value[name] > 0, value[name], np.nan)
        if np.isfinite(positive).any():
            residual.semilogy(k, positive, ".-", label=label)
    residual.legend(frameon=False)
    for action in sorted(set(actions.tolist())):
        chosen = actions == action
        step.plot(k[chosen], value["step"][chosen], "o", label=Action(action).name.lower())
    step.set_ylabel("step")
    step.legend(frameon=False, ncols=4)
    active.step(k, value["active"], where="mid")
    active.set_ylabel("active")
    active.set_xlabel("iteration")
    return figure


def lines_of(record: Record, show: int) -> list[str]:
    """The last ``show`` iterations of one problem, as text."""
    count = _number_of_entries(record)
    names = ("objective", "residual", "violation", "step", "regularization", "barrier")
    lines = [
        "  " + " ".join(["iteration  ", *(f"{name:>14}" for name in names), " active  action"])
    ]
    for k in range(max(0, count - show), count):
        numbers = " ".join(f"{float(getattr(record, name)[k]):14.6g}" for name in names)
        action = Action(int(record.action[k])).name
        lines.append(f"  {k:<11} {numbers} {int(record.active[k]):7d}  {action}")
    return lines


def _number_of_entries(record: Record) -> int:
    return int(np.sum(~np.isnan(np.asarray(record.regularization, float))))


def _one_record(solution: Any) -> Record:
    if not isinstance(solution, Solution):
        raise TypeError(f"solution must be a jaxmpc.Solution, got {type(solution).__name__}")
    record = solution.record
    if record is None:
        raise ValueError("solution has no record: solve with Options(record=200)")
    if np.ndim(solution.status):
        raise ValueError(
            f"solution must be that of one problem, got a batch {list(np.shape(solution.status))}: "
            "take one with jax.tree.map(lambda a: a[i], solution)"
        )
    return record
