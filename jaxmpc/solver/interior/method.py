"""A trip of the interior-point method: evaluate, judge, step, search, record."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import rollout
from jaxmpc.problem.prices import RowState, largest_violation, slack_price
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.problem.stages import transition
from jaxmpc.riccati.point import z_of
from jaxmpc.solver.assessment import all_finite, tolerances
from jaxmpc.solver.interior import active_set, barrier, filter
from jaxmpc.solver.interior.barrier import Layout, Pairs
from jaxmpc.solver.interior.filter import Candidate, Filter
from jaxmpc.solver.interior.local import FIRST, Local, evaluated
from jaxmpc.solver.interior.state import (
    FINISH,
    INTERIOR,
    PROBE,
    RESTORE,
    Held,
    Measures,
    Prices,
    Search,
    Trajectory,
    Values,
    evaluate,
    layout_of,
    tiny_of,
)
from jaxmpc.solver.interior.step import Step, propose
from jaxmpc.solver.judgement import CROSSED, RUNNING
from jaxmpc.solver.linearization import Evaluation, Linearization, no_evaluation
from jaxmpc.types import Action, Options, Record, Solution, Status

_PUSH = 1e-2  # how far from its boundary a distance begins, relative to its scale
_SOLVED = 10.0  # the problem of τ counts as solved at an error of so many τ,
_ROUNDINGS = 16.0  # or of so many roundings
_LINEAR, _POWER = 0.2, 1.5  # then τ falls to this share, or by this power, whichever is less
_LEAST = 1e-3  # τ in the end, relative to the tolerance
_SMALL = 2e-3  # relative to the first, from where on a finish is tried
_SHORT = 0.1  # a step so short was not one of a good Hessian
_MAX_TRIES = 14  # lengths of a step
_EXACT = 1e-3  # a finish ends at this share of the tolerance, if it can
_HALVES = 0.5  # a finish has to halve its error,
_MISSES = 2  # or to hold fewer than before, but for so many times in a row
_MANY = 2**30  # more than there are
_RESTARTS, _RAISED = 4, 1e3  # from a τ so much larger
_PATIENCE = 8  # finishes that may fail once τ is at its least
_FLOOR = 1e-2  # a violation costs at least this share of what is to be gained, relative to sizes
# The slope of a violation that is at its least, relative to its cost.
_AT_REST, _NEARLY_AT_REST = 1e-6, 1e-3


class Carry(NamedTuple):
    """The carry of the loop."""

    status: Array
    search: Search
    evaluation: Evaluation


def start(problem: Problem, data: Data, options: Options, wanted: Array) -> Carry:
    lower, upper = data.u_lower, data.u_upper
    u = jnp.clip(data.u_init, lower, upper)
    x, values = _first(problem, data, u)
    one, no = jnp.ones(wanted.shape, x.dtype), jnp.zeros(wanted.shape, bool)
    zero = jnp.zeros(wanted.shape, jnp.int32)
    nu = layout_of(values.g, u).rows_alone(data.multipliers)
    free = jnp.ones_like(nu)
    off = jnp.zeros(nu.shape, bool)
    at = Trajectory(x, u, jnp.zeros_like(x), Pairs(free, nu, free, free), values)
    search = Search(
        at=at,
        kept=at,
        mode=zero + PROBE,
        tau=one,
        tau_before=one,
        measures=Measures(one, jnp.zeros_like(z_of(x, u)[0]), free, free),
        filter=filter.empty(one),
        prices=Prices(jnp.zeros_like(values.gaps), jnp.zeros_like(nu)),
        still=no,
        violation=one,
        weight=free,
        held=Held(off, off, jnp.zeros(u.shape, bool)),
        fresh=no,
        error=one * jnp.inf,
        fewest=zero,
        misses=zero,
        tries=zero,
        wait=zero,
        regularization=jnp.broadcast_to(options.regularization, wanted.shape).astype(x.dtype),
        mirror=no,
        anew=no,
        second=no,
        rested=jnp.zeros_like(u),
        rested_off=one * jnp.inf,
        leaving=no,
        last=no,
        infeasible=no,
        restarts=zero,
        iterations=zero,
    )
    return Carry(
        status=jnp.where(wanted & lanes.every(lower <= upper, 2), RUNNING, CROSSED).astype(
            jnp.int32
        ),
        search=search,
        evaluation=no_evaluation(x, u, values.g),
    )


def _first(problem: Problem, data: Data, u: Array) -> tuple[Array, Values]:
    """The states that a search starts with: those of the guess, or of the rollout; but x_init at
    every stage where the rollout is so far off that its rounding hides what that would cost."""
    if data.x_guess is not None:
        x = jnp.concatenate([data.x_init[None], data.x_guess[1:]])
        return x, evaluate(problem, data, x, u)
    x = rollout(problem, data.theta, data.x_init, u)
    both = jnp.stack([x, jnp.broadcast_to(data.x_init, x.shape)])
    values = jax.vmap(lambda x: evaluate(problem, data, x, u))(both)
    (rolled, held), (cost, other) = both, jnp.sum(jnp.abs(values.costs), axis=1)
    usable = all_finite(jax.tree.map(lambda a: a[0], values), cost.ndim)
    usable &= lanes.eps(x) * cost <= jnp.where(jnp.isfinite(other), other, jnp.inf)
    of_rolled, of_held = (jax.tree.map(lambda a, i=i: a[i], values) for i in (0, 1))
    return lanes.select(usable, (rolled, of_rolled), (held, of_held))


def trip(problem: Problem, data: Data, options: Options, carry: Carry) -> tuple[Carry, Record]:
    """Evaluate the trajectory, judge it, and step from it."""
    s = carry.search
    layout, running = layout_of(s.at.values.g, s.at.u), carry.status == RUNNING
    here = evaluated(problem, data, s, layout, carry.evaluation.linearization.factors.K)
    judged = judge(data, options, s, here)
    step = propose(
        data, options, s, here, layout, judged.tau, judged.measures, ~running | judged.ends
    )
    found = search(problem, data, options, s, here, layout, judged, step, running)
    after, status = record(data, s, here, layout, judged, step, found, options)
    evaluation = _evaluation(data, s, here, step, layout, options)
    entry = _entry(s, here, judged, evaluation, found, status)
    return Carry(status, after, evaluation), entry


class Judgement(NamedTuple):
    """A finish is judged by itself, the barrier by the error of its problem."""

    error: Array  # of a finish
    there: Array
    ends: Array  # this is the last trip
    goes_on: Array
    fails: Array
    better: Array  # it came closer, or holds fewer than ever
    holds: Array  # how many rows and bounds
    solved: Array  # the problem of τ
    tau: Array
    at_least: Array  # τ is as little as it needs to be,
    floored: Array  # and as it can be
    small_tau: Array
    counts: Array  # rows whose miss is a violation
    measures: Array  # the problem is measured here
    leaves: Array  # goes to a rollout, the last one
    restarts: Array  # goes to x_init at every stage, and begins again
    out_of_time: Array


def judge(data: Data, options: Options, s: Search, here: Local) -> Judgement:
    values, pairs = s.at.values, s.at.pairs
    dtype, T = values.costs.dtype, values.costs.shape[0] - 1
    eps, (tolerance, goal) = lanes.eps(dtype), tolerances(options, dtype)
    scale = s.measures.scale
    out_of_time = s.iterations >= options.max_iterations
    probing, finishing, restoring = s.mode == PROBE, s.mode == FINISH, s.mode == RESTORE
    inside = (s.mode == INTERIOR) | restoring

    error = jnp.where(here.finite & finishing & ~s.fresh, here.error, jnp.inf)
    better = error <= _HALVES * s.error
    # The least that the objective, in a restoration the cost of violation, still shows.
    floor = eps * jnp.where(restoring, s.violation, scale) / T
    floored = s.tau <= floor
    holds = jnp.sum(here.state.active, axis=0, dtype=jnp.int32)
    holds += jnp.sum(here.clamped, axis=(0, 1), dtype=jnp.int32)
    # Where the barrier can say no more of what is active, sets that shrink lead on, too.
    fewer = floored & (holds < s.fewest)
    # Newton's step from a small error is worth its price: it ends at rounding.
    exact = (error <= jnp.minimum(goal, _EXACT * tolerance)) | ~better
    there = (error <= tolerance) & exact
    ends = finishing & (s.last | (~s.fresh & (there | out_of_time)))
    may = (error < 1) & (better | fewer | (s.misses < _MISSES))
    goes_on = finishing & ~ends & (s.fresh | may)

    # In a restoration the violation of equalities belongs to the objective.
    counts = here.sides.row & ~(restoring & here.sides.equality)
    missed = jnp.where(counts, barrier.missed(here.sides, pairs, here.g), 0)
    primal = jnp.maximum(
        jnp.max(jnp.abs(values.gaps) * s.prices.gaps, axis=(0, 1)),
        jnp.max(jnp.abs(missed) * s.prices.rows, axis=0),
    )
    worst = jnp.maximum(here.dual, primal)
    worst = jnp.maximum(worst, barrier.off_centre(here.sides, pairs, s.tau))
    begun = s.filter.most > 0  # and so what violation is summed with
    enough = worst <= jnp.maximum(_SOLVED * s.tau, _ROUNDINGS * here.rounding)
    solved = inside & begun & (enough | s.still)
    lower_tau = jnp.minimum(_LINEAR * s.tau, s.tau * (s.tau * T / scale) ** (_POWER - 1))
    tau = jnp.where(solved, jnp.maximum(lower_tau, floor), s.tau)
    small_tau = tau <= _SMALL * FIRST * scale / T
    ended = s.leaving | out_of_time | ~here.finite
    return Judgement(
        error=error,
        there=there,
        ends=ends,
        goes_on=goes_on,
        fails=finishing & ~ends & ~goes_on,
        better=better | fewer,
        holds=holds,
        solved=solved,
        tau=tau,
        at_least=s.tau <= jnp.maximum(_LEAST * tolerance * scale / T, floor),
        floored=floored,
        small_tau=small_tau,
        counts=counts,
        measures=probing | ((s.mode == INTERIOR) & solved & small_tau),
        leaves=(inside | probing) & ended & ~s.anew,
        restarts=s.anew,
        out_of_time=out_of_time,
    )


class Found(NamedTuple):
    """Where the search for the length of a step ended."""

    x: Array
    u: Array
    pairs: Pairs
    values: Values
    accepted: Array
    alpha: Array
    by_objective: Array
    still: Array
    now: Candidate  # what it began with
    prices: Prices
    entries: Filter
    push: Array  # [T, m], how far from their bounds controls begin


def search(
    problem: Problem,
    data: Data,
    options: Options,
    s: Search,
    here: Local,
    layout: Layout,
    judged: Judgement,
    step: Step,
    running: Array,
) -> Found:
    """The longest step that the filter accepts; rollouts and beginnings are taken as they are."""
    x, u, _, pairs, values = s.at
    low, high = data.u_lower, data.u_upper
    dtype, expanded, sides = x.dtype, here.expanded, here.sides
    eps, tiny, tau = lanes.eps(dtype), tiny_of(x), judged.tau
    dx, du = step.direction.dx, step.direction.du
    scale = s.measures.scale
    probing, restoring, finishing = (s.mode == mode for mode in (PROBE, RESTORE, FINISH))
    inside = (s.mode == INTERIOR) | restoring

    # Where a step leads.
    width = high - low
    push = _PUSH * jnp.where(jnp.isfinite(width), width, jnp.maximum(here.sizes.u, tiny))
    between = low < high
    pushed = jnp.where(jnp.isfinite(low) & between, jnp.maximum(u, low + push), u)
    pushed = jnp.where(jnp.isfinite(high) & between, jnp.minimum(pushed, high - push), pushed)
    begins = probing & ~here.warm
    rolls = ((judged.goes_on & ~s.last) | here.warm | judged.leaves) & ~judged.restarts

    def roll():
        transit, stages = transition(problem, data.theta, u)
        stays = judged.leaves
        reached = jnp.where(stays, x, x + dx)
        pinned = (finishing | here.warm) & here.clamped
        target = jnp.where(stays, u, jnp.where(pinned, step.bound, u + du))
        # The less violating of two plans, or the one where a second search found none.
        back = stays & jnp.isfinite(s.rested_off)
        back &= ~(s.infeasible & (_violation_of(here) <= s.rested_off))
        target = jnp.where(back, s.rested, target)
        K = jnp.where(here.finite & ~back, step.direction.factors.K, 0)

        def advance(x_new, now):
            u, x, K, low, high, t = now
            # What is not finite would make a control so.
            off = jnp.where(here.finite, x_new - x, 0)
            u_new = jnp.clip(u + lanes.matvec(K, off), low, high)
            return transit(x_new, u_new, t), (x_new, u_new)

        along = target, reached[:-1], K, low, high, stages
        x_final, (x_new, u_new) = lax.scan(advance, data.x_init, along)
        return jnp.concatenate([x_new, x_final[None]]), u_new

    rolled = lax.cond(jnp.any(rolls & running), roll, lambda: (x, u))
    held = jnp.broadcast_to(data.x_init, x.shape), jnp.clip(data.u_init, low, high)
    given = lanes.select(
        judged.restarts, held, lanes.select(rolls, rolled, (x, jnp.where(begins, pushed, u)))
    )

    # What it has to lower.
    anew = (judged.solved | (s.filter.most == 0)) & inside
    size_x = jnp.where(here.sizes.x > 0, here.sizes.x, 1)
    prices = Prices(
        jnp.abs(step.direction.costate[1:]) + _FLOOR * scale / size_x,
        jnp.abs(pairs.nu + step.changes.nu) + _FLOOR * scale / here.sizes.some,
    )
    prices = lanes.select(anew, prices, s.prices)

    def candidate(x, u, pairs, values) -> Candidate:
        g = layout.rows_alone(values.g)
        miss = jnp.abs(barrier.missed(sides, pairs, g)) * prices.rows
        theta = jnp.sum(jnp.abs(values.gaps) * prices.gaps, axis=(0, 1))
        theta += jnp.sum(jnp.where(judged.counts, miss, 0), axis=0)
        near, near_x = here.near
        away = jnp.sum(near * (z_of(x, u) - z_of(s.kept.x, s.kept.u)) ** 2, axis=(0, 1))
        away += jnp.sum(near_x * (x[-1] - s.kept.x[-1]) ** 2, axis=0)
        away += jnp.sum(jnp.where(sides.equality, here.weight * g**2, 0), axis=0)
        costs = jnp.where(restoring, 0.5 * away, jnp.sum(values.costs, axis=0))
        return Candidate(theta, costs + barrier.value(sides, pairs, tau))

    now = candidate(x, u, pairs, values)
    slope = jnp.sum(expanded.c * z_of(dx, du), axis=(0, 1)) + lanes.dot(expanded.c_final, dx[-1])
    slope += barrier.slope(sides, pairs, step.changes, tau)
    broken = jnp.sum(jnp.where(sides.equality, here.weight * here.g * step.moves, 0), axis=0)
    slope += jnp.where(restoring, broken, 0)
    entries = filter.begun(s.filter, anew, now.theta, scale)
    noise = 10 * eps * (jnp.sum(jnp.abs(values.costs), axis=0) + jnp.abs(now.phi))
    wanted = running & (inside | probing | rolls | judged.restarts)
    forced = rolls | begins | judged.restarts

    def unfinished(carry):
        _, accepted, _, _, tries = carry
        return wanted & ~accepted & (tries < _MAX_TRIES)

    def attempt(carry):
        before, accepted, last_alpha, by_objective, tries = carry
        alpha = step.alpha * jnp.asarray(options.line_search_decay, dtype) ** tries.astype(dtype)
        x_new, u_new = lanes.select(
            forced, given, (x + alpha * dx, jnp.clip(u + alpha * du, low, high))
        )
        pairs_new = barrier.moved(sides, pairs, step.changes, alpha, step.alpha_dual, tau)
        new = evaluate(problem, data, x_new, u_new)
        good, falls = filter.accepts(
            entries, now, candidate(x_new, u_new, pairs_new, new), slope, alpha, scale, noise
        )
        going = unfinished(carry)
        takes = going & (good | forced)
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
    still = inside & accepted & (alpha == 1) & (jnp.abs(slope) + now.theta <= noise)
    return Found(
        x=x_new,
        u=u_new,
        pairs=pairs_new,
        values=new,
        accepted=accepted,
        alpha=alpha,
        by_objective=by_objective,
        still=still,
        now=now,
        prices=prices,
        entries=entries,
        push=push,
    )


def record(
    data: Data,
    s: Search,
    here: Local,
    layout: Layout,
    judged: Judgement,
    step: Step,
    found: Found,
    options: Options,
) -> tuple[Search, Array]:
    """What comes of a trip, and the status."""
    low, high = data.u_lower, data.u_upper
    at, measures, accepted = s.at, step.measures, found.accepted
    pairs, T = at.pairs, at.u.shape[0]
    tiny = tiny_of(at.x)
    tolerance, _ = tolerances(options, at.x.dtype)
    probing, restoring, finishing = (s.mode == mode for mode in (PROBE, RESTORE, FINISH))
    interior = s.mode == INTERIOR
    inside, leaves = interior | restoring, judged.leaves

    # Where the barrier is stuck although what is left to repair is little, it begins anew from a
    # larger τ; where it is not, the violation is minimised alone.
    failed = inside & ~accepted & ~leaves & ~judged.restarts
    much = found.now.theta > jnp.maximum(1e-6 * s.measures.scale, s.tau)
    raises = failed & interior & ~much & (s.restarts < _RESTARTS)
    to_restore = failed & interior & much
    gives_up = failed & ~to_restore & ~raises

    violation = active_set.violation(here.plain, here.g)
    cost = 0.5 * jnp.sum(here.weight * violation**2, axis=0)
    # At rest to the last digits, or to some where there are no more.
    exact = (s.tau * T <= tolerance * cost) & (here.dual <= _AT_REST * cost)
    rests = exact | ((judged.floored | gives_up) & (here.dual <= _NEARLY_AT_REST * cost))
    off = jnp.max(violation / here.sizes.some, axis=0)
    rests &= restoring & (off > tolerance)
    # A least violation near the rollout need not be one near x_init.
    anew = rests & ~s.second & ~judged.restarts
    infeasible = s.infeasible | (rests & s.second)
    left = active_set.violation(here.plain, layout.rows_alone(found.values.g))
    restored = restoring & accepted & ~leaves & ~judged.restarts
    restored &= 0.5 * jnp.sum(here.weight * left**2, axis=0) <= 0.25 * s.violation

    begins = interior & ((judged.solved & judged.small_tau & (s.wait <= 0) & accepted) | gives_up)
    begins = (begins | (raises & (s.wait <= 0))) & ~leaves & ~judged.restarts
    leaving = gives_up & (restoring | (s.tries > _PATIENCE))
    leaving |= interior & judged.at_least & (s.tries > _PATIENCE)
    leaving |= infeasible

    # Where the barrier begins, at first, in a restoration, and after one.
    begun = (probing & ~here.warm) | to_restore | restored | raises
    larger = jnp.minimum(_RAISED * s.tau, FIRST * s.measures.scale / T)
    tau = jnp.where(probing, FIRST * measures.scale / T, judged.tau)
    tau = jnp.where(raises, larger, tau)
    tau = jnp.where(restored, jnp.maximum(s.tau_before, tau), tau)
    tau = jnp.where(to_restore, FIRST * cost / T, tau)
    bounds_g = jnp.concatenate([found.u - high, low - found.u], axis=1)
    bounds_g = jnp.where(jnp.isfinite(bounds_g), bounds_g, -1)
    push = jnp.concatenate([found.push, found.push], axis=1)
    reach = layout.pack(layout.rows(_PUSH * here.sizes.rows), push)
    # Where a row has no multiplier of its own yet, w² = τ v is on the central path.
    natural = jnp.sqrt(tau * measures.freedom)
    row = here.plain.row
    reach = jnp.where((natural > 0) & row, jnp.minimum(reach, natural), reach)
    begun_pairs = barrier.start(
        barrier.relaxed(here.plain, here.weight, to_restore),
        layout.pack(found.values.g, bounds_g),
        jnp.where(row, reach, tiny),
        tau,
    )
    # The distances from the bounds go on.
    central = jnp.where(here.plain.inequality, tau / found.pairs.w, 0)
    begun_pairs = begun_pairs._replace(
        w=jnp.where(row | probing, begun_pairs.w, found.pairs.w),
        nu=jnp.where(row | probing, begun_pairs.nu, central),
    )

    # The next trajectory.
    on_set = finishing | here.warm
    nu_set = jnp.where(here.sides.row, step.slopes + step.weights * step.moves, 0)
    pairs_new = found.pairs._replace(nu=jnp.where(on_set, nu_set, found.pairs.nu))
    pairs_new = lanes.select(begun, begun_pairs, pairs_new)
    pairs_new = pairs_new._replace(nu=jnp.where(judged.restarts, 0, pairs_new.nu))
    share = jnp.where(inside, found.alpha, 1)
    costate = here.costate + share * (step.direction.costate - here.costate)
    # Those of the rollout may be beyond all measure; a restoration has its own.
    costate = jnp.where(probing & ~here.warm, step.estimate, costate)
    costate = jnp.where(to_restore, 0, jnp.where(restored, s.kept.costate, costate))
    after = Trajectory(found.x, found.u, costate, pairs_new, found.values)
    after = lanes.select(finishing & ~judged.goes_on, at, after)
    after = lanes.select(judged.fails, s.kept, after)
    after = lanes.select(raises, at._replace(pairs=begun_pairs), after)
    # A finish that multipliers began leads back to the same probe without them.
    cold = at._replace(pairs=pairs._replace(nu=jnp.zeros_like(pairs.nu)))
    kept = lanes.select(begins | to_restore, after, s.kept)
    kept = lanes.select(here.warm, cold, kept)

    # The active set that a finish begins with.
    ends_w = barrier.to_boundary(pairs.w, step.changes.w, pairs.nu, step.changes.nu)
    # Which of the two goes to zero shows while τ falls; then, what the force moves the row by.
    falls = judged.solved & (judged.tau < s.tau)
    to_zero = jnp.where(falls, ends_w, pairs.w < pairs.nu * measures.freedom)
    slack_ends = barrier.to_boundary(pairs.sigma, step.changes.sigma, pairs.zeta, step.changes.zeta)
    over = here.sides.soft & to_zero & ~slack_ends
    active = here.sides.equality | (here.sides.inequality & to_zero & ~over)
    at_high, at_low = layout.bounds(here.sides.inequality & to_zero)
    guess = Held(active & here.sides.row, over, at_high | at_low | (low == high))

    mode = jnp.where(probing, INTERIOR, s.mode)
    mode = jnp.where(to_restore, RESTORE, mode)
    mode = jnp.where(restored, INTERIOR, mode)
    mode = jnp.where(judged.fails, jnp.where(s.filter.most > 0, INTERIOR, PROBE), mode)
    mode = jnp.where(begins | leaves | here.warm, FINISH, mode)
    mode = jnp.where(judged.restarts, PROBE, mode)

    status = _status(s, here, judged, step.definite)
    entered = filter.with_entry(found.entries, found.now, inside & accepted & ~found.by_objective)
    entered = entered._replace(most=jnp.where(begun, 0, entered.most))
    raised = jnp.where(gives_up, jnp.maximum(s.regularization * 10, 1e-4), s.regularization / 3)
    missed = judged.goes_on & ~s.fresh & ~judged.better
    counts = ~leaves & (status == RUNNING)
    return Search(
        at=after,
        kept=kept,
        mode=mode,
        tau=tau,
        tau_before=jnp.where(to_restore, s.tau, s.tau_before),
        measures=measures,
        filter=lanes.select(inside | probing, entered, s.filter),
        prices=found.prices,
        still=found.still,
        violation=jnp.where(to_restore, cost, s.violation),
        weight=jnp.where(to_restore, here.weight, s.weight),
        held=lanes.select(finishing, s.held, guess),
        # Where it ends it stays, and is evaluated the same way again.
        fresh=jnp.where(status == RUNNING, begins | leaves, s.fresh),
        error=jnp.where(judged.goes_on, jnp.minimum(judged.error, s.error), jnp.inf),
        fewest=jnp.where(s.fresh, _MANY, jnp.minimum(judged.holds, s.fewest)),
        misses=jnp.where(missed, s.misses + 1, 0),
        tries=s.tries + jnp.where(judged.fails, 1, 0),
        wait=jnp.where(judged.fails, 1, s.wait - jnp.where(judged.solved, 1, 0)),
        regularization=jnp.where(inside, raised, s.regularization),
        mirror=s.mirror ^ (inside & step.convex & ~judged.measures & (found.alpha < _SHORT)),
        anew=anew,
        second=s.second | judged.restarts,
        rested=jnp.where(anew, at.u, s.rested),
        rested_off=jnp.where(anew, off, s.rested_off),
        leaving=s.leaving | leaving,
        last=s.last | leaves,
        infeasible=infeasible,
        restarts=s.restarts + jnp.where(raises, 1, 0),
        iterations=s.iterations + jnp.where(counts, 1, 0),
    ), status


def _entry(
    s: Search, here: Local, judged: Judgement, evaluation: Evaluation, found: Found, status: Array
) -> Record:
    """What a trip did."""
    values = s.at.values
    action = jnp.where(here.warm, Action.FINISH, Action.MEASURE)
    for mode, name in (
        (INTERIOR, Action.BARRIER), (RESTORE, Action.RESTORE), (FINISH, Action.FINISH)
    ):  # fmt: skip
        action = jnp.where(s.mode == mode, name, action)
    # A finish that fails goes back to where it began.
    action = jnp.where(judged.fails, Action.BACK, action)
    gaps = jnp.max(jnp.abs(values.gaps), axis=(0, 1))
    return Record(
        objective=jnp.sum(values.costs, axis=0),
        residual=evaluation.kkt_residual,
        violation=jnp.maximum(evaluation.violation, gaps),
        step=jnp.where(found.accepted, jnp.minimum(found.alpha, 1), 0),
        regularization=s.regularization,
        barrier=s.tau,
        active=jnp.sum(here.clamped, axis=(0, 1)) + jnp.sum(here.state.active, axis=0),
        action=jnp.where(status == RUNNING, action, Action.STOP),
    )


def _violation_of(here: Local) -> Array:
    """The largest of a hard row, over its size."""
    return jnp.max(active_set.violation(here.plain, here.g) / here.sizes.some, axis=0)


def _status(s: Search, here: Local, judged: Judgement, definite: Array) -> Array:
    """Where a problem ends."""
    ends = {
        Status.CONVERGED: judged.ends & judged.there & definite,
        Status.INDEFINITE: judged.ends & judged.there,
    }
    failures = {
        Status.NONFINITE: ~here.finite,
        Status.INFEASIBLE: s.infeasible | jnp.isfinite(s.rested_off),
        Status.MAX_ITERATIONS: judged.out_of_time,
        Status.STALLED: judged.ends,
    }
    conditions = [*ends.values(), *(judged.ends & why for why in failures.values())]
    codes = [jnp.int32(code) for code in (*ends, *failures)]
    return jnp.select(conditions, codes, RUNNING).astype(jnp.int32)


def _evaluation(
    data: Data,
    s: Search,
    here: Local,
    step: Step,
    layout: Layout,
    options: Options,
) -> Evaluation:
    u, low, high = s.at.u, data.u_lower, data.u_upper
    projected = jnp.max(jnp.abs(jnp.clip(u - here.gradient, low, high) - u), axis=(0, 1))
    gap = jnp.max(active_set.gaps(here.sides, here.g, here.state), axis=0)
    whole = options.backward_hessian == "exact"
    return Evaluation(
        costate=here.costate,
        free=~here.clamped,
        kkt_residual=jnp.maximum(projected, gap),
        linearization=Linearization(
            factors=step.direction.factors,
            hessian=here.H if whole else here.expanded.C,
            F=here.expanded.F,
            C_final=here.H_final if whole else here.expanded.C_final,
            gradient=here.gradient,
            G=here.expanded.G,
            state=RowState(*(layout.rows(a) for a in here.state)),
            weights=layout.rows(s.measures.hold),
        ),
        price=slack_price(s.at.values.g, data.prices),
        violation=largest_violation(s.at.values.g, data.prices),
    )


def report(data: Data, end: Carry) -> tuple[Solution, Linearization]:
    costate, free, kkt_residual, linearization, price, violation = end.evaluation
    search = end.search
    at = search.at
    solution = Solution(
        x=at.x,
        u=at.u,
        costate=costate,
        K=linearization.factors.K,
        free=free,
        objective=jnp.sum(at.values.costs, axis=0) + price,
        kkt_residual=kkt_residual,
        iterations=search.iterations,
        status=end.status,
        multipliers=linearization.state.multiplier,
        violation=violation,
    )
    return solution, linearization
