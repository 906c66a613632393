"""An interior-point method for the convex model of a step: a quadratic program with rows.

    minimise over dx, du   ½ dzᵀ C dz + cᵀ dz + Σ ψ(g + G dz),   low ≤ du ≤ high

along the linearized dynamics, z = (x, u), with ψ the augmented Lagrangian of a row (``augmented``).
In place of ψ stands what it is the minimum of: a row g ≤ r + σ with the multiplier ν and the
distance w from it, where r = (ν − μ) / ρ is how far the row gives way, and σ ≥ 0 with the
multiplier ζ the slack of a soft row. A bound of a control is a row that does not give. Each of the
pairs (w, ν) and (σ, ζ) is positive and has the product τ, which is lowered to nothing. What is left
of a Newton step for that, with all but dz eliminated, is an LQR in which every row has a slope and
a weight.

Source: Rao, Wright and Rawlings 1998, Application of interior-point methods to model predictive
control (the LQR of every step); Wright 1997, Primal-Dual Interior-Point Methods (the rest).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.prices import Prices
from jaxmpc.riccati.point import Rows
from jaxmpc.riccati.rows import along_rows
from jaxmpc.solver.augmented import Penalty

_BOUNDARY = 0.99  # the share of the way to where a variable becomes 0 that a step may take
_REDUCTION = 0.1  # of τ, by a full step
_CENTRAL = 0.1  # the first τ, relative to a multiplier times the distance that it makes a row give
_DIGITS = 0.9  # τ ends at this power of eps, relative to where it started
# Or with what the rows still cost at this share of the decrease, and the linear equations met.
_ACCURATE, _MET = 1e-3, 1e-2


class Sides(NamedTuple):
    """One kind of rows: those of the stages, those at the end, or the bounds of the controls."""

    g: Array  # at dz = 0
    mu: Array
    give: Array  # 1/ρ, by how much a row gives way to a unit of ν; 0 for bounds
    linear: Array  # the price of slack; 0 where there is none
    quadratic: Array
    inequality: Array  # bool; an infinite bound, or slack that is free, is neither of the two
    equality: Array
    soft: Array


class Variables(NamedTuple):
    """Those of one kind of rows."""

    w: Array
    nu: Array
    sigma: Array
    zeta: Array


class Interior(NamedTuple):
    """A point of the interior."""

    dx: Array  # [T+1, n]
    du: Array  # [T, m]
    variables: tuple[Variables, ...]  # of every kind of rows
    tau: Array
    last: Array  # the τ to end at
    missed: Array  # the share of the linear equations that is still missed


class Newton(NamedTuple):
    """A Newton step, up to the LQR."""

    slope: Array  # of a row, at the point
    weight: Array
    changes: Callable[[Array], Variables]  # those that go with a change of g


def sides(g: Rows, penalty: Penalty, prices: Prices, low: Array, high: Array) -> tuple[Sides, ...]:
    """Those of a problem, the rows of the stages, of the end, and the bounds low ≤ du ≤ high."""

    def of_rows(g, mu, lower, linear, quadratic):
        soft, equality = jnp.isfinite(linear), lower < 0
        give = jnp.zeros_like(g) + 1 / penalty.rho
        costly = ~soft | (linear > 0) | (quadratic > 0)
        return Sides(
            g, mu, give, jnp.where(soft, linear, 0), quadratic,
            ~equality & costly, equality, soft & costly,
        )  # fmt: skip

    kinds = zip(*map(jax.tree.leaves, (g, penalty.mu, *prices)), strict=True)
    bounds = jnp.concatenate([-high, low], axis=1)
    bounded = jnp.isfinite(bounds) & jnp.concatenate([low < high] * 2, axis=1)
    zero, no = jnp.zeros_like(bounds), jnp.zeros(bounds.shape, bool)
    of_controls = Sides(jnp.where(bounded, bounds, 0), zero, zero, zero, zero, bounded, no, no)
    return *(of_rows(*kind) for kind in kinds), of_controls


def along(G: Rows, dx: Array, du: Array) -> tuple[Array, ...]:
    """The change of every kind of rows with dz."""
    return *jax.tree.leaves(along_rows(G, dx, du)), jnp.concatenate([du, -du], axis=1)


def start(sides: tuple[Sides, ...], x: Array, u: Array, scale: Array, rho: Array) -> Interior:
    """At dz = 0, of the shapes of x and u, with multipliers of the order of ``scale``; on the
    central path, but for bounds and slack."""
    tiny = float(jnp.finfo(x.dtype).tiny) ** 0.5
    tau = jnp.maximum(_CENTRAL * scale**2 / rho, tiny)

    def variables(one: Sides):
        g, give = one.g, one.give
        # w² + b w = give τ.
        b = one.mu * give + g
        root = (jnp.sqrt(b**2 + 4 * give * tau) + jnp.abs(b)) / 2
        central = jnp.where(b > 0, give * tau / jnp.where(root > 0, root, 1), root)
        w = jnp.where(give > 0, central, jnp.maximum(-g, jnp.sqrt(tau)))
        w = jnp.maximum(w, tiny)
        sigma = jnp.broadcast_to(jnp.sqrt(tau), g.shape)
        return Variables(w, tau / w, sigma, tau / sigma)

    last = tau * lanes.eps(x) ** _DIGITS
    each = tuple(variables(one) for one in sides)
    return Interior(jnp.zeros_like(x), jnp.zeros_like(u), each, tau, last, jnp.ones_like(tau))


def newton(one: Sides, at: Variables, moved: Array, tau: Array) -> Newton:
    """For one kind of rows, which ``moved`` from g to the point."""
    w, nu, sigma, zeta = at
    # By how much the linear equations are missed, and dσ = a + relax dν from those of the slack.
    miss_w = (nu - one.mu) * one.give + jnp.where(one.soft, sigma, 0) - one.g - moved - w
    miss_zeta = one.linear + one.quadratic * sigma - nu - zeta
    stiff = zeta + one.quadratic * sigma
    a = jnp.where(one.soft, (tau - sigma * (zeta + miss_zeta)) / stiff, 0)
    relax = jnp.where(one.soft, sigma / stiff, 0)
    # Without w / ν, which overflows where a bound is far away.
    stiffness = w + nu * (one.give + relax)
    weight = nu / stiffness
    slope = nu + (tau - nu * (w + miss_w + a)) / stiffness
    rho = 1 / jnp.where(one.give > 0, one.give, 1)
    held = one.mu + rho * (one.g + moved)

    def changes(move):
        dnu = slope + weight * move - nu
        dsigma = a + relax * dnu
        dw = miss_w + one.give * dnu + dsigma - move
        dzeta = miss_zeta + one.quadratic * dsigma - dnu
        hard, soft = one.inequality, one.soft
        return Variables(
            jnp.where(hard, dw, 0),
            jnp.where(hard, dnu, 0),
            jnp.where(soft, dsigma, 0),
            jnp.where(soft, dzeta, 0),
        )

    def either(inequality, equality):
        return jnp.where(one.inequality, inequality, jnp.where(one.equality, equality, 0))

    return Newton(either(slope, held), either(weight, rho), changes)


def advance(
    sides: tuple[Sides, ...],
    at: Interior,
    steps: tuple[Newton, ...],
    G: Rows,
    dx: Array,
    du: Array,
) -> Interior:
    """The point after the Newton step to (dx, du), which is shortened to stay inside."""
    moves = along(G, dx - at.dx, du - at.du)
    changes = tuple(step.changes(move) for step, move in zip(steps, moves, strict=True))

    def share(v, dv):
        limit = jnp.where(dv < 0, -_BOUNDARY * v / dv, 1)
        return jnp.min(limit, axis=tuple(range(v.ndim - at.tau.ndim)), initial=1)

    shares = jax.tree.leaves(jax.tree.map(share, at.variables, changes))
    alpha = functools.reduce(jnp.minimum, shares, jnp.ones_like(at.tau))
    to = at._replace(
        dx=at.dx + alpha * (dx - at.dx),
        du=at.du + alpha * (du - at.du),
        variables=jax.tree.map(lambda v, dv: v + alpha * dv, at.variables, changes),
        missed=at.missed * (1 - alpha),
    )
    pairs = lanes.sum_of(
        _total(kind.astype(at.tau.dtype), at.tau.ndim)
        for one in sides
        for kind in (one.inequality, one.soft)
    )
    mean = complementarity(sides, to) / jnp.maximum(pairs, 1)
    return to._replace(tau=mean * jnp.minimum(1, 1 + _REDUCTION - alpha))


def complementarity(sides: tuple[Sides, ...], at: Interior) -> Array:
    """Σ w ν + σ ζ: what the point costs more than the minimum, if it meets the linear equations."""

    def products(one, v):
        return jnp.where(one.inequality, v.w * v.nu, 0) + jnp.where(one.soft, v.sigma * v.zeta, 0)

    each = zip(sides, at.variables, strict=True)
    return lanes.sum_of(_total(products(*pair), at.tau.ndim) for pair in each)


def ended(sides: tuple[Sides, ...], at: Interior, decrease: Array) -> Array:
    """Whether the point is as near to the minimum as is worth while, or as rounding allows."""
    near = (complementarity(sides, at) <= _ACCURATE * decrease) & (at.missed <= _MET)
    return ~(at.tau > at.last) | near


def _total(a: Array, batch_axes: int) -> Array:
    return jnp.sum(a, axis=tuple(range(a.ndim - batch_axes)))
