"""Where the search for the plan of a barrier τ starts: near the exact plan, but inside.

To first and second order around the exact plan, that of τ is found by Newton's method on springs:
each step is an LQR, and where it leads, new springs are made. Of the way there as much is taken as
leaves all rows inside of their boundaries.
"""

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.problem.expansions import constraint_values, rollout
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.riccati.kkt import SEQUENTIAL, kkt_solve
from jaxmpc.riccati.point import Point, Rhs
from jaxmpc.riccati.rows import add_pull, along_rows, largest, per_row
from jaxmpc.solver.linearization import Linearization
from jaxmpc.solver.springs import Around, Held, Springs, around, springs_of, system_with
from jaxmpc.types import Solution

_STEPS = 20  # at most,
_MOVES = 0.1  # until none of them changes a distance by more than this share
_MARGIN = 0.1  # the least distance from a bound, relative to that of its spring
_HALVES = 20  # times that the way is halved


def start_inside(
    problem: Problem, data: Data, solution: Solution, found: Linearization, tau: Array
) -> Array:
    """Controls [T, m] whose rollout is inside, if one is found."""
    point = Point(solution.x, solution.u, solution.costate, solution.multipliers)
    known = jnp.all(jnp.isfinite(found.hessian)) & jnp.all(jnp.isfinite(found.F))
    at = point, data.theta, data.prices
    a = around(problem, data, at, found, solution.free, found.state, known)
    way, springs = towards(a, tau)
    u = solution.u

    def after(share: Array) -> Array:
        def margin(distance):
            return jnp.where(jnp.isfinite(distance), _MARGIN * share * distance, 0)

        low, high = data.u_lower + margin(springs.low), data.u_upper - margin(springs.high)
        return jnp.where(data.u_lower == data.u_upper, u, jnp.clip(u + share * way.u, low, high))

    whole = jnp.ones((), u.dtype)
    if not problem.constrained:
        return after(whole)

    def outside(carry):
        share, tries = carry
        u = after(share)
        x = rollout(problem, data.theta, data.x_init, u)
        hard = per_row(
            lambda g, there, linear: jnp.where(there & (linear == jnp.inf), g, -1),
            constraint_values(problem, data.theta, x, u), a.inequality, data.prices.linear,
        )  # fmt: skip
        return (tries < _HALVES) & ~(largest(hard, -1.0) < 0)

    def halve(carry):
        share, tries = carry
        return 0.5 * share, tries + 1

    share, _ = lax.while_loop(outside, halve, (whole, jnp.int32(0)))
    return after(share)


def towards(a: Around, tau: Array) -> tuple[Point, Springs]:
    """The way from the exact plan to that of τ, to first order, and the springs that it ends at."""

    def step(carry):
        _, springs, _, steps = carry
        way = _with(a, springs, tau)
        new = springs_of(a, _held(a, springs, way, tau), tau, walls=False)
        moves = [
            _most_moved(before, after)
            for before, after in ((springs.low, new.low), (springs.high, new.high))
        ]
        moves.append(largest(per_row(_share, springs.rows, new.rows)))
        return way, new, jnp.max(jnp.stack(moves)), steps + 1

    def unfinished(carry):
        _, _, moved, steps = carry
        return (steps < _STEPS) & (moved > _MOVES)

    first = springs_of(a, a.exact, tau, walls=False)
    (T, n), m = a.found.F.shape[:2], a.h.shape[1]
    x, u = jnp.zeros((T + 1, n), a.h.dtype), jnp.zeros((T, m), a.h.dtype)
    nowhere = Point(x, u, x, per_row(jnp.zeros_like, a.exact.nu))
    start = nowhere, first, jnp.full((), jnp.inf, a.h.dtype), jnp.int32(0)
    way, springs, *_ = lax.while_loop(unfinished, step, start)
    return way, springs


def _share(before: Array, after: Array) -> Array:
    some = before > 0
    return jnp.where(some, jnp.abs(after - before) / jnp.where(some, before, 1), 0)


def _most_moved(before: Array, after: Array) -> Array:
    finite = jnp.isfinite(before) & jnp.isfinite(after)
    return jnp.max(jnp.where(finite, _share(before, after), 0), initial=0)


def _force(spring: Array, distance: Array, rest: Array, tau: Array) -> Array:
    """What the spring of a bound pushes with, at a distance from it."""
    exists = spring > 0
    return jnp.where(exists, 2 * tau / jnp.where(exists, rest, 1) - spring * distance, 0)


def _with(a: Around, springs: Springs, tau: Array) -> Point:
    """The way to where the springs hold the plan."""
    T, both = a.found.hessian.shape[:2]
    n, dtype = a.found.C_final.shape[0], a.h.dtype
    system, _ = system_with(a, springs)
    of_u = jnp.where(a.free, 0, a.found.gradient)
    of_u += _force(springs.upper, a.exact.above, springs.high, tau)
    of_u -= _force(springs.lower, a.exact.below, springs.low, tau)
    c = jnp.zeros((T, both), dtype).at[:, n:].set(jnp.where(system.free, of_u, 0))
    pull = per_row(
        lambda spring, offset, g, nu: jnp.where(spring > 0, spring * (g + offset) - nu, 0),
        springs.rows, springs.offset, a.exact.g, a.exact.nu,
    )  # fmt: skip
    c, c_final = add_pull(c, jnp.zeros(n, dtype), springs.G, pull)
    nothing = per_row(jnp.zeros_like, a.exact.g)
    rest = jnp.zeros(n, dtype)
    return kkt_solve(SEQUENTIAL, system, Rhs(rest, c, jnp.zeros((T, n), dtype), c_final, nothing))


def _held(a: Around, springs: Springs, way: Point, tau: Array) -> Held:
    """What the springs predict at the end of the way."""
    below, above = a.exact.below + way.u, a.exact.above - way.u
    low = _force(springs.lower, below, springs.low, tau)
    high = _force(springs.upper, above, springs.high, tau)
    g = per_row(jnp.add, a.exact.g, along_rows(springs.G, way.x, way.u))
    nu = per_row(
        lambda nu, spring, offset, g: jnp.where(spring > 0, spring * (g + offset), nu),
        a.exact.nu, springs.rows, springs.offset, g,
    )  # fmt: skip

    def slack_of(slack, relax, linear, nu):
        soft = relax > 0
        rest = 2 * tau / jnp.where(soft, slack, 1) - jnp.where(soft, linear, 0)
        return relax * (nu + rest)

    slack = per_row(
        slack_of, springs.slack, springs.relax, a.prices.linear, nu,
    )  # fmt: skip
    return Held(low - high, below, above, nu, slack, g)
