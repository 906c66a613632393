"""Rollouts, and the Taylor expansions of cost and dynamics along them (eq. 12 and 13).

For one problem, or for a batch on the last axis of every array (``lanes``).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem import matrices
from jaxmpc.problem.problem import Problem, Theta
from jaxmpc.problem.stages import along, at_end, transition
from jaxmpc.riccati.point import Rows, no_rows, z_of
from jaxmpc.riccati.rows import add_pull


def rollout(problem: Problem, theta: Theta, x_init: Array, u: Array) -> Array:
    """x [T+1, n] of the controls u [T, m]."""
    step, at = transition(problem, theta, u)

    def advance(x, data):
        u, now = data
        return step(x, u, now), x

    x_final, x = lax.scan(advance, x_init, (u, at))
    return jnp.concatenate([x, x_final[None]])


def stage_costs(problem: Problem, theta: Theta, x: Array, u: Array) -> Array:
    """The T stage costs, and the terminal cost last: [T+1]."""
    if "cost" in problem.given:
        costs = matrices.values(theta, "cost", z_of(x, u))
    else:
        costs = along(problem.cost, theta, x[:-1], u)
    if "terminal_cost" in problem.given:
        final = matrices.values(theta, "terminal_cost", x[-1:])[0]
    else:
        final = at_end(problem.terminal_cost, theta, x[-1])
    return jnp.concatenate([costs, final[None]])


def constraint_values(problem: Problem, theta: Theta, x: Array, u: Array) -> Rows:
    """The constraint functions along a trajectory."""
    if not problem.constrained:
        return no_rows(len(u), x.dtype, x.shape[2:])
    return Rows(
        along(problem.constraint, theta, x[:-1], u),
        at_end(problem.final_constraint, theta, x[-1]),
    )


class Expansion(NamedTuple):
    """Taylor expansions along a rollout: cost to second order, the rest to first."""

    c: Array  # [T, n+m], ∇cost
    C: Array  # [T, n+m, n+m], ∇²cost
    F: Array  # [T, n, n+m], the Jacobian of the dynamics
    c_final: Array  # [n]
    C_final: Array  # [n, n]
    G: Rows  # [T, p, n+m] and [q, n], the Jacobians of the constraints


class FirstOrder(NamedTuple):
    """Gradients of the Lagrangian: the costates λ, and the multipliers ν of the constraints."""

    c: Array  # [T, n+m], ∇(cost + νᵀg)
    c_final: Array  # [n]
    costate: Array  # [T+1, n]
    control_cost: Array  # [T, m], the part of c in u
    control_pull: Array  # [T, m], Bᵀλ; ∇_u J is the sum of the two


def _of_z(fn: Callable, n: int) -> Callable:
    """A function of a stage as one of z = (x, u)."""
    return lambda z, t, theta: fn(z[:n], z[n:], t, theta)


@lanes.any_rank
def expand(problem: Problem, theta: Theta, x: Array, u: Array) -> Expansion:
    """The expansions along the rollout x of u."""
    n, z = x.shape[1], z_of(x, u)
    if "cost" in problem.given:
        c, C = matrices.expand_quadratic(theta, "cost", z)
    else:
        cost = _of_z(problem.cost, n)
        c, C = along(problem.gradient(cost), theta, z), along(problem.hessian(cost), theta, z)
    if "dynamics" in problem.given:
        F = matrices.jacobians(theta, "dynamics", len(u))
    else:
        F = along(jax.jacfwd(_of_z(problem.dynamics, n)), theta, z)
    if "terminal_cost" in problem.given:
        c_final, C_final = (a[0] for a in matrices.expand_quadratic(theta, "terminal_cost", x[-1:]))
    else:
        c_final = at_end(problem.gradient(problem.terminal_cost), theta, x[-1])
        C_final = at_end(problem.hessian(problem.terminal_cost), theta, x[-1])
    # Without rows, G has the shapes of C with no rows.
    G = Rows(C[:, :0], C_final[:0])
    if problem.constrained:
        G = Rows(
            along(jax.jacfwd(_of_z(problem.constraint, n)), theta, z),
            at_end(jax.jacfwd(problem.final_constraint), theta, x[-1]),
        )
    return Expansion(c, C, F, c_final, C_final, G)


@lanes.any_rank
def first_order(expansion: Expansion, multipliers: Rows, K: Array | None = None) -> FirstOrder:
    """The gradients of the Lagrangian, from an expansion.

    With gains K [T, m, n] those of controls that answer by K (x_new − x): of what is added to them.
    They vanish where the others do, and what the costates amplify is the closed loop's.
    """
    c, _, F, c_final, _, G = expansion
    n = c_final.shape[0]
    c, c_final = add_pull(c, c_final, G, multipliers)

    def adjoint(costate, data):
        c, F, K = data
        costate = c + lanes.matvec_t(F, costate)
        if K is not None:
            costate = costate[:n] + lanes.matvec_t(K, costate[n:])
        return costate, costate

    open_loop = c[:, :n], F[:, :, :n], None
    _, costate = lax.scan(adjoint, c_final, open_loop if K is None else (c, F, K), reverse=True)
    costate = jnp.concatenate([costate, c_final[None]])
    pull = jax.vmap(lanes.matvec_t)(F[:, :, n:], costate[1:])
    return FirstOrder(c, c_final, costate, c[:, n:], pull)


@lanes.any_rank
def hessians(
    problem: Problem,
    theta: Theta,
    x: Array,
    u: Array,
    expansion: Expansion,
    costate: Array,
    multipliers: Rows,
) -> tuple[Array, Array]:
    """[T, n+m, n+m], ∇² of the Hamiltonian cost + λᵀ dynamics + νᵀ g along a rollout; and [n, n],
    that of the terminal cost + νᵀ g."""
    n = x.shape[1]
    H, H_final = expansion.C, expansion.C_final
    # What bends, each with its multipliers.
    curved = [] if "dynamics" in problem.given else [(problem.dynamics, costate[1:])]
    if multipliers.stage.shape[1]:
        curved.append((problem.constraint, multipliers.stage))
    if curved:
        functions, weights = zip(*((_of_z(fn, n), w) for fn, w in curved), strict=True)

        def bending(z, *rest):
            *weights, t, theta = rest
            pairs = zip(functions, weights, strict=True)
            return sum(lanes.vdot(w, fn(z, t, theta)) for fn, w in pairs)

        H = H + along(problem.hessian(bending), theta, z_of(x, u), *weights)
    if multipliers.final.shape[0]:

        def bending_at_end(x, nu, theta):
            return lanes.vdot(nu, problem.final_constraint(x, theta))

        bend = problem.hessian(bending_at_end)
        H_final = H_final + at_end(bend, theta, x[-1], multipliers.final)
    return H, H_final
