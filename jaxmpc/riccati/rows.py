"""Arithmetic on rows, and with their Jacobians G: what a plan makes of rows, and G in the
stationarity.

Where there are no rows nothing is traced: compiling takes time, be it of arrays of size zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.riccati.point import Rows, z_of


def per_row(fn: Callable, first, *rest, dtype=None):
    """``fn`` of every row, which gives one number each, of ``dtype`` (by default that of the first
    argument). Of all rows, or of one array of them."""

    def apply(first, *rest):
        if first.size:
            return fn(first, *rest)
        return first if dtype is None else jnp.zeros(first.shape, dtype)

    return jax.tree.map(apply, first, *rest)


@lanes.any_rank
def along_rows(G: Rows, x: Array, u: Array) -> Rows:
    """G z: what every row makes of x [T+1, n] and u [T, m]."""
    stage, final = jnp.zeros((len(u), 0, *x.shape[2:]), x.dtype), jnp.zeros_like(x[0, :0])
    if G.stage.size:
        stage = jax.vmap(lanes.matvec)(G.stage, z_of(x, u))
    if G.final.size:
        final = lanes.matvec(G.final, x[-1])
    return Rows(stage, final)


@lanes.any_rank
def add_pull(c: Array, c_final: Array, G: Rows, weights: Rows) -> tuple[Array, Array]:
    """c + Gᵀ w, at the stages and at the end."""
    if G.stage.size:
        c = c + jax.vmap(lanes.matvec_t)(G.stage, weights.stage)
    if G.final.size:
        c_final = c_final + lanes.matvec_t(G.final, weights.final)
    return c, c_final


@lanes.any_rank
def add_squares(C: Array, C_final: Array, G: Rows, weights: Rows) -> tuple[Array, Array]:
    """C + Gᵀ diag(w) G, at the stages and at the end."""

    def add(C, G, w):
        return C + lanes.matmul_t(w[:, None] * G, G)

    if G.stage.size:
        C = lanes.materialize(jax.vmap(add), C, G.stage, weights.stage)
    if G.final.size:
        C_final = add(C_final, G.final, weights.final)
    return C, C_final


def largest(rows: Rows, of_none: float = 0.0) -> Array:
    """The largest entry of all rows, of each problem; ``of_none`` where there are no rows."""
    found = jnp.full(rows.stage.shape[2:], of_none, rows.stage.dtype)
    if rows.stage.size:
        found = jnp.maximum(found, jnp.max(rows.stage, axis=(0, 1)))
    if rows.final.size:
        found = jnp.maximum(found, jnp.max(rows.final, axis=0))
    return found


def total(rows: Rows) -> Array:
    """The sum over all rows, of each problem."""
    found = jnp.zeros(rows.stage.shape[2:], rows.stage.dtype)
    if rows.stage.size:
        found = found + jnp.sum(rows.stage, axis=(0, 1))
    if rows.final.size:
        found = found + jnp.sum(rows.final, axis=0)
    return found
