"""A point held against the first-order conditions, and what counts as meeting them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import Expansion, FirstOrder, first_order
from jaxmpc.problem.problem import Data
from jaxmpc.solver import augmented
from jaxmpc.solver.box_qp import clamped
from jaxmpc.solver.iterate import Iterate
from jaxmpc.types import Options


class Assessment(NamedTuple):
    """A point held against the first-order conditions."""

    first: FirstOrder
    gradient: Array  # [T, m], ∇_u J
    held: Array  # [T, m], the clamped controls
    kkt_residual: Array
    residual: Array  # the stricter one that convergence asks for
    stationary: Array  # that, over the terms that cancel in it
    relative: Array  # the same, or the gap of the constraints over their size if that is larger
    finite: Array
    rows: Any = None  # RowState of the constraints, if there are any
    gap: Any = None
    size: Any = None  # of the terms that cancel in the constraints, at least 1


def assess(data: Data, point: Iterate, expanded: Expansion) -> Assessment:
    """Hold a point against the first-order conditions."""
    u, lower, upper = point.u, data.u_lower, data.u_upper
    rows = gap = size = None
    if point.penalty is not None:
        rows = augmented.state(point.g, point.penalty, data.prices)
        gap = augmented.gap(rows, point.penalty)
    first = first_order(expanded, None if rows is None else rows.multiplier)
    gradient = first.control_cost + first.control_pull
    held = clamped(gradient, u, lower, upper)
    # Stricter than the KKT residual: a control one ulp away from its bound is not clamped, so its
    # gradient has to vanish. Hence every clamped control ends exactly on its bound.
    residual = jnp.max(jnp.where(held, 0, jnp.abs(gradient)), axis=(0, 1))
    terms = jnp.maximum(jnp.abs(first.control_cost), jnp.abs(first.control_pull))
    stationary = relative = residual / jnp.maximum(1, jnp.max(terms, axis=(0, 1)))
    kkt_residual = jnp.max(jnp.abs(jnp.clip(u - gradient, lower, upper) - u), axis=(0, 1))
    # What is not finite in F, c or G makes the gradients so, be it multiplied by 0.
    shown = [point.x, point.costs, first.costate, gradient]
    if gap is not None:
        size = jnp.maximum(1, augmented.size(expanded.G, point.x, u))
        relative = jnp.maximum(stationary, gap / size)
        kkt_residual = jnp.maximum(kkt_residual, gap)
        shown += jax.tree.leaves(point.g)
    return Assessment(
        first=first,
        gradient=gradient,
        held=held,
        kkt_residual=kkt_residual,
        residual=residual,
        stationary=stationary,
        relative=relative,
        finite=all_finite(shown, residual.ndim),
        rows=rows,
        gap=gap,
        size=size,
    )


def all_finite(arrays, batch_axes: int) -> Array:
    return functools.reduce(
        jnp.logical_and, (lanes.every(jnp.isfinite(a), a.ndim - batch_axes) for a in arrays)
    )


def tolerances(options: Options, dtype) -> tuple[Array, Array]:
    """What counts as converged, and what the solver aims for before it stops.

    They differ in the default for narrow types: there the residual that rounding allows depends on
    the problem, so the solver goes on while steps still lower it.
    """
    if options.tolerance is not None:
        tolerance = goal = options.tolerance
    elif (eps := float(jnp.finfo(dtype).eps)) < 1e-12:
        tolerance = goal = 1e-10
    else:
        tolerance, goal = 64 * eps, 4 * eps
    return jnp.asarray(tolerance, dtype), jnp.asarray(goal, dtype)
