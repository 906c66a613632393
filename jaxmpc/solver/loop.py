"""Control-limited differential dynamic programming: the forward solver (Algorithm 2).

Every trip of the loop first evaluates the current point, and stops there or moves on. So what a
solution reports was computed at the very point that it returns.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.batch.batchwise import batchwise
from jaxmpc.batch.select import select
from jaxmpc.batch.turns import in_turns
from jaxmpc.problem.expansions import Expansion, expand, hessians
from jaxmpc.problem.prices import largest_violation
from jaxmpc.problem.problem import Data, Model
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.solver import augmented
from jaxmpc.solver.assessment import Assessment, all_finite, assess, tolerances
from jaxmpc.solver.escape import along_negative_curvature
from jaxmpc.solver.iterate import Iterate, iterate, rounding
from jaxmpc.solver.line_search import line_search
from jaxmpc.solver.linearization import Evaluation, Linearization, evaluation, no_evaluation
from jaxmpc.solver.propose import propose
from jaxmpc.types import Options, Solution, Status

_FIRST_REGULARIZATION, _MIN_REGULARIZATION, _MAX_REGULARIZATION = 1e-2, 1e-6, 1e6
# The augmented Lagrangian counts as minimised at this share of the gradient that its update leaves.
_MINIMISED, _NEAR = 0.1, 1e-2
_RUNNING = -1  # the status of a problem that goes on
_CROSSED = -2  # of one whose bounds exclude each other, from the start


class _Search(NamedTuple):
    """The carry of the loop."""

    point: Iterate
    evaluation: Evaluation  # of the point that the last trip began with
    previous: Iterate
    previous_residual: Array
    regularization: Array
    noisy: Array  # the step to `point` changed the objective by rounding only
    finish: Array  # nothing is left to try: evaluate the point and stop
    iterations: Array
    status: Array


@lanes.any_rank
def forward(model: Model, data: Data, options: Options) -> tuple[Solution, Linearization]:
    """Solve one problem, or a batch; the linearization is that at the returned point."""
    wanted = jnp.ones(data.x_init.shape[1:], bool)
    end = lax.while_loop(
        lambda s: jnp.any(s.status == _RUNNING),
        lambda s: _trip(model, data, options, s),
        _start(model, data, options, wanted),
    )
    return _report(end)


def solver(model: Model):
    """``forward`` of ``model``; under ``vmap`` the whole batch at once, on lanes."""

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
            return Data(data.theta, *arrays), options

        lifted = model._replace(batch=(width,), batched=batched[0].theta)
        if width == size:
            out = forward(lifted, *take(None))
            return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), out)
        return in_turns(
            size,
            width,
            take,
            start=lambda problems, wanted: _start(lifted, *problems, wanted),
            step=lambda problems, s: _trip(lifted, *problems, s),
            running=lambda s: s.status == _RUNNING,
            report=_report,
        )

    return batchwise(functools.partial(forward, model), many)


def _start(model: Model, data: Data, options: Options, wanted: Array) -> _Search:
    lower, upper = data.u_lower, data.u_upper
    start = iterate(model, data, jnp.clip(data.u_init, lower, upper))

    nan = jnp.full(wanted.shape, jnp.nan, data.x_init.dtype)
    feasible = lanes.every(lower <= upper, 2)
    return _Search(
        point=start,
        evaluation=no_evaluation(start),
        previous=start,
        previous_residual=nan,
        regularization=jnp.broadcast_to(options.regularization, wanted.shape).astype(nan.dtype),
        noisy=~wanted,
        finish=~wanted,
        iterations=jnp.zeros(wanted.shape, jnp.int32),
        status=jnp.where(wanted & feasible, _RUNNING, _CROSSED).astype(jnp.int32),
    )


def _trip(model: Model, data: Data, options: Options, s: _Search) -> _Search:
    """Evaluate the point of every running problem; stop there, or move on."""
    dtype = data.x_init.dtype
    tolerance, goal = tolerances(options, dtype)
    expanded = expand(model, data.theta, s.point.x, s.point.u)
    point = s.point
    if model.constrained:
        penalty, limits = augmented.begin(point.penalty, expanded)
        point = point._replace(penalty=penalty)
    here = assess(data, point, expanded)
    running = s.status == _RUNNING
    small = here.finite & (here.relative <= tolerance)
    out_of_time = s.iterations >= options.max_iterations
    moved = s.iterations > 0
    there = small & (here.relative <= goal)
    # A step that changed the objective by rounding only has to halve the residual, or there is
    # nothing more to gain on this way; it has to lower it at all to be kept.
    settled = s.noisy & ~(here.residual < 0.5 * s.previous_residual)
    if model.constrained:
        # Nor is an update worth another that does not halve a gap that is small already.
        lingers = (here.gap > goal * here.size) & ~(here.gap < 0.5 * point.penalty.gap)
        settled |= moved & small & lingers
    worse = s.noisy & ~there & ~(here.residual < s.previous_residual)
    back = moved & ~s.finish & (~here.finite | worse)

    # At a point that may be the last, the exact KKT matrix of the active set; else a step.
    certify = ~running | there | (small & settled) | s.finish | out_of_time
    infeasible = jnp.zeros_like(running)
    if model.constrained:
        point, here, infeasible = _update_multipliers(
            data, point, here, expanded, ~certify & ~back, tolerance, goal, settled, limits
        )
        certify |= infeasible
    multipliers = None if here.rows is None else here.rows.multiplier
    costate = here.first.costate
    H, H_final = hessians(model, data.theta, point.x, point.u, expanded, costate, multipliers)
    finite = here.finite & all_finite((H, H_final), running.ndim)
    back |= moved & ~s.finish & ~finite
    near = _within_reach(data, point, options)
    # The factors of the last trip are those of the derivative's linear system, which converges the
    # faster the larger ρ is.
    rho = jnp.where(certify, limits[0], point.penalty.rho) if model.constrained else None
    step, factors, ahead = propose(
        near, point, here, expanded, H, H_final, rho, options, s.regularization, certify
    )
    definite = lanes.every(factors.curvature > definite_threshold(dtype))
    escape = certify & small
    if model.constrained:
        # Between updates nothing is certified. And a saddle of the augmented Lagrangian, a plan
        # into the middle of an obstacle, is left at once: its multipliers mean nothing.
        fresh = s.regularization < _FIRST_REGULARIZATION
        escape |= ~certify & (here.stationary <= jnp.where(fresh, _NEAR, tolerance))
    escape &= running & finite & ~definite
    step = lax.cond(
        jnp.any(escape),
        lambda: select(
            escape,
            along_negative_curvature(near, point, here, expanded, H, rho, factors),
            step,
        ),
        lambda: step,
    )

    converged = finite & certify & small & definite
    stuck = certify & ~small
    stop = ~finite | back | converged | stuck | out_of_time
    new, search = line_search(
        model,
        near,
        point,
        step,
        escape,
        running & ~stop,
        rounding(point, costate, data.prices),
        jnp.asarray(options.line_search_decay, dtype),
    )
    moves = ~stop & search.accepted
    if ahead is not None:
        followed = augmented.follow(ahead, new.g, new.penalty)
        new = new._replace(penalty=select(search.noisy, followed, new.penalty))
    failed = ~stop & ~search.accepted
    raised = jnp.maximum(s.regularization * 10, _FIRST_REGULARIZATION)
    lowered = jnp.where(s.regularization > _MIN_REGULARIZATION, s.regularization * 0.1, 0)
    limit = raised > _MAX_REGULARIZATION
    exhausted = (failed & (search.hopeless | limit)) | (back & limit)
    ends = {
        Status.NONFINITE: ~finite & ~moved,
        Status.CONVERGED: converged & ~back,
        Status.INFEASIBLE: infeasible & ~back,
        Status.INDEFINITE: small & escape & ~back & (exhausted | out_of_time),
        Status.MAX_ITERATIONS: out_of_time & ~back,
        Status.STALLED: stuck & ~back,
    }
    status = jnp.select(list(ends.values()), list(ends), _RUNNING)
    after = _Search(
        point=select(back, s.previous, select(moves, new, point)),
        evaluation=evaluation(data, point, here, expanded, H, H_final, rho, factors, options),
        previous=select(moves, point, s.previous),
        previous_residual=jnp.where(moves, here.residual, s.previous_residual),
        regularization=jnp.where(
            failed | (moves & (search.alpha < 0.2)) | (back & ~finite) | (settled & ~small),
            raised,
            jnp.where(moves & ~search.noisy & (search.alpha == 1), lowered, s.regularization),
        ),
        noisy=moves & search.noisy,
        finish=(back & small) | (exhausted & ~escape),
        iterations=s.iterations + jnp.where(stop, 0, 1),
        status=status.astype(jnp.int32),
    )
    # The others wait for the last problem of the batch. Every end certifies, and so do they, at a
    # point that stays: their evaluation comes out the same again, and the largest arrays need no
    # selection.
    return select(running, after, s._replace(evaluation=after.evaluation))


def _within_reach(data: Data, point: Iterate, options: Options) -> Data:
    """The bounds of the next step."""
    reach = options.trust_region
    if reach is None:
        return data
    return data._replace(
        u_lower=jnp.maximum(data.u_lower, point.u - reach),
        u_upper=jnp.minimum(data.u_upper, point.u + reach),
    )


def _update_multipliers(
    data: Data,
    point: Iterate,
    here: Assessment,
    expanded: Expansion,
    may: Array,
    tolerance: Array,
    goal: Array,
    settled: Array,
    limits: tuple[Array, Array],
) -> tuple[Iterate, Assessment, Array]:
    """μ ← ν where the augmented Lagrangian is as good as minimised; and whether the violation of
    the constraints is stationary, so that no further update will help.

    As good as: the gradient is small beside what the update makes of it. One Newton step an update
    is then enough, and the rest of the minimisation comes with the next.
    """
    drowned = augmented.drowned(here.residual, point.penalty, expanded, here.size)
    penalty = augmented.update(here.rows, point.penalty, here.gap, here.size, tolerance, limits)
    updated = point._replace(penalty=penalty)
    after = assess(data, updated, expanded)
    # Before ρ is raised, the gap must be that of the multipliers, not of the minimisation.
    raised = penalty.rho > point.penalty.rho
    share = jnp.where(raised, _MINIMISED**2, _MINIMISED)
    change = after.gradient - here.gradient
    upset = here.gradient + change * (point.penalty.rho / penalty.rho)
    upset = jnp.max(jnp.where(after.held, 0, jnp.abs(upset)), axis=(0, 1))
    minimised = (here.stationary <= tolerance) | settled | drowned
    minimised |= (here.stationary <= _NEAR) & (here.residual <= share * upset)
    violation = largest_violation(point.g, data.prices)
    infeasible = may & minimised & (violation > tolerance * here.size)
    infeasible &= augmented.hopeless(penalty, expanded, change, here.gap, data, point.u)
    # A smaller gap is rounding, which an update would only multiply by ρ.
    worthwhile = here.gap > goal * here.size
    updates = may & minimised & worthwhile & ~infeasible
    return *select(updates, (updated, after), (point, here)), infeasible


def _report(end: _Search) -> tuple[Solution, Linearization]:
    u, x, costs, g, _ = end.point
    crossed = end.status == _CROSSED
    costate, free, kkt_residual, linearization, price, violation = jax.tree.map(
        lambda a: jnp.where(crossed, jnp.zeros((), a.dtype) if a.dtype == bool else jnp.nan, a),
        end.evaluation,
    )
    objective = jnp.sum(costs, axis=0)
    solution = Solution(
        x=x,
        u=u,
        costate=costate,
        K=linearization.factors.K,
        free=free,
        objective=objective if price is None else objective + price,
        kkt_residual=kkt_residual,
        iterations=end.iterations,
        status=jnp.where(crossed, Status.INFEASIBLE, end.status).astype(jnp.int32),
        multipliers=None if g is None else linearization.rows.multiplier,
        violation=jnp.zeros_like(objective) if violation is None else violation,
    )
    return solution, linearization
