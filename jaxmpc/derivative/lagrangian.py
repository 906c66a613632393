"""The Lagrangian of the problem: its value and gradient at a point, and the matrices around it.

    L = Σ cost + terminal_cost + λ_0ᵀ(x_init − x_0) + Σ λ_{t+1}ᵀ(dynamics_t − x_{t+1}) + rows

with ν g for an active row, its price for one with slack, and nothing for the bounds.
"""

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import (
    constraint_values,
    expand,
    first_order,
    hessians,
    stage_costs,
)
from jaxmpc.problem.prices import Prices, RowState, add_curvature, row_terms
from jaxmpc.problem.problem import Problem, Theta
from jaxmpc.problem.stages import stages
from jaxmpc.riccati.point import Point, Rhs, Rows, z_of
from jaxmpc.riccati.rows import total


def value(
    problem: Problem, theta: Theta, prices: Prices, x_init: Array, point: Point, state: RowState
) -> Array:
    x, u, costate, multiplier = point
    x_next = jax.vmap(problem.dynamics, (0, 0, 0, None))(x[:-1], u, stages(u), theta)
    g = constraint_values(problem, theta, x, u)
    return (
        jnp.sum(stage_costs(problem, theta, x, u))
        + lanes.vdot(costate[1:], x_next - x[1:])
        + lanes.vdot(costate[0], x_init - x[0])
        + total(row_terms(g, state._replace(multiplier=multiplier), prices))
    )


def gradient(
    problem: Problem, theta: Theta, prices: Prices, x_init: Array, point: Point, state: RowState
) -> Rhs:
    """∇L, the residual of the KKT system: 0 at a solution, where its derivatives shape those of the
    solution."""
    x, u, costate, multiplier = point
    n = x_init.shape[0]
    rows = state._replace(multiplier=multiplier), prices

    def part(name):
        return jax.tree.map(
            lambda of_rows: getattr(of_rows, name), rows, is_leaf=lambda a: isinstance(a, Rows)
        )

    def hamiltonian(z, t, costate, of_rows):
        x, u = z[:n], z[n:]
        x_next, g = problem.dynamics(x, u, t, theta), problem.constraint(x, u, t, theta)
        paid = jnp.sum(row_terms(g, *of_rows))
        return problem.cost(x, u, t, theta) + lanes.vdot(costate, x_next) + paid, (x_next, g)

    def end(x):
        g = problem.final_constraint(x, theta)
        return problem.terminal_cost(x, theta) + jnp.sum(row_terms(g, *part("final"))), g

    at_stages = jax.vmap(jax.grad(hamiltonian, has_aux=True))
    c, (x_next, g) = at_stages(z_of(x, u), stages(u), costate[1:], part("stage"))
    c_final, g_final = jax.grad(end, has_aux=True)(x[-1])
    return Rhs(
        x_init=x_init - x[0],
        c=c.at[:, :n].add(-costate[:-1]),
        f=x_next - x[1:],
        c_final=c_final - costate[-1],
        g=jax.tree.map(lambda g, active: jnp.where(active, g, 0), Rows(g, g_final), state.active),
    )


def matrices(
    problem: Problem,
    theta: Theta,
    prices: Prices,
    point: Point,
    state: RowState,
    exact: bool = True,
) -> tuple[Array, Array, Array, Rows, Array]:
    """(C, F, C_final, G, ∇_u L): the Hessian of L in the states and controls, or without ``exact``
    its part without second derivatives of dynamics and rows, and the Jacobians."""
    x, u, costate, multiplier = point
    expanded = expand(problem, theta, x, u)
    first = first_order(expanded, multiplier)
    C, C_final = expanded.C, expanded.C_final
    if exact:
        C, C_final = hessians(problem, theta, x, u, expanded, costate, multiplier)
    C, C_final = add_curvature(C, C_final, expanded.G, state, prices)
    return C, expanded.F, C_final, expanded.G, first.control_cost + first.control_pull
