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

from jaxmpc.batch import lanes
from jaxmpc.batch.select import select
from jaxmpc.problem.expansions import Expansion
from jaxmpc.problem.prices import Prices, RowState
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.riccati.rows import Rows, add_pull, add_squares, along_rows, largest
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver import augmented, interior
from jaxmpc.solver.assessment import Assessment
from jaxmpc.solver.backward import backward_pass
from jaxmpc.solver.interior import Interior
from jaxmpc.solver.iterate import Iterate
from jaxmpc.solver.line_search import Step
from jaxmpc.types import Options

_ALMOST = 1e-2  # of the size of a control, or the width of its bounds: so near is next to one
_MAX_GUESSES = 4  # of the pieces
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
) -> tuple[Step, Factors, RowState | None]:
    """The step with the exact Hessian where every stage stays convex, else with ∇²cost; and the
    rows as the model has them at its end.

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
        ahead, inside = None, jnp.zeros_like(certify)
    else:
        low, high = lower - u, upper - u
        sides = interior.sides(point.g, point.penalty, data.prices, low, high)
        solved, ahead, inside = _RowModel(
            point, here, expanded, data.prices, rho, regularization, certify,
            low, high, box, sides, solve,
        ).search()  # fmt: skip
    d, free, used, slope, bend, factors, _ = solved
    bound = jnp.where(d <= lower - u, lower, upper)
    target = jnp.where(free, jnp.clip(u + d, lower, upper), bound)
    # From the interior, d is within the bounds together with K dx only.
    target = jnp.where(inside, u + d, target)
    step = Step(target, _reach(data, u, here, target), used.K, slope, bend)
    return step, factors, ahead


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
    ahead: RowState  # likewise, where it leads to
    solved: _Solved
    open: Array
    tries: Array


class _Minimum(NamedTuple):
    """Of a model that is quadratic."""

    solved: _Solved
    dx: Array  # [T+1, n]
    du: Array  # [T, m]
    steps: tuple[interior.Newton, ...]  # that led there, in the interior


class _RowModel(NamedTuple):
    """The augmented Lagrangian's model of a step, which is quadratic in pieces: rows become active
    on the way, and others cease to be."""

    point: Iterate
    here: Assessment
    expanded: Expansion
    prices: Prices
    rho: Array
    regularization: Array
    certify: Array
    low: Array  # [T, m], of the change of the controls
    high: Array
    box: _Box
    sides: tuple[interior.Sides, ...]
    solve: Callable[..., _Solved]

    def search(self) -> tuple[_Solved, RowState, Array]:
        """The step, the rows at its end, and whether the interior-point method found it.

        The pieces are guessed, at first as those of the point, and corrected by what they lead to,
        a semismooth Newton iteration, which near a solution ends with the first. If it comes to no
        end, the interior-point method takes over.
        """
        pieces, no = self.pieces_here(), jnp.zeros_like(self.certify)
        at, tries = self.enter(pieces), jnp.int32(0)
        shape = jax.eval_shape(lambda: self.minimum(pieces, no, at, ~no).solved)
        solved = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)
        begin = _Search(pieces, no, at, ~no, solved.exact, self.here.rows, solved, ~no, tries)
        end = lax.while_loop(
            lambda s: jnp.any(s.open) & (s.tries < _MAX_GUESSES + _MAX_INTERIOR),
            self.improve,
            begin,
        )
        held = jax.tree.map(lambda active: active & ~end.inside, end.ahead.active)
        ahead = end.ahead._replace(active=held)
        return end.solved._replace(exact=end.exact), ahead, end.inside

    def improve(self, s: _Search) -> _Search:
        """The next guess, or the next step in the interior."""
        found = self.minimum(s.pieces, s.inside, s.at, s.curved)
        moved = jax.tree.map(jnp.add, self.point.g, along_rows(self.expanded.G, found.dx, found.du))
        ahead = augmented.state(moved, self.point.penalty, self.prices)
        there = select(self.certify, self.pieces_here(), (ahead.active, ahead.beyond))
        differs = jax.tree.leaves(jax.tree.map(jnp.not_equal, there, s.pieces))
        ends = (lanes.every(~a, a.ndim - s.open.ndim) for a in differs)
        settled = functools.reduce(jnp.logical_and, ends)
        after, curved, inner = self.step_inside(s, found)
        ended = interior.ended(self.sides, after, inner.bend)
        open = s.open & jnp.where(s.inside, ~ended, ~settled)
        enters = open & ~s.inside & (s.tries + 1 >= _MAX_GUESSES)
        pieces = select(open & ~s.inside, there, s.pieces)
        return _Search(
            pieces=pieces,
            inside=s.inside | enters,
            at=select(s.inside & open, after, select(enters, self.enter(pieces), s.at)),
            curved=curved,
            exact=select(s.inside, s.exact, found.solved.exact),
            ahead=select(s.inside, s.ahead, ahead),
            solved=select(s.inside, inner, found.solved),
            open=open,
            tries=s.tries + 1,
        )

    def minimum(self, pieces, inside, at: Interior, curved) -> _Minimum:
        """Of the model on these pieces, or of that of a Newton step in the interior."""
        G, F, box = self.expanded.G, self.expanded.F, self.box
        n = self.point.x.shape[1]
        moved = interior.along(G, at.dx, at.du)
        steps = tuple(
            interior.newton(one, variables, g, at.tau)
            for one, variables, g in zip(self.sides, at.variables, moved, strict=True)
        )
        terms = select(inside, self.terms_inside(moved, steps), self.terms_on(pieces))

        def squares(C, C_final):
            C, C_final = add_squares(C, C_final, G, terms.weights)
            return C.at[:, n:, n:].add(jax.vmap(lanes.diagonal_matrix)(terms.bounds)), C_final

        pinned = self.low == self.high
        around = _Box(
            jnp.where(inside, jnp.where(pinned, 0, -jnp.inf), box.low),
            jnp.where(inside, jnp.where(pinned, 0, jnp.inf), box.high),
            jnp.where(inside, pinned, box.held),
        )
        solved = self.solve(terms.c, terms.c_final, around, squares, curved, inside)

        def advance(dx, now):
            F, d, K, low, high = now
            du = d + lanes.matvec(K, dx)
            du = jnp.where(inside, du, jnp.clip(du, low, high))
            return lanes.matvec(F[:, :n], dx) + lanes.matvec(F[:, n:], du), (dx, du)

        stages = F, solved.d, solved.used.K, self.low, self.high
        dx_final, (dx, du) = lax.scan(advance, jnp.zeros_like(self.point.x[0]), stages)
        return _Minimum(solved, jnp.concatenate([dx, dx_final[None]]), du, steps)

    # On pieces.

    def pieces_here(self) -> tuple[Rows, Rows]:
        return self.here.rows.active, self.here.rows.beyond

    def on(self, pieces) -> RowState:
        return augmented.on_pieces(self.point.g, self.point.penalty, self.prices, *pieces)

    def terms_on(self, pieces) -> _Terms:
        state = self.on(pieces)
        weights = augmented.weights(state, self.rho, self.prices, self.certify)
        return _Terms(*self.gradient(state.multiplier), weights, jnp.zeros_like(self.point.u))

    def gradient(self, slopes: Rows) -> tuple[Array, Array]:
        return add_pull(self.expanded.c, self.expanded.c_final, self.expanded.G, slopes)

    # In the interior.

    def enter(self, pieces) -> Interior:
        now, then = (
            largest(jax.tree.map(jnp.abs, state.multiplier))
            for state in (self.here.rows, self.on(pieces))
        )
        # Those of pieces that were guessed in vain may be far too large.
        scale = jnp.where(now > 0, now, then)
        x, u, rho = self.point.x, self.point.u, self.point.penalty.rho
        return interior.start(self.sides, x, u, scale, rho)

    def terms_inside(self, moved, steps) -> _Terms:
        m, n = self.point.u.shape[1], self.point.x.shape[1]
        # The slopes at dz = 0.
        *slopes, bounds = (s.slope - s.weight * g for s, g in zip(steps, moved, strict=True))
        *weights, of_bounds = (s.weight for s in steps)
        c, c_final = self.gradient(self.as_rows(slopes))
        c = c.at[:, n:].add(bounds[:, :m] - bounds[:, m:])
        # Relative to the cost alone, for the weights of the bounds grow without limit.
        size = jnp.abs(jax.vmap(lanes.diagonal)(self.expanded.C))
        size = jnp.where(size[:, n:] > 0, size[:, n:], jnp.max(size, axis=(0, 1)))
        weight = of_bounds[:, :m] + of_bounds[:, m:] + self.regularization * size
        return _Terms(c, c_final, self.as_rows(weights), weight)

    def as_rows(self, parts) -> Rows:
        parts = iter(parts)
        return Rows(*(None if g is None else next(parts) for g in self.expanded.G))

    def step_inside(self, s: _Search, found: _Minimum) -> tuple[Interior, Array, _Solved]:
        """The next point, whether the exact Hessian is still to be used, and the step so far."""
        solved, first = found.solved, self.here.first
        after = interior.advance(self.sides, s.at, found.steps, self.expanded.G, found.dx, found.du)
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
        return after, curved, inner
