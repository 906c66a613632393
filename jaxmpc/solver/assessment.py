"""An iterate held against the first-order conditions, and what counts as meeting them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import Expansion, FirstOrder, first_order
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.point import Rows
from jaxmpc.solver.box_qp import clamped
from jaxmpc.solver.iterate import Iterate
from jaxmpc.types import Options


class Assessment(NamedTuple):
    """An iterate held against the first-order conditions."""

    first: FirstOrder
    gradient: Array  # [T, m], ∇_u of the Lagrangian
    clamped: Array  # [T, m], the controls that a bound holds against the gradient
    kkt_residual: Array
    residual: Array  # the stricter one that convergence asks for
    relative: Array  # that, over the terms that cancel in it
    finite: Array


def assess(data: Data, at: Iterate, expanded: Expansion, multipliers: Rows) -> Assessment:
    """Hold an iterate against the first-order conditions, with the multipliers of the rows."""
    u, lower, upper = at.u, data.u_lower, data.u_upper
    first = first_order(expanded, multipliers)
    gradient = first.control_cost + first.control_pull
    held = clamped(gradient, u, lower, upper)
    # Stricter than the KKT residual: a control one ulp away from its bound is not clamped, so its
    # gradient has to vanish. Hence every clamped control ends exactly on its bound.
    residual = jnp.max(jnp.where(held, 0, jnp.abs(gradient)), axis=(0, 1))
    terms = jnp.maximum(jnp.abs(first.control_cost), jnp.abs(first.control_pull))
    projected = jnp.max(jnp.abs(jnp.clip(u - gradient, lower, upper) - u), axis=(0, 1))
    # What is not finite in F, c or G makes the gradients so, be it multiplied by 0.
    shown = (at.x, at.costs, first.costate, gradient)
    return Assessment(
        first=first,
        gradient=gradient,
        clamped=held,
        kkt_residual=projected,
        residual=residual,
        relative=residual / jnp.maximum(1, jnp.max(terms, axis=(0, 1))),
        finite=all_finite(shown, residual.ndim),
    )


def all_finite(tree, batch_axes: int) -> Array:
    """Whether everything in a tree is finite, of each problem."""
    each = (lanes.every(jnp.isfinite(a), a.ndim - batch_axes) for a in jax.tree.leaves(tree))
    return functools.reduce(jnp.logical_and, each)


def tolerances(options: Options, dtype) -> tuple[Array, Array]:
    """What counts as converged, and what the solver aims for before it stops.

    They differ in the default for narrow types: there the residual that rounding allows depends on
    the problem, so the solver goes on while steps still lower it.
    """
    if options.tolerance is not None:
        tolerance = goal = options.tolerance
    elif lanes.is_wide(dtype):
        tolerance = goal = 1e-10
    else:
        tolerance, goal = 64 * lanes.eps(dtype), 4 * lanes.eps(dtype)
    return jnp.asarray(tolerance, dtype), jnp.asarray(goal, dtype)
