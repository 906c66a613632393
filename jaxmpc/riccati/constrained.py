"""The LQR's KKT system with active rows, G z + g = 0, in O(T) a step.

    [ C   Fᵀ  Gᵀ ]
    [ F   0   0  ]  with G replaced by 0 in rows that are not active.
    [ G   0   0  ]

With −W⁻¹ on the diagonal of the last block, W a positive weight for each row, its rows can be
eliminated, and what is left is the LQR with C + Gᵀ W G: one Riccati factorization. Solving with
that for what a point leaves of the right-hand side gives a correction that leaves nothing but in
the rows, where it leaves (1 + W S)⁻¹ of what there was, S = G C⁻¹ Gᵀ among the plans of the LQR.
Where W is large that is nothing at all; where it is not, or rows are nearly dependent, the
corrections are combined as in the method of conjugate residuals, which leaves the least.

It ends when every single residual is rounding of the terms that cancel in it: of costates and
multipliers, too, and whatever the units. Where what is left is not of the rows but of the
rounding of the others, the correction is taken as it is, which makes of it iterative refinement.

Where active rows depend on each other the system is singular. Then z is what the rows leave, with
those that contradict each other met in the sense of least squares, weighted by W, and the
multipliers are the smallest of those that fit, measured by W⁻¹: two equal rows of equal weights
share theirs in halves.

Source: the method of multipliers as a proximal point algorithm: Rockafellar 1976; for this system:
Jallet et al. 2024 (arXiv:2405.09197); conjugate residuals: Stiefel 1955, Relaxationsmethoden
bester Strategie zur Lösung linearer Gleichungssysteme; the measure of a residual: Oettli and
Prager 1964; refinement by it: Skeel 1980, Iterative refinement implies numerical stability for
Gaussian elimination.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.point import Point, Rhs, Rows, no_rows, z_of
from jaxmpc.riccati.rows import add_pull, add_squares, along_rows, per_row, total
from jaxmpc.riccati.sequential import Factors

_MAX_CORRECTIONS = 100
_DONE = 8  # roundings of the terms of a residual
# From here on a correction that does not halve the residual is the last one.
_NEARLY_DONE = 256
# What the rows leave contradicts itself if a correction moves it by no more than these roundings.
_CONTRADICTS = 1024
# Directions closer to each other than the square root of this are one and its rounding.
_INDEPENDENT = 1e-4


class ActiveRows(NamedTuple):
    """The rows that hold with equality, and the weights that the factors have for their squares."""

    G: Rows
    active: Rows  # bool
    weights: Rows  # positive where active


class System(NamedTuple):
    """The matrices of the KKT system, with their factorization."""

    factors: Factors  # of (C, F, C_final, free), with GᵀWG of the active rows in C and C_final
    C: Array  # [T, n+m, n+m], symmetric, without them
    F: Array  # [T, n, n+m]
    C_final: Array  # [n, n]
    free: Array  # [T, m] bool; the other controls are pinned to 0
    rows: ActiveRows


def no_active_rows(F: Array) -> ActiveRows:
    """Those of an LQR without rows, with the dynamics F."""
    T, n, both = F.shape
    G = Rows(jnp.zeros((T, 0, both), F.dtype), jnp.zeros((0, n), F.dtype))
    return ActiveRows(G, no_rows(T, bool), no_rows(T, F.dtype))


def penalised(C: Array, C_final: Array, rows: ActiveRows) -> tuple[Array, Array]:
    """C + Gᵀ W G of the active rows, which the factors are of."""
    return add_squares(C, C_final, rows.G, _masked(rows.weights, rows.active))


def residual(system: System, point: Point, rhs: Rhs) -> Rhs:
    """What the point leaves of the right-hand side: ∇L of the LQR. At its solution that is 0, but
    for c on the pinned controls: there it is what holds them."""
    return _sums(system, point, rhs, minus=jnp.negative)


@lanes.any_rank
def sizes(system: System, point: Point, rhs: Rhs) -> Rhs:
    """The sizes of the terms that cancel in each residual."""
    C, F, C_final, G = jax.tree.map(jnp.abs, (system.C, system.F, system.C_final, system.rows.G))
    positive = system._replace(C=C, F=F, C_final=C_final, rows=system.rows._replace(G=G))
    point, rhs = jax.tree.map(jnp.abs, (point, rhs))
    found = _sums(positive, point, rhs, minus=lambda a: a)
    # A row that holds one state at 0 has no terms of its own: it counts by the state elsewhere.
    x, u = (jnp.broadcast_to(jnp.max(a, axis=0), a.shape) for a in (point.x, point.u))
    return found._replace(g=per_row(jnp.add, along_rows(G, x, u), rhs.g))


@lanes.any_rank
def _sums(system: System, point: Point, rhs: Rhs, *, minus: Callable) -> Rhs:
    _, C, F, C_final, _, rows = system
    x, u, costate, multiplier = point
    n, z = C_final.shape[0], z_of(x, u)
    matvec, matvec_t = jax.vmap(lanes.matvec), jax.vmap(lanes.matvec_t)
    c = matvec(C, z) + rhs.c + matvec_t(F, costate[1:])
    c_final = lanes.matvec(C_final, x[-1]) + rhs.c_final + minus(costate[-1])
    c, c_final = add_pull(c, c_final, rows.G, _masked(multiplier, rows.active))
    g = _masked(per_row(jnp.add, along_rows(rows.G, x, u), rhs.g), rows.active)
    return Rhs(
        x_init=rhs.x_init + minus(x[0]),
        c=c.at[:, :n].add(minus(costate[:-1])),
        f=matvec(F, z) + rhs.f + minus(x[1:]),
        c_final=c_final,
        g=g,
    )


def backward_error(system: System, point: Point, rhs: Rhs, rest: Rhs) -> tuple[Array, Array]:
    """The largest residual relative to its terms, of the LQR and of the rows: the relative change
    of the system's numbers that makes the point its solution."""
    n = system.C_final.shape[0]

    def relative(rest, size):
        share = jnp.abs(rest) / jnp.where(size > 0, size, 1)
        return jnp.max(share, axis=tuple(range(share.ndim - batch)), initial=0)

    batch = rhs.x_init.ndim - 1
    rest = rest._replace(c=rest.c.at[:, n:].set(jnp.where(system.free, rest.c[:, n:], 0)))
    *of_plan, of_rows = map(
        functools.partial(jax.tree.map, relative), rest, sizes(system, point, rhs)
    )
    return functools.reduce(jnp.maximum, of_plan), jnp.maximum(*of_rows)


def _masked(of_rows: Rows, active: Rows) -> Rows:
    return per_row(lambda a, active: jnp.where(active, a, 0), of_rows, active)


class _Search(NamedTuple):
    """The carry of the loop, with the point that it has come to."""

    point: Point
    direction: Point  # that the last correction went along, and what that makes of the rows
    moves: Rows
    error: Array
    contradicts: Array  # what the rows leave cannot be lessened
    going: Array
    corrections: Array


@lanes.any_rank
def solve(system: System, rhs: Rhs, substitute: Callable) -> Point:
    """The point where the LQR's Lagrangian is stationary; its rows may depend on each other."""
    factors, _, F, _, free, (G, active, weights) = system
    eps, batch = lanes.eps(F), F.shape[3:]

    def weighed(g: Rows) -> Rows:
        return _masked(per_row(jnp.multiply, weights, g), active)

    def product(a: Rows, b: Rows) -> Array:
        return total(per_row(jnp.multiply, weighed(a), b))

    def along(step, a, b):
        return jax.tree.map(lambda a, b: a + step * b, a, b)

    def correct(rest: Rhs) -> tuple[Point, Rows]:
        c, c_final = add_pull(rest.c, rest.c_final, G, weighed(rest.g))
        point, _ = substitute(factors, F, rest._replace(c=c, c_final=c_final))
        moves = _masked(along_rows(G, point.x, point.u), active)
        return point._replace(multiplier=weighed(per_row(jnp.add, moves, rest.g))), moves

    def improve(s: _Search) -> _Search:
        rest = residual(system, s.point, rhs)
        of_plan, of_rows = backward_error(system, s.point, rhs, rest)
        error = jnp.maximum(of_plan, of_rows)
        settled = (error <= _NEARLY_DONE * eps) & (error > 0.5 * s.error)
        going = s.going & (error > _DONE * eps) & ~settled

        correction, moved = correct(rest)
        # Conjugate to the last one: what the two do to the rows is orthogonal.
        share = -_ratio(product(moved, s.moves), product(s.moves, s.moves))
        moves = along(share, moved, s.moves)
        square = product(moved, moved)
        # The first correction, and what refines the plan, are taken as they are.
        plain = (s.corrections == 0) | (of_plan > of_rows)
        contradicts = ~plain & (square <= (_CONTRADICTS * eps) ** 2 * product(rest.g, rest.g))
        fresh = plain | contradicts | (product(moves, moves) <= _INDEPENDENT * square)
        share = jnp.where(fresh, 0, share)
        direction, moves = along(share, (correction, moved), (s.direction, s.moves))
        length = -_ratio(product(rest.g, moves), product(moves, moves))
        length = jnp.where(plain | contradicts, 1, length)
        point = lanes.select(going, along(length, s.point, direction), s.point)
        # Only directions that leave the plan's residuals alone may come again.
        direction, moves = lanes.select(
            plain, jax.tree.map(jnp.zeros_like, (direction, moves)), (direction, moves)
        )
        return _Search(
            point=point,
            direction=direction,
            moves=moves,
            error=error,
            contradicts=jnp.where(going, contradicts, s.contradicts),
            going=going & ~(contradicts & (of_plan <= _NEARLY_DONE * eps)),
            corrections=s.corrections + 1,
        )

    def unfinished(s: _Search) -> Array:
        return jnp.any(s.going) & (s.corrections < _MAX_CORRECTIONS)

    none = jnp.zeros(batch, F.dtype)
    rest = jax.tree.map(jnp.zeros_like, rhs)
    nowhere = Point(
        jnp.concatenate([rest.f, rest.c_final[None]]),
        jnp.zeros(free.shape, F.dtype),
        jnp.concatenate([rest.f, rest.c_final[None]]),
        rest.g,
    )
    ever = none == 0
    start = _Search(nowhere, nowhere, rest.g, none + jnp.inf, ~ever, ever, jnp.int32(0))
    end = lax.while_loop(unfinished, improve, start)

    # Of rows that contradict each other every correction has added a multiple of the last one.
    left = residual(system, end.point, rhs).g
    held = total(per_row(jnp.multiply, end.point.multiplier, left))
    excess = jnp.where(end.contradicts, _ratio(held, product(left, left)), 0)
    return along(-excess, end.point, end.direction)


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
