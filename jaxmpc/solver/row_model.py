"""The model of a step with rows: quadratic in pieces, for rows become active on the way, and others
cease to be.

Which piece each row will be on is guessed first, and found by the interior-point method where no
guess holds.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import Expansion
from jaxmpc.problem.prices import Prices, RowState
from jaxmpc.riccati.point import Rows, z_of
from jaxmpc.riccati.rows import add_pull, add_squares, along_rows, largest
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver import augmented, interior
from jaxmpc.solver.assessment import Assessment
from jaxmpc.solver.backward import Box, Recursion
from jaxmpc.solver.interior import Interior
from jaxmpc.solver.iterate import Iterate

_MAX_GUESSES = 4  # of the pieces
_MAX_INTERIOR = 40  # steps of the interior-point method


class Solved(NamedTuple):
    """The minimum of a quadratic model."""

    recursion: Recursion
    exact: Factors  # those with the Hessian that was tried first
    fine: Array  # which was good enough


class _Terms(NamedTuple):
    """What rows make of the model: its gradient, and the weights of their squares."""

    c: Array  # [T, n+m]
    c_final: Array  # [n]
    weights: Rows
    bounds: Array  # [T, m], the weights of those of the controls


class _Guess(NamedTuple):
    """For the minimum of the model: by guesses of the pieces, or in the interior."""

    pieces: tuple[Rows, Rows]  # the guess
    inside: Array  # bool: the guesses came to no end
    at: Interior
    curved: Array  # with the exact Hessian; once it is not good enough, never again
    exact: Factors  # of the last guess
    ahead: RowState  # likewise, where it leads to
    solved: Solved
    open: Array
    tries: Array


class _Minimum(NamedTuple):
    """Of a model that is quadratic."""

    solved: Solved
    dx: Array  # [T+1, n]
    du: Array  # [T, m]
    steps: tuple[interior.Newton, ...]  # that led there, in the interior


class RowModel(NamedTuple):
    """The augmented Lagrangian's model of a step, which is quadratic in pieces: rows become active
    on the way, and others cease to be."""

    at: Iterate
    here: Assessment
    expanded: Expansion
    prices: Prices
    rho: Array
    regularization: Array
    certify: Array
    low: Array  # [T, m], of the change of the controls
    high: Array
    box: Box
    sides: tuple[interior.Sides, ...]
    solve: Callable[..., Solved]

    def search(self) -> tuple[Solved, RowState, Array]:
        """The step, the rows at its end, and whether the interior-point method found it.

        The pieces are guessed, at first as those of the point, and corrected by what they lead to,
        a semismooth Newton iteration, which near a solution ends with the first. If it comes to no
        end, the interior-point method takes over.
        """
        pieces, no = self.pieces_here(), jnp.zeros_like(self.certify)
        at, tries = self.enter(pieces), jnp.int32(0)
        shape = jax.eval_shape(lambda: self.minimum(pieces, no, at, ~no).solved)
        solved = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)
        begin = _Guess(pieces, no, at, ~no, solved.exact, self.here.state, solved, ~no, tries)
        end = lax.while_loop(
            lambda s: jnp.any(s.open) & (s.tries < _MAX_GUESSES + _MAX_INTERIOR),
            self.improve,
            begin,
        )
        held = jax.tree.map(lambda active: active & ~end.inside, end.ahead.active)
        ahead = end.ahead._replace(active=held)
        return end.solved._replace(exact=end.exact), ahead, end.inside

    def improve(self, s: _Guess) -> _Guess:
        """The next guess, or the next step in the interior."""
        found = self.minimum(s.pieces, s.inside, s.at, s.curved)
        moved = jax.tree.map(jnp.add, self.at.g, along_rows(self.expanded.G, found.dx, found.du))
        ahead = augmented.state(moved, self.at.penalty, self.prices)
        there = lanes.select(self.certify, self.pieces_here(), (ahead.active, ahead.beyond))
        differs = jax.tree.leaves(jax.tree.map(jnp.not_equal, there, s.pieces))
        ends = (lanes.every(~a, a.ndim - s.open.ndim) for a in differs)
        settled = functools.reduce(jnp.logical_and, ends)
        after, curved, inner = self.step_inside(s, found)
        ended = interior.ended(self.sides, after, inner.recursion.bend)
        open = s.open & jnp.where(s.inside, ~ended, ~settled)
        enters = open & ~s.inside & (s.tries + 1 >= _MAX_GUESSES)
        pieces = lanes.select(open & ~s.inside, there, s.pieces)
        return _Guess(
            pieces=pieces,
            inside=s.inside | enters,
            at=lanes.select(s.inside & open, after, lanes.select(enters, self.enter(pieces), s.at)),
            curved=curved,
            exact=lanes.select(s.inside, s.exact, found.solved.exact),
            ahead=lanes.select(s.inside, s.ahead, ahead),
            solved=lanes.select(s.inside, inner, found.solved),
            open=open,
            tries=s.tries + 1,
        )

    def minimum(self, pieces, inside, at: Interior, curved) -> _Minimum:
        """Of the model on these pieces, or of that of a Newton step in the interior."""
        G, F, box = self.expanded.G, self.expanded.F, self.box
        n = self.at.x.shape[1]
        moved = interior.along(G, at.dx, at.du)
        steps = tuple(
            interior.newton(one, variables, g, at.tau)
            for one, variables, g in zip(self.sides, at.variables, moved, strict=True)
        )
        terms = lanes.select(inside, self.terms_inside(moved, steps), self.terms_on(pieces))

        def squares(C, C_final):
            C, C_final = add_squares(C, C_final, G, terms.weights)
            return C.at[:, n:, n:].add(jax.vmap(lanes.diagonal_matrix)(terms.bounds)), C_final

        pinned = self.low == self.high
        around = Box(
            jnp.where(inside, jnp.where(pinned, 0, -jnp.inf), box.low),
            jnp.where(inside, jnp.where(pinned, 0, jnp.inf), box.high),
            jnp.where(inside, pinned, box.clamped),
        )
        solved = self.solve(terms.c, terms.c_final, around, squares, curved, inside)

        def advance(dx, now):
            F, d, K, low, high = now
            du = d + lanes.matvec(K, dx)
            du = jnp.where(inside, du, jnp.clip(du, low, high))
            return lanes.matvec(F[:, :n], dx) + lanes.matvec(F[:, n:], du), (dx, du)

        stages = F, solved.recursion.d, solved.recursion.factors.K, self.low, self.high
        dx_final, (dx, du) = lax.scan(advance, jnp.zeros_like(self.at.x[0]), stages)
        return _Minimum(solved, jnp.concatenate([dx, dx_final[None]]), du, steps)

    # On pieces.

    def pieces_here(self) -> tuple[Rows, Rows]:
        return self.here.state.active, self.here.state.beyond

    def on(self, pieces) -> RowState:
        return augmented.on_pieces(self.at.g, self.at.penalty, self.prices, *pieces)

    def terms_on(self, pieces) -> _Terms:
        state = self.on(pieces)
        weights = augmented.weights(state, self.rho, self.prices, self.certify)
        return _Terms(*self.gradient(state.multiplier), weights, jnp.zeros_like(self.at.u))

    def gradient(self, slopes: Rows) -> tuple[Array, Array]:
        return add_pull(self.expanded.c, self.expanded.c_final, self.expanded.G, slopes)

    # In the interior.

    def enter(self, pieces) -> Interior:
        now, then = (
            largest(jax.tree.map(jnp.abs, state.multiplier))
            for state in (self.here.state, self.on(pieces))
        )
        # Those of pieces that were guessed in vain may be far too large.
        scale = jnp.where(now > 0, now, then)
        x, u, rho = self.at.x, self.at.u, self.at.penalty.rho
        return interior.start(self.sides, x, u, scale, rho)

    def terms_inside(self, moved, steps) -> _Terms:
        m, n = self.at.u.shape[1], self.at.x.shape[1]
        # The slopes at dz = 0.
        *of_rows, bounds = (s.slope - s.weight * g for s, g in zip(steps, moved, strict=True))
        *weights, of_bounds = (s.weight for s in steps)
        c, c_final = self.gradient(Rows(*of_rows))
        c = c.at[:, n:].add(bounds[:, :m] - bounds[:, m:])
        # Relative to the cost alone, for the weights of the bounds grow without limit.
        size = jnp.abs(jax.vmap(lanes.diagonal)(self.expanded.C))
        size = jnp.where(size[:, n:] > 0, size[:, n:], jnp.max(size, axis=(0, 1)))
        weight = of_bounds[:, :m] + of_bounds[:, m:] + self.regularization * size
        return _Terms(c, c_final, Rows(*weights), weight)

    def step_inside(self, s: _Guess, found: _Minimum) -> tuple[Interior, Array, Solved]:
        """The next point, whether the exact Hessian is still to be used, and the step so far."""
        solved, first = found.solved, self.here.first
        after = interior.advance(self.sides, s.at, found.steps, self.expanded.G, found.dx, found.du)
        curved = s.curved & (solved.fine | ~s.inside)
        # With another Hessian the conditions are others.
        after = after._replace(missed=jnp.where(curved == s.curved, after.missed, 1))
        # The recursion's slope at the point is not that of the objective.
        slope = jnp.sum(first.c * z_of(after.dx, after.du), axis=(0, 1))
        slope += lanes.dot(first.c_final, after.dx[-1])
        recursion = solved.recursion
        inner = recursion._replace(
            d=after.du - jax.vmap(lanes.matvec)(recursion.factors.K, after.dx[:-1]),
            free=jnp.ones_like(recursion.free),
            slope=slope,
            bend=-slope / 2,
        )
        return after, curved, solved._replace(recursion=inner)
