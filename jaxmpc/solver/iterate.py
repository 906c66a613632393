"""Where the search is: controls, states, and what they cost."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import Expansion, rollout, stage_costs
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.problem.stages import transition
from jaxmpc.riccati.point import z_of


class Iterate(NamedTuple):
    """Controls and states, mostly their rollout, and what they cost."""

    u: Array  # [T, m]
    x: Array  # [T+1, n]
    costs: Array  # [T+1]
    gaps: Array  # [T, n], what the dynamics say of x_{t+1} minus what it is: 0 on a rollout


def new_iterate(problem: Problem, data: Data, u: Array) -> Iterate:
    """The rollout of the controls u."""
    x = rollout(problem, data.theta, data.x_init, u)
    return Iterate(u, x, stage_costs(problem, data.theta, x, u), jnp.zeros_like(x[1:]))


def with_gaps(problem: Problem, data: Data, u: Array, x: Array) -> Iterate:
    """The iterate of controls and states that need not belong together."""
    step, now = transition(problem, data.theta, u)
    gaps = jax.vmap(step)(x[:-1], u, now) - x[1:]
    return Iterate(u, x, stage_costs(problem, data.theta, x, u), gaps)


def rounding(at: Iterate, costate: Array, expanded: Expansion) -> Array:
    """The size of rounding in the objective: that of the costs, and that of the terms which each
    state is summed from, which the costates amplify, and at a minimum of the cost its curvature.
    The signs are random, so the squares add up."""
    n, eps = at.x.shape[1], lanes.eps(at.x)
    terms = jax.vmap(lanes.matvec)(jnp.abs(expanded.F), jnp.abs(z_of(at.x, at.u)))
    terms = eps * jnp.concatenate([jnp.abs(at.x[:1]), terms])
    curvature = jax.vmap(lanes.diagonal)(expanded.C[:, :n, :n])
    curvature = jnp.concatenate([curvature, lanes.diagonal(expanded.C_final)[None]])
    states = terms * (jnp.abs(costate) + jnp.abs(curvature) * terms)
    return _norm(4 * eps * at.costs, (0,)) + _norm(states, (0, 1))


def _norm(a: Array, axes: tuple[int, ...]) -> Array:
    """√Σ a², of entries whose squares may be out of range."""
    largest = jnp.max(jnp.abs(a), axis=axes)
    some = jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt(jnp.sum((a / some) ** 2, axis=axes))
