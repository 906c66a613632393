"""The LQR's KKT system with active constraints, G z + g = 0, in O(T).

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

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.rows import Rows, add_pull, add_squares
from jaxmpc.riccati.sequential import Factors, Point, Rhs

_MAX_CORRECTIONS = 50
_CONVERGES = 0.9  # corrections shrink at least so fast, until rounding


class ActiveRows(NamedTuple):
    """The constraints that hold with equality, and the penalty that the factors have for them."""

    G: Rows
    active: Rows  # bool
    rho: Array


def penalised(C: Array, C_final: Array, rows: ActiveRows) -> tuple[Array, Array]:
    """C + ρ GᵀG of the active rows, which the factors are of."""
    weights = jax.tree.map(lambda active: jnp.where(active, rows.rho, 0), rows.active)
    return add_squares(C, C_final, rows.G, weights)


@lanes.any_rank
def solve(
    factors: Factors,
    C: Array,
    F: Array,
    C_final: Array,
    free: Array,
    rows: ActiveRows,
    rhs: Rhs,
    substitute,
) -> Point:
    """The point where the LQR's Lagrangian is stationary; C without the penalty."""
    n = rhs.x_init.shape[0]
    stage, final = rows.G
    G = Rows(
        None if stage is None else jnp.where(rows.active.stage[:, :, None], stage, 0),
        None if final is None else jnp.where(rows.active.final[:, None], final, 0),
    )
    matvec, matvec_t = jax.vmap(lanes.matvec), jax.vmap(lanes.matvec_t)

    def apply_rows(x, u):
        z = jnp.concatenate([x[:-1], u], axis=1)
        stage = None if G.stage is None else matvec(G.stage, z)
        return Rows(stage, None if G.final is None else lanes.matvec(G.final, x[-1]))

    def masked(g):
        return jax.tree.map(lambda g, active: jnp.where(active, g, 0), g, rows.active)

    def left(point: Point) -> Rhs:
        """What the point leaves of the right-hand side."""
        x, u, costate, multiplier = point
        z = jnp.concatenate([x[:-1], u], axis=1)
        c = matvec(C, z) + rhs.c + matvec_t(F, costate[1:])
        c = c.at[:, :n].add(-costate[:-1])
        c_final = lanes.matvec(C_final, x[-1]) + rhs.c_final - costate[-1]
        c, c_final = add_pull(c, c_final, G, multiplier)
        g = masked(jax.tree.map(jnp.add, apply_rows(x, u), rhs.g))
        return Rhs(rhs.x_init - x[0], c, matvec(F, z) + rhs.f - x[1:], c_final, g)

    def correction(rest: Rhs) -> Point:
        scaled = jax.tree.map(lambda g: rows.rho * g, masked(rest.g))
        c, c_final = add_pull(rest.c, rest.c_final, G, scaled)
        point, _ = substitute(factors, F, Rhs(rest.x_init, c, rest.f, c_final))
        moved = jax.tree.map(jnp.add, apply_rows(point.x, point.u), masked(rest.g))
        return point._replace(multiplier=jax.tree.map(lambda g: rows.rho * g, moved))

    def length(point: Point):
        parts = (point.x, point.u)
        return jnp.max(jnp.stack([jnp.max(jnp.abs(a), axis=(0, 1)) for a in parts]), axis=0)

    def unfinished(carry):
        _, _, going, count = carry
        return jnp.any(going) & (count < _MAX_CORRECTIONS)

    def improve(carry):
        point, last, going, count = carry
        step = correction(left(point))
        size = length(step)
        good = going & (size < _CONVERGES * last)
        new = jax.tree.map(lambda a, b: jnp.where(good, a + b, a), point, step)
        eps = float(jnp.finfo(C.dtype).eps)
        return new, jnp.where(good, size, last), good & (size > eps * length(new)), count + 1

    first = correction(rhs._replace(g=masked(rhs.g)))
    yes = jnp.ones(rows.rho.shape, bool)
    start = first, length(first), yes, jnp.int32(0)
    point, *_ = lax.while_loop(unfinished, improve, start)
    return point
