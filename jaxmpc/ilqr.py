"""Control-limited differential dynamic programming: the forward solver (Algorithm 2).

Every trip of the loop first evaluates the current point, and stops there or moves on. So what a
solution reports was computed at the very point that it returns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jaxmpc import entrywise, problem, validation
from jaxmpc.box_qp import box_qp, clamped
from jaxmpc.expansions import first_order, rollout, second_order, stage_costs, stages
from jaxmpc.lqr import Factors, entrywise_pays, masked_inverse, quadratic_form, value_hessian
from jaxmpc.problem import Data, Model, Theta
from jaxmpc.types import Options, Solution, Status

_MAX_TRIES = 6  # step lengths tried before the regularization is raised
_SUFFICIENT = 1e-4  # share of the predicted decrease that a step has to achieve
_FIRST_REGULARIZATION, _MIN_REGULARIZATION, _MAX_REGULARIZATION = 1e-2, 1e-6, 1e8
_RUNNING = -1  # the status of a problem that goes on


class Iterate(NamedTuple):
    """A control sequence, its rollout and what it costs."""

    u: Array  # [T, m]
    x: Array  # [T+1, n]
    costs: Array  # [T+1]


class Evaluation(NamedTuple):
    """What is reported of a point apart from its rollout."""

    costate: Array  # [T+1, n]
    factors: Factors  # of the exact KKT matrix with the clamped controls pinned
    free: Array  # [T, m]
    kkt_residual: Array


class Step(NamedTuple):
    """A proposal: u + α (target − u) + K dx, clipped to the bounds."""

    target: Array  # [T, m]
    K: Array  # [T, m, n]
    slope: Array  # the predicted change of the objective is α slope + α² bend
    bend: Array


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


def backward_pass(H, F, c, C_final, c_final, low, high, held, regularization, certify):
    """The backward recursion of Algorithm 2 for the change d of the controls, low ≤ d ≤ high.

    A stage's box QP needs a positive definite Q_uu. Where it is not, the controls that are
    ``held`` (clamped at the current point) stay; where that does not suffice, Q_uu is shifted, and
    the stage's ``curvature`` in the factors says so.

    ``certify`` takes Q_uu as it is: with low = high = 0 on the clamped controls and no other
    bounds, the factors are then those of the exact KKT matrix, definite or not.
    """
    n = c_final.shape[0]
    m = low.shape[1]
    threshold = definite_threshold(F.dtype)

    def stage(carry, data):
        V, v = carry
        H, F, c, low, high, held = data
        Q, size = quadratic_form(H, F, V)
        Quu, size = Q[n:, n:], size[n:]
        q = c + F.T @ v

        _, whole = masked_inverse(Quu, held | ~held, size)
        _, curvature = masked_inverse(Quu, ~held, size)
        unsafe = ~certify & ~(whole > threshold)
        stay = entrywise.elementwise(lambda held: held & unsafe, held)
        low, high = entrywise.where(stay, 0, low), entrywise.where(stay, 0, high)
        # Gershgorin's bound on the smallest eigenvalue; for one control the shift gives |Q_uu|.
        smallest = entrywise.min(2 * entrywise.diag(Quu) - abs(Quu).sum(axis=1))
        fine = certify | (curvature > threshold)
        shift = jnp.where(fine, 0, 2 * jnp.maximum(-smallest, 0))
        multiple = regularization + jnp.where(fine, 0, 1e-6)
        unit = jnp.where(fine, 0, 1)
        added = entrywise.elementwise(
            lambda size: shift + jnp.where(size > 0, multiple * size, unit), size
        )
        convex = Quu + entrywise.diag(added)

        d, Quu_inv, free = box_qp(convex, q[n:], low, high, size)
        K = -(Quu_inv @ Q[n:, :n])
        V = value_hessian(Q, K, n)
        Quu_d = Quu @ d
        v = q[:n] + K.T @ (q[n:] + Quu_d) + Q[:n, n:] @ d
        return (V, v), (d, K, Quu_inv, free, V, curvature, q[n:] @ d, (d @ Quu_d) * 0.5)

    _, (d, K, Quu_inv, free, V, curvature, slope, bend) = entrywise.scan(
        stage,
        (C_final, c_final),
        (H, F, c, low, high, held),
        entrywise=entrywise_pays(n, m),
        reverse=True,
    )
    factors = Factors(K, Quu_inv, jnp.concatenate([V, C_final[None]]), curvature)
    return d, free, factors, jnp.sum(slope), jnp.sum(bend)


def definite_threshold(dtype) -> float:
    """Pivots below this share of the terms they were computed from have no sign."""
    return 16 * float(jnp.finfo(dtype).eps)


def default_tolerance(dtype) -> float:
    """What second-order steps reach within the dtype's rounding (see ``Options.tolerance``)."""
    eps = float(jnp.finfo(dtype).eps)
    return 1e-10 if eps < 1e-12 else 32 * eps


def forward(model: Model, data: Data, options: Options) -> tuple[Solution, Factors]:
    """Solve one problem; the factors are those of the returned point."""
    theta, x_init, u_init, lower, upper = data
    dtype = x_init.dtype
    T, m = u_init.shape
    n = x_init.shape[0]
    tolerance = default_tolerance(dtype) if options.tolerance is None else options.tolerance
    tolerance = jnp.asarray(tolerance, dtype)
    decay = jnp.asarray(options.line_search_decay, dtype)

    def trip(s: _Search) -> _Search:
        u, x, costs = s.point
        first = first_order(model, theta, x, u)
        second = second_order(model, theta, x, u, first.costate)
        gradient = first.control_cost + first.control_pull
        kkt_residual = jnp.max(jnp.abs(jnp.clip(u - gradient, lower, upper) - u))
        held = clamped(gradient, u, lower, upper)
        # Stricter than the KKT residual: a control one ulp away from its bound is not clamped, so
        # its gradient has to vanish. Hence every clamped control ends exactly on its bound.
        residual = jnp.max(jnp.where(held, 0, jnp.abs(gradient)))
        terms = jnp.maximum(jnp.abs(first.control_cost), jnp.abs(first.control_pull))
        finite = _all_finite((s.point, first, second))
        small = finite & (residual <= tolerance * jnp.maximum(1, jnp.max(terms)))
        out_of_time = s.iterations >= options.max_iterations
        moved = s.iterations > 0
        # Go back if the derivatives are not finite here, or if the step here changed the objective
        # by rounding only and did not lower the residual either.
        useless = s.noisy & ~small & ~(residual < s.previous_residual)
        back = moved & ~s.finish & (~finite | useless)

        # At a point that may be the last, the exact KKT matrix of the active set; else a step.
        certify = small | s.finish | out_of_time
        low = jnp.where(certify, jnp.where(held, 0, -jnp.inf), lower - u)
        high = jnp.where(certify, jnp.where(held, 0, jnp.inf), upper - u)
        exact = second.H if options.hessian == "exact" else jnp.where(certify, second.H, second.C)
        regularization = jnp.where(certify, 0, s.regularization)
        # Both Hessians side by side: second-order steps where they are safe, else iLQR's.
        passes = jax.vmap(backward_pass, (0,) + (None,) * 9)(
            jnp.stack([exact, second.C]), first.F, first.c, second.C_final, first.c_final,
            low, high, held, regularization, certify,
        )  # fmt: skip
        factors = jax.tree.map(lambda a: a[0], passes[2])
        definite = jnp.all(factors.curvature > definite_threshold(dtype))
        d, free, used, slope, bend = _select(
            certify | definite,
            jax.tree.map(lambda a: a[0], passes),
            jax.tree.map(lambda a: a[1], passes),
        )
        bound = jnp.where(d <= lower - u, lower, upper)
        target = jnp.where(free, jnp.clip(u + d, lower, upper), bound)
        escape = small & ~definite
        step = _select(
            escape,
            _along_negative_curvature(s.point, second.H, first.F, factors, held, lower, upper),
            Step(target, used.K, slope, bend),
        )

        stop = ~finite | back | (small & definite) | s.finish | out_of_time
        new, accepted, full, noisy, hopeless = _line_search(
            model, data, s.point, step, escape, ~stop, decay
        )
        failed = ~stop & ~accepted
        raised = jnp.maximum(s.regularization * 10, _FIRST_REGULARIZATION)
        lowered = jnp.where(s.regularization > _MIN_REGULARIZATION, s.regularization * 0.1, 0)
        exhausted = failed & (hopeless | (raised > _MAX_REGULARIZATION))
        status = jnp.select(
            [
                ~finite & ~moved,
                small & definite,
                small & (exhausted | s.finish | out_of_time),
                s.finish,
                out_of_time,
            ],
            [
                Status.NONFINITE,
                Status.CONVERGED,
                Status.INDEFINITE,
                Status.STALLED,
                Status.MAX_ITERATIONS,
            ],
            _RUNNING,
        )
        moves = accepted & ~stop
        return _Search(
            point=_select(back, s.previous, _select(moves, new, s.point)),
            evaluation=Evaluation(first.costate, factors, ~held, kkt_residual),
            previous=_select(moves, s.point, s.previous),
            previous_residual=jnp.where(moves, residual, s.previous_residual),
            regularization=jnp.where(
                failed | (back & ~finite),
                raised,
                jnp.where(moves & full, lowered, s.regularization),
            ),
            noisy=moves & noisy,
            finish=(back & finite) | (exhausted & ~small),
            iterations=s.iterations + jnp.where(stop, 0, 1),
            status=status.astype(jnp.int32),
        )

    start = _rollout(model, data, jnp.clip(u_init, lower, upper))
    nan = jnp.full((), jnp.nan, dtype)
    search = _Search(
        point=start,
        evaluation=Evaluation(
            costate=jnp.full((T + 1, n), nan),
            factors=Factors(
                K=jnp.full((T, m, n), nan),
                Quu_inv=jnp.full((T, m, m), nan),
                V=jnp.full((T + 1, n, n), nan),
                curvature=jnp.full(T, nan),
            ),
            free=jnp.zeros((T, m), bool),
            kkt_residual=nan,
        ),
        previous=start,
        previous_residual=nan,
        regularization=jnp.asarray(options.regularization, dtype),
        noisy=jnp.array(False),
        finish=jnp.array(False),
        iterations=jnp.int32(0),
        status=jnp.where(jnp.all(lower <= upper), _RUNNING, Status.INFEASIBLE).astype(jnp.int32),
    )
    end = lax.while_loop(lambda s: s.status == _RUNNING, trip, search)
    u, x, costs = end.point
    costate, factors, free, kkt_residual = end.evaluation
    solution = Solution(
        x=x,
        u=u,
        costate=costate,
        K=factors.K,
        free=free,
        objective=jnp.sum(costs),
        kkt_residual=kkt_residual,
        iterations=end.iterations,
        status=end.status,
    )
    return solution, factors


def _rollout(model: Model, data: Data, u: Array) -> Iterate:
    x = rollout(model, data.theta, data.x_init, u)
    return Iterate(u, x, stage_costs(model, data.theta, x, u))


def apply(model: Model, data: Data, point: Iterate, step: Step, alpha: Array) -> Iterate:
    """The forward recursion of Algorithm 2 on the true dynamics, inside the bounds."""

    def advance(x_new, now):
        u, target, K, x, lower, upper, t = now
        # The target itself for a full step: u + (bound − u) may miss the bound by an ulp.
        straight = jnp.where(alpha == 1, target, u + alpha * (target - u))
        u_new = jnp.clip(straight + K @ (x_new - x), lower, upper)
        return model.dynamics(x_new, u_new, t, data.theta), (x_new, u_new)

    u, x, _ = point
    now = (u, step.target, step.K, x[:-1], data.u_lower, data.u_upper, stages(u))
    x_final, (x_new, u_new) = lax.scan(advance, data.x_init, now)
    x_new = jnp.concatenate([x_new, x_final[None]])
    return Iterate(u_new, x_new, stage_costs(model, data.theta, x_new, u_new))


def _line_search(model, data, point, step, escape, wanted, decay):
    """Shorten the step until the objective falls; along negative curvature try both directions.

    Returns the new point, whether it was accepted, whether it took the full step, whether it only
    changed the objective by rounding, and (where it failed) whether a smaller step is hopeless.
    """
    eps = float(jnp.finfo(decay.dtype).eps)
    noise = 4 * eps * jnp.sum(jnp.abs(point.costs))
    # Near a solution the decrease drowns in rounding before the residual does: take the full step,
    # and let the next trip judge by the residual.
    drowned = ~escape & (-(step.slope + step.bend) <= noise)
    max_tries = jnp.where(escape, 2 * _MAX_TRIES, jnp.where(drowned, 1, _MAX_TRIES))

    def wants_more(carry):
        _, accepted, _, tries = carry
        return wanted & ~accepted & (tries < max_tries)

    def attempt(carry):
        *_, tries = carry
        both_ways = decay ** (2 * (tries // 2)) * jnp.where(tries % 2 == 0, 1, -1)
        alpha = jnp.where(escape, both_ways, decay**tries)
        new = apply(model, data, point, step, alpha)
        change = jnp.sum(new.costs - point.costs)
        predicted = alpha * step.slope + alpha**2 * step.bend
        falls = change <= jnp.where(escape, -noise, _SUFFICIENT * jnp.minimum(predicted, 0))
        noisy = ~falls & drowned & (jnp.abs(change) <= noise)
        return new, falls | noisy, noisy, tries + 1

    start = (point, jnp.array(False), jnp.array(False), jnp.int32(0))
    new, accepted, noisy, tries = lax.while_loop(wants_more, attempt, start)
    return new, accepted, tries == 1, noisy, escape | drowned


def _along_negative_curvature(point, H, F, factors, held, lower, upper) -> Step:
    """A step away from a saddle: at the last stage whose Q_uu is not positive definite, along a
    direction of negative curvature, with the later stages answering by their feedback."""
    T, m = point.u.shape
    n = point.x.shape[1]
    bad = ~(factors.curvature > definite_threshold(F.dtype))
    last = T - 1 - jnp.argmax(bad[::-1])
    B, V = F[last, :, n:], factors.V[last + 1]
    direction = _negative_direction(H[last, n:, n:] + B.T @ V @ B, ~held[last])
    u, lower, upper = point.u[last], lower[last], upper[last]
    width = jnp.where(jnp.isfinite(upper - lower), upper - lower, jnp.maximum(1, jnp.abs(u)))
    # The longest step that keeps every control within its width.
    length = jnp.min(jnp.where(direction == 0, jnp.inf, width / jnp.abs(direction)))
    target = point.u.at[last].add(length * direction)
    K = jnp.where((jnp.arange(T) > last)[:, None, None], factors.K, 0)
    zero = jnp.zeros((), F.dtype)
    return Step(target, K, zero, zero)


def _negative_direction(Q, free):
    """d with dᵀQd equal to the first pivot of Q (on the free controls) that is not positive."""
    m = free.shape[0]
    A = jnp.where(free[:, None] & free[None, :], Q, jnp.eye(m, dtype=Q.dtype))
    threshold = definite_threshold(Q.dtype) * jnp.max(jnp.abs(A))
    unit = jnp.eye(m, dtype=Q.dtype)

    def eliminate(k, carry):
        # L⁻¹ of the rows so far: row k of `rows` is e_k made A-orthogonal to the rows before it.
        rows, direction, found = carry
        pivots = jnp.einsum("ki,ij,kj->k", rows, A, rows)
        weights = jnp.where(jnp.arange(m) < k, (rows @ A)[:, k] / pivots, 0)
        row = unit[k] - weights @ rows
        here = ~found & ~(row @ A @ row > threshold)
        return rows.at[k].set(row), jnp.where(here, row, direction), found | here

    # Without a bad pivot (other problems of a batch) any direction will do.
    _, direction, _ = lax.fori_loop(0, m, eliminate, (unit, unit[0], jnp.array(False)))
    return jnp.where(free, direction, 0)


def _select(condition, a, b):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def _all_finite(tree) -> Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)]))


@jax.custom_vjp
def _not_differentiable(solution):
    return solution


def _not_differentiable_bwd(_, cotangent):
    raise TypeError(
        "ilqr_box is the forward solver alone and not differentiable in reverse mode: use "
        "jaxmpc.mpc_solve, which takes the same arguments, or jax.lax.stop_gradient its result"
    )


_not_differentiable.defvjp(lambda solution: (solution, None), _not_differentiable_bwd)


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
    """TODO"""
    validation.check_options(options)
    model, data = problem.trace(
        cost, dynamics, x_init, u_init, params, terminal_cost, u_lower, u_upper
    )
    solution, _ = jax.jit(lambda data, options: forward(model, data, options))(
        lax.stop_gradient(data), options
    )
    return _not_differentiable(solution)
