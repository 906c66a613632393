"""Something for every row of the constraints, and the products with their Jacobians G."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes


class Rows(NamedTuple):
    """Something for every row of the constraints; None where there are no rows."""

    stage: Any  # [T, p, ...]
    final: Any  # [q, ...]


def along_rows(G: Rows, dx: Array, du: Array) -> Rows:
    """G dz: the change of every row with dx [T+1, n] and du [T, m]."""
    stage = final = None
    if G.stage is not None:
        stage = jax.vmap(lanes.matvec)(G.stage, jnp.concatenate([dx[:-1], du], axis=1))
    if G.final is not None:
        final = lanes.matvec(G.final, dx[-1])
    return Rows(stage, final)


@lanes.any_rank
def add_pull(c: Array, c_final: Array, G: Rows, weights: Rows) -> tuple[Array, Array]:
    """c + Gᵀ w, at the stages and at the end."""
    if G.stage is not None:
        c = c + jax.vmap(lanes.matvec_t)(G.stage, weights.stage)
    if G.final is not None:
        c_final = c_final + lanes.matvec_t(G.final, weights.final)
    return c, c_final


@lanes.any_rank
def add_squares(C: Array, C_final: Array, G: Rows, weights: Rows) -> tuple[Array, Array]:
    """C + Gᵀ diag(w) G, at the stages and at the end."""

    def add(C, G, w):
        return C + lanes.matmul_t(w[:, None] * G, G)

    if G.stage is not None:
        C = lanes.materialize(jax.vmap(add), C, G.stage, weights.stage)
    if G.final is not None:
        C_final = add(C_final, G.final, weights.final)
    return C, C_final


def largest(rows: Rows) -> Array:
    """The largest entry of all rows, of each problem."""
    return _reduce(jnp.maximum, jnp.max, rows)


def total(rows: Rows) -> Array:
    """The sum over all rows, of each problem."""
    return _reduce(jnp.add, jnp.sum, rows)


def _reduce(combine, reduce, rows: Rows) -> Array:
    parts = [] if rows.stage is None else [reduce(rows.stage, axis=(0, 1))]
    parts += [] if rows.final is None else [reduce(rows.final, axis=0)]
    return functools.reduce(combine, parts)
