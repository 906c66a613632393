"""Control-limited differential dynamic programming, for problems without rows (Algorithm 2).

A trip evaluates the iterate and judges it; then it stops there, or proposes a step and searches for
its length. So what a solution reports was computed at the very point that it returns.

An iterate is a rollout, or on the way to one: where the search begins at states of its own, the
dynamics have gaps, each step closes a share of them, and a full one closes them for good (DDP
driven by feasibility; Mastalli et al. 2020, Crocoddyl). So it begins where the user guesses the
states; and where nothing came of its start, such as a rollout of u_init that overflows or leads
nowhere, it begins again with all states at x_init; and if that leads nowhere, it goes back.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import expand, hessians
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver.assessment import Assessment, all_finite, assess, noise_of, tolerances
from jaxmpc.solver.escape import along_negative_curvature
from jaxmpc.solver.iterate import Iterate, new_iterate, rounding, with_gaps
from jaxmpc.solver.judgement import (
    CROSSED,
    RUNNING,
    Judgement,
    Verdict,
    conclude,
    judge,
    status,
)
from jaxmpc.solver.line_search import Length, line_search
from jaxmpc.solver.linearization import Evaluation, Linearization, evaluation, no_evaluation
from jaxmpc.solver.propose import definite, propose
from jaxmpc.solver.rounding import hidden
from jaxmpc.types import Action, Options, Record, Solution, Status

# Relative to the curvature: where it begins once a step has failed, and what counts as none at all.
_FIRST_REGULARIZATION, _MIN_REGULARIZATION, _MAX_REGULARIZATION = 1e-2, 1e-6, 1e6
# By what it grows where a step fails, or had to be short; and falls where the model was right, or
# where the objective is all rounding and the residual still falls.
_FAILED, _SHORTENED, _LOWERED, _FINE = 5.0, 3.0, 3.0, 100.0
# By what the share of the dynamics' curvature grows and falls, and the least.
_BEND_MORE, _BEND_LESS, _LEAST = 2.0, 4.0, 1e-3
_SHORT = 0.2  # a step that had to be shortened so much means a model that needs regularization


class Search(NamedTuple):
    """The carry of the loop."""

    at: Iterate
    evaluation: Evaluation  # of the iterate that the last trip began with
    before: Iterate  # from which a step led here
    residual_before: Array
    regularization: Array
    bending: Array  # the share of λᵀ∇²dynamics in a model that is not convex with all of it
    noisy: Array  # that step changed the objective by rounding only
    drowned: Array  # so did the last step that was kept: the iterate is held under its feedback
    K: Array  # [T, m, n], against the first-order conditions
    finish: Array  # nothing is left to try: evaluate the iterate, closed if need be, and stop
    again: Array  # begun for the second time
    fresh: Array  # at states that are no rollout, and not yet evaluated
    iterations: Array
    status: Array


def start(problem: Problem, data: Data, options: Options, wanted: Array) -> Search:
    lower, upper = data.u_lower, data.u_upper
    u = jnp.clip(data.u_init, lower, upper)
    if data.x_guess is None:
        first = new_iterate(problem, data, u)
    else:
        known = jnp.all(jnp.isfinite(data.x_guess), axis=1)
        x = jnp.where(known[:, None], data.x_guess, data.x_init)
        infinite = jnp.full((len(x), *wanted.shape), jnp.inf, x.dtype)
        first = Iterate(u, x, infinite, jnp.zeros_like(x[1:]))
    nan = jnp.full(wanted.shape, jnp.nan, data.x_init.dtype)
    feasible = lanes.every(lower <= upper, 2)
    return Search(
        at=first,
        evaluation=no_evaluation(first.x, first.u, data.multipliers),
        before=first,
        residual_before=nan,
        regularization=jnp.broadcast_to(options.regularization, wanted.shape).astype(nan.dtype),
        bending=jnp.ones_like(nan),
        noisy=~wanted,
        drowned=jnp.zeros_like(wanted),
        K=jnp.zeros((*u.shape[:2], first.x.shape[1], *wanted.shape), nan.dtype),
        finish=~wanted,
        again=jnp.zeros_like(wanted),
        fresh=jnp.full(wanted.shape, data.x_guess is not None),
        iterations=jnp.zeros(wanted.shape, jnp.int32),
        status=jnp.where(wanted & feasible, RUNNING, CROSSED).astype(jnp.int32),
    )


def trip(problem: Problem, data: Data, options: Options, s: Search) -> tuple[Search, Record]:
    """Evaluate the iterate of every running problem; stop there, or move on."""
    dtype = data.x_init.dtype
    asked, goal = tolerances(options, dtype)
    running, at = s.status == RUNNING, s.at

    # Evaluate.
    at = lanes.select(s.fresh, with_gaps(problem, data, at.u, at.x), at)
    expanded = expand(problem, data.theta, at.x, at.u)
    # Where only rounding is left, the feedback keeps it from growing on the way there and back.
    feedback = jnp.where(s.drowned, s.K, 0)
    here = assess(data, at, expanded, data.multipliers, feedback)
    costate = here.first.costate
    H, H_final = hessians(problem, data.theta, at.x, at.u, expanded, costate, data.multipliers)
    # Across gaps the costates mean nothing, and may overflow: nothing is small there.
    gaping = ~lanes.every(at.gaps == 0, 2)
    known = all_finite((at.costs, at.gaps), running.ndim)
    here = here._replace(
        finite=jnp.where(gaping, known, here.finite),
        residual=jnp.where(gaping, jnp.inf, here.residual),
        size=jnp.where(gaping, 0, here.size),
        rest=jnp.where(gaping, 0, here.rest),
    )
    tolerance, goal = (jnp.where(s.drowned & here.loose, 0, a) for a in (asked, goal))

    # Judge.
    out_of_time = s.iterations >= options.max_iterations
    finish = s.finish & ~s.fresh
    forced = running & gaping & (finish | out_of_time)
    # The sampling is dear: for residuals that seem to be rounding, though above the tolerance.
    ending = (s.drowned | finish | out_of_time) & ~gaping
    doubtful = running & ending & ~(here.residual <= tolerance * here.size)
    noise = lax.cond(
        jnp.any(doubtful),
        lambda: noise_of(at, here, H, expanded.F, H_final, asked, feedback),
        lambda: jnp.zeros_like(here.residual),
    )
    noise = jnp.where(doubtful, noise, 0)  # whoever else is
    judged = judge(
        here, s.residual_before, running=running, moved=(s.iterations > 0) & ~finish,
        noisy=s.noisy, finish=finish & ~gaping, out_of_time=out_of_time & ~gaping,
        tolerance=tolerance, goal=goal, noise=noise,
    )  # fmt: skip
    # States of its own that cost more than what a rollout came to: stay there, and stop.
    no_better = s.fresh & (jnp.sum(at.costs, axis=0) >= jnp.sum(s.before.costs, axis=0))
    finite = here.finite & (gaping | all_finite((H, H_final), running.ndim))
    back = judged.back | (judged.moved & ~finish & ~finite) | no_better
    judged = judged._replace(finite=finite, back=back)

    # Propose. The factors of the last trip are those of the derivative's linear system.
    near = _within_reach(data, at, options)
    exact_at = functools.partial(hessians, problem, data.theta, at.x, at.u, expanded)
    step, factors, blended, used = propose(
        near, at, here, expanded, H, H_final, options, s.regularization, judged.certify, s.bending,
        s.drowned, lambda costate: exact_at(costate, data.multipliers),
    )  # fmt: skip
    verdict = conclude(judged, factors, running)
    away = functools.partial(along_negative_curvature, near, at, here, expanded.F, H, factors)
    step = lax.cond(
        jnp.any(verdict.escape),
        lambda: lanes.select(verdict.escape, away(), step),
        lambda: step,
    )

    # Search.
    noise = rounding(at, here.first.costate, expanded)
    decay = jnp.asarray(options.line_search_decay, dtype)
    wanted = running & ~verdict.stop
    new, length = line_search(
        problem, near, at, step, verdict.escape, wanted, noise, decay, gaping=gaping, forced=forced
    )

    # Record.
    moves, failed = ~verdict.stop & length.accepted, ~verdict.stop & ~length.accepted
    # Where a step led out of range, it may have lowered the regularization before that was seen.
    factor = jnp.where(judged.back & ~judged.finite, _FAILED**2, _FAILED)
    raised = s.regularization * jnp.where(moves, _SHORTENED, factor)
    raised = jnp.maximum(raised, _FIRST_REGULARIZATION)
    lowered = s.regularization / jnp.where(s.noisy, _FINE, _LOWERED)
    lowered = jnp.where(lowered > _MIN_REGULARIZATION, lowered, 0)
    too_much = raised > _MAX_REGULARIZATION
    # A second beginning that leads nowhere: back to where the first one got to, and on from there.
    second = s.again & gaping
    exhausted = (failed & (length.hopeless | too_much)) | (judged.back & too_much)
    returns = running & second & ~s.fresh & (exhausted | judged.back)
    returns &= all_finite(s.before.costs, running.ndim)
    raise_it = failed | (moves & (length.alpha < _SHORT))
    # Where the objective is all rounding, the residual says whether the model was right. The least
    # one counts: back at an iterate it may be another, for want of the costates that led there.
    to_beat = jnp.where(s.drowned, jnp.minimum(here.residual, s.residual_before), here.residual)
    raise_it |= judged.back & ~no_better
    lower_it = moves & (s.noisy | ~length.noisy & length.right)
    if options.hessian != "exact":  # the regularization so far was that of another Hessian
        drowns = moves & length.noisy & ~s.drowned
        lower_it, lowered = lower_it | drowns, jnp.where(drowns, 0, lowered)
    regularization = jnp.where(lower_it, lowered, s.regularization)
    regularization = jnp.where(raise_it, raised, regularization)
    more, less = jnp.minimum(s.bending * _BEND_MORE, 1), jnp.maximum(s.bending / _BEND_LESS, _LEAST)
    bending = jnp.where(definite(used.factors), more, less)
    after = Search(
        at=lanes.select(judged.back | returns, s.before, lanes.select(moves, new, at)),
        evaluation=evaluation(data, here, expanded, H, H_final, factors, options),
        before=lanes.select(moves & ~second, at, s.before),
        residual_before=jnp.where(moves, to_beat, s.residual_before),
        regularization=jnp.where(returns, _FIRST_REGULARIZATION, regularization),
        bending=jnp.where(blended & ~verdict.stop, bending, s.bending),
        noisy=moves & length.noisy,
        drowned=jnp.where(moves, length.noisy, s.drowned),
        K=lanes.select(moves, used.factors.K, s.K),
        finish=(judged.back & judged.small)
        | (exhausted & ~verdict.escape & ~returns)
        | forced
        | (no_better & s.finish),
        again=s.again,
        fresh=jnp.zeros_like(s.fresh),
        iterations=s.iterations + jnp.where(verdict.stop | forced, 0, 1),
        status=status(judged, verdict, exhausted),
    )
    after = _begin_again(data, options, after, running & failed & ~forced)
    return after, _entry(s, after, here, judged, verdict, factors, moves, length)


def _entry(
    s: Search,
    after: Search,
    here: Assessment,
    judged: Judgement,
    verdict: Verdict,
    factors: Factors,
    moves: Array,
    length: Length,
) -> Record:
    """What a trip did."""
    none = jnp.zeros_like(s.regularization)
    action = jnp.where(definite(factors), Action.NEWTON, Action.CONVEX)
    action = jnp.where(verdict.escape, Action.ESCAPE, action)
    action = jnp.where(judged.back, Action.BACK, action)
    return Record(
        objective=jnp.sum(s.at.costs, axis=0),
        residual=here.kkt_residual,
        violation=none,
        step=jnp.where(moves, length.alpha, 0),
        regularization=s.regularization,
        barrier=none,
        active=jnp.sum(here.clamped, axis=(0, 1)),
        action=jnp.where(verdict.stop & ~judged.back, Action.STOP, action),
    )


def _begin_again(data: Data, options: Options, s: Search, failed: Array) -> Search:
    """Where nothing came of the first start, or no step helps for the first time,
    begin again with all states at x_init, if that costs less than where it got to."""
    ended = (s.status == Status.STALLED) | (s.status == Status.NONFINITE)
    lost = ~s.again & (ended | failed)
    at = s.at._replace(
        u=jnp.clip(data.u_init, data.u_lower, data.u_upper),
        x=jnp.broadcast_to(data.x_init, s.at.x.shape),
    )
    return s._replace(
        at=lanes.select(lost, at, s.at),
        before=lanes.select(lost, s.at, s.before),
        regularization=jnp.where(lost & ended, options.regularization, s.regularization),
        noisy=s.noisy & ~lost,
        drowned=s.drowned & ~lost,
        finish=jnp.where(lost, ended, s.finish),
        again=s.again | lost,
        fresh=lost,
        status=jnp.where(lost, RUNNING, s.status),
    )


def report(data: Data, end: Search) -> tuple[Solution, Linearization]:
    """The solution, and the linearization at its point."""
    costate, free, kkt_residual, linearization, _, violation = end.evaluation
    _, H, F, H_final, gradient, *_ = linearization
    noise, _ = hidden(end.at.x, end.at.u, costate, gradient, H, F, H_final)
    kkt_residual = jnp.maximum(kkt_residual, jnp.max(jnp.where(free, noise, 0), axis=(0, 1)))
    solution = Solution(
        x=end.at.x,
        u=end.at.u,
        costate=costate,
        K=linearization.factors.K,
        free=free,
        objective=jnp.sum(end.at.costs, axis=0),
        kkt_residual=kkt_residual,
        iterations=end.iterations,
        status=end.status,
        multipliers=linearization.state.multiplier,
        violation=violation,
    )
    return solution, linearization


def _within_reach(data: Data, at: Iterate, options: Options) -> Data:
    """The bounds of the next step."""
    reach = options.trust_region
    if reach is None:
        return data
    return data._replace(
        u_lower=jnp.maximum(data.u_lower, at.u - reach),
        u_upper=jnp.minimum(data.u_upper, at.u + reach),
    )
