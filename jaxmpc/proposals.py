"""What the solver tries next: the minimum of a convex model around the current point, or away from
a saddle.

Without rows the model is a box QP a stage (Algorithm 2). With rows it is quadratic in pieces, and
which piece each row will be on is guessed first, and found by the interior-point method where no
guess holds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc import augmented, interior, lanes
from jaxmpc.assessment import Assessment
from jaxmpc.expansions import Expansion, add_pull, add_squares, along_rows
from jaxmpc.interior import Interior
from jaxmpc.model import Data, Rows
from jaxmpc.riccati import Factors
from jaxmpc.steps import (
    Iterate,
    Step,
    backward_pass,
    definite_threshold,
    merits,
    negative_direction,
    select,
)
from jaxmpc.types import Options

_ALMOST = 1e-2  # of the size of a control, or the width of its bounds: so near is next to one
_MAX_GUESSES = 4  # of the pieces
_MAX_INTERIOR = 20  # steps of the interior-point method


class _Box(NamedTuple):
    """What a stage's QP may do with the controls."""

    low: Array  # [T, m], of their change
    high: Array
    held: Array  # [T, m], those that stay where Q_uu is not positive definite


class _Solved(NamedTuple):
    """A backward recursion."""

    d: Array  # [T, m], the change of the controls is d + K dx
    free: Array
    used: Factors
    slope: Array
    bend: Array
    exact: Factors  # those with the Hessian that was tried first
    fine: Array  # which was good enough


class _Terms(NamedTuple):
    """What rows make of the model: its gradient, and the weights of their squares."""

    c: Array  # [T, n+m]
    c_final: Array  # [n]
    weights: Rows
    bounds: Array  # [T, m], the weights of those of the controls


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
    held = here.held
    u, lower, upper = point.u, data.u_lower, data.u_upper
    box = _Box(
        jnp.where(certify, jnp.where(held, 0, -jnp.inf), lower - u),
        jnp.where(certify, jnp.where(held, 0, jnp.inf), upper - u),
        held,
    )

    def solve(
        c, c_final, box: _Box, squares: Callable, curved: Any = True, inside: Any = False
    ) -> _Solved:
        """``squares`` adds to a Hessian, and ``inside`` it regularizes it, too; the exact one is
        tried where ``curved``."""
        convex, exact = squares(expanded.C, expanded.C_final), squares(H, H_final)
        if options.hessian != "exact":
            curved = certify
        exact = select(curved, exact, convex)

        def recursion(hessian, final):
            return backward_pass(
                hessian, expanded.F, c, final, c_final, *box,
                jnp.where(certify | inside, 0, regularization), certify,
            )  # fmt: skip

        with_exact = recursion(*exact)
        factors = with_exact[2]
        fine = certify | lanes.every(factors.curvature > definite_threshold(u.dtype))
        chosen = lax.cond(
            jnp.all(fine),
            lambda: with_exact,
            lambda: select(fine, with_exact, recursion(*convex)),
        )
        d, free, used, slope, bend = chosen
        return _Solved(d, free, used, slope, bend, factors, fine)

    first = here.first
    if here.rows is None:
        solved = solve(first.c, first.c_final, box, lambda C, C_final: (C, C_final))
        inside = jnp.zeros_like(certify)
    else:
        solved, inside = _with_rows(
            data, point, here, expanded, rho, regularization, certify, box, solve
        )
    d, free, used, slope, bend, factors, _ = solved
    bound = jnp.where(d <= lower - u, lower, upper)
    target = jnp.where(free, jnp.clip(u + d, lower, upper), bound)
    # From the interior, d is within the bounds together with K dx only.
    target = jnp.where(inside, u + d, target)
    return Step(target, _reach(data, u, here, target), used.K, slope, bend), factors


def _reach(data: Data, u: Array, here: Assessment, target: Array) -> Array:
    """From how far away a control goes all the way to its bound, if the gradient holds it there.

    With a share of every step it would come nearer for ever, and count as free all the way
    (Bertsekas 1982, Projected Newton methods for optimization problems with simple constraints).
    """
    lower, upper = data.u_lower, data.u_upper
    width = jnp.minimum(upper - lower, jnp.max(jnp.abs(u), axis=0))
    outward = jnp.where(here.gradient > 0, target == lower, target == upper)
    return jnp.where(outward, _ALMOST * width, 0)


class _Search(NamedTuple):
    """For the minimum of the model: by guesses of the pieces, or in the interior."""

    pieces: tuple[Rows, Rows]  # the guess
    inside: Array  # bool: the guesses came to no end
    at: Interior
    curved: Array  # with the exact Hessian; once it is not good enough, never again
    exact: Factors  # of the last guess
    solved: _Solved
    open: Array
    tries: Array


def _with_rows(
    data: Data,
    point: Iterate,
    here: Assessment,
    expanded: Expansion,
    rho: Array,
    regularization: Array,
    certify: Array,
    box: _Box,
    solve: Callable[..., _Solved],
) -> tuple[_Solved, Array]:
    """The step of the augmented Lagrangian's model, and whether the interior-point method found it.

    That is quadratic in pieces: rows become active on the way and others cease to be. So the
    pieces are guessed, at first as those of the point, and corrected by what they lead to, a
    semismooth Newton iteration, which near a solution ends with the first. If it comes to no end,
    the interior-point method takes over.
    """
    G, penalty, prices = expanded.G, point.penalty, data.prices
    m, n = point.u.shape[1], point.x.shape[1]
    low, high = data.u_lower - point.u, data.u_upper - point.u
    sides = interior.sides(point.g, penalty, prices, low, high)
    first, no = here.first, jnp.zeros_like(certify)

    def gradient(slopes: Rows) -> tuple[Array, Array]:
        return add_pull(expanded.c, expanded.c_final, G, slopes)

    def of_pieces(pieces) -> _Terms:
        state = augmented.on_pieces(point.g, penalty, prices, *pieces)
        weights = augmented.weights(state, rho, prices, certify)
        return _Terms(*gradient(state.multiplier), weights, jnp.zeros_like(point.u))

    def of_interior(moved, steps) -> _Terms:
        # The slopes at dz = 0.
        *slopes, bounds = (s.slope - s.weight * g for s, g in zip(steps, moved, strict=True))
        *weights, of_bounds = (s.weight for s in steps)
        c, c_final = gradient(_as_rows(G, slopes))
        c = c.at[:, n:].add(bounds[:, :m] - bounds[:, m:])
        # Relative to the cost alone, for the weights of the bounds grow without limit.
        size = jnp.abs(jax.vmap(lanes.diagonal)(expanded.C))
        size = jnp.where(size[:, n:] > 0, size[:, n:], jnp.max(size, axis=(0, 1)))
        weight = of_bounds[:, :m] + of_bounds[:, m:] + regularization * size
        return _Terms(c, c_final, _as_rows(G, weights), weight)

    def minimum(pieces, inside, at: Interior, curved) -> tuple[_Solved, Array, Array, Any]:
        """Of the model, and where it is; and the Newton steps of the interior."""
        moved = interior.along(G, at.dx, at.du)
        steps = tuple(
            interior.newton(one, variables, g, at.tau)
            for one, variables, g in zip(sides, at.variables, moved, strict=True)
        )
        terms = select(inside, of_interior(moved, steps), of_pieces(pieces))

        def squares(C, C_final):
            C, C_final = add_squares(C, C_final, G, terms.weights)
            return C.at[:, n:, n:].add(jax.vmap(lanes.diagonal_matrix)(terms.bounds)), C_final

        pinned = low == high
        around = _Box(
            jnp.where(inside, jnp.where(pinned, 0, -jnp.inf), box.low),
            jnp.where(inside, jnp.where(pinned, 0, jnp.inf), box.high),
            jnp.where(inside, pinned, box.held),
        )
        solved = solve(terms.c, terms.c_final, around, squares, curved, inside)

        def advance(dx, now):
            F, d, K, low, high = now
            du = d + lanes.matvec(K, dx)
            du = jnp.where(inside, du, jnp.clip(du, low, high))
            return lanes.matvec(F[:, :n], dx) + lanes.matvec(F[:, n:], du), (dx, du)

        stages = expanded.F, solved.d, solved.used.K, low, high
        dx_final, (dx, du) = lax.scan(advance, jnp.zeros_like(point.x[0]), stages)
        dx = jnp.concatenate([dx, dx_final[None]])
        return solved, dx, du, steps

    def unsettled(s: _Search):
        return jnp.any(s.open) & (s.tries < _MAX_GUESSES + _MAX_INTERIOR)

    def improve(s: _Search) -> _Search:
        solved, dx, du, steps = minimum(s.pieces, s.inside, s.at, s.curved)
        there = augmented.predicted(point.g, penalty, prices, along_rows(G, dx, du))
        there = select(certify, (here.rows.active, here.rows.beyond), there)
        differs = jax.tree.leaves(jax.tree.map(jnp.not_equal, there, s.pieces))
        settled = functools.reduce(
            jnp.logical_and, (lanes.every(~a, a.ndim - no.ndim) for a in differs)
        )
        settled |= s.inside
        after = interior.advance(sides, s.at, steps, G, dx, du)
        curved = s.curved & (solved.fine | ~s.inside)
        # With another Hessian the conditions are others.
        after = after._replace(missed=jnp.where(curved == s.curved, after.missed, 1))
        # The recursion's slope at the point is not that of the objective.
        slope = jnp.sum(first.c * jnp.concatenate([after.dx[:-1], after.du], axis=1), axis=(0, 1))
        slope += lanes.dot(first.c_final, after.dx[-1])
        inner = solved._replace(
            d=after.du - jax.vmap(lanes.matvec)(solved.used.K, after.dx[:-1]),
            free=jnp.ones_like(solved.free),
            slope=slope,
            bend=-slope / 2,
        )
        ended = interior.ended(sides, after, -slope / 2)
        open = s.open & jnp.where(s.inside, ~ended, ~settled)
        enters = open & ~s.inside & (s.tries + 1 >= _MAX_GUESSES)
        pieces = select(open & ~s.inside, there, s.pieces)
        return _Search(
            pieces=pieces,
            inside=s.inside | enters,
            at=select(s.inside & open, after, select(enters, at_first(pieces), s.at)),
            curved=curved,
            exact=select(s.inside, s.exact, solved.exact),
            solved=select(s.inside, inner, solved),
            open=open,
            tries=s.tries + 1,
        )

    def at_first(pieces) -> Interior:
        now, then = (
            augmented.largest(jax.tree.map(jnp.abs, state.multiplier))
            for state in (here.rows, augmented.on_pieces(point.g, penalty, prices, *pieces))
        )
        return interior.start(sides, point.x, point.u, jnp.maximum(now, then), penalty.rho)

    local = here.rows.active, here.rows.beyond
    at = at_first(local)
    solved = jax.eval_shape(lambda: minimum(local, no, at, ~no)[0])
    solved = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), solved)
    begin = _Search(local, no, at, ~no, solved.exact, solved, ~no, jnp.int32(0))
    end = lax.while_loop(unsettled, improve, begin)
    return end.solved._replace(exact=end.exact), end.inside


def _as_rows(G: Rows, parts) -> Rows:
    parts = iter(parts)
    return Rows(*(None if g is None else next(parts) for g in G))


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
    return Step(target, jnp.zeros_like(target), K, zero, zero)
