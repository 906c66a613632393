"""A trajectory held against the conditions of a solution, with what a step needs to know of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import Expansion, expand, first_order, hessians
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.riccati.point import Rows, z_of
from jaxmpc.riccati.rows import add_pull, per_row
from jaxmpc.solver.assessment import all_finite
from jaxmpc.solver.box_qp import clamped
from jaxmpc.solver.interior import active_set, barrier
from jaxmpc.solver.interior.active_set import State
from jaxmpc.solver.interior.barrier import Layout, Sides
from jaxmpc.solver.interior.state import (
    FINISH,
    INTERIOR,
    PROBE,
    RESTORE,
    Search,
    tiny_of,
)

FIRST = 0.1  # τ at first, relative to what is to be gained a stage
# What going away by as much as the states and controls are large costs a restoration.
_NEAR = 0.1
_NEARLY = 0.1  # with a smaller error a search begins with a finish


class Sizes(NamedTuple):
    """What rounding is measured by, and what a step is short against."""

    x: Array  # [n], the largest along the horizon
    u: Array  # [m], likewise, or the distance of the bounds
    rows: Array  # Σ_j |G_ij z_j| of every row

    @property
    def some(self) -> Array:
        """``rows``, with 1 for those that have no size."""
        return jnp.where(self.rows > 0, self.rows, 1)


class Local(NamedTuple):
    expanded: Expansion  # in a restoration with its objective
    H: Array
    H_final: Array
    costate: Array
    g: Array  # of every row and bound
    state: State
    warm: Array  # it begins with multipliers, or close to a solution
    plain: Sides
    sides: Sides  # the same, in a restoration relaxed
    sizes: Sizes
    weight: Array  # of the violation in a restoration
    near: tuple[Array, Array]  # [n+m] and [n], the curvature that keeps it near
    gradient: Array  # [T, m], ∇_u of the Lagrangian
    clamped: Array  # [T, m]
    # On an active set: the residual over the terms that cancel in it, and rows over their sizes.
    error: Array
    dual: Array  # ∇ of the barrier's Lagrangian, in units of the objective
    rounding: Array  # in that
    finite: Array


def known_or(known: Array | None, found: Array) -> Array:
    """The sizes [n+m] that the user knows, and those that are found where there are none."""
    return found if known is None else jnp.where((known > 0) & (known < jnp.inf), known, found)


def row_sizes(G: Rows, size_z: Array, g: Rows) -> Rows:
    """Σ_j |G_ij| size_j of every row, for states and controls of the given sizes [n+m]."""
    n = G.final.shape[1]
    of_stage = jnp.sum(jnp.abs(G.stage) * size_z, axis=2)
    of_end = jnp.sum(jnp.abs(G.final) * size_z[:n], axis=1)
    return per_row(lambda a, g: jnp.where(a > 0, a, jnp.abs(g)), Rows(of_stage, of_end), g)


def evaluated(problem: Problem, data: Data, s: Search, layout: Layout, K: Array) -> Local:
    """``K``: the feedback that a finish was rolled out with."""
    at, kept, measures = s.at, s.kept, s.measures
    x, u, values = at.x, at.u, at.values
    low, high = data.u_lower, data.u_upper
    eps, tiny, n, T = lanes.eps(x), tiny_of(x), x.shape[1], u.shape[0]
    restoring, finishing, probing = s.mode == RESTORE, s.mode == FINISH, s.mode == PROBE
    inside = (s.mode == INTERIOR) | restoring
    expanded = expand(problem, data.theta, x, u)

    # Sizes.
    size_x = jnp.maximum(jnp.max(jnp.abs(x), axis=0), measures.reach[:n])
    width = jnp.where(jnp.isfinite(high - low), high - low, 0)
    size_u = jnp.max(jnp.maximum(jnp.abs(u), width), axis=0)
    size_u = jnp.where(size_u > 0, size_u, measures.reach[n:])
    size_z = known_or(data.sizes, jnp.concatenate([size_x, size_u]))
    if data.sizes is not None:
        size_x, size_u = size_z[:n], size_z[n:]
    both = jnp.broadcast_to(jnp.concatenate([size_u, size_u]), (T, 2 * u.shape[1], *u.shape[2:]))
    sizes = Sizes(size_x, size_u, layout.pack(row_sizes(expanded.G, size_z, values.g), both))

    # In a restoration the violation is all that counts, near to where it began.
    # Its weights are those where it began: the same objective all the way.
    weight = jnp.where(restoring, s.weight, measures.scale / sizes.some**2)
    at_first = jnp.max(jnp.abs(z_of(kept.x, kept.u)), axis=0)
    at_first = jnp.maximum(at_first, jnp.concatenate([measures.reach[:n], size_u]))
    at_first = known_or(data.sizes, at_first)
    many = float(T * (n + u.shape[1]))
    near = _NEAR * (s.tau * T / FIRST) / many / jnp.where(at_first > 0, at_first, 1) ** 2
    near_x = near[:n]
    away = z_of(x, u) - z_of(kept.x, kept.u)
    expanded = lanes.select(
        restoring,
        expanded._replace(
            c=near * away,
            C=jax.vmap(lanes.diagonal_matrix)(jnp.broadcast_to(near, expanded.c.shape)),
            c_final=near_x * (x[-1] - kept.x[-1]),
            C_final=lanes.diagonal_matrix(near_x),
        ),
        expanded,
    )
    plain = barrier.sides_of(layout, data.prices, low, high)
    sides = barrier.relaxed(plain, weight, restoring)
    g = layout.rows_alone(values.g)
    # The distance from a bound keeps the digits that the control beside it has lost.
    g = jnp.where(sides.row, g, -at.pairs.w)

    # The active set.
    nu = at.pairs.nu
    guess = State(jnp.where(sides.row, nu, 0), s.held.active, s.held.beyond)
    # What is to be gained, or until that is known, what the multipliers say of it.
    force = jnp.max(jnp.where(sides.row, jnp.abs(nu) * sizes.some, 0), axis=0)
    gain = jnp.where(probing, jnp.where(force > 0, force, 1), measures.scale)
    found = active_set.state_of(plain, nu, g, gain / sizes.some**2)
    state = lanes.select((finishing & ~s.fresh) | probing, found, guess)

    # First and second order. A rollout's own costates carry its rounding back, which an unstable
    # plant amplifies on the way there and on the way back. So a finish is held, as the barrier is,
    # against the costates that the step led to: those answer by feedback.
    multipliers = layout.rows(state.nu)
    first = first_order(expanded, multipliers)
    own = inside | (finishing & ~s.fresh)
    costate = lanes.select(own, at.costate, first.costate)
    H, H_final = hessians(problem, data.theta, x, u, expanded, costate, multipliers)
    pull = jax.vmap(lanes.matvec_t)
    of_z = first.c + pull(expanded.F, costate[1:])
    gradient = of_z[:, n:]
    of_x = jnp.concatenate([of_z[1:, :n], first.c_final[None]]) - costate[1:]
    held = jnp.where(s.fresh & ~s.last, s.held.clamped, clamped(gradient, u, low, high))

    def largest(of_x, of_u):
        """Along the plan, [n+m]."""
        return jnp.max(jnp.concatenate([of_x, of_u], axis=1), axis=0)

    off_x = jnp.abs(of_x)
    residual = largest(off_x, jnp.where(held, 0, jnp.abs(gradient)))
    # What cancels: the cost, the rows and the dynamics, each by its size; and in the costates,
    # before the dynamics multiply them.
    size_c, size_final = add_pull(
        jnp.abs(expanded.c),
        jnp.abs(expanded.c_final),
        per_row(jnp.abs, expanded.G),
        per_row(jnp.abs, multipliers),
    )
    size_F = jnp.abs(expanded.F)
    size_costate = size_c[:, :n] + pull(size_F[:, :, :n], jnp.abs(costate[1:]))
    size_costate = jnp.concatenate([size_costate[1:], size_final[None]])
    terms = largest(size_costate, size_c[:, n:] + pull(size_F[:, :, n:], size_costate))
    # What one rounding of every state and control makes of the residuals is no error. Along a
    # rollout the controls answer those of the states.
    size_K = jnp.abs(jnp.where(finishing, K, 0))
    answer = jax.vmap(lanes.matvec)(size_K, jnp.abs(x[:-1]))
    bends = jax.vmap(lanes.matvec)(jnp.abs(H), z_of(jnp.abs(x), jnp.abs(u) + answer))
    ends = lanes.matvec(jnp.abs(H_final), jnp.abs(x[-1]))
    noise = eps * largest(jnp.concatenate([bends[1:, :n], ends[None]]), bends[:, n:])
    least = jnp.where(probing, 0, 1e-3 * measures.scale) / jnp.maximum(size_z, tiny)
    shares = jnp.maximum(residual - noise, 0) / jnp.maximum(jnp.maximum(terms, least), tiny)
    error = jnp.max(active_set.gaps(plain, g, state) / sizes.some, axis=0)
    error = jnp.maximum(jnp.max(shares, axis=0), error)
    finite = all_finite((x, values, first.costate, H, H_final, expanded.F, expanded.G), s.tau.ndim)

    # The same with the multipliers of the bounds, in units of the objective.
    upper, lower = layout.bounds(nu)
    off_u = jnp.where(low < high, jnp.abs(gradient + upper - lower), 0)
    return Local(
        expanded=expanded,
        H=H,
        H_final=H_final,
        costate=costate,
        g=g,
        state=state,
        warm=probing & finite & ((force > 0) | (error < _NEARLY)),
        plain=plain,
        sides=sides,
        sizes=sizes,
        weight=weight,
        near=(near, near_x),
        gradient=gradient,
        clamped=held,
        error=error,
        dual=jnp.max(largest(off_x, off_u) * size_z, axis=0),
        rounding=jnp.max(jnp.maximum(eps * terms, noise) * size_z, axis=0),
        finite=finite,
    )
