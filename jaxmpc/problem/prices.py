"""What a row g of the constraints costs: its price, with slope, curvature and margin.

    hard inequality   0 where g ≤ 0, ∞ beyond
    equality          0 where g = 0, ∞ beyond
    soft inequality   0 where g ≤ 0, linear g + ½ quadratic g² beyond, with slack

At a solution a row is inactive, or active: held at g = 0 by its multiplier, or beyond, with slack.
A row whose price is zero everywhere is absent.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmpc.riccati.point import Rows
from jaxmpc.riccati.rows import add_squares, largest, per_row, total


class Prices(NamedTuple):
    """The price of every row."""

    lower: Rows  # of the multiplier: 0 for inequalities, −∞ for equalities
    linear: Rows  # ∞ for hard rows
    quadratic: Rows


class RowState(NamedTuple):
    """Which piece of its price every row is on, and the slope there."""

    multiplier: Rows  # ν
    active: Rows  # bool
    beyond: Rows  # bool


def present(prices: Prices) -> Rows:
    """Which rows are not absent, bool."""
    return per_row(
        lambda lower, linear, quadratic: (lower < 0) | (linear > 0) | (quadratic > 0),
        *prices, dtype=bool,
    )  # fmt: skip


def _paid(g, beyond, linear, quadratic):
    # ∞ for hard rows, and 0 · ∞ has no derivative.
    linear = jnp.where(beyond, linear, 0)
    return jnp.where(beyond, (linear + 0.5 * quadratic * g) * g, 0)


def slack_price(g: Rows, prices: Prices) -> Array:
    """What the slack of soft rows costs."""

    def paid(g, linear, quadratic):
        return _paid(g, (g > 0) & jnp.isfinite(linear), linear, quadratic)

    return total(per_row(paid, g, prices.linear, prices.quadratic))


def row_terms(g, state: RowState, prices: Prices):
    """What the rows add to the Lagrangian: ν g where they are active, their price beyond. Of all
    rows, or of one array of them."""

    def term(g, multiplier, active, beyond, lower, linear, quadratic):
        return jnp.where(active, multiplier * g, _paid(g, beyond, linear, quadratic))

    return per_row(term, g, *state, *prices)


def slopes(g: Rows, state: RowState, prices: Prices) -> Rows:
    """The derivative of ``row_terms`` in g, which is the multiplier: an unknown of the KKT system
    where the row is active, given by its price where it has slack."""

    def slope(multiplier, active, beyond, g, lower, linear, quadratic):
        paid = jnp.where(beyond, jnp.where(beyond, linear, 0) + quadratic * g, 0)
        return jnp.where(active, multiplier, paid)

    return per_row(slope, *state, g, *prices)


def add_curvature(
    C: Array, C_final: Array, G: Rows, state: RowState, prices: Prices
) -> tuple[Array, Array]:
    """C and C_final with the curvature of ``row_terms``: that of the price where there is slack."""
    weights = per_row(
        lambda quadratic, beyond: jnp.where(beyond, quadratic, 0), prices.quadratic, state.beyond
    )
    return add_squares(C, C_final, G, weights)


def largest_violation(g: Rows, prices: Prices) -> Array:
    """The largest violation of a hard row."""

    def broken(g, lower, linear):
        over = jnp.where(lower < 0, jnp.abs(g), jnp.maximum(g, 0))
        return jnp.where(jnp.isfinite(linear), 0, over)

    return largest(per_row(broken, g, prices.lower, prices.linear))


def margins(g: Rows, state: RowState, prices: Prices) -> tuple[Array, Array]:
    """How far the rows are from another piece: the multipliers of the active inequalities from
    their ends, and the values of the other rows from 0."""

    def of_multiplier(nu, active, lower, linear):
        inside = jnp.minimum(jnp.where(lower < 0, jnp.inf, nu), linear - nu)
        return -jnp.where(active, inside, jnp.inf)

    def of_value(g, active, there):
        return -jnp.where(active | ~there, jnp.inf, jnp.abs(g))

    multipliers = per_row(
        of_multiplier, state.multiplier, state.active, prices.lower, prices.linear
    )
    values = per_row(of_value, g, state.active, present(prices))
    return -largest(multipliers, -jnp.inf), -largest(values, -jnp.inf)
