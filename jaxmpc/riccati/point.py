"""The unknowns of the KKT system, and what it is solved for.

For one problem, or for a batch on the last axis of every array (``lanes``).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Rows(NamedTuple):
    """Something for every row: a row is one scalar constraint, of a stage or of the end.

    Rows are always there. Of a problem without constraints their arrays have size zero, and the
    compiler drops them.
    """

    stage: Array  # [T, p, ...]
    final: Array  # [q, ...]

    @property
    def num(self) -> int:
        """How many there are at a stage and at the end together."""
        return self.stage.shape[1] + self.final.shape[0]


def no_rows(T: int, dtype, batch: tuple[int, ...] = ()) -> Rows:
    """Those of a problem without constraints, or of a batch of them."""
    return Rows(jnp.zeros((T, 0, *batch), dtype), jnp.zeros((0, *batch), dtype))


class Rhs(NamedTuple):
    """What the KKT system is solved for: the terms of the LQR that C, F and G do not hold."""

    x_init: Array  # [n]
    c: Array  # [T, n+m]
    f: Array  # [T, n]
    c_final: Array  # [n]
    g: Rows


class Point(NamedTuple):
    """A plan with its states, costates and multipliers: the unknowns of the KKT system."""

    x: Array  # [T+1, n]
    u: Array  # [T, m]
    costate: Array  # [T+1, n]
    multiplier: Rows


def z_of(x: Array, u: Array) -> Array:
    """z_t = (x_t, u_t) of every stage, [T, n+m], for x [T+1, n] and u [T, m]."""
    return jnp.concatenate([x[:-1], u], axis=1)
