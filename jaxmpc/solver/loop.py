"""Control-limited differential dynamic programming: the forward solver (Algorithm 2).

A trip of the loop evaluates the iterate and judges it; then it stops there, or proposes a step and
searches for its length. So what a solution reports was computed at the very point that it returns.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.batch.batchwise import batchwise
from jaxmpc.batch.turns import in_turns
from jaxmpc.problem.expansions import Expansion, expand, hessians
from jaxmpc.problem.prices import largest_violation
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.solver import augmented
from jaxmpc.solver.assessment import Assessment, all_finite, assess, tolerances
from jaxmpc.solver.escape import along_negative_curvature
from jaxmpc.solver.iterate import Iterate, new_iterate, rounding
from jaxmpc.solver.judgement import CROSSED, RUNNING, Judgement, conclude, judge, status
from jaxmpc.solver.line_search import line_search
from jaxmpc.solver.linearization import Evaluation, Linearization, evaluation, no_evaluation
from jaxmpc.solver.propose import propose
from jaxmpc.types import Options, Solution, Status

# Relative to the curvature: where it begins once a step has failed, and what counts as none at all.
_FIRST_REGULARIZATION, _MIN_REGULARIZATION, _MAX_REGULARIZATION = 1e-2, 1e-6, 1e6
_FACTOR = 10.0  # by which it grows and falls
_SHORT = 0.2  # a step that had to be shortened so much means a model that needs regularization
# The augmented Lagrangian counts as minimised at this share of the gradient that its update leaves,
# from this relative residual on.
_MINIMISED, _NEAR = 0.1, 1e-2


class Search(NamedTuple):
    """The carry of the loop."""

    at: Iterate
    evaluation: Evaluation  # of the iterate that the last trip began with
    before: Iterate  # from which a step led here
    residual_before: Array
    regularization: Array
    noisy: Array  # that step changed the objective by rounding only
    finish: Array  # nothing is left to try: evaluate the iterate and stop
    iterations: Array
    status: Array


@lanes.any_rank
def forward(problem: Problem, data: Data, options: Options) -> tuple[Solution, Linearization]:
    """Solve one problem, or a batch; the linearization is that at the returned point."""
    wanted = jnp.ones(data.x_init.shape[1:], bool)
    end = lax.while_loop(
        lambda s: jnp.any(s.status == RUNNING),
        lambda s: _trip(problem, data, options, s),
        _start(problem, data, options, wanted),
    )
    return _report(end)


def solver(problem: Problem):
    """``forward`` of ``problem``; under ``vmap`` the whole batch at once, on lanes."""

    @lanes.any_rank
    def many(size, batched, *problems):
        x_init, u_init = problems[0].x_init, problems[0].u_init
        num = x_init.shape[-1] + u_init.shape[-1]
        width = min(size, lanes.width(num**2 * x_init.dtype.itemsize))

        def take(index):
            def one(a, own):
                if not own:
                    return a
                return jnp.moveaxis(a if index is None else a[index], 0, -1)

            data, options = jax.tree.map(one, problems, tuple(batched))
            # States, controls and bounds on every lane; what theta or options share stays shared.
            arrays = jax.tree.map(
                lambda a, own: a if own else lanes.spread(a, width), data[1:], batched[0][1:]
            )
            if options.trust_region is not None and not batched[1].trust_region:
                reach = lanes.spread(options.trust_region, width)
                options = dataclasses.replace(options, trust_region=reach)
            flags = tuple(jax.tree.leaves(batched[0].theta))
            theta = dataclasses.replace(data.theta, lanes=(width,), batched=flags)
            return Data(theta, *arrays), options

        if width == size:
            out = forward(problem, *take(None))
            return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), out)
        return in_turns(
            size,
            width,
            take,
            start=lambda problems, wanted: _start(problem, *problems, wanted),
            step=lambda problems, s: _trip(problem, *problems, s),
            running=lambda s: s.status == RUNNING,
            report=_report,
        )

    return batchwise(functools.partial(forward, problem), many)


def _start(problem: Problem, data: Data, options: Options, wanted: Array) -> Search:
    lower, upper = data.u_lower, data.u_upper
    first = new_iterate(problem, data, jnp.clip(data.u_init, lower, upper))
    nan = jnp.full(wanted.shape, jnp.nan, data.x_init.dtype)
    feasible = lanes.every(lower <= upper, 2)
    return Search(
        at=first,
        evaluation=no_evaluation(first),
        before=first,
        residual_before=nan,
        regularization=jnp.broadcast_to(options.regularization, wanted.shape).astype(nan.dtype),
        noisy=~wanted,
        finish=~wanted,
        iterations=jnp.zeros(wanted.shape, jnp.int32),
        status=jnp.where(wanted & feasible, RUNNING, CROSSED).astype(jnp.int32),
    )


def _trip(problem: Problem, data: Data, options: Options, s: Search) -> Search:
    """Evaluate the iterate of every running problem; stop there, or move on."""
    dtype = data.x_init.dtype
    tolerance, goal = tolerances(options, dtype)
    running = s.status == RUNNING

    # Evaluate.
    expanded = expand(problem, data.theta, s.at.x, s.at.u)
    penalty, limits = augmented.begin(s.at.penalty, expanded)
    at = s.at._replace(penalty=penalty)
    here = assess(data, at, expanded)

    # Judge.
    judged = judge(
        here, at, s.residual_before, running=running, moved=s.iterations > 0, noisy=s.noisy,
        finish=s.finish, out_of_time=s.iterations >= options.max_iterations, tolerance=tolerance,
        goal=goal,
    )  # fmt: skip
    if problem.constrained:
        at, here, judged = _update_multipliers(
            data, at, here, expanded, judged, tolerance, goal, limits
        )
    costate, multipliers = here.first.costate, here.state.multiplier
    H, H_final = hessians(problem, data.theta, at.x, at.u, expanded, costate, multipliers)
    finite = here.finite & all_finite((H, H_final), running.ndim)
    back = judged.back | (judged.moved & ~s.finish & ~finite)
    judged = judged._replace(finite=finite, back=back)

    # Propose. The factors of the last trip are those of the derivative's linear system, which
    # converges the faster the larger ρ is.
    near = _within_reach(data, at, options)
    rho = jnp.where(judged.certify, limits[0], at.penalty.rho)
    step, factors, ahead = propose(
        near, at, here, expanded, H, H_final, rho, options, s.regularization, judged.certify
    )
    saddle = jnp.zeros_like(running)
    if problem.constrained:
        # Between updates nothing is certified. And a saddle of the augmented Lagrangian, a plan
        # into the middle of an obstacle, is left at once: its multipliers mean nothing.
        fresh = s.regularization < _FIRST_REGULARIZATION
        saddle = ~judged.certify & (here.stationary <= jnp.where(fresh, _NEAR, tolerance))
    verdict = conclude(judged, factors, running, saddle)
    away = functools.partial(along_negative_curvature, near, at, here, expanded, H, rho, factors)
    step = lax.cond(
        jnp.any(verdict.escape),
        lambda: lanes.select(verdict.escape, away(), step),
        lambda: step,
    )

    # Search.
    noise = rounding(at, costate, data.prices)
    decay = jnp.asarray(options.line_search_decay, dtype)
    wanted = running & ~verdict.stop
    new, length = line_search(problem, near, at, step, verdict.escape, wanted, noise, decay)
    followed = augmented.follow(ahead, new.g, new.penalty)
    new = new._replace(penalty=lanes.select(length.noisy, followed, new.penalty))

    # Record.
    moves, failed = ~verdict.stop & length.accepted, ~verdict.stop & ~length.accepted
    raised = jnp.maximum(s.regularization * _FACTOR, _FIRST_REGULARIZATION)
    lowered = jnp.where(s.regularization > _MIN_REGULARIZATION, s.regularization / _FACTOR, 0)
    too_much = raised > _MAX_REGULARIZATION
    exhausted = (failed & (length.hopeless | too_much)) | (judged.back & too_much)
    raise_it = failed | (moves & (length.alpha < _SHORT))
    raise_it |= (judged.back & ~judged.finite) | (judged.settled & ~judged.small)
    lower_it = moves & ~length.noisy & (length.alpha == 1)
    after = Search(
        at=lanes.select(judged.back, s.before, lanes.select(moves, new, at)),
        evaluation=evaluation(data, at, here, expanded, H, H_final, rho, factors, options),
        before=lanes.select(moves, at, s.before),
        residual_before=jnp.where(moves, here.residual, s.residual_before),
        regularization=jnp.where(raise_it, raised, jnp.where(lower_it, lowered, s.regularization)),
        noisy=moves & length.noisy,
        finish=(judged.back & judged.small) | (exhausted & ~verdict.escape),
        iterations=s.iterations + jnp.where(verdict.stop, 0, 1),
        status=status(judged, verdict, exhausted),
    )
    # The others wait for the last problem of the batch. Every end certifies, and so do they, at a
    # point that stays: their evaluation comes out the same again, and the largest arrays need no
    # selection.
    return lanes.select(running, after, s._replace(evaluation=after.evaluation))


def _within_reach(data: Data, at: Iterate, options: Options) -> Data:
    """The bounds of the next step."""
    reach = options.trust_region
    if reach is None:
        return data
    return data._replace(
        u_lower=jnp.maximum(data.u_lower, at.u - reach),
        u_upper=jnp.minimum(data.u_upper, at.u + reach),
    )


def _update_multipliers(
    data: Data,
    at: Iterate,
    here: Assessment,
    expanded: Expansion,
    judged: Judgement,
    tolerance: Array,
    goal: Array,
    limits: tuple[Array, Array],
) -> tuple[Iterate, Assessment, Judgement]:
    """μ ← ν where the augmented Lagrangian is as good as minimised; and whether the violation of
    the constraints is stationary, so that no further update will help.

    As good as: the gradient is small beside what the update makes of it. One Newton step an update
    is then enough, and the rest of the minimisation comes with the next.
    """
    may = ~judged.certify & ~judged.back
    drowned = augmented.drowned(here.residual, at.penalty, expanded, here.size)
    penalty = augmented.update(here.state, at.penalty, here.gap, here.size, tolerance, limits)
    updated = at._replace(penalty=penalty)
    after = assess(data, updated, expanded)
    # Before ρ is raised, the gap must be that of the multipliers, not of the minimisation.
    raised = penalty.rho > at.penalty.rho
    share = jnp.where(raised, _MINIMISED**2, _MINIMISED)
    change = after.gradient - here.gradient
    upset = here.gradient + change * (at.penalty.rho / penalty.rho)
    upset = jnp.max(jnp.where(after.clamped, 0, jnp.abs(upset)), axis=(0, 1))
    minimised = (here.stationary <= tolerance) | judged.settled | drowned
    minimised |= (here.stationary <= _NEAR) & (here.residual <= share * upset)
    violated = largest_violation(at.g, data.prices) > tolerance * here.size
    infeasible = may & minimised & violated
    infeasible &= augmented.hopeless(penalty, expanded, change, here.gap, data, at.u)
    # A smaller gap is rounding, which an update would only multiply by ρ.
    worthwhile = here.gap > goal * here.size
    updates = may & minimised & worthwhile & ~infeasible
    at, here = lanes.select(updates, (updated, after), (at, here))
    certify = judged.certify | infeasible
    return at, here, judged._replace(infeasible=infeasible, certify=certify)


def _report(end: Search) -> tuple[Solution, Linearization]:
    crossed = end.status == CROSSED
    unknown = crossed & bool(end.at.g.num)
    price, violation = (
        jnp.where(unknown, jnp.nan, a) for a in (end.evaluation.price, end.evaluation.violation)
    )
    costate, free, kkt_residual, linearization, *_ = jax.tree.map(
        lambda a: jnp.where(crossed, jnp.zeros((), a.dtype) if a.dtype == bool else jnp.nan, a),
        end.evaluation,
    )
    solution = Solution(
        x=end.at.x,
        u=end.at.u,
        costate=costate,
        K=linearization.factors.K,
        free=free,
        objective=jnp.sum(end.at.costs, axis=0) + price,
        kkt_residual=kkt_residual,
        iterations=end.iterations,
        status=jnp.where(crossed, Status.INFEASIBLE, end.status).astype(jnp.int32),
        multipliers=linearization.state.multiplier,
        violation=violation,
    )
    return solution, linearization
