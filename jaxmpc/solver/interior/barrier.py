"""Rows and bounds as the interior-point method sees them: each by itself, all in one flat array.

    hard inequality   g + w = 0,        w ≥ 0, ν ≥ 0,   w ν = τ
    soft inequality   g + w = σ,        the same, and   σ ≥ 0, ζ ≥ 0, σ ζ = τ, ν + ζ = p + q σ
    equality          g = (ν⁺ − ν) / W,  with a weight W that holds it
    bound             w is the distance of the control itself

τ → 0; p and q are the prices of the slack σ. With all but the step dz eliminated from Newton's
equations, a row adds a slope and a weight to the LQR: slope · G dz + ½ weight (G dz)².

Source: Wright 1997, Primal-Dual Interior-Point Methods; Wächter and Biegler 2006, Mathematical
Programming 106 (the nonlinear problem); Rao, Wright and Rawlings 1998 (the LQR of a step).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.problem.prices import Prices
from jaxmpc.riccati.point import Rows
from jaxmpc.riccati.rows import along_rows

# Multipliers stay within this factor of τ / w (as in the source).
_NEAR_CENTRE = 1e10


class Layout(NamedTuple):
    """How rows and bounds lie in the flat array: those of the stages, of the end, the bounds."""

    T: int
    p: int
    q: int
    m: int

    @property
    def num_rows(self) -> int:
        return self.T * self.p + self.q

    def pack(self, rows: Rows, bounds: Array) -> Array:
        """Rows and something for each bound [T, 2m], the upper ones first, as one array."""
        batch = bounds.shape[2:]
        stage = rows.stage.reshape(self.T * self.p, *batch)
        return jnp.concatenate([stage, rows.final, bounds.reshape(-1, *batch)])

    def rows_alone(self, rows: Rows) -> Array:
        """Rows as one array, with 0 for the bounds."""
        bounds = (self.T, 2 * self.m, *rows.final.shape[1:])
        return self.pack(rows, jnp.zeros(bounds, rows.final.dtype))

    def rows(self, flat: Array) -> Rows:
        stages = self.T * self.p
        batch = flat.shape[1:]
        stage = flat[:stages].reshape(self.T, self.p, *batch)
        return Rows(stage, flat[stages : self.num_rows])

    def bounds(self, flat: Array) -> tuple[Array, Array]:
        """Of the upper bounds and of the lower ones, [T, m] each."""
        both = flat[self.num_rows :].reshape(self.T, 2 * self.m, *flat.shape[1:])
        return both[:, : self.m], both[:, self.m :]

    def along(self, G: Rows, dx: Array, du: Array) -> Array:
        """The change of every row and bound with dz."""
        return self.pack(along_rows(G, dx, du), jnp.concatenate([du, -du], axis=1))


class Sides(NamedTuple):
    """What every row is."""

    inequality: Array  # bool; what costs nothing is neither this nor an equality
    equality: Array
    soft: Array
    linear: Array  # the price of slack; 0 where there is none
    quadratic: Array
    row: Array  # bool: no bound

    @property
    def hard(self) -> Array:
        """Rows whose violation counts."""
        return self.row & ((self.inequality & ~self.soft) | self.equality)


class Pairs(NamedTuple):
    """The variables of every row."""

    w: Array
    nu: Array
    sigma: Array
    zeta: Array


class Eliminated(NamedTuple):
    """What is left of the rows in the LQR of a step."""

    slope: Array
    weight: Array
    relax: Array
    miss: Array  # g + w − σ, or g of an equality
    a: Array
    miss_zeta: Array


def sides_of(layout: Layout, prices: Prices, low: Array, high: Array) -> Sides:
    """Those of a problem with the bounds low ≤ u ≤ high."""
    bounded = jnp.concatenate([jnp.isfinite(high), jnp.isfinite(low)], axis=1)
    bounded &= jnp.concatenate([low < high] * 2, axis=1)
    zero = jnp.zeros(bounded.shape, low.dtype)
    lower, linear, quadratic = (
        layout.pack(rows, bounds)
        for rows, bounds in zip(prices, (zero, zero + jnp.inf, zero), strict=True)
    )
    bounded = layout.pack(jax.tree.map(lambda a: jnp.ones(a.shape, bool), prices.lower), bounded)
    row = layout.pack(jax.tree.map(jnp.ones_like, prices.lower), zero) > 0
    soft, equality = jnp.isfinite(linear), lower < 0
    costly = ~soft | (linear > 0) | (quadratic > 0)
    return Sides(
        inequality=~equality & costly & bounded,
        equality=equality,
        soft=soft & costly,
        linear=jnp.where(soft, linear, 0),
        quadratic=quadratic,
        row=row,
    )


def relaxed(sides: Sides, weight: Array, restoring: Array) -> Sides:
    """In a restoration hard rows have slack with a quadratic price, and soft ones do not count."""
    hard = sides.inequality & ~sides.soft
    return sides._replace(
        inequality=jnp.where(restoring, hard, sides.inequality),
        soft=jnp.where(restoring, hard & sides.row, sides.soft),
        linear=jnp.where(restoring, 0, sides.linear),
        quadratic=jnp.where(restoring, weight, sides.quadratic),
    )


def start(sides: Sides, g: Array, reach: Array, tau: Array) -> Pairs:
    """At least ``reach`` away from the boundary, and on the central path but for g."""
    tiny = jnp.asarray(jnp.finfo(g.dtype).tiny, g.dtype) ** 0.5
    reach = jnp.maximum(reach, tiny)
    over = jnp.where(sides.soft, jnp.maximum(g, 0) + reach, 0)
    w = jnp.maximum(over - g, reach)
    price = sides.linear + sides.quadratic * over
    nu = tau / w
    nu = jnp.where(sides.soft, jnp.minimum(nu, 0.5 * price), nu)
    zeta = jnp.where(sides.soft, jnp.maximum(price - nu, tiny), 1)
    return Pairs(
        jnp.where(sides.inequality, w, 1),
        jnp.where(sides.inequality, jnp.maximum(nu, tiny), 0),
        jnp.where(sides.soft, jnp.maximum(over, tau / zeta), 1),
        zeta,
    )


def missed(sides: Sides, at: Pairs, g: Array) -> Array:
    """What is left of the equations of the rows: g + w − σ, or g of an equality."""
    inequality = g + at.w - jnp.where(sides.soft, at.sigma, 0)
    inequality = jnp.where(sides.row, inequality, 0)
    return jnp.where(sides.inequality, inequality, jnp.where(sides.equality, g, 0))


def eliminate(
    sides: Sides, at: Pairs, g: Array, tau: Array, centre: Array, weight: Array
) -> Eliminated:
    """Newton's equations; ``centre`` and ``weight`` are those of equalities."""
    w, nu, sigma, zeta = at
    miss = missed(sides, at, g)
    miss_zeta = sides.linear + sides.quadratic * sigma - nu - zeta
    stiff = zeta + sides.quadratic * sigma
    a = jnp.where(sides.soft, (tau - sigma * (zeta + miss_zeta)) / stiff, 0)
    relax = jnp.where(sides.soft, sigma / stiff, 0)
    stiffness = w + nu * relax
    slope = nu + (tau - nu * (w - miss + a)) / stiffness

    def either(inequality, equality):
        return jnp.where(sides.inequality, inequality, jnp.where(sides.equality, equality, 0))

    slope, weight = either(slope, centre + weight * g), either(nu / stiffness, weight)
    return Eliminated(slope, weight, relax, miss, a, miss_zeta)


def changes(sides: Sides, at: Pairs, step: Eliminated, move: Array) -> Pairs:
    """Those of the variables that go with a change of g."""
    dnu = step.slope + step.weight * move - at.nu
    dsigma = step.a + step.relax * dnu
    dw = dsigma - step.miss - move
    dzeta = step.miss_zeta + sides.quadratic * dsigma - dnu
    inequality, soft = sides.inequality, sides.soft
    return Pairs(
        jnp.where(inequality, dw, 0),
        jnp.where(inequality | sides.equality, dnu, 0),
        jnp.where(soft, dsigma, 0),
        jnp.where(soft, dzeta, 0),
    )


def shares(sides: Sides, at: Pairs, move: Pairs, boundary: Array) -> tuple[Array, Array]:
    """How much of the step the distances allow, and how much the multipliers."""

    def share(exists, v, dv):
        shrinks = exists & (dv < 0)
        return jnp.where(shrinks, -boundary * v / jnp.where(shrinks, dv, -1), 1)

    def least(*parts):
        return jnp.min(jnp.minimum(*parts), axis=0)

    inequality, soft = sides.inequality, sides.soft
    primal = least(share(inequality, at.w, move.w), share(soft, at.sigma, move.sigma))
    dual = least(share(inequality, at.nu, move.nu), share(soft, at.zeta, move.zeta))
    return primal, dual


def moved(sides: Sides, at: Pairs, move: Pairs, primal: Array, dual: Array, tau: Array) -> Pairs:
    """After the step; multipliers are kept near the central path."""
    w, sigma = at.w + primal * move.w, at.sigma + primal * move.sigma
    nu = at.nu + jnp.where(sides.equality, primal, dual) * move.nu
    zeta = at.zeta + dual * move.zeta

    def near(multiplier, distance):
        return jnp.clip(multiplier, tau / distance / _NEAR_CENTRE, tau / distance * _NEAR_CENTRE)

    return Pairs(
        w,
        jnp.where(sides.inequality, near(nu, w), nu),
        sigma,
        jnp.where(sides.soft, near(zeta, sigma), zeta),
    )


def value(sides: Sides, at: Pairs, tau: Array) -> Array:
    """−τ Σ log of the distances, with the price of the slack."""
    logs = jnp.where(sides.inequality, jnp.log(at.w), 0)
    logs += jnp.where(sides.soft, jnp.log(at.sigma), 0)
    price = (sides.linear + 0.5 * sides.quadratic * at.sigma) * at.sigma
    return jnp.sum(jnp.where(sides.soft, price, 0) - tau * logs, axis=0)


def slope(sides: Sides, at: Pairs, move: Pairs, tau: Array) -> Array:
    """The derivative of ``value`` along a change of the variables."""
    of_w = jnp.where(sides.inequality, -tau * move.w / at.w, 0)
    of_sigma = (sides.linear + sides.quadratic * at.sigma - tau / at.sigma) * move.sigma
    return jnp.sum(of_w + jnp.where(sides.soft, of_sigma, 0), axis=0)


def off_centre(sides: Sides, at: Pairs, tau: Array) -> Array:
    """The largest |w ν − τ|."""
    pairs = jnp.where(sides.inequality, jnp.abs(at.w * at.nu - tau), 0)
    slack = jnp.where(sides.soft, jnp.abs(at.sigma * at.zeta - tau), 0)
    return jnp.max(jnp.maximum(pairs, slack), axis=0)


def to_boundary(distance: Array, change: Array, multiplier: Array, its_change: Array) -> Array:
    """Whether it is the distance that goes to zero with τ, and not the multiplier (Tapia's
    indicator)."""
    return change / distance < its_change / jnp.where(multiplier > 0, multiplier, 1)
