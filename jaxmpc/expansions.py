"""Rollouts, and the Taylor expansions of cost and dynamics along them (eq. 12 and 13).

For one problem, or for a batch on the last axis of every array (``lanes``).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc import lanes
from jaxmpc.problem import Model, Theta


def stages(u: Array) -> Array:
    return jnp.arange(u.shape[0], dtype=jnp.int32)


def along(model: Model, fn, theta: Theta, *arrays: Array) -> Array:
    """``fn(*arrays_t, t, theta)`` of one problem, at every stage t and across the batch."""
    each = model.across(fn)
    return jax.vmap(lambda *args: each(*args, theta))(*arrays, stages(arrays[0]))


def rollout(model: Model, theta: Theta, x_init: Array, u: Array) -> Array:
    """x [T+1, n] of the controls u [T, m]."""
    dynamics = model.across(model.dynamics)

    def step(x, data):
        u, t = data
        return dynamics(x, u, t, theta), x

    x_final, x = lax.scan(step, x_init, (u, stages(u)))
    return jnp.concatenate([x, x_final[None]])


def stage_costs(model: Model, theta: Theta, x: Array, u: Array) -> Array:
    """The T stage costs, and the terminal cost last: [T+1]."""
    costs = along(model, model.cost, theta, x[:-1], u)
    if model.terminal_cost is None:
        final = jnp.zeros_like(costs[0])
    else:
        final = model.across(model.terminal_cost)(x[-1], theta)
    return jnp.concatenate([costs, final[None]])


class FirstOrder(NamedTuple):
    c: Array  # [T, n+m], ∇cost
    F: Array  # [T, n, n+m], the Jacobian of the dynamics
    c_final: Array  # [n]
    costate: Array  # [T+1, n]
    control_cost: Array  # [T, m], ∇_u cost
    control_pull: Array  # [T, m], Bᵀλ; ∇_u J is the sum of the two


class SecondOrder(NamedTuple):
    C: Array  # [T, n+m, n+m], ∇²cost
    H: Array  # [T, n+m, n+m], ∇² of the Hamiltonian cost + λᵀ dynamics
    C_final: Array  # [n, n]


def _stage_functions(model: Model, n: int):
    """Cost and dynamics of one stage as functions of z = (x, u)."""

    def cost(z, t, theta):
        return model.cost(z[:n], z[n:], t, theta)

    def dynamics(z, t, theta):
        return model.dynamics(z[:n], z[n:], t, theta)

    return cost, dynamics


@lanes.any_rank
def first_order(model: Model, theta: Theta, x: Array, u: Array) -> FirstOrder:
    """Gradients, Jacobians and costates along the rollout x of u."""
    n = x.shape[1]
    cost, dynamics = _stage_functions(model, n)
    z = jnp.concatenate([x[:-1], u], axis=1)
    c = along(model, jax.grad(cost), theta, z)
    F = along(model, jax.jacfwd(dynamics), theta, z)
    if model.terminal_cost is None:
        c_final = jnp.zeros_like(x[-1])
    else:
        c_final = model.across(jax.grad(model.terminal_cost))(x[-1], theta)

    def adjoint(costate, data):
        c, A = data
        costate = c + lanes.matvec_t(A, costate)
        return costate, costate

    _, costate = lax.scan(adjoint, c_final, (c[:, :n], F[:, :, :n]), reverse=True)
    costate = jnp.concatenate([costate, c_final[None]])
    pull = jax.vmap(lanes.matvec_t)(F[:, :, n:], costate[1:])
    return FirstOrder(c, F, c_final, costate, c[:, n:], pull)


@lanes.any_rank
def second_order(model: Model, theta: Theta, x: Array, u: Array, costate: Array) -> SecondOrder:
    """Hessians of the cost and of the Hamiltonian along the rollout."""
    n = x.shape[1]
    cost, dynamics = _stage_functions(model, n)
    z = jnp.concatenate([x[:-1], u], axis=1)
    C = along(model, jax.hessian(cost), theta, z)
    bend = jax.hessian(lambda z, costate, t, theta: costate @ dynamics(z, t, theta))
    H = C + along(model, bend, theta, z, costate[1:])
    if model.terminal_cost is None:
        C_final = jnp.zeros((n, *x.shape[1:]), x.dtype)
    else:
        C_final = model.across(jax.hessian(model.terminal_cost))(x[-1], theta)
    return SecondOrder(C, H, C_final)
