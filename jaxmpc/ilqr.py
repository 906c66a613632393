"""Control-limited differential dynamic programming: the forward solver (Algorithm 2).

Every trip of the loop first evaluates the current point, and stops there or moves on. So what a
solution reports was computed at the very point that it returns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import lanes, problem, validation
from jaxmpc.batching import batchwise
from jaxmpc.box_qp import clamped
from jaxmpc.expansions import FirstOrder, SecondOrder, first_order, second_order
from jaxmpc.problem import Data, Model
from jaxmpc.riccati import Factors
from jaxmpc.steps import (
    Iterate,
    Step,
    backward_pass,
    definite_threshold,
    iterate,
    line_search,
    negative_direction,
    rounding,
    select,
)
from jaxmpc.turns import in_turns
from jaxmpc.types import Options, Solution, Status

_FIRST_REGULARIZATION, _MIN_REGULARIZATION, _MAX_REGULARIZATION = 1e-2, 1e-6, 1e6
_RUNNING = -1  # the status of a problem that goes on
# So many problems at once fill the vector units and stay in the caches; elsewhere, all of them.
_LANES = {"cpu": 128}


class Linearization(NamedTuple):
    """The first-order conditions around a point: what their derivative needs."""

    factors: Factors  # of the exact KKT matrix with the clamped controls pinned
    hessian: Array  # [T, n+m, n+m], the one that ``Options.backward_hessian`` names
    F: Array  # [T, n, n+m]
    C_final: Array  # [n, n]
    gradient: Array  # [T, m], ∇_u J


class Evaluation(NamedTuple):
    """What is reported of a point apart from its rollout."""

    costate: Array  # [T+1, n]
    free: Array  # [T, m]
    kkt_residual: Array
    linearization: Linearization


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
    """The expansions at a point, and what they say about it."""

    first: FirstOrder
    second: SecondOrder
    gradient: Array  # [T, m], ∇_u J
    held: Array  # [T, m], the clamped controls
    kkt_residual: Array
    residual: Array  # the stricter one that convergence asks for
    relative: Array  # the residual over the terms that cancel in it
    finite: Array


def assess(model: Model, data: Data, point: Iterate) -> Assessment:
    """Expand the problem at a point and hold it against the first-order conditions."""
    u, x, _ = point
    lower, upper = data.u_lower, data.u_upper
    first = first_order(model, data.theta, x, u)
    second = second_order(model, data.theta, x, u, first.costate)
    gradient = first.control_cost + first.control_pull
    held = clamped(gradient, u, lower, upper)
    # Stricter than the KKT residual: a control one ulp away from its bound is not clamped, so its
    # gradient has to vanish. Hence every clamped control ends exactly on its bound.
    residual = jnp.max(jnp.where(held, 0, jnp.abs(gradient)), axis=(0, 1))
    terms = jnp.maximum(jnp.abs(first.control_cost), jnp.abs(first.control_pull))
    # What these do not show to be finite enters none of the others.
    shown = (x, point.costs, first.c, first.F, first.costate, second.H, second.C_final)
    finite = functools.reduce(
        jnp.logical_and, (lanes.every(jnp.isfinite(a), a.ndim - residual.ndim) for a in shown)
    )
    return Assessment(
        first=first,
        second=second,
        gradient=gradient,
        held=held,
        kkt_residual=jnp.max(jnp.abs(jnp.clip(u - gradient, lower, upper) - u), axis=(0, 1)),
        residual=residual,
        relative=residual / jnp.maximum(1, jnp.max(terms, axis=(0, 1))),
        finite=finite,
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
        status=jnp.where(wanted & feasible, _RUNNING, Status.INFEASIBLE).astype(jnp.int32),
    )


def _trip(model: Model, data: Data, options: Options, s: _Search) -> _Search:
    """Evaluate the point of every running problem; stop there, or move on."""
    dtype = data.x_init.dtype
    tolerance, goal = tolerances(options, dtype)
    here = assess(model, data, s.point)
    running = s.status == _RUNNING
    finite = here.finite
    small = finite & (here.relative <= tolerance)
    out_of_time = s.iterations >= options.max_iterations
    moved = s.iterations > 0
    there = small & (here.relative <= goal)
    # A step that changed the objective by rounding only has to halve the residual, or there is
    # nothing more to gain on this way; it has to lower it at all to be kept.
    settled = s.noisy & ~(here.residual < 0.5 * s.previous_residual)
    worse = s.noisy & ~there & ~(here.residual < s.previous_residual)
    back = moved & ~s.finish & (~finite | worse)

    # At a point that may be the last, the exact KKT matrix of the active set; else a step.
    certify = ~running | there | (small & settled) | s.finish | out_of_time
    step, factors = propose(data, s.point, here, options, s.regularization, certify)
    definite = lanes.every(factors.curvature > definite_threshold(dtype))
    escape = running & certify & small & ~definite
    step = lax.cond(
        jnp.any(escape),
        lambda: select(escape, along_negative_curvature(data, s.point, here, factors), step),
        lambda: step,
    )

    converged = certify & small & definite
    stuck = certify & ~small
    stop = ~finite | back | converged | stuck | out_of_time
    new, search = line_search(
        model,
        data,
        s.point,
        step,
        escape,
        running & ~stop,
        rounding(s.point, here.first.costate),
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
        Status.INDEFINITE: escape & ~back & (exhausted | out_of_time),
        Status.MAX_ITERATIONS: out_of_time & ~back,
        Status.STALLED: stuck & ~back,
    }
    status = jnp.select(list(ends.values()), list(ends), _RUNNING)
    after = _Search(
        point=select(back, s.previous, select(moves, new, s.point)),
        evaluation=_evaluation(here, factors, options),
        previous=select(moves, s.point, s.previous),
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


def _evaluation(here: Assessment, factors: Factors, options: Options) -> Evaluation:
    exact = options.backward_hessian == "exact"
    return Evaluation(
        costate=here.first.costate,
        free=~here.held,
        kkt_residual=here.kkt_residual,
        linearization=Linearization(
            factors=factors,
            hessian=here.second.H if exact else here.second.C,
            F=here.first.F,
            C_final=here.second.C_final,
            gradient=here.gradient,
        ),
    )


def _no_evaluation(point: Iterate) -> Evaluation:
    """Room for that of the first trip."""
    T, m, *batch = point.u.shape
    n = point.x.shape[1]

    def zeros(*shape):
        return jnp.zeros((*shape, *batch), point.x.dtype)

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
        ),
    )


def _report(end: _Search) -> tuple[Solution, Linearization]:
    u, x, costs = end.point
    feasible = end.status != Status.INFEASIBLE
    costate, free, kkt_residual, linearization = jax.tree.map(
        lambda a: jnp.where(feasible, a, jnp.zeros((), a.dtype) if a.dtype == bool else jnp.nan),
        end.evaluation,
    )
    solution = Solution(
        x=x,
        u=u,
        costate=costate,
        K=linearization.factors.K,
        free=free,
        objective=jnp.sum(costs, axis=0),
        kkt_residual=kkt_residual,
        iterations=end.iterations,
        status=end.status,
    )
    return solution, linearization


def propose(
    data: Data,
    point: Iterate,
    here: Assessment,
    options: Options,
    regularization: Array,
    certify: Array,
) -> tuple[Step, Factors]:
    """The step with the exact Hessian where every stage stays convex, else with ∇²cost.

    With ``certify`` nothing is regularized, the active set is that of the point, and the factors
    are those of its exact KKT matrix; in any case they are those with the exact Hessian.
    """
    first, second, held = here.first, here.second, here.held
    u, lower, upper = point.u, data.u_lower, data.u_upper
    low = jnp.where(certify, jnp.where(held, 0, -jnp.inf), lower - u)
    high = jnp.where(certify, jnp.where(held, 0, jnp.inf), upper - u)
    exact = second.H if options.hessian == "exact" else jnp.where(certify, second.H, second.C)

    def recursion(hessian):
        return backward_pass(
            hessian, first.F, first.c, second.C_final, first.c_final,
            low, high, held, jnp.where(certify, 0, regularization), certify,
        )  # fmt: skip

    with_exact = recursion(exact)
    factors = with_exact[2]
    fine = certify | lanes.every(factors.curvature > definite_threshold(u.dtype))
    d, free, used, slope, bend = lax.cond(
        jnp.all(fine),
        lambda: with_exact,
        lambda: select(fine, with_exact, recursion(second.C)),
    )
    bound = jnp.where(d <= lower - u, lower, upper)
    target = jnp.where(free, jnp.clip(u + d, lower, upper), bound)
    return Step(target, used.K, slope, bend), factors


def along_negative_curvature(
    data: Data, point: Iterate, here: Assessment, factors: Factors
) -> Step:
    """A step away from a saddle: at the last stage whose Q_uu is not positive definite, along a
    direction of negative curvature, with the later stages answering by their feedback."""
    T, _, *batch = point.u.shape
    n = point.x.shape[1]
    bad = ~(factors.curvature > definite_threshold(point.u.dtype))
    last = T - 1 - jnp.argmax(bad[::-1], axis=0)
    stage = jnp.arange(T).reshape((T,) + (1,) * len(batch))
    at_last, later = stage == last, stage > last  # [T]

    def pick(a):
        """a[last], of each problem."""
        here = at_last.reshape((T,) + (1,) * (a.ndim - at_last.ndim) + tuple(batch))
        return jnp.sum(jnp.where(here, a, 0), axis=0)

    B, V = pick(here.first.F[:, :, n:]), pick(factors.V[1:])
    Quu = pick(here.second.H[:, n:, n:]) + lanes.matmul_t(B, lanes.matmul(V, B))
    direction = negative_direction(Quu, jnp.any(at_last[:, None] & ~here.held, axis=0))
    lower, upper = pick(data.u_lower), pick(data.u_upper)
    # Without bounds, the length at which the curvature would have used up the objective.
    curvature = -lanes.dot(direction, lanes.matvec(Quu, direction))
    curvature = jnp.maximum(curvature, jnp.finfo(point.u.dtype).tiny)
    natural = jnp.sqrt(jnp.sum(jnp.abs(point.costs), axis=0) / curvature)
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
    options: Options = Options(),
) -> Solution:
    """Control-limited iLQR with second-order steps: the forward solver alone.

        minimise over u   Σ_{t<T} cost(x_t, u_t, t, params) + terminal_cost(x_T, params)
        subject to        x_0 = x_init,  x_{t+1} = dynamics(x_t, u_t, t, params),
                          u_lower ≤ u_t ≤ u_upper

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

    Source: Amos et al. 2018 (arXiv:1810.13400), Algorithm 2; the box QP and the regularization
    after Tassa, Mansard and Todorov, Control-limited differential dynamic programming, ICRA 2014.
    """
    validation.check_options(options)
    model, data = problem.trace(
        cost, dynamics, x_init, u_init, params, terminal_cost, u_lower, u_upper
    )
    solution, _ = jax.jit(solver(model))(lax.stop_gradient(data), options)
    return _not_differentiable(solution, data)
