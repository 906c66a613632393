"""The finish of the interior-point method: Newton's method on an active set, on rollouts.

The rows that are held and the controls that are clamped are guessed from the barrier, and corrected
by what they lead to. At a solution the active rows are 0 and the clamped controls at their bounds,
to rounding.

Source: Hintermüller, Ito and Kunisch 2002, The primal-dual active set strategy as a semismooth
Newton method.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmpc.solver.interior.barrier import Sides


class State(NamedTuple):
    """The piece of its price that every row is on, and the slope there."""

    nu: Array
    active: Array  # bool
    beyond: Array  # bool


def state_of(sides: Sides, nu: Array, g: Array, stiffness: Array) -> State:
    """By ν + c g, with c the ``stiffness``.

    At a plan of the active set one of the two is 0, for any c. On the way g is off by what the
    functions bend, so c is no larger than the units ask for: the weights that hold rows would make
    a large force of that, and drop the row.
    """
    ahead = nu + stiffness * g
    beyond = sides.soft & (ahead > sides.linear) & (g > 0)
    active = sides.equality | (sides.row & sides.inequality & (ahead > 0) & ~beyond)
    held = jnp.maximum(nu, 0)
    held = jnp.where(sides.soft, jnp.minimum(held, sides.linear), held)
    held = jnp.where(sides.equality, nu, held)
    paid = jnp.where(beyond, sides.linear + sides.quadratic * g, 0)
    return State(jnp.where(active, held, paid), active, beyond)


def gaps(sides: Sides, g: Array, state: State) -> Array:
    """How far every row is from feasible and complementary, in its own units."""
    over = jnp.where(sides.inequality & sides.row, jnp.maximum(g, 0), 0)
    return jnp.where(state.active, jnp.abs(g), jnp.where(state.beyond, 0, over))


def slopes_and_weights(sides: Sides, g: Array, state: State, weights: Array) -> tuple[Array, Array]:
    """Of the rows in the LQR of a step: active ones are held by their weight, those with slack
    have the curvature of its price."""
    slope = jnp.where(state.active, state.nu + weights * g, state.nu)
    quadratic = jnp.where(state.beyond, sides.quadratic, 0)
    return slope, jnp.where(state.active, weights, quadratic)


def violation(sides: Sides, g: Array) -> Array:
    """Of the hard rows."""
    over = jnp.where(sides.equality, jnp.abs(g), jnp.maximum(g, 0))
    return jnp.where(sides.hard, over, 0)
