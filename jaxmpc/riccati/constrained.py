"""The LQR's KKT system with active rows, G z + g = 0, in O(T).

    [ C   Fᵀ  Gᵀ ]
    [ F   0   0  ]  with G replaced by 0 in rows that are not active.
    [ G   0   0  ]

With −1/ρ on the diagonal of the last block its rows can be eliminated, and what is left is the LQR
with C + ρ GᵀG: one Riccati factorization. Solving with that again and again for what is left of the
right-hand side converges to the solution of the system itself, by a factor of about
1 + ρ G C⁻¹ Gᵀ each time.

Where active rows depend on each other the system is singular. Then z is what the rows leave, with
those that contradict each other met in the sense of least squares, and the multipliers are the
smallest of those that fit: two equal rows share theirs in halves.

Source: the method of multipliers as a proximal point algorithm: Rockafellar 1976; for this system:
Jallet et al. 2024 (arXiv:2405.09197); the least squares: Chiche and Gilbert 2016, How the augmented
Lagrangian algorithm can deal with an infeasible convex quadratic optimization problem.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.point import Point, Rhs, Rows, no_rows, z_of
from jaxmpc.riccati.rows import add_pull, add_squares, along_rows, per_row
from jaxmpc.riccati.sequential import Factors

_MAX_CORRECTIONS = 50
_CONVERGES = 0.9  # corrections shrink at least so fast, until rounding


class ActiveRows(NamedTuple):
    """The rows that hold with equality, and the penalty that the factors have for them."""

    G: Rows
    active: Rows  # bool
    rho: Array


class System(NamedTuple):
    """The matrices of the KKT system, with their factorization."""

    factors: Factors  # of (C, F, C_final, free), with ρ GᵀG of the active rows in C and C_final
    C: Array  # [T, n+m, n+m], symmetric, without them
    F: Array  # [T, n, n+m]
    C_final: Array  # [n, n]
    free: Array  # [T, m] bool; the other controls are pinned to 0
    rows: ActiveRows


def no_active_rows(F: Array) -> ActiveRows:
    """Those of an LQR without rows, with the dynamics F."""
    T, n, both = F.shape
    G = Rows(jnp.zeros((T, 0, both), F.dtype), jnp.zeros((0, n), F.dtype))
    return ActiveRows(G, no_rows(T, bool), jnp.ones((), F.dtype))


def penalised(C: Array, C_final: Array, rows: ActiveRows) -> tuple[Array, Array]:
    """C + ρ GᵀG of the active rows, which the factors are of."""
    weights = per_row(
        lambda active: jnp.where(active, rows.rho, 0), rows.active, dtype=rows.rho.dtype
    )
    return add_squares(C, C_final, rows.G, weights)


@lanes.any_rank
def residual(system: System, point: Point, rhs: Rhs) -> Rhs:
    """What the point leaves of the right-hand side: ∇L of the LQR. At its solution that is 0, but
    for c on the pinned controls: there it is what holds them."""
    _, C, F, C_final, _, rows = system
    x, u, costate, multiplier = point
    n, z = C_final.shape[0], z_of(x, u)
    matvec, matvec_t = jax.vmap(lanes.matvec), jax.vmap(lanes.matvec_t)
    c = matvec(C, z) + rhs.c + matvec_t(F, costate[1:])
    c_final = lanes.matvec(C_final, x[-1]) + rhs.c_final - costate[-1]
    c, c_final = add_pull(c, c_final, rows.G, _masked(multiplier, rows.active))
    g = _masked(per_row(jnp.add, along_rows(rows.G, x, u), rhs.g), rows.active)
    return Rhs(
        x_init=rhs.x_init - x[0],
        c=c.at[:, :n].add(-costate[:-1]),
        f=matvec(F, z) + rhs.f - x[1:],
        c_final=c_final,
        g=g,
    )


def _masked(of_rows: Rows, active: Rows) -> Rows:
    return per_row(lambda a, active: jnp.where(active, a, 0), of_rows, active)


@lanes.any_rank
def solve(system: System, rhs: Rhs, substitute: Callable) -> Point:
    """The point where the LQR's Lagrangian is stationary; its rows may depend on each other."""
    factors, _, F, _, _, (G, active, rho) = system

    def weighed(g):
        return jax.tree.map(lambda g: rho * g, _masked(g, active))

    def correction(rest: Rhs) -> Point:
        c, c_final = add_pull(rest.c, rest.c_final, G, weighed(rest.g))
        point, _ = substitute(factors, F, rest._replace(c=c, c_final=c_final))
        g = jax.tree.map(jnp.add, along_rows(G, point.x, point.u), rest.g)
        return point._replace(multiplier=weighed(g))

    def length(point: Point):
        parts = (point.x, point.u)
        return jnp.max(jnp.stack([jnp.max(jnp.abs(a), axis=(0, 1)) for a in parts]), axis=0)

    def unfinished(carry):
        _, _, going, count = carry
        return jnp.any(going) & (count < _MAX_CORRECTIONS)

    def improve(carry):
        point, last, going, count = carry
        step = correction(residual(system, point, rhs))
        moved = length(step)
        good = going & (moved < _CONVERGES * last)
        new = lanes.select(good, jax.tree.map(jnp.add, point, step), point)
        going = good & (moved > lanes.eps(rho) * length(new))
        return new, jnp.where(good, moved, last), going, count + 1

    first = correction(rhs)
    start = first, length(first), jnp.ones(rho.shape, bool), jnp.int32(0)
    point, *_ = lax.while_loop(unfinished, improve, start)
    return point
