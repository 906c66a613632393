"""The first-order conditions around a point, and what is reported of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.problem.expansions import Expansion
from jaxmpc.problem.prices import RowState, largest_violation, slack_price
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.rows import Rows
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver.assessment import Assessment
from jaxmpc.solver.iterate import Iterate
from jaxmpc.types import Options


class Linearization(NamedTuple):
    """The first-order conditions around a point: what their derivative needs."""

    factors: Factors  # of the exact KKT matrix with the clamped controls pinned
    hessian: Array  # [T, n+m, n+m], the one that ``Options.backward_hessian`` names
    F: Array  # [T, n, n+m]
    C_final: Array  # [n, n], likewise
    gradient: Array  # [T, m], ∇_u J
    # Of the constraints, if there are any. The factors have ρ GᵀG of the active rows in them.
    G: Any = None  # Rows
    rows: Any = None  # RowState
    rho: Any = None


class Evaluation(NamedTuple):
    """What is reported of a point apart from its rollout."""

    costate: Array  # [T+1, n]
    free: Array  # [T, m]
    kkt_residual: Array
    linearization: Linearization
    # Of the constraints, if there are any.
    price: Array | None = None  # of the slack
    violation: Array | None = None


def evaluation(
    data: Data,
    point: Iterate,
    here: Assessment,
    expanded: Expansion,
    H: Array,
    H_final: Array,
    rho: Any,
    factors: Factors,
    options: Options,
) -> Evaluation:
    exact = options.backward_hessian == "exact"
    constrained = point.g is not None
    return Evaluation(
        costate=here.first.costate,
        free=~here.held,
        kkt_residual=here.kkt_residual,
        linearization=Linearization(
            factors=factors,
            hessian=H if exact else expanded.C,
            F=expanded.F,
            C_final=H_final if exact else expanded.C_final,
            gradient=here.gradient,
            G=expanded.G,
            rows=here.rows,
            rho=rho,
        ),
        price=slack_price(point.g, data.prices) if constrained else None,
        violation=largest_violation(point.g, data.prices) if constrained else None,
    )


def no_evaluation(point: Iterate) -> Evaluation:
    """Room for that of the first trip."""
    T, m, *batch = point.u.shape
    n = point.x.shape[1]

    def zeros(*shape):
        return jnp.zeros((*shape, *batch), point.x.dtype)

    G = rows = rho = price = None
    if point.g is not None:
        stage, final = point.g
        G = Rows(
            None if stage is None else zeros(*stage.shape[:2], n + m),
            None if final is None else zeros(final.shape[0], n),
        )
        no = jax.tree.map(lambda g: jnp.zeros(g.shape, bool), point.g)
        rows, rho = RowState(jax.tree.map(jnp.zeros_like, point.g), no, no), zeros()
        price = zeros()
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
            G=G,
            rows=rows,
            rho=rho,
        ),
        price=price,
        violation=price,
    )
