"""A primal-dual interior-point method for problems with rows, with an active-set finish.

Every row and bound is held away from its boundary by a barrier τ that goes to nothing, and has a
multiplier of its own (``barrier``). The states are unknowns beside the controls: on the way the
dynamics need not hold, and a trial step costs no rollout. What a step has to lower is the violation
or the barrier objective (``filter``); where it can do neither, a restoration minimises the
violation alone. Once the barrier shows which rows are active, the plan of that active set is found
by Newton's method on rollouts (``active_set``); where that leads nowhere, the barrier goes on.

Source: Wächter and Biegler 2006, Mathematical Programming 106 (interior point, filter,
restoration); Rao, Wright and Rawlings 1998 (the LQR of every step).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import (
    Expansion,
    FirstOrder,
    constraint_values,
    expand,
    first_order,
    hessians,
    rollout,
    stage_costs,
)
from jaxmpc.problem.prices import RowState, largest_violation, slack_price
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.problem.stages import transition
from jaxmpc.riccati.pivots import convex_part, definite_threshold
from jaxmpc.riccati.point import Rows, z_of
from jaxmpc.riccati.rows import add_pull, add_squares, per_row
from jaxmpc.riccati.sequential import row_freedom
from jaxmpc.solver import active_set, barrier, filter
from jaxmpc.solver.active_set import State
from jaxmpc.solver.assessment import all_finite, tolerances
from jaxmpc.solver.barrier import Layout, Pairs, Sides
from jaxmpc.solver.box_qp import clamped
from jaxmpc.solver.filter import Candidate, Filter
from jaxmpc.solver.judgement import CROSSED, RUNNING
from jaxmpc.solver.linearization import Evaluation, Linearization, no_evaluation
from jaxmpc.solver.newton import Direction, newton
from jaxmpc.types import Options, Solution, Status

# What a trip is for: to measure the problem; a step of the barrier method; one of the restoration;
# one of the finish.
PROBE, INTERIOR, RESTORE, FINISH = 0, 1, 2, 3

_PUSH = 1e-2  # how far from its boundary a distance begins, relative to its scale
_FIRST = 0.1  # τ at first, relative to what is to be gained a stage
_SOLVED = 10.0  # the problem of τ counts as solved at an error of so many τ,
_ROUNDINGS = 16.0  # or of so many roundings
_LINEAR, _POWER = 0.2, 1.5  # then τ falls to this share, or by this power, whichever is less
_LEAST = 1e-3  # τ in the end, relative to the tolerance
_SMALL = 2e-3  # relative to the first, from where on a finish is tried
_BOUNDARY = 0.99  # the share of the way to the boundary that a step may take
_SHORT = 0.1  # a step so short was not one of a good Hessian
_MAX_TRIES = 14  # lengths of a step
_EXACT = 1e-3  # a finish ends at this share of the tolerance, if it can
_HALVES = 0.5  # a finish has to halve its error,
_MISSES = 2  # but for so many times in a row
_RESTARTS, _RAISED = 4, 1e3  # from a τ so much larger
_PATIENCE = 8  # finishes that may fail once τ is at its least
_FLOOR = 1e-2  # a violation costs at least this share of what is to be gained, relative to sizes
_WELL_HELD = 0.5  # the weight that holds a row, over its own stiffness: this power of 1 / eps
# What going away by as much as the states and controls are large costs a restoration.
_NEAR = 0.1
_AT_REST = 1e-6  # the slope of a violation that is at its least, relative to its cost


class Values(NamedTuple):
    """The functions along a trajectory."""

    costs: Array  # [T+1]
    gaps: Array  # [T, n], by how much the dynamics do not hold
    g: Rows


class Trajectory(NamedTuple):
    x: Array  # [T+1, n]
    u: Array  # [T, m]
    costate: Array  # [T+1, n]
    pairs: Pairs
    values: Values


def packed(at: Trajectory) -> Array:
    """A trajectory as one array: in the carry, where all that is carried is selected from."""
    batch = at.values.costs.shape[1:]
    return jnp.concatenate([a.reshape(-1, *batch) for a in jax.tree.leaves(at)])


def unpacked(flat: Array, data: Data) -> Trajectory:
    T, m = data.u_init.shape[:2]
    n, batch = data.x_init.shape[0], flat.shape[1:]
    p, q = data.multipliers.stage.shape[1], data.multipliers.final.shape[0]
    many = (T * p + q + 2 * T * m,)
    # In the order of the fields.
    shapes = [(T + 1, n), (T, m), (T + 1, n), *[many] * 4, (T + 1,), (T, n), (T, p), (q,)]
    parts, begin = [], 0
    for shape in shapes:
        end = begin + math.prod(shape)
        parts.append(flat[begin:end].reshape(*shape, *batch))
        begin = end
    x, u, costate, w, nu, sigma, zeta, costs, gaps, stage, final = parts
    pairs, values = Pairs(w, nu, sigma, zeta), Values(costs, gaps, Rows(stage, final))
    return Trajectory(x, u, costate, pairs, values)


class Held(NamedTuple):
    """The active set that a finish begins with."""

    active: Array  # of every row, bool
    beyond: Array
    clamped: Array  # [T, m]


class Prices(NamedTuple):
    """What violation is summed with."""

    gaps: Array  # [T, n]
    rows: Array


class Search(NamedTuple):
    """The carry of the loop."""

    at: Array  # a trajectory, packed
    # Likewise, where the barrier goes on after a finish; what a restoration stays near to.
    kept: Array
    mode: Array
    tau: Array
    tau_before: Array  # a restoration
    scale: Array  # what is to be gained, in units of the objective
    freedom: Array  # of every row and bound, diag(G H⁻¹ Gᵀ)
    hold: Array  # the weights that hold rows
    reach: Array  # [n+m], how far states and controls go for what is to be gained
    filter: Filter
    prices: Prices
    violation: Array  # the cost of it at which a restoration began
    weight: Array  # of every row in that cost
    held: Held
    fresh: Array  # the finish begins here, with the active set of the barrier
    error: Array  # of the finish, the least so far
    misses: Array
    tries: Array  # finishes that have failed
    wait: Array  # so many τ before the next
    regularization: Array
    mirror: Array  # what replaces an indefinite Hessian: its own convex part, or that of the cost
    leaving: Array  # nothing is left to try: go to a rollout,
    last: Array  # and evaluate it, and stop
    infeasible: Array
    restarts: Array
    iterations: Array
    status: Array
    evaluation: Evaluation


def layout_of(problem_rows: Rows, u: Array) -> Layout:
    return Layout(u.shape[0], problem_rows.stage.shape[1], problem_rows.final.shape[0], u.shape[1])


def start(problem: Problem, data: Data, options: Options, wanted: Array) -> Search:
    lower, upper = data.u_lower, data.u_upper
    u = jnp.clip(data.u_init, lower, upper)
    x = rollout(problem, data.theta, data.x_init, u)
    values = evaluate(problem, data, x, u)
    one, no = jnp.ones(wanted.shape, x.dtype), jnp.zeros(wanted.shape, bool)
    zero = jnp.zeros(wanted.shape, jnp.int32)
    nu = layout_of(values.g, u).rows_alone(data.multipliers)
    free = jnp.ones_like(nu)
    at = Trajectory(x, u, jnp.zeros_like(x), Pairs(free, nu, free, free), values)
    off = jnp.zeros(nu.shape, bool)
    return Search(
        at=packed(at),
        kept=packed(at),
        mode=zero + PROBE,
        tau=one,
        tau_before=one,
        scale=one,
        freedom=free,
        hold=free,
        reach=jnp.zeros_like(jnp.concatenate([x[0], u[0]])),
        filter=filter.empty(one),
        prices=Prices(jnp.zeros_like(values.gaps), jnp.zeros_like(nu)),
        violation=one,
        weight=free,
        held=Held(off, off, jnp.zeros(u.shape, bool)),
        fresh=no,
        error=one * jnp.inf,
        misses=zero,
        tries=zero,
        wait=zero,
        regularization=jnp.broadcast_to(options.regularization, wanted.shape).astype(x.dtype),
        mirror=no,
        leaving=no,
        last=no,
        infeasible=no,
        restarts=zero,
        iterations=zero,
        status=jnp.where(wanted & lanes.every(lower <= upper, 2), RUNNING, CROSSED).astype(
            jnp.int32
        ),
        evaluation=no_evaluation(x, u, values.g),
    )


def evaluate(problem: Problem, data: Data, x: Array, u: Array) -> Values:
    step, now = transition(problem, data.theta, u)
    x_next = jax.vmap(step)(x[:-1], u, now)
    return Values(
        stage_costs(problem, data.theta, x, u),
        x_next - x[1:],
        constraint_values(problem, data.theta, x, u),
    )


class Sizes(NamedTuple):
    """What rounding is measured by, and what a step is short against."""

    x: Array  # [n], the largest along the horizon
    u: Array  # [m], likewise, or the distance of the bounds
    rows: Array  # Σ_j |G_ij z_j| of every row


class Here(NamedTuple):
    """A trajectory with its derivatives."""

    expanded: Expansion  # in a restoration with its objective
    first: FirstOrder
    H: Array
    H_final: Array
    costate: Array
    g: Array  # of every row and bound
    state: State
    plain: Sides
    sides: Sides  # the same, in a restoration relaxed
    sizes: Sizes
    weight: Array  # of the violation in a restoration
    near: tuple[Array, Array]  # [n+m] and [n], the curvature that keeps it near
    gradient: Array  # [T, m], ∇_u of the Lagrangian
    clamped: Array  # [T, m]
    stationary: Array  # the residual over the terms that cancel in it
    rounding: Array  # in the gradient, in units of the objective
    finite: Array


def row_sizes(G: Rows, size_z: Array, g: Rows) -> Rows:
    """Σ_j |G_ij| size_j of every row, for states and controls of the given sizes [n+m]."""
    n = G.final.shape[1]
    of_stage = jnp.sum(jnp.abs(G.stage) * size_z, axis=2)
    of_end = jnp.sum(jnp.abs(G.final) * size_z[:n], axis=1)
    return per_row(lambda a, g: jnp.where(a > 0, a, jnp.abs(g)), Rows(of_stage, of_end), g)


def here_of(
    problem: Problem,
    data: Data,
    s: Search,
    at: Trajectory,
    kept: Trajectory,
    layout: Layout,
    hold: Array,
) -> Here:
    """The trajectory evaluated; ``hold`` are the weights that hold rows."""
    x, u, values = at.x, at.u, at.values
    low, high = data.u_lower, data.u_upper
    tiny = _tiny(x)
    n, T = x.shape[1], u.shape[0]
    restoring, finishing = s.mode == RESTORE, s.mode == FINISH
    inside = (s.mode == INTERIOR) | restoring
    expanded = expand(problem, data.theta, x, u)
    size_x = jnp.maximum(jnp.max(jnp.abs(x), axis=0), s.reach[:n])
    width = jnp.where(jnp.isfinite(high - low), high - low, 0)
    size_u = jnp.max(jnp.maximum(jnp.abs(u), width), axis=0)
    size_u = jnp.where(size_u > 0, size_u, s.reach[n:])
    size_z = jnp.concatenate([size_x, size_u])
    of_rows = row_sizes(expanded.G, size_z, values.g)
    both = jnp.concatenate([size_u, size_u])
    both = jnp.broadcast_to(both, (T, *both.shape))
    sizes = Sizes(size_x, size_u, layout.pack(of_rows, both))

    # In a restoration the violation is all that counts, near to where it began.
    # Its weights are those where it began: the same objective all the way.
    some = jnp.where(sizes.rows > 0, sizes.rows, 1)
    weight = jnp.where(restoring, s.weight, s.scale / some**2)
    at_first = jnp.max(jnp.abs(z_of(kept.x, kept.u)), axis=0)
    at_first = jnp.maximum(at_first, jnp.concatenate([s.reach[:n], size_u]))
    many = float(z_of(x, u).shape[0] * z_of(x, u).shape[1])
    near = _NEAR * (s.tau * T / _FIRST) / many / jnp.where(at_first > 0, at_first, 1) ** 2
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

    nu = at.pairs.nu
    found = active_set.state_of(plain, nu, g, hold)
    guess = State(jnp.where(sides.row, nu, 0), s.held.active, s.held.beyond)
    state = lanes.select(finishing & ~s.fresh, found, guess)
    multipliers = layout.rows(state.nu)
    first = first_order(expanded, multipliers)
    costate = lanes.select(inside & (s.filter.most > 0), at.costate, first.costate)
    H, H_final = hessians(problem, data.theta, x, u, expanded, costate, multipliers)

    gradient = first.control_cost + first.control_pull
    held = jnp.where(s.fresh & ~s.last, s.held.clamped, clamped(gradient, u, low, high))
    residual = jnp.max(jnp.where(held, 0, jnp.abs(gradient)), axis=0)
    # What cancels in the gradient: the cost, the rows and the dynamics, each by its size; and in
    # the costates, before the dynamics multiply them.
    size_c, size_final = add_pull(
        jnp.abs(expanded.c),
        jnp.abs(expanded.c_final),
        per_row(jnp.abs, expanded.G),
        per_row(jnp.abs, multipliers),
    )
    size_F, pull = jnp.abs(expanded.F), jax.vmap(lanes.matvec_t)
    size_costate = size_c[:, :n] + pull(size_F[:, :, :n], jnp.abs(first.costate[1:]))
    size_costate = jnp.concatenate([size_costate[1:], size_final[None]])
    terms = jnp.max(size_c[:, n:] + pull(size_F[:, :, n:], size_costate), axis=0)
    floor = 1e-3 * s.scale / jnp.maximum(size_u, tiny)
    stationary = jnp.max(residual / jnp.maximum(jnp.maximum(terms, floor), tiny), axis=0)
    return Here(
        expanded, first, H, H_final, costate, g, state, plain, sides, sizes, weight, (near, near_x),
        gradient, held, stationary, lanes.eps(x) * jnp.max(terms * size_u, axis=0),
        all_finite((x, values, first.costate, H, H_final, expanded.F, expanded.G), s.tau.ndim),
    )  # fmt: skip


def _tiny(a: Array) -> float:
    return float(jnp.finfo(a.dtype).tiny) ** 0.5


class Finish(NamedTuple):
    """How a finish stands."""

    error: Array
    there: Array
    ends: Array  # this is the last trip
    goes_on: Array
    fails: Array
    better: Array


def finish_of(s: Search, here: Here, tolerance, goal, out_of_time: Array) -> Finish:
    finishing = s.mode == FINISH
    evaluated = finishing & ~s.fresh
    off = active_set.gaps(here.sides, here.g, here.state)
    off = off / jnp.where(here.sizes.rows > 0, here.sizes.rows, 1)
    error = jnp.maximum(here.stationary, jnp.max(off, axis=0))
    error = jnp.where(here.finite & evaluated, error, jnp.inf)
    better = error <= _HALVES * s.error
    small = error <= tolerance
    # Newton's step from a small error is worth its price: it ends at rounding.
    there = small & ((error <= jnp.minimum(goal, _EXACT * tolerance)) | ~better)
    ends = finishing & (s.last | (evaluated & (there | out_of_time)))
    may = (error < 1) | (s.misses < 0)
    goes_on = finishing & ~ends & (s.fresh | (may & (better | (s.misses < _MISSES))))
    return Finish(error, there, ends, goes_on, finishing & ~ends & ~goes_on, better)


def trip(problem: Problem, data: Data, options: Options, s: Search) -> Search:
    """Evaluate the trajectory, judge it, and step from it."""
    at, kept_at = unpacked(s.at, data), unpacked(s.kept, data)
    x, u, values = at.x, at.u, at.values
    low, high = data.u_lower, data.u_upper
    dtype, n, T = x.dtype, x.shape[1], u.shape[0]
    eps, tiny = lanes.eps(dtype), _tiny(x)
    layout = layout_of(values.g, u)
    tolerance, goal = tolerances(options, dtype)
    running = s.status == RUNNING
    probing, restoring, finishing = (s.mode == mode for mode in (PROBE, RESTORE, FINISH))
    inside = (s.mode == INTERIOR) | restoring
    out_of_time = s.iterations >= options.max_iterations

    # Evaluate.
    hold = s.hold
    here = here_of(problem, data, s, at, kept_at, layout, hold)
    expanded, sides, g, pairs = here.expanded, here.sides, here.g, at.pairs

    # Judge: a finish by itself, the barrier by the error of its problem.
    finish = finish_of(s, here, tolerance, goal, out_of_time)
    # In a restoration the violation of equalities belongs to the objective.
    counts = sides.row & ~(restoring & sides.equality)
    missed = jnp.where(counts, barrier.missed(sides, pairs, g), 0)
    dual = _dual_error(here, at, layout, data)
    centre = barrier.off_centre(sides, pairs, s.tau)
    worst = jnp.max(jnp.abs(values.gaps) * s.prices.gaps, axis=(0, 1))
    primal = jnp.maximum(worst, jnp.max(jnp.abs(missed) * s.prices.rows, axis=0))
    begun = s.filter.most > 0  # and so what violation is summed with
    enough = jnp.maximum(_SOLVED * s.tau, _ROUNDINGS * here.rounding)
    solved = inside & begun & (jnp.maximum(jnp.maximum(dual, primal), centre) <= enough)
    lower_tau = s.tau * (s.tau * T / s.scale) ** (_POWER - 1)
    lower_tau = jnp.minimum(_LINEAR * s.tau, lower_tau)
    lower_tau = jnp.maximum(lower_tau, eps * s.scale / T)
    tau = jnp.where(solved, lower_tau, s.tau)
    at_least = s.tau <= jnp.maximum(_LEAST * tolerance, eps) * s.scale / T
    small_tau = tau <= _SMALL * _FIRST * s.scale / T

    # The step.
    centre_eq = jnp.where(restoring, 0, pairs.nu)
    weight_eq = jnp.where(restoring, here.weight, hold)
    eliminated = barrier.eliminate(sides, pairs, g, tau, centre_eq, weight_eq)
    slope_f, weight_f = active_set.slopes_and_weights(sides, g, here.state, hold)
    slopes = jnp.where(finishing, slope_f, eliminated.slope)
    weights = jnp.where(finishing, weight_f, eliminated.weight)
    bound = _bound_of(here, u, s.fresh, data)
    offset = jnp.where(finishing & here.clamped, bound - u, 0)
    pinned = jnp.where(finishing, here.clamped, low == high)
    measures = probing | ((s.mode == INTERIOR) & solved & small_tau)
    width = jnp.where(probing & jnp.isfinite(high - low) & (high > low), high - low, jnp.inf)

    def recursion(H, H_final, slopes, weights, plain) -> Direction:
        c, c_final = add_pull(expanded.c, expanded.c_final, expanded.G, layout.rows(slopes))
        upper, lower = layout.bounds(slopes)
        c = c.at[:, n:].add(upper - lower)
        H, H_final = add_squares(H, H_final, expanded.G, layout.rows(weights))
        upper, lower = layout.bounds(weights)
        H = H.at[:, n:, n:].add(jax.vmap(lanes.diagonal_matrix)(upper + lower))
        gaps = jnp.where(finishing & ~s.fresh, 0, values.gaps)
        return newton(
            H, H_final, expanded.F, c, c_final, gaps, ~pinned, offset, width,
            s.regularization, plain,
        )  # fmt: skip

    exact = recursion(here.H, here.H_final, slopes, weights, finishing & ~s.fresh)
    definite = lanes.every(exact.factors.curvature > definite_threshold(dtype))
    convex = ~finish.ends & (~definite if options.hessian == "exact" else True)
    convex = (convex | measures) & running & ~finish.ends

    mirrored = s.mirror & (options.hessian == "exact")

    def second():
        """With ∇²cost where the exact Hessian is not convex; and without rows, to measure what the
        controls can do about each."""
        on = sides.row & measures
        size_z = jnp.concatenate([here.sizes.x, here.sizes.u])
        chosen = lanes.select(
            mirrored & ~measures, (here.H, here.H_final), (expanded.C, expanded.C_final)
        )
        H = jax.vmap(convex_part, (0, None))(chosen[0], size_z)
        d = recursion(
            H, convex_part(chosen[1], here.sizes.x),
            jnp.where(on | probing, 0, slopes), jnp.where(on | probing, 0, weights),
            jnp.zeros_like(running),
        )  # fmt: skip
        freedom, of_z = row_freedom(d.factors, expanded.F, expanded.G)
        of_u = jnp.concatenate([of_z[n:], of_z[n:]])
        freedom = layout.pack(freedom, jnp.broadcast_to(of_u, (T, *of_u.shape)))
        return lanes.select(convex & ~measures, d, exact), freedom, of_z, d.descent

    direction, freedom, of_z, descent = lax.cond(
        jnp.any(convex),
        second,
        lambda: (exact, s.freedom, jnp.zeros_like(s.reach), jnp.zeros_like(s.tau)),
    )
    dx, du = direction.dx, direction.du
    move = layout.along(expanded.G, dx, du)
    changes = barrier.changes(sides, pairs, eliminated, move)
    boundary = jnp.clip(1 - tau / s.scale, _BOUNDARY, 1 - eps**0.5)
    alpha_p, alpha_d = barrier.shares(sides, pairs, changes, boundary)
    if options.trust_region is not None:
        reach = options.trust_region / jnp.maximum(jnp.max(jnp.abs(du), axis=0), tiny)
        alpha_p = jnp.minimum(alpha_p, jnp.min(reach, axis=0))

    # What is to be gained, what holds rows, and where the barrier begins: from the probe.
    violation = active_set.violation(here.plain, g)
    repair = jnp.max(violation**2 / jnp.maximum(freedom, tiny), axis=0)
    gain = jnp.maximum(-descent, 0) + jnp.where(jnp.isfinite(repair), repair, 0)
    gain = jnp.maximum(gain, 1e-6 * jnp.sum(jnp.abs(values.costs), axis=0))
    scale = jnp.where(probing, jnp.where(gain > 0, gain, 1), s.scale)
    some = jnp.where(here.sizes.rows > 0, here.sizes.rows, 1)
    reach_z = jnp.where(probing, jnp.sqrt(scale * jnp.where(jnp.isfinite(of_z), of_z, 0)), s.reach)
    # What is 0 at first has the size of what it may become.
    size_z = jnp.maximum(jnp.concatenate([here.sizes.x, here.sizes.u]), reach_z)
    of_rows = row_sizes(expanded.G, size_z, values.g)
    grown = layout.rows_alone(of_rows)
    some = jnp.where(probing & (grown > 0), grown, some)
    # Beyond the second, rounding in g would show in the multiplier.
    stiff = 1 / (eps**_WELL_HELD * jnp.maximum(freedom, tiny))
    stiff = jnp.clip(stiff, scale / some**2 * eps**-0.25, scale / some**2 * eps**-0.75)
    freedom = jnp.where(measures, freedom, s.freedom)
    hold = jnp.where(measures, jnp.where(sides.row, stiff, 0), hold)
    tau = jnp.where(probing, _FIRST * scale / T, tau)

    # Where a step leads.
    width = high - low
    push = _PUSH * jnp.where(jnp.isfinite(width), width, jnp.maximum(here.sizes.u, tiny))
    between = low < high
    pushed = jnp.where(jnp.isfinite(low) & between, jnp.maximum(u, low + push), u)
    pushed = jnp.where(jnp.isfinite(high) & between, jnp.minimum(pushed, high - push), pushed)
    leaves = (inside | probing) & (s.leaving | out_of_time | ~here.finite)
    rolls = (finish.goes_on & ~s.last) | leaves

    def roll():
        transit, stages = transition(problem, data.theta, u)
        reached = jnp.where(leaves, x, x + dx)
        target = jnp.where(leaves, u, jnp.where(finishing & here.clamped, bound, u + du))

        def advance(x_new, now):
            u, x, K, low, high, t = now
            u_new = jnp.clip(u + lanes.matvec(K, x_new - x), low, high)
            return transit(x_new, u_new, t), (x_new, u_new)

        along = target, reached[:-1], direction.factors.K, low, high, stages
        x_final, (x_new, u_new) = lax.scan(advance, data.x_init, along)
        return jnp.concatenate([x_new, x_final[None]]), u_new

    rolled = lax.cond(jnp.any(rolls & running), roll, lambda: (x, u))

    # Search.
    anew = (solved | ~begun) & inside
    size_x = jnp.where(here.sizes.x > 0, here.sizes.x, 1)
    prices = Prices(
        jnp.abs(direction.costate[1:]) + _FLOOR * s.scale / size_x,
        jnp.abs(pairs.nu + changes.nu) + _FLOOR * s.scale / some,
    )
    prices = lanes.select(anew, prices, s.prices)

    def candidate(x, u, pairs, values) -> Candidate:
        g = layout.rows_alone(values.g)
        off = jnp.abs(barrier.missed(sides, pairs, g)) * prices.rows
        theta = jnp.sum(jnp.abs(values.gaps) * prices.gaps, axis=(0, 1))
        theta += jnp.sum(jnp.where(counts, off, 0), axis=0)
        near, near_x = here.near
        away = jnp.sum(near * (z_of(x, u) - z_of(kept_at.x, kept_at.u)) ** 2, axis=(0, 1))
        away += jnp.sum(near_x * (x[-1] - kept_at.x[-1]) ** 2, axis=0)
        away += jnp.sum(jnp.where(sides.equality, here.weight * g**2, 0), axis=0)
        costs = jnp.where(restoring, 0.5 * away, jnp.sum(values.costs, axis=0))
        return Candidate(theta, costs + barrier.value(sides, pairs, tau))

    now = candidate(x, u, pairs, values)
    slope = jnp.sum(expanded.c * z_of(dx, du), axis=(0, 1)) + lanes.dot(expanded.c_final, dx[-1])
    slope += barrier.slope(sides, pairs, changes, tau)
    broken = jnp.sum(jnp.where(sides.equality, here.weight * g * move, 0), axis=0)
    slope += jnp.where(restoring, broken, 0)
    entries = filter.begun(s.filter, anew, now.theta, s.scale)
    noise = 10 * eps * (jnp.sum(jnp.abs(values.costs), axis=0) + jnp.abs(now.phi))
    wanted = running & (inside | probing | rolls)

    def unfinished(carry):
        _, accepted, _, _, tries = carry
        return wanted & ~accepted & (tries < _MAX_TRIES)

    def attempt(carry):
        before, accepted, last_alpha, by_objective, tries = carry
        alpha = alpha_p * jnp.asarray(options.line_search_decay, dtype) ** tries.astype(dtype)
        x_new = jnp.where(inside, x + alpha * dx, x)
        u_new = jnp.where(inside, jnp.clip(u + alpha * du, low, high), u)
        x_new, u_new = lanes.select(rolls, rolled, (x_new, jnp.where(probing, pushed, u_new)))
        pairs_new = barrier.moved(sides, pairs, changes, alpha, alpha_d, tau)
        new = evaluate(problem, data, x_new, u_new)
        good, falls = filter.accepts(
            entries, now, candidate(x_new, u_new, pairs_new, new), slope, alpha, s.scale, noise
        )
        going = unfinished(carry)
        takes = going & (good | rolls | probing)
        return (
            lanes.select(takes, (x_new, u_new, pairs_new, new), before),
            accepted | takes,
            jnp.where(going, alpha, last_alpha),
            jnp.where(takes, falls, by_objective),
            tries + 1,
        )

    no, zero = jnp.zeros_like(running), jnp.zeros_like(s.tau)
    (x_new, u_new, pairs_new, new), accepted, alpha, by_objective, _ = lax.while_loop(
        lambda carry: jnp.any(unfinished(carry)),
        attempt,
        ((x, u, pairs, values), no, zero, no, jnp.int32(0)),
    )

    # What comes of it.
    failed = inside & ~accepted & ~leaves
    interior = s.mode == INTERIOR
    # Where the barrier is stuck although what is left to repair is little, it begins anew from a
    # larger τ; where it is not, the violation is minimised alone.
    much = now.theta > jnp.maximum(1e-6 * s.scale, s.tau)
    restarts = failed & interior & ~much & (s.restarts < _RESTARTS)
    to_restore = failed & interior & much
    gives_up = failed & ~to_restore & ~restarts
    cost_of_violation = 0.5 * jnp.sum(here.weight * violation**2, axis=0)
    rel = jnp.max(violation / some, axis=0)
    rests = (dual <= _AT_REST * cost_of_violation) & (s.tau * T <= tolerance * cost_of_violation)
    rests |= gives_up & (dual <= 1e-3 * cost_of_violation)
    infeasible = s.infeasible | (restoring & (rel > tolerance) & rests)
    after_violation = active_set.violation(here.plain, layout.rows_alone(new.g))
    restored = restoring & accepted & ~leaves
    restored &= 0.5 * jnp.sum(here.weight * after_violation**2, axis=0) <= 0.25 * s.violation
    warm = probing & (jnp.max(jnp.abs(pairs.nu), axis=0) > 0) & ~leaves
    begins = (interior & solved & (small_tau & (s.wait <= 0)) & accepted) | (interior & gives_up)
    begins |= restarts & (s.wait <= 0)
    begins &= ~leaves
    leaving = gives_up & (restoring | (s.tries > _PATIENCE))
    leaving |= interior & at_least & (s.tries > _PATIENCE)
    leaving |= infeasible

    # Where the barrier begins, at first, in a restoration, and after one.
    starts = probing | to_restore | restored | restarts
    plain = here.plain
    sides_next = barrier.relaxed(plain, here.weight, to_restore)
    tau_restore = _FIRST * cost_of_violation / T
    larger = jnp.minimum(_RAISED * s.tau, _FIRST * s.scale / T)
    tau = jnp.where(restarts, larger, tau)
    tau = jnp.where(
        restored, jnp.maximum(s.tau_before, tau), jnp.where(to_restore, tau_restore, tau)
    )
    bounds_g = jnp.concatenate([u_new - high, low - u_new], axis=1)
    bounds_g = jnp.where(jnp.isfinite(bounds_g), bounds_g, -1)
    reach = layout.pack(layout.rows(_PUSH * here.sizes.rows), jnp.concatenate([push, push], axis=1))
    # Where a row has no multiplier of its own yet, w² = τ v is on the central path.
    natural = jnp.sqrt(tau * freedom)
    reach = jnp.where((natural > 0) & plain.row, jnp.minimum(reach, natural), reach)
    reach = jnp.where(plain.row, reach, tiny)
    begun_pairs = barrier.start(sides_next, layout.pack(new.g, bounds_g), reach, tau)
    # The distances from the bounds go on.
    on = plain.row | probing
    central = jnp.where(plain.inequality, tau / pairs_new.w, 0)
    begun_pairs = begun_pairs._replace(
        w=jnp.where(on, begun_pairs.w, pairs_new.w), nu=jnp.where(on, begun_pairs.nu, central)
    )

    nu_finish = jnp.where(sides.row, slopes + weights * move, 0)
    pairs_new = pairs_new._replace(nu=jnp.where(finishing, nu_finish, pairs_new.nu))
    pairs_new = lanes.select(starts, begun_pairs, pairs_new)
    costate = jnp.where(
        inside, here.costate + alpha * (direction.costate - here.costate), here.first.costate
    )
    after = packed(Trajectory(x_new, u_new, costate, pairs_new, new))
    stays = (finishing & ~finish.goes_on) | warm
    result = lanes.select(finish.fails, s.kept, lanes.select(stays, s.at, after))
    stuck = packed(at._replace(pairs=begun_pairs))
    result = lanes.select(restarts, stuck, result)
    kept = lanes.select(warm, after, lanes.select(begins | to_restore, result, s.kept))

    to_zero = barrier.to_boundary(pairs.w, changes.w, pairs.nu, changes.nu)
    near_w = pairs.w < pairs.nu * s.freedom
    to_zero = jnp.where(solved, to_zero, near_w)
    slack_ends = barrier.to_boundary(pairs.sigma, changes.sigma, pairs.zeta, changes.zeta)
    over = sides.soft & to_zero & ~slack_ends
    guess_active = (sides.equality | (sides.inequality & to_zero & ~over)) & sides.row
    at_high, at_low = layout.bounds(sides.inequality & to_zero)
    guess = Held(guess_active, over, at_high | at_low | (low == high))

    mode = s.mode
    mode = jnp.where(probing, INTERIOR, mode)
    mode = jnp.where(to_restore, RESTORE, mode)
    mode = jnp.where(restored | finish.fails, INTERIOR, mode)
    mode = jnp.where(begins | leaves | warm, FINISH, mode)

    status = _status(s, here, finish, definite, out_of_time)
    evaluation = _evaluation(data, u, here, values, exact, layout, options, hold)
    entered = filter.with_entry(entries, now, inside & accepted & ~by_objective)
    entered = entered._replace(most=jnp.where(starts, 0, entered.most))
    raised = jnp.where(gives_up, jnp.maximum(s.regularization * 10, 1e-4), s.regularization / 3)
    next_search = Search(
        at=result,
        kept=kept,
        mode=mode,
        tau=tau,
        tau_before=jnp.where(to_restore, s.tau, s.tau_before),
        scale=scale,
        freedom=freedom,
        hold=hold,
        restarts=s.restarts + jnp.where(restarts, 1, 0),
        reach=reach_z,
        filter=lanes.select(inside | probing, entered, s.filter),
        prices=prices,
        weight=jnp.where(to_restore, here.weight, s.weight),
        violation=jnp.where(to_restore, cost_of_violation, s.violation),
        held=lanes.select(finishing, s.held, guess),
        fresh=begins | leaves,
        error=jnp.where(finish.goes_on, jnp.minimum(finish.error, s.error), jnp.inf),
        misses=jnp.where(
            warm, -1, jnp.where(finish.goes_on & ~s.fresh & ~finish.better, s.misses + 1, 0)
        ),
        tries=s.tries + jnp.where(finish.fails, 1, 0),
        wait=jnp.where(finish.fails, 1, s.wait - jnp.where(solved, 1, 0)),
        regularization=jnp.where(inside, raised, s.regularization),
        mirror=s.mirror ^ (inside & convex & ~measures & (alpha < _SHORT)),
        leaving=s.leaving | leaving,
        last=s.last | leaves,
        infeasible=infeasible,
        iterations=s.iterations + jnp.where(leaves | (status != RUNNING), 0, 1),
        status=status,
        evaluation=evaluation,
    )
    # The others wait for the last problem of the batch, at a point that stays: their evaluation
    # comes out the same again, and the largest arrays need no selection.
    return lanes.select(running, next_search, s._replace(evaluation=evaluation))


def _dual_error(here: Here, at: Trajectory, layout: Layout, data: Data) -> Array:
    """∇ of the Lagrangian in states and controls, in units of the objective."""
    expanded, nu = here.expanded, at.pairs.nu
    n = here.costate.shape[1]
    pull = jax.vmap(lanes.matvec_t)(expanded.F, here.costate[1:])
    r, r_final = add_pull(expanded.c + pull, expanded.c_final, expanded.G, layout.rows(nu))
    upper, lower = layout.bounds(nu)
    of_u = jnp.where(data.u_lower < data.u_upper, jnp.abs(r[:, n:] + upper - lower), 0)
    of_x = jnp.concatenate([r[1:, :n], r_final[None]]) - here.costate[1:]
    of_x, of_u = jnp.max(jnp.abs(of_x), axis=0), jnp.max(of_u, axis=0)
    return jnp.maximum(jnp.max(of_x * here.sizes.x, axis=0), jnp.max(of_u * here.sizes.u, axis=0))


def _bound_of(here: Here, u: Array, fresh: Array, data: Data) -> Array:
    """The bound that a clamped control goes to: the one that holds it against the gradient, or at
    the beginning of a finish the nearer one."""
    low, high = data.u_lower, data.u_upper
    at_low = jnp.where(fresh, u - low < high - u, here.gradient > 0)
    bound = jnp.where(at_low | (low == high), low, high)
    return jnp.where(jnp.isfinite(bound), bound, u)


def _status(s: Search, here: Here, finish: Finish, definite: Array, out_of_time: Array) -> Array:
    """Where a problem ends."""
    ends = {
        Status.NONFINITE: (s.iterations == 0) & ~here.finite,
        Status.CONVERGED: finish.ends & finish.there & definite,
        Status.INDEFINITE: finish.ends & finish.there,
    }
    failures = {
        Status.NONFINITE: ~here.finite,
        Status.INFEASIBLE: s.infeasible,
        Status.MAX_ITERATIONS: out_of_time,
        Status.STALLED: finish.ends,
    }
    conditions = [*ends.values(), *(finish.ends & why for why in failures.values())]
    codes = [jnp.int32(code) for code in (*ends, *failures)]
    return jnp.select(conditions, codes, RUNNING).astype(jnp.int32)


def _evaluation(
    data: Data,
    u: Array,
    here: Here,
    values: Values,
    exact: Direction,
    layout: Layout,
    options: Options,
    hold: Array,
) -> Evaluation:
    low, high = data.u_lower, data.u_upper
    projected = jnp.max(jnp.abs(jnp.clip(u - here.gradient, low, high) - u), axis=(0, 1))
    gap = jnp.max(active_set.gaps(here.sides, here.g, here.state), axis=0)
    whole = options.backward_hessian == "exact"
    return Evaluation(
        costate=here.first.costate,
        free=~here.clamped,
        kkt_residual=jnp.maximum(projected, gap),
        linearization=Linearization(
            factors=exact.factors,
            hessian=here.H if whole else here.expanded.C,
            F=here.expanded.F,
            C_final=here.H_final if whole else here.expanded.C_final,
            gradient=here.gradient,
            G=here.expanded.G,
            state=RowState(*(layout.rows(a) for a in here.state)),
            weights=layout.rows(hold),
        ),
        price=slack_price(values.g, data.prices),
        violation=largest_violation(values.g, data.prices),
    )


def report(data: Data, end: Search) -> tuple[Solution, Linearization]:
    crossed = end.status == CROSSED
    price, violation = (
        jnp.where(crossed, jnp.nan, a) for a in (end.evaluation.price, end.evaluation.violation)
    )
    costate, free, kkt_residual, linearization, *_ = jax.tree.map(
        lambda a: jnp.where(crossed, jnp.zeros((), a.dtype) if a.dtype == bool else jnp.nan, a),
        end.evaluation,
    )
    at = unpacked(end.at, data)
    solution = Solution(
        x=at.x,
        u=at.u,
        costate=costate,
        K=linearization.factors.K,
        free=free,
        objective=jnp.sum(at.values.costs, axis=0) + price,
        kkt_residual=kkt_residual,
        iterations=end.iterations,
        status=jnp.where(crossed, Status.INFEASIBLE, end.status).astype(jnp.int32),
        multipliers=linearization.state.multiplier,
        violation=violation,
    )
    return solution, linearization
