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
from jaxmpc.expansions import Expansion, add_squares, rows_pull
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

_MAX_GUESSES = 6  # of the pieces
_MAX_INTERIOR = 40  # steps of the interior-point method


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
    exact: Factors  # those with the exact Hessian
    fine: Array  # which was good enough


class _Terms(NamedTuple):
    """What rows add to the model of a stage, and of the end."""

    c: Rows  # [T, n+m] and [n]; None where there is nothing
    weights: Rows  # [T, p] and [q], of the squares of the rows
    bounds: Array  # [T, m], of those of the controls


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

    def solve(c, c_final, box: _Box, squares: Callable, curved: Any = True) -> _Solved:
        """``squares`` adds to a Hessian; the exact one is tried where ``curved``."""
        convex, exact = squares(expanded.C, expanded.C_final), squares(H, H_final)
        if options.hessian != "exact":
            curved = certify
        exact = select(curved, exact, convex)

        def recursion(hessian, final):
            return backward_pass(
                hessian, expanded.F, c, final, c_final, *box,
                jnp.where(certify, 0, regularization), certify,
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
        solved, inside = _with_rows(data, point, here, expanded, rho, certify, box, solve)
    d, free, used, slope, bend, factors, _ = solved
    bound = jnp.where(d <= lower - u, lower, upper)
    target = jnp.where(free, jnp.clip(u + d, lower, upper), bound)
    # From the interior, d is within the bounds together with K dx only.
    target = jnp.where(inside, u + d, target)
    return Step(target, used.K, slope, bend), factors


class _Search(NamedTuple):
    """For the pieces."""

    pieces: tuple[Rows, Rows]
    inside: Array  # by the interior-point method, for the guesses came to no end
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
    no = jnp.zeros_like(certify)

    def of_pieces(pieces) -> _Terms:
        state = augmented.on_pieces(point.g, penalty, prices, *pieces)
        weights = augmented.weights(state, rho, prices, certify)
        return _Terms(rows_pull(G, state.multiplier), weights, jnp.zeros_like(point.u))

    def of_interior(at: Interior, steps) -> _Terms:
        moved = interior.along(G, at.dx, at.du)
        # The slopes at dz = 0.
        *slopes, bounds = (s.slope - s.weight * g for s, g in zip(steps, moved, strict=True))
        *weights, of_bounds = (s.weight for s in steps)
        c = rows_pull(G, _as_rows(G, slopes))
        stage = jnp.zeros_like(expanded.c) if c.stage is None else c.stage
        stage = stage.at[:, n:].add(bounds[:, :m] - bounds[:, m:])
        return _Terms(
            Rows(stage, c.final), _as_rows(G, weights), of_bounds[:, :m] + of_bounds[:, m:]
        )

    def minimum(pieces, inside, at: Interior, curved) -> tuple[_Solved, Array, Array, Any]:
        """Of the model, and where it is; and the Newton steps of the interior."""
        moved = interior.along(G, at.dx, at.du)
        steps = tuple(
            interior.newton(one, variables, g, at.tau)
            for one, variables, g in zip(sides, at.variables, moved, strict=True)
        )
        outside, within = of_pieces(pieces), of_interior(at, steps)
        if outside.c.stage is None:
            outside = outside._replace(c=Rows(jnp.zeros_like(expanded.c), outside.c.final))
        terms = select(inside, within, outside)
        final = expanded.c_final if terms.c.final is None else expanded.c_final + terms.c.final

        def squares(C, C_final):
            C, C_final = add_squares(C, C_final, G, terms.weights)
            return C.at[:, n:, n:].add(jax.vmap(lanes.diagonal_matrix)(terms.bounds)), C_final

        pinned = low == high
        around = _Box(
            jnp.where(inside, jnp.where(pinned, 0, -jnp.inf), box.low),
            jnp.where(inside, jnp.where(pinned, 0, jnp.inf), box.high),
            box.held & ~inside,
        )
        solved = solve(expanded.c + terms.c.stage, final, around, squares, curved)

        def advance(dx, now):
            F, d, K, low, high = now
            du = d + lanes.matvec(K, dx)
            du = jnp.where(inside, du, jnp.clip(du, low, high))
            return lanes.matvec(F[:, :n], dx) + lanes.matvec(F[:, n:], du), (dx, du)

        stages = expanded.F, solved.d, solved.used.K, low, high
        dx_final, (dx, du) = lax.scan(advance, jnp.zeros_like(point.x[0]), stages)
        dx = jnp.concatenate([dx, dx_final[None]])
        # In the interior the recursion has another slope at the point than the objective.
        first = here.first
        slope = jnp.sum(first.c * jnp.concatenate([dx[:-1], du], axis=1), axis=(0, 1))
        slope += lanes.dot(first.c_final, dx[-1])
        inner = solved._replace(slope=slope, bend=-slope / 2, free=jnp.ones_like(solved.free))
        return select(inside, inner, solved), dx, du, steps

    def unsettled(s: _Search):
        return jnp.any(s.open) & (s.tries < _MAX_GUESSES + _MAX_INTERIOR)

    def improve(s: _Search) -> _Search:
        solved, dx, du, steps = minimum(s.pieces, s.inside, s.at, s.curved)
        there = augmented.predicted(point.g, penalty, prices, G, dx, du)
        there = select(certify, (here.rows.active, here.rows.beyond), there)
        differs = jax.tree.leaves(jax.tree.map(jnp.not_equal, there, s.pieces))
        settled = functools.reduce(
            jnp.logical_and, (lanes.every(~a, a.ndim - no.ndim) for a in differs)
        )
        settled |= s.inside
        ended = interior.ended(sides, s.at, -solved.slope)
        open = s.open & jnp.where(s.inside, ~ended, ~settled)
        enters = open & ~s.inside & (s.tries + 1 >= _MAX_GUESSES)
        pieces = select(open & ~s.inside, there, s.pieces)
        after = interior.advance(sides, s.at, steps, G, dx, du)
        return _Search(
            pieces=pieces,
            inside=s.inside | enters,
            at=select(s.inside & open, after, select(enters, at_first(pieces), s.at)),
            curved=s.curved & (solved.fine | ~s.inside),
            exact=select(s.inside, s.exact, solved.exact),
            solved=solved,
            open=open,
            tries=s.tries + 1,
        )

    def at_first(pieces) -> Interior:
        now, then = (
            augmented.largest(jax.tree.map(jnp.abs, state.multiplier))
            for state in (here.rows, augmented.on_pieces(point.g, penalty, prices, *pieces))
        )
        return interior.start(sides, point.x, point.u, jnp.where(now > 0, now, then), penalty.rho)

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
    return Step(target, K, zero, zero)
