"""The separable quadratic stage cost of the example systems."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class QuadraticCost(NamedTuple):
    """Coefficients of the stage cost ½ τᵀ diag(q) τ + pᵀ τ with τ = (x, u).

    Attributes:
        q: [n+m] weights, the states' first and then the controls'.
        p: [n+m] linear term, in the same order.
    """

    q: Array
    p: Array


def cost(x: Array, u: Array, t: Any, params: QuadraticCost) -> Array:
    """Stage cost ½ τᵀ diag(q) τ + pᵀ τ with τ = (x, u).

    Args:
        x: [n] state.
        u: [m] control.
        t: time index; the cost does not depend on it.
        params: the coefficients, each [n+m].

    Returns:
        The cost, a scalar. Differentiable in x, u and params, any number of times.
    """
    del t
    tau = jnp.concatenate((x, u))
    return jnp.sum((0.5 * params.q * tau + params.p) * tau)


def goal_cost(
    goal: ArrayLike | list[float] | tuple[float, ...],
    goal_weights: ArrayLike | list[float] | tuple[float, ...],
    control_weight: ArrayLike,
    m: int = 1,
    dtype: Any = None,
) -> QuadraticCost:
    """Cost that pulls the state to a goal, in the convention of the paper's published code.

    With w the goal weights: q = (w, control_weight, …) and p = (−√w ∘ goal, 0, …).

    The minimum in one state coordinate is at goal/√w. That is the goal itself only where the weight
    is 1 or the goal is 0, which holds for the pendulum and the cartpole. For a minimum at the goal
    whatever the weight, build `QuadraticCost` with p = −w ∘ goal instead.

    Args:
        goal: [n] goal state.
        goal_weights: [n] weights w ≥ 0 of the states.
        control_weight: weight of each control, a scalar or [m].
        m: number of controls.
        dtype: of the coefficients; by default that of the arguments, Python numbers counting as
            JAX's default float.

    Returns:
        The coefficients. Differentiable in the goal, in the control weight and in the goal weights
        where they are positive (√w has no finite slope at 0).

    Source: Amos et al. 2018 (arXiv:1810.13400), published code.
    """
    if dtype is None:
        dtype = jnp.result_type(*jax.tree.leaves((goal, goal_weights, control_weight)), 0.0)
    goal = jnp.asarray(goal, dtype)
    weights = jnp.asarray(goal_weights, dtype)
    if goal.ndim != 1 or goal.shape != weights.shape:
        raise ValueError(
            "goal and goal_weights must be vectors of one length, "
            f"got shapes {goal.shape} and {weights.shape}"
        )
    control_weights = jnp.broadcast_to(jnp.asarray(control_weight, dtype), (m,))
    return QuadraticCost(
        q=jnp.concatenate((weights, control_weights)),
        p=jnp.concatenate((-jnp.sqrt(weights) * goal, jnp.zeros((m,), dtype))),
    )
