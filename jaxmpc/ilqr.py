"""Control-limited differential dynamic programming: the forward solver (Algorithm 2).

Every trip of the loop first evaluates the current point, and stops there or moves on. So what a
solution reports was computed at the very point that it returns.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import augmented, lanes, problem, rows, validation
from jaxmpc.augmented import RowState
from jaxmpc.batching import batchwise
from jaxmpc.box_qp import clamped
from jaxmpc.expansions import (
    Expansion,
    FirstOrder,
    add_squares,
    expand,
    first_order,
    hessians,
    rows_pull,
)
from jaxmpc.model import Data, Model, Rows
from jaxmpc.riccati import Factors
from jaxmpc.steps import (
    Iterate,
    Step,
    backward_pass,
    definite_threshold,
    iterate,
    line_search,
    merits,
    negative_direction,
    rounding,
    select,
)
from jaxmpc.turns import in_turns
from jaxmpc.types import Constraints, Options, Solution, Status

_FIRST_REGULARIZATION, _MIN_REGULARIZATION, _MAX_REGULARIZATION = 1e-2, 1e-6, 1e6
# The augmented Lagrangian counts as minimised at this share of the gradient that its update leaves.
_MINIMISED, _NEAR = 0.1, 1e-2
_MAX_GUESSES = 6  # of the rows that a step makes active
_RUNNING = -1  # the status of a problem that goes on
_CROSSED = -2  # of one whose bounds exclude each other, from the start
# So many problems at once fill the vector units and stay in the caches; elsewhere, all of them.
_LANES = {"cpu": 128}


class Linearization(NamedTuple):
    """The first-order conditions around a point: what their derivative needs."""

    factors: Factors  # of the exact KKT matrix with the clamped controls pinned
    hessian: Array  # [T, n+m, n+m], the one that ``Options.backward_hessian`` names
    F: Array  # [T, n, n+m]
    C_final: Array  # [n, n], likewise
    gradient: Array  # [T, m], ∇_u J
    # Of the constraints, if there are any. The factors have ρ GᵀG of the active rows in them.
    G: Any = None  # Rows
    rows: Any = None  # RowState
    rho: Any = None


class Evaluation(NamedTuple):
    """What is reported of a point apart from its rollout."""

    costate: Array  # [T+1, n]
    free: Array  # [T, m]
    kkt_residual: Array
    linearization: Linearization
    # Of the constraints, if there are any.
    price: Array | None = None  # of the slack
    violation: Array | None = None


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
    # What these do not show to be finite enters none of the others.
    shown = [point.x, point.costs, first.c, expanded.F, first.costate]
    if gap is not None:
        size = jnp.maximum(1, augmented.size(expanded.G, point.x, u))
        relative = jnp.maximum(stationary, gap / size)
        kkt_residual = jnp.maximum(kkt_residual, gap)
        shown += jax.tree.leaves((point.g, expanded.G))
    return Assessment(
        first=first,
        gradient=gradient,
        held=held,
        kkt_residual=kkt_residual,
        residual=residual,
        stationary=stationary,
        relative=relative,
        finite=_finite(shown, residual.ndim),
        rows=rows,
        gap=gap,
        size=size,
    )


def _finite(arrays, batch_axes: int) -> Array:
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
        width = min(size, _LANES.get(jax.default_backend(), size))

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
        evaluation=_no_evaluation(start),
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
    worse = s.noisy & ~there & ~(here.residual < s.previous_residual)
    back = moved & ~s.finish & (~here.finite | worse)

    # At a point that may be the last, the exact KKT matrix of the active set; else a step.
    certify = ~running | there | (small & settled) | s.finish | out_of_time
    infeasible = jnp.zeros_like(running)
    if model.constrained:
        point, here, infeasible = _update_multipliers(
            data, point, here, expanded, ~certify & ~back, tolerance, settled, limits
        )
        certify |= infeasible
    multipliers = None if here.rows is None else here.rows.multiplier
    costate = here.first.costate
    H, H_final = hessians(model, data.theta, point.x, point.u, expanded, costate, multipliers)
    finite = here.finite & _finite((H, H_final), running.ndim)
    back |= moved & ~s.finish & ~finite
    near = _within_reach(data, point, options)
    # The factors of the last trip are those of the derivative's linear system, which converges the
    # faster the larger ρ is.
    rho = jnp.where(certify, limits[0], point.penalty.rho) if model.constrained else None
    step, factors = propose(
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
        evaluation=_evaluation(data, point, here, expanded, H, H_final, rho, factors, options),
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
    settled: Array,
    limits: tuple[Array, Array],
) -> tuple[Iterate, Assessment, Array]:
    """μ ← ν where the augmented Lagrangian is as good as minimised; and whether the violation of
    the constraints is stationary, so that no further update will help.

    As good as: the gradient is small beside what the update makes of it. One Newton step an update
    is then enough, and the rest of the minimisation comes with the next.
    """
    drowned = augmented.drowned(here.residual, point.penalty, expanded, here.size)
    noisy = drowned & ~(here.stationary <= tolerance)
    penalty = augmented.update(
        here.rows, point.penalty, here.gap, here.size, tolerance, noisy, limits
    )
    updated = point._replace(penalty=penalty)
    after = assess(data, updated, expanded)
    # Before ρ is raised, the gap must be that of the multipliers, not of the minimisation.
    raised = penalty.rho > point.penalty.rho
    share = jnp.where(raised, _MINIMISED**2, _MINIMISED)
    change = (after.gradient - here.gradient) * (point.penalty.rho / penalty.rho)
    upset = jnp.max(jnp.where(after.held, 0, jnp.abs(here.gradient + change)), axis=(0, 1))
    minimised = (here.stationary <= tolerance) | settled | drowned
    minimised |= (here.stationary <= _NEAR) & (here.residual <= share * upset)
    infeasible = (
        may
        & minimised
        & augmented.hopeless(
            penalty, expanded, after.gradient - here.gradient, here.gap, data, point.u
        )
    )
    updates = may & minimised & ~infeasible
    return *select(updates, (updated, after), (point, here)), infeasible


def _evaluation(
    data: Data,
    point: Iterate,
    here: Assessment,
    expanded: Expansion,
    H: Array,
    H_final: Array,
    rho: Any,
    factors: Factors,
    options: Options,
) -> Evaluation:
    exact = options.backward_hessian == "exact"
    constrained = point.g is not None
    return Evaluation(
        costate=here.first.costate,
        free=~here.held,
        kkt_residual=here.kkt_residual,
        linearization=Linearization(
            factors=factors,
            hessian=H if exact else expanded.C,
            F=expanded.F,
            C_final=H_final if exact else expanded.C_final,
            gradient=here.gradient,
            G=expanded.G,
            rows=here.rows,
            rho=rho,
        ),
        price=augmented.price(point.g, data.prices) if constrained else None,
        violation=augmented.violation(point.g, data.prices) if constrained else None,
    )


def _no_evaluation(point: Iterate) -> Evaluation:
    """Room for that of the first trip."""
    T, m, *batch = point.u.shape
    n = point.x.shape[1]

    def zeros(*shape):
        return jnp.zeros((*shape, *batch), point.x.dtype)

    G = rows = rho = price = None
    if point.g is not None:
        stage, final = point.g
        G = Rows(
            None if stage is None else zeros(*stage.shape[:2], n + m),
            None if final is None else zeros(final.shape[0], n),
        )
        no = jax.tree.map(lambda g: jnp.zeros(g.shape, bool), point.g)
        rows, rho = RowState(jax.tree.map(jnp.zeros_like, point.g), no, no), zeros()
        price = zeros()
    return Evaluation(
        costate=zeros(T + 1, n),
        free=zeros(T, m) > 0,
        kkt_residual=zeros(),
        linearization=Linearization(
            factors=Factors(zeros(T, m, n), zeros(T, m, m), zeros(T + 1, n, n), zeros(T)),
            hessian=zeros(T, n + m, n + m),
            F=zeros(T, n, n + m),
            C_final=zeros(n, n),
            gradient=zeros(T, m),
            G=G,
            rows=rows,
            rho=rho,
        ),
        price=price,
        violation=price,
    )


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


def propose(
    data: Data,
    point: Iterate,
    here: Assessment,
    expanded: Expansion,
    H: Array,
    H_final: Array,
    rho: Any,
    options: Options,
    regularization: Array,
    certify: Array,
) -> tuple[Step, Factors]:
    """The step with the exact Hessian where every stage stays convex, else with ∇²cost.

    With ``certify`` nothing is regularized, the active set is that of the point, and the factors
    are those of its exact KKT matrix, with ρ GᵀG of the active rows in it; in any case they are
    those with the exact Hessian.
    """
    first, held = here.first, here.held
    u, lower, upper = point.u, data.u_lower, data.u_upper
    low = jnp.where(certify, jnp.where(held, 0, -jnp.inf), lower - u)
    high = jnp.where(certify, jnp.where(held, 0, jnp.inf), upper - u)

    def recursions(convex, exact, c, c_final):
        if options.hessian != "exact":
            exact = select(certify, exact, convex)

        def recursion(hessian, final):
            return backward_pass(
                hessian, expanded.F, c, final, c_final,
                low, high, held, jnp.where(certify, 0, regularization), certify,
            )  # fmt: skip

        with_exact = recursion(*exact)
        factors = with_exact[2]
        fine = certify | lanes.every(factors.curvature > definite_threshold(u.dtype))
        chosen = lax.cond(
            jnp.all(fine),
            lambda: with_exact,
            lambda: select(fine, with_exact, recursion(*convex)),
        )
        return chosen, factors

    convex, exact = (expanded.C, expanded.C_final), (H, H_final)
    if here.rows is None:
        chosen, factors = recursions(convex, exact, first.c, first.c_final)
    else:
        chosen, factors = _with_rows(
            data, point, here.rows, expanded, convex, exact, rho, certify, recursions
        )
    d, free, used, slope, bend = chosen
    bound = jnp.where(d <= lower - u, lower, upper)
    target = jnp.where(free, jnp.clip(u + d, lower, upper), bound)
    return Step(target, used.K, slope, bend), factors


def _with_rows(
    data, point, rows: RowState, expanded: Expansion, convex, exact, rho, certify, recursions
):
    """``recursions`` on the augmented Lagrangian's model of a step.

    That is quadratic in pieces: rows become active on the way and others cease to be. So the
    pieces are guessed, at first as those of the point, and corrected by what they lead to, a
    semismooth Newton iteration. If that comes to no end, the model is one from above: the slopes
    at the point, and the curvature of every row that was active in any guess.
    """
    G, penalty, prices = expanded.G, point.penalty, data.prices
    n = point.x.shape[1]

    def with_pieces(active, beyond, stiff):
        state = augmented.on_pieces(point.g, penalty, prices, active, beyond)
        weights = augmented.weights(state._replace(active=stiff), rho, prices, certify)
        pull = rows_pull(G, state.multiplier)
        c = expanded.c if pull.stage is None else expanded.c + pull.stage
        c_final = expanded.c_final if pull.final is None else expanded.c_final + pull.final
        return recursions(
            add_squares(*convex, G, weights), add_squares(*exact, G, weights), c, c_final
        )

    def led_to(d, K):
        """The pieces after the step that the model proposes."""
        low, high = data.u_lower - point.u, data.u_upper - point.u

        def advance(dx, now):
            F, d, K, low, high = now
            du = jnp.clip(d + lanes.matvec(K, dx), low, high)
            return lanes.matvec(F[:, :n], dx) + lanes.matvec(F[:, n:], du), (dx, du)

        start = jnp.zeros_like(point.x[0])
        dx_final, (dx, du) = lax.scan(advance, start, (expanded.F, d, K, low, high))
        dx = jnp.concatenate([dx, dx_final[None]])
        return augmented.predicted(point.g, penalty, prices, G, dx, du)

    local = rows.active, rows.beyond

    def unsettled(carry):
        _, _, changed, count = carry
        return jnp.any(changed) & (count <= _MAX_GUESSES)

    def guess(carry):
        (pieces, stiff, seen), _, changed, count = carry
        out = with_pieces(*pieces, stiff)
        (d, _, used, _, _), _ = out
        there = select(certify, local, led_to(d, used.K))
        seen = jax.tree.map(jnp.logical_or, seen, there[0])
        differs = jax.tree.map(jnp.not_equal, there, pieces)
        changed = functools.reduce(
            jnp.logical_or,
            (~lanes.every(~a, a.ndim - changed.ndim) for a in jax.tree.leaves(differs)),
        )
        more = count + 1 < _MAX_GUESSES
        after = select(more, there, local), select(more, there[0], seen)
        return (*select(changed, after, (pieces, stiff)), seen), out, changed, count + 1

    out = jax.eval_shape(lambda: with_pieces(*local, rows.active))
    out = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), out)
    yes = jnp.ones_like(certify)
    pieces = local, rows.active, rows.active
    _, out, _, _ = lax.while_loop(unsettled, guess, (pieces, out, yes, jnp.int32(0)))
    return out


def along_negative_curvature(
    data: Data,
    point: Iterate,
    here: Assessment,
    expanded: Expansion,
    H: Array,
    rho: Any,
    factors: Factors,
) -> Step:
    """A step away from a saddle: at the last stage whose Q_uu is not positive definite, along a
    direction of negative curvature, with the later stages answering by their feedback."""
    T, _, *batch = point.u.shape
    n = point.x.shape[1]
    bad = ~(factors.curvature > definite_threshold(point.u.dtype))
    last = T - 1 - jnp.argmax(bad[::-1], axis=0)
    stage = jnp.arange(T).reshape((T,) + (1,) * len(batch))
    if here.rows is not None:
        G = expanded.G
        weights = augmented.weights(here.rows, rho, data.prices, jnp.bool_(False))
        H, _ = add_squares(H, expanded.C_final, G, weights)
    at_last, later = stage == last, stage > last  # [T]

    def pick(a):
        """a[last], of each problem."""
        here = at_last.reshape((T,) + (1,) * (a.ndim - at_last.ndim) + tuple(batch))
        return jnp.sum(jnp.where(here, a, 0), axis=0)

    B, V = pick(expanded.F[:, :, n:]), pick(factors.V[1:])
    Quu = pick(H[:, n:, n:]) + lanes.matmul_t(B, lanes.matmul(V, B))
    direction = negative_direction(Quu, jnp.any(at_last[:, None] & ~here.held, axis=0))
    lower, upper = pick(data.u_lower), pick(data.u_upper)
    # Without bounds, the length at which the curvature would have used up the objective.
    curvature = -lanes.dot(direction, lanes.matvec(Quu, direction))
    curvature = jnp.maximum(curvature, jnp.finfo(point.u.dtype).tiny)
    natural = jnp.sqrt(jnp.sum(jnp.abs(merits(point, data.prices)), axis=0) / curvature)
    natural = jnp.where(natural > 0, natural, jnp.maximum(1, jnp.abs(pick(point.u))))
    width = jnp.where(jnp.isfinite(upper - lower), upper - lower, natural)
    # The longest step that keeps every control within its width.
    length = jnp.min(jnp.where(direction == 0, jnp.inf, width / jnp.abs(direction)), axis=0)
    move = jnp.where(direction == 0, 0, length * direction)
    target = point.u + jnp.where(at_last[:, None], move, 0)
    K = jnp.where(later[:, None, None], factors.K, 0)
    zero = jnp.zeros(batch, point.u.dtype)
    return Step(target, K, zero, zero)


@jax.custom_vjp
def _not_differentiable(solution: Solution, data: Data) -> Solution:
    """``solution``, as a function of the data that it came from."""
    return solution


def _not_differentiable_bwd(_, cotangent):
    raise TypeError(
        "ilqr_box is the forward solver alone and not differentiable in reverse mode: use "
        "jaxmpc.mpc_solve, which takes the same arguments, or jax.lax.stop_gradient its result"
    )


_not_differentiable.defvjp(lambda solution, data: (solution, None), _not_differentiable_bwd)


def ilqr_box(
    cost,
    dynamics,
    x_init: ArrayLike,
    u_init: ArrayLike,
    params: Any = None,
    *,
    terminal_cost=None,
    u_lower: ArrayLike | None = None,
    u_upper: ArrayLike | None = None,
    constraints: Constraints | None = None,
    options: Options = Options(),
) -> Solution:
    """Control-limited iLQR with second-order steps: the forward solver alone.

        minimise over u   Σ_{t<T} cost(x_t, u_t, t, params) + terminal_cost(x_T, params)
        subject to        x_0 = x_init,  x_{t+1} = dynamics(x_t, u_t, t, params),
                          u_lower ≤ u_t ≤ u_upper,  and the ``constraints``, if there are any

    The arguments, the result and the errors are those of ``mpc_solve``, which differentiates the
    solution; this does not, and says so: reverse mode through it is a TypeError, forward mode too.

    Every iteration expands cost and dynamics at the current rollout, solves a box-constrained
    quadratic program at each stage backward in time, and rolls the resulting policy out, with a
    step length at which the true objective falls. The quadratic model has the exact Hessian of the
    Hamiltonian cost + λᵀ dynamics wherever that leaves every stage's Q_uu positive definite, and
    ∇²cost elsewhere (``Options.hessian="ilqr"``: always). Q_uu is regularized, relative to its own
    size, more when steps fail and less when they succeed. The solver stops by the scaled KKT
    residual and the curvature, never by the step's length; at a small residual without positive
    curvature it leaves along negative curvature, or ends INDEFINITE. The objective never rises, up
    to rounding, so the last iterate is the best.

    Constraints are dealt with by the augmented Lagrangian. Its multipliers are updated whenever it
    is minimised as well as the update would upset it, which near a solution is after every step,
    and its penalty grows until each update closes nearly all of the gap.

    Source: Amos et al. 2018 (arXiv:1810.13400), Algorithm 2; the box QP and the regularization
    after Tassa, Mansard and Todorov, Control-limited differential dynamic programming, ICRA 2014.
    """
    validation.check_options(options)
    model, data = problem.trace(
        cost, dynamics, x_init, u_init, params, terminal_cost, u_lower, u_upper, constraints
    )
    options = validation.with_trust_region(options, data.u_init)
    solution, _ = jax.jit(solver(model))(lax.stop_gradient(data), options)
    return _not_differentiable(rows.for_user(model, solution), data)
