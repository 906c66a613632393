"""The Lagrangian of the problem at a solution, its gradient, and the matrices of its Hessian."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.problem.expansions import (
    constraint_values,
    expand,
    first_order,
    hessians,
    stage_costs,
    stages,
)
from jaxmpc.problem.prices import Prices, RowState, priced, row_terms
from jaxmpc.problem.problem import Data, Model
from jaxmpc.riccati.rows import Rows, total
from jaxmpc.riccati.sequential import Point, Rhs
from jaxmpc.solver.linearization import Linearization


def kkt_residual(model: Model, theta, prices: Any, x_init: Array, point: Point, state: Any) -> Rhs:
    """∇L, L the Lagrangian: 0 at a solution, where its derivatives shape those of the solution."""
    x, u, costate, multiplier = point
    n = x_init.shape[0]
    # Of every row, what ``row_terms`` takes beside its value.
    row = (multiplier, state.active, state.beyond, prices.linear, prices.quadratic) if state else ()
    stage, final = ([part[i] for part in row] for i in range(2))

    def hamiltonian(z, t, costate, stage):
        x, u = z[:n], z[n:]
        x_next = model.dynamics(x, u, t, theta)
        value, g = model.cost(x, u, t, theta) + costate @ x_next, None
        if model.constraint is not None:
            g = model.constraint(x, u, t, theta)
            value += jnp.sum(row_terms(g, *stage))
        return value, (x_next, g)

    def end(x):
        value, g = jnp.zeros((), x.dtype), None
        if model.terminal_cost is not None:
            value += model.terminal_cost(x, theta)
        if model.final_constraint is not None:
            g = model.final_constraint(x, theta)
            value += jnp.sum(row_terms(g, *final))
        return value, g

    z = jnp.concatenate([x[:-1], u], axis=1)
    of_stage = stage if model.constraint is not None else None
    c, (x_next, g) = jax.vmap(jax.grad(hamiltonian, has_aux=True))(
        z, stages(u), costate[1:], of_stage
    )
    c_final, g_final = jax.grad(end, has_aux=True)(x[-1])
    held = None
    if state is not None:
        values = Rows(g, g_final)
        held = jax.tree.map(lambda g, active: jnp.where(active, g, 0), values, state.active)
    return Rhs(
        x_init=x_init - x[0],
        c=c.at[:, :n].add(-costate[:-1]),
        f=x_next - x[1:],
        c_final=c_final - costate[-1],
        g=held,
    )


def lagrangian(model: Model, theta, prices: Any, x_init: Array, point: Point, state: Any) -> Array:
    """The objective plus costates times dynamics and multipliers times constraints, without the
    term of the bounds."""
    x, u, costate, multiplier = point
    x_next = jax.vmap(model.dynamics, (0, 0, 0, None))(x[:-1], u, stages(u), theta)
    value = (
        jnp.sum(stage_costs(model, theta, x, u))
        + jnp.vdot(costate[1:], x_next - x[1:])
        + costate[0] @ (x_init - x[0])
    )
    if state is None:
        return value
    g = constraint_values(model, theta, x, u)
    row = multiplier, state.active, state.beyond, prices.linear, prices.quadratic
    return value + total(jax.tree.map(row_terms, g, *row))


def row_multipliers(model: Model, theta, prices: Prices, point: Point, state: RowState) -> Rows:
    """ν of every row: an unknown of the KKT system where it is active, given by its price where it
    has slack."""
    g = constraint_values(model, theta, point.x, point.u)

    def value(multiplier, active, beyond, g, linear, quadratic):
        priced = jnp.where(beyond, jnp.where(beyond, linear, 0) + quadratic * g, 0)
        return jnp.where(active, multiplier, priced)

    row = point.multiplier, state.active, state.beyond, g, prices.linear, prices.quadratic
    return jax.tree.map(value, *row)


def bound_gap(data: Data, u: Array, free: Array, multiplier: Array) -> Array:
    """0, as a function of the bounds: how far each clamped control is from the bound that holds
    it, the one that the multiplier's sign names (half each at zero, for equal bounds)."""
    lower, upper = data.u_lower, data.u_upper
    middle = jnp.where(lower == upper, (lower + upper) * 0.5, u)
    bound = jnp.where(multiplier > 0, lower, jnp.where(multiplier < 0, upper, middle))
    return jnp.where(free, 0, bound - u)


def kkt_system(at: Linearization, prices: Any) -> list:
    """[C, F, C_final, G, ∇_u J] of the KKT system; rows with slack are part of the cost."""
    if at.rows is None:
        return [at.hessian, at.F, at.C_final, None, at.gradient]
    C, C_final = priced(at.hessian, at.C_final, at.G, at.rows, prices)
    return [C, at.F, C_final, at.G, at.gradient]


def attach_expansion(model: Model, state: Any, exact: bool):
    """The identity on the ``system`` at a point, as a function of it, of theta and the prices."""

    @jax.custom_vjp
    def attach(system, state, point, theta, prices):
        return system

    def bwd(saved, cotangent):
        state, *at = saved

        def system(point, theta, prices):
            return expanded_system(model, point, theta, prices, state, exact)

        _, vjp = jax.vjp(system, *at)
        return None, None, *vjp(cotangent)

    attach.defvjp(lambda system, *at: (attach(system, *at), at), bwd)
    return lambda system, *at: attach(system, state, *at)


def expanded_system(model, point: Point, theta, prices, state: Any, exact=True) -> list:
    """``system`` from the user's functions."""
    x, u, costate, multiplier = point
    expanded = expand(model, theta, x, u)
    first = first_order(expanded, multiplier)
    C, C_final = expanded.C, expanded.C_final
    if exact:
        C, C_final = hessians(model, theta, x, u, expanded, costate, multiplier)
    if state is not None:
        C, C_final = priced(C, C_final, expanded.G, state, prices)
    gradient = first.control_cost + first.control_pull
    return [C, expanded.F, C_final, expanded.G, gradient]
