"""Bounds and rows as springs: what a barrier τ makes of the walls around a plan.

Where a bound or a row holds the plan, the exact one does not answer, and its derivative is zero
however wrong it is. With a barrier it answers: for the distance s from a boundary and its
multiplier z, s z = τ stands for s z = 0. To first order a boundary is then a spring of stiffness
Σ = z / s in place of a wall,

    (H + Gᵀ Σ G) dz = −d(rest),

and the wall is the limit Σ → ∞. How far from its boundary each of them rests can be told from the
exact plan, without another solve: by itself, with the curvature h that it sees, it is where
½ h δ² + λ δ − τ log(s + δ) is least. That is exact where each is by itself, and continuous where a
control comes free.

τ means something only beside what a boundary withholds. One that is let go gains about λ²/h, for
its multiplier λ, or on the way to the other side, if that is nearer, λ · width. The largest of
these gains is the unit of ``Options.smoothing``, one for a problem.

Where LQRs with springs are not convex, they are made so, stage by stage.

Source: the derivative with a barrier: Fiacco 1976, Sensitivity analysis for nonlinear programming
using penalty methods; of a QP, at a relaxed point: Tracy and Manchester 2024 (arXiv:2406.11749).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.barrier import inequalities
from jaxmpc.problem.expansions import constraint_values
from jaxmpc.problem.prices import Prices, RowState, add_curvature
from jaxmpc.problem.problem import Data, Problem, Theta
from jaxmpc.riccati.constrained import ActiveRows, System, penalised
from jaxmpc.riccati.kkt import factorize_convex
from jaxmpc.riccati.point import Point, Rhs, Rows
from jaxmpc.riccati.rows import add_pull, add_squares, along_rows, largest, per_row
from jaxmpc.riccati.sequential import row_freedom
from jaxmpc.solver.linearization import Linearization

_ITERATIONS = 5  # of a scalar equation, towards the root from one side


class Held(NamedTuple):
    """How far bounds and rows are, and what they are held with; a linear prediction of it may have
    distances below 0."""

    force: Array  # [T, m], of the bounds: positive at the lower one
    below: Array  # [T, m], the distances of the bounds
    above: Array
    nu: Rows
    slack: Rows
    g: Rows


class Around(NamedTuple):
    """What springs are made of: a plan, and what is known of its boundaries."""

    data: Data
    found: Linearization
    prices: Prices
    free: Array  # [T, m], the controls that are not clamped
    state: RowState
    inequality: Rows  # bool, the rows that may have a spring
    exact: Held
    h: Array  # [T, m], the curvature that the bounds see,
    h_rows: Rows  # and the rows
    used: Array  # whether there is a plan


class Springs(NamedTuple):
    """What stands for the walls."""

    G: Rows
    low: Array  # [T, m], the distances from the bounds at which they rest
    high: Array
    lower: Array  # [T, m], Σ of the bounds; 0 where there is none, and where it is a wall
    upper: Array
    rows: Rows  # Σ, likewise
    # A row's force is Σ (g + offset); its slack is ``slack``, and ``relax`` more with each unit of
    # the multiplier.
    offset: Rows
    slack: Rows
    relax: Rows


def around(
    problem: Problem,
    data: Data,
    at: tuple[Point, Theta, Prices],
    found: Linearization,
    free: Array,
    state: RowState,
    used: Array,
) -> Around:
    """What there is to know of the boundaries of a plan; a constant to differentiation."""
    data, (point, theta, prices), found = lax.stop_gradient((data, at, found))
    x, u, _, nu = point
    dtype, G = u.dtype, found.G
    C = jnp.where(used, found.hessian, jnp.eye(found.hessian.shape[1], dtype=dtype))
    found = found._replace(hessian=C)
    # The curvature that every boundary sees, with the controls clamped and no rows.
    factors, _, h = factorize_convex(C, found.F, found.C_final, free, jnp.zeros_like(u))
    g = h_rows = constraint_values(problem, theta, x, u)
    if G.num:
        # A clamped control moves a row as far as its own curvature lets it.
        clamped = jnp.where(free, 0, 1 / jnp.where(free | (h == 0), 1, h))
        factors = factors._replace(Quu_inv=factors.Quu_inv + jax.vmap(jnp.diag)(clamped))
        freedom, _ = row_freedom(factors, found.F, G)
        tiny = float(jnp.finfo(dtype).tiny) ** 0.5
        h_rows = per_row(lambda a: 1 / jnp.maximum(a, tiny), freedom)
    equal = data.u_lower == data.u_upper
    exact = Held(
        force=jnp.where(free | equal, 0, found.gradient),
        below=u - data.u_lower,
        above=data.u_upper - u,
        nu=nu,
        slack=per_row(lambda g, beyond: jnp.where(beyond, g, 0), g, state.beyond),
        g=g,
    )
    there = inequalities(prices)
    return Around(data, found, prices, free, state, there, exact, h, h_rows, used)


def unit(a: Around, x: Array, u: Array) -> Array:
    """The most that a boundary of the plan withholds, in units of the objective."""

    def gain(force, h, width):
        way = jnp.minimum(force / jnp.where(h > 0, h, 1), width)
        return jnp.where(jnp.isfinite(way), force * way, 0)

    width = a.data.u_upper - a.data.u_lower
    most = jnp.max(gain(jnp.abs(a.exact.force), a.h, width), initial=0)
    if a.found.G.num:
        size = (jnp.broadcast_to(jnp.max(jnp.abs(z), axis=0), z.shape) for z in (x, u))
        sizes = along_rows(per_row(jnp.abs, a.found.G), *size)
        gains = per_row(gain, a.exact.nu, a.h_rows, sizes)
        held = per_row(jnp.logical_and, a.inequality, a.state.active)
        most = jnp.maximum(
            most, largest(per_row(lambda g, held: jnp.where(held, g, 0), gains, held))
        )
    return most


def springs_of(a: Around, held: Held, tau: Array, *, walls: bool) -> Springs:
    """Those of a barrier τ. With ``walls``, rows whose springs are as stiff as what holds rows is
    are walls, and better held by that; and so are all of them where τ is 0."""
    low, high = _between(held.force, a.h, held.below, held.above, tau)
    pinned = (a.data.u_lower == a.data.u_upper) | (~a.free & ~(jnp.minimum(low, high) > 0))

    def stiffness(distance):
        usable = ~pinned & (distance > 0) & jnp.isfinite(distance)
        return jnp.where(usable, tau / jnp.where(usable, distance, 1) ** 2, 0)

    def row(nu, slack, g, linear, quadratic, there, h):
        soft = jnp.isfinite(linear)
        linear = jnp.where(soft, linear, 0)
        w = _inside(nu, h, slack - g, tau)
        slack = _inside(linear + quadratic * slack - nu, h, slack, tau)
        usable = there & (tau > 0) & (w > 0)
        soft &= usable & (slack > 0)
        slack = jnp.where(soft, slack, 1)
        relax = jnp.where(soft, 1 / (tau / slack**2 + quadratic), 0)
        at_rest = jnp.where(soft, relax * (2 * tau / slack - linear), 0)
        yields = jnp.where(usable, w**2 / jnp.where(tau > 0, tau, 1) + relax, jnp.inf)
        if walls:
            usable &= yields * h > lanes.eps(g) ** 0.5
        usable &= yields > 0
        parts = 1 / jnp.where(usable, yields, 1), 2 * w - at_rest, slack, relax
        return tuple(jnp.where(usable, part, 0) for part in parts)

    rows = offset = slack = relax = held.nu
    if a.found.G.num:
        given = (held.nu, held.slack, held.g, a.prices.linear, a.prices.quadratic, a.inequality,
                 a.h_rows)  # fmt: skip
        each = (row(*(getattr(r, part) for r in given)) for part in Rows._fields)
        rows, offset, slack, relax = (Rows(*both) for both in zip(*each, strict=True))
    found = Springs(
        G=a.found.G, low=low, high=high, lower=stiffness(low), upper=stiffness(high),
        rows=rows, offset=offset, slack=slack, relax=relax,
    )  # fmt: skip
    return lanes.select(a.used, found, jax.tree.map(jnp.zeros_like, found))


def _inside(force: Array, h: Array, distance: Array, tau: Array) -> Array:
    """The distance p from its boundary where ½ h (p − distance)² + force p − τ log p is least."""
    c = force - h * distance
    root = jnp.sqrt(c**2 + 4 * h * tau)
    pushed = 2 * tau / jnp.where(c + root > 0, c + root, 1)
    return jnp.where(c >= 0, pushed, (root - c) / jnp.where(h > 0, 2 * h, 1))


def _between(force: Array, h: Array, below: Array, above: Array, tau: Array) -> tuple[Array, Array]:
    """The same between two boundaries, for a force downwards: the distances from both.

    That from the nearer one is solved for, with the tangent of what the other does.
    """
    width = below + above
    finite = jnp.isfinite(width)
    half = 0.5 * jnp.where(finite, width, 0)
    is_above = jnp.where(finite, force + h * (half - below) < 0, ~jnp.isfinite(below))
    near = jnp.where(is_above, above, below)
    near = jnp.where(jnp.isfinite(near), near, 0)
    force = jnp.where(is_above, -force, force)
    p = half
    for _ in range(_ITERATIONS):
        rest = width - p
        usable = finite & (rest > 0)
        push = jnp.where(usable, tau / jnp.where(usable, rest, 1), 0)
        slope = jnp.where(usable, push / jnp.where(usable, rest, 1), 0)
        p = _inside(force - h * near + push - slope * p, h + slope, jnp.zeros_like(p), tau)
    p = jnp.where(jnp.isfinite(below) | jnp.isfinite(above), p, jnp.inf)
    rest = jnp.where(finite, width - p, jnp.inf)
    return jnp.where(is_above, rest, p), jnp.where(is_above, p, rest)


# The first-order conditions with springs.


def system_with(a: Around, springs: Springs) -> tuple[System, RowState]:
    """The linear system, and the pieces of its rows: one with a spring has a multiplier, and counts
    as active. Its free controls are those that nothing pins."""
    n = a.found.C_final.shape[0]

    def without(these, spring):
        return these & ~(spring > 0)

    walls = per_row(without, a.state.active, springs.rows)
    state = a.state._replace(
        active=per_row(lambda wall, spring: wall | (spring > 0), walls, springs.rows),
        beyond=per_row(without, a.state.beyond, springs.rows),
    )
    free = a.free | (springs.lower + springs.upper > 0)
    C, C_final = add_curvature(a.found.hessian, a.found.C_final, a.found.G, state, a.prices)
    C, C_final = add_squares(C, C_final, a.found.G, springs.rows)
    rows = ActiveRows(a.found.G, walls, a.found.weights)
    stiff, stiff_final = penalised(C, C_final, rows)
    factors, shift, _ = factorize_convex(
        stiff, a.found.F, stiff_final, free, springs.lower + springs.upper
    )
    C = C.at[:, n:, n:].add(jax.vmap(jnp.diag)(shift))
    return System(factors, C, a.found.F, C_final, free, rows), state


def with_springs(gradient: Rhs, springs: Springs, data: Data, prices: Prices) -> Rhs:
    """∇L as a function of what moves the boundaries, which pull at their springs; its value is
    another one."""
    n = data.x_init.shape[0]

    def pull(spring, bound):
        return spring * jnp.where(jnp.isfinite(bound), bound, 0)

    pulls = pull(springs.upper, data.u_upper) + pull(springs.lower, data.u_lower)
    g = per_row(
        lambda g, relax, slack, linear, quadratic: (
            g + relax * (jnp.where(relax > 0, linear, 0) + slack * quadratic)
        ),
        gradient.g, springs.relax, springs.slack, prices.linear, prices.quadratic,
    )  # fmt: skip
    return gradient._replace(c=gradient.c.at[:, n:].add(-pulls), g=g)


def eliminated(springs: Springs, rhs: Rhs) -> Rhs:
    """Without the multipliers of the springs: dν = Σ (G dz + g)."""
    c, c_final = add_pull(rhs.c, rhs.c_final, springs.G, per_row(jnp.multiply, springs.rows, rhs.g))
    return rhs._replace(c=c, c_final=c_final)


def completed(springs: Springs, point: Point, rhs: Rhs) -> Point:
    """The solution of the system without them, with them."""
    moves = along_rows(springs.G, point.x, point.u)
    multiplier = per_row(
        lambda nu, spring, move, g: jnp.where(spring > 0, spring * (move + g), nu),
        point.multiplier, springs.rows, moves, rhs.g,
    )  # fmt: skip
    return point._replace(multiplier=multiplier)
