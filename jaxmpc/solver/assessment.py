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
from jaxmpc.solver.rounding import hidden
from jaxmpc.types import Options

# By so many roundings costates under feedback may differ from those of the rollout.
_COSTATE = 16.0


class Assessment(NamedTuple):
    """An iterate held against the first-order conditions."""

    first: FirstOrder
    gradient: Array  # [T, m], ∇_u of the Lagrangian
    clamped: Array  # [T, m], the controls that a bound holds against the gradient
    kkt_residual: Array
    residual: Array  # the stricter one that convergence asks for
    size: Array  # of the terms that cancel in it
    loose: Array  # under feedback, where nothing but rounding may be left of it
    rest: Array  # what gains nothing: a square of it over the curvature is lost in the objective
    finite: Array


def assess(
    data: Data,
    at: Iterate,
    expanded: Expansion,
    multipliers: Rows,
    feedback: Array | None = None,
) -> Assessment:
    """Hold an iterate against the first-order conditions, with the multipliers of the rows.

    With ``feedback`` [T, m, n] the gradient is that of controls which answer by these gains, where
    no bound holds them. A rollout's own costates carry its rounding back, which an unstable plant
    amplifies on the way there and on the way back.
    """
    u, lower, upper = at.u, data.u_lower, data.u_upper
    n, pull = at.x.shape[1], jax.vmap(lanes.matvec_t)
    K = feedback
    if K is not None:
        K = jnp.where(((lower < u) & (u < upper))[:, :, None], K, 0)
    first = first_order(expanded, multipliers, K)
    size_F, size_c = jnp.abs(expanded.F), jnp.abs(first.c)
    of_costate = size_c[:, :n] + pull(size_F[:, :, :n], jnp.abs(first.costate[1:]))
    of_costate = jnp.concatenate([of_costate[1:], jnp.abs(first.costate[-1:])])
    gradient = first.control_cost + first.control_pull
    held = clamped(gradient, u, lower, upper)
    # Stricter than the KKT residual: a control one ulp away from its bound is not clamped, so its
    # gradient has to vanish. Hence every clamped control ends exactly on its bound.
    residual = jnp.max(jnp.where(held, 0, jnp.abs(gradient)), axis=(0, 1))
    # What cancels in the gradient, and in the costates before. At rest all that may vanish; then it
    # is what the controls would pay, be they a rounding of those that the search began with.
    size_u = jnp.maximum(jnp.abs(u), lanes.eps(u) * jnp.abs(data.u_init))
    price = jax.vmap(lanes.matvec)(jnp.abs(expanded.C[:, n:, n:]), size_u)
    terms = jnp.maximum(size_c[:, n:], price) + pull(size_F[:, :, n:], of_costate)
    size = jnp.max(terms, axis=(0, 1))
    loose = jnp.zeros(residual.shape, bool)
    if K is not None:
        # A tolerance would not do: what they lack, the plant amplifies on the way back.
        off = jnp.max(jnp.abs(pull(K, gradient)), axis=0)
        loose = ~lanes.every(off <= _COSTATE * lanes.eps(u) * jnp.max(of_costate, axis=0), 1)
    curvature = jnp.max(jnp.abs(jax.vmap(lanes.diagonal)(expanded.C[:, n:, n:])), axis=(0, 1))
    rest = 4 * lanes.eps(u) * jnp.sqrt(curvature) * jnp.sqrt(jnp.sum(jnp.abs(at.costs), axis=0))
    projected = jnp.max(jnp.abs(jnp.clip(u - gradient, lower, upper) - u), axis=(0, 1))
    # What is not finite in F, c or G makes the gradients so, be it multiplied by 0.
    shown = (at.x, at.costs, first.costate, gradient, terms)
    return Assessment(
        first=first,
        gradient=gradient,
        clamped=held,
        kkt_residual=projected,
        residual=residual,
        size=size,
        loose=loose,
        rest=rest,
        finite=all_finite(shown, residual.ndim),
    )


def noise_of(
    at: Iterate,
    here: Assessment,
    H: Array,
    F: Array,
    H_final: Array,
    tolerance: Array,
    feedback: Array,
) -> Array:
    """The size of rounding in the residual; 0 where that leaves fewer than half of the digits of
    the tolerance."""
    K = jnp.where(here.clamped[:, :, None], 0, feedback)
    noise, terms = hidden(at.x, at.u, here.first.costate, here.gradient, H, F, H_final, K)
    noise = jnp.max(jnp.where(here.clamped, 0, noise), axis=(0, 1))
    holds = noise <= tolerance**0.5 * jnp.max(terms, axis=(0, 1))
    return jnp.where(holds, noise, 0)


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
