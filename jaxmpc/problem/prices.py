"""What a row of the constraints costs: nothing or everything where it is hard, a price of its slack
where it is soft."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.riccati.rows import Rows, add_squares, largest, total


class Prices(NamedTuple):
    """What it costs to violate a row (``augmented``)."""

    lower: Rows  # of the multiplier: 0 for inequalities, −∞ for equalities
    linear: Rows  # ∞ for hard rows
    quadratic: Rows


class RowState(NamedTuple):
    """Which piece of ψ a row is on, and the slope of that piece."""

    multiplier: Rows  # ν
    active: Rows  # bool: held at g = 0
    beyond: Rows  # bool: soft, with slack


def slack_price(g: Rows, prices: Prices) -> Array:
    """What the slack of soft rows costs."""

    def paid(g, linear, quadratic):
        soft, slack = jnp.isfinite(linear), jnp.maximum(g, 0)
        return jnp.where(soft, (jnp.where(soft, linear, 0) + 0.5 * quadratic * slack) * slack, 0)

    return total(jax.tree.map(paid, g, prices.linear, prices.quadratic))


def largest_violation(g: Rows, prices: Prices) -> Array:
    """The largest violation of a hard row."""

    def broken(g, lower, linear):
        over = jnp.where(lower < 0, jnp.abs(g), jnp.maximum(g, 0))
        return jnp.where(jnp.isfinite(linear), 0, over)

    return largest(jax.tree.map(broken, g, prices.lower, prices.linear))


def margins(g: Rows, rows: RowState, prices: Prices) -> tuple[Array, Array]:
    """How far the rows are from another piece: the multipliers of the active inequalities from
    their ends, and the values of the other rows from 0."""

    def of_multiplier(nu, active, lower, linear):
        inside = jnp.minimum(jnp.where(lower < 0, jnp.inf, nu), linear - nu)
        return -jnp.where(active, inside, jnp.inf)

    def of_value(g, active):
        return -jnp.where(active, jnp.inf, jnp.abs(g))

    multiplier = jax.tree.map(
        of_multiplier, rows.multiplier, rows.active, prices.lower, prices.linear
    )
    return -largest(multiplier), -largest(jax.tree.map(of_value, g, rows.active))


def row_terms(g, multiplier, active, beyond, linear, quadratic):
    """What a row adds to the Lagrangian: νᵀg where it holds, its price where it has slack."""
    linear = jnp.where(beyond, linear, 0)  # ∞ for hard rows, and 0 · ∞ has no derivative
    paid = jnp.where(beyond, (linear + 0.5 * quadratic * g) * g, 0)
    return jnp.where(active, multiplier * g, paid)


def priced(C, C_final, G: Rows, state: RowState, prices: Prices):
    """C and C_final with the curvature of the prices of the rows with slack."""
    weights = jax.tree.map(
        lambda beyond, quadratic: jnp.where(beyond, quadratic, 0), state.beyond, prices.quadratic
    )
    return add_squares(C, C_final, G, weights)
