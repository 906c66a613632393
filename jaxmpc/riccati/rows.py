"""The rows' Jacobians G: what a plan makes of the rows, and the rows of the stationarity."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.riccati.point import Rows, z_of


@lanes.any_rank
def along_rows(G: Rows, x: Array, u: Array) -> Rows:
    """G z: what every row makes of x [T+1, n] and u [T, m]."""
    return Rows(jax.vmap(lanes.matvec)(G.stage, z_of(x, u)), lanes.matvec(G.final, x[-1]))


@lanes.any_rank
def add_pull(c: Array, c_final: Array, G: Rows, weights: Rows) -> tuple[Array, Array]:
    """c + Gᵀ w, at the stages and at the end."""
    if G.stage.shape[1]:
        c = c + jax.vmap(lanes.matvec_t)(G.stage, weights.stage)
    if G.final.shape[0]:
        c_final = c_final + lanes.matvec_t(G.final, weights.final)
    return c, c_final


@lanes.any_rank
def add_squares(C: Array, C_final: Array, G: Rows, weights: Rows) -> tuple[Array, Array]:
    """C + Gᵀ diag(w) G, at the stages and at the end."""

    def add(C, G, w):
        return C + lanes.matmul_t(w[:, None] * G, G)

    if G.stage.shape[1]:
        C = lanes.materialize(jax.vmap(add), C, G.stage, weights.stage)
    if G.final.shape[0]:
        C_final = add(C_final, G.final, weights.final)
    return C, C_final


def largest(rows: Rows, of_none: float = 0.0) -> Array:
    """The largest entry of all rows, of each problem; ``of_none`` where there are no rows."""
    stage = jnp.max(rows.stage, axis=(0, 1), initial=of_none)
    return jnp.maximum(stage, jnp.max(rows.final, axis=0, initial=of_none))


def total(rows: Rows) -> Array:
    """The sum over all rows, of each problem."""
    return jnp.sum(rows.stage, axis=(0, 1)) + jnp.sum(rows.final, axis=0)
