"""The first-order conditions around an iterate, and what is reported of it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.problem.expansions import Expansion
from jaxmpc.problem.prices import RowState
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.point import Rows
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver.assessment import Assessment
from jaxmpc.types import Options


class Linearization(NamedTuple):
    """The first-order conditions around a point: what their derivative needs."""

    factors: Factors  # of the exact KKT matrix, with GᵀWG of the active rows in it
    hessian: Array  # [T, n+m, n+m], the one that ``Options.backward_hessian`` names
    F: Array  # [T, n, n+m]
    C_final: Array  # [n, n], likewise
    gradient: Array  # [T, m], ∇_u of the Lagrangian
    G: Rows
    state: RowState
    weights: Rows  # W, positive where a row is active


class Evaluation(NamedTuple):
    """What is reported of an iterate apart from its rollout."""

    costate: Array  # [T+1, n]
    free: Array  # [T, m]
    kkt_residual: Array
    linearization: Linearization
    price: Array  # of the slack
    violation: Array  # of the constraints


def evaluation(
    data: Data,
    here: Assessment,
    expanded: Expansion,
    H: Array,
    H_final: Array,
    factors: Factors,
    options: Options,
) -> Evaluation:
    """That of an iterate of a problem without rows."""
    exact = options.backward_hessian == "exact"
    none = jnp.zeros_like(here.kkt_residual)
    return Evaluation(
        costate=here.first.costate,
        free=~here.clamped,
        kkt_residual=here.kkt_residual,
        linearization=Linearization(
            factors=factors,
            hessian=H if exact else expanded.C,
            F=expanded.F,
            C_final=H_final if exact else expanded.C_final,
            gradient=here.gradient,
            G=expanded.G,
            state=_inactive(data.multipliers),
            weights=data.multipliers,
        ),
        price=none,
        violation=none,
    )


def no_evaluation(x: Array, u: Array, g: Rows) -> Evaluation:
    """Room for that of the first trip."""
    T, m, *batch = u.shape
    n = x.shape[1]
    p, q = g.stage.shape[1], g.final.shape[0]

    def zeros(*shape):
        return jnp.zeros((*shape, *batch), x.dtype)

    return Evaluation(
        costate=zeros(T + 1, n),
        free=zeros(T, m) > 0,
        kkt_residual=zeros(),
        linearization=Linearization(
            factors=Factors(zeros(T, m, n), zeros(T, m, m), zeros(T + 1, n, n), zeros(T)),
            hessian=zeros(T, n + m, n + m),
            F=zeros(T, n, n + m),
            C_final=zeros(n, n),
            gradient=zeros(T, m),
            G=Rows(zeros(T, p, n + m), zeros(q, n)),
            state=_inactive(g),
            weights=jax.tree.map(jnp.zeros_like, g),
        ),
        price=zeros(),
        violation=zeros(),
    )


def _inactive(rows: Rows) -> RowState:
    no = jax.tree.map(lambda a: jnp.zeros(a.shape, bool), rows)
    return RowState(jax.tree.map(jnp.zeros_like, rows), no, no)
