"""Rollouts, and the Taylor expansions of cost and dynamics along them (eq. 12 and 13)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc import entrywise
from jaxmpc.lqr import entrywise_pays
from jaxmpc.problem import Model, Theta


def stages(u: Array) -> Array:
    return jnp.arange(u.shape[0], dtype=jnp.int32)


def rollout(model: Model, theta: Theta, x_init: Array, u: Array) -> Array:
    """x [T+1, n] of the controls u [T, m]."""

    def step(x, data):
        u, t = data
        return model.dynamics(x, u, t, theta), x

    x_final, x = lax.scan(step, x_init, (u, stages(u)))
    return jnp.concatenate([x, x_final[None]])


def stage_costs(model: Model, theta: Theta, x: Array, u: Array) -> Array:
    """The T stage costs, and the terminal cost last: [T+1]."""
    costs = jax.vmap(model.cost, (0, 0, 0, None))(x[:-1], u, stages(u), theta)
    if model.terminal_cost is None:
        final = jnp.zeros((), x.dtype)
    else:
        final = model.terminal_cost(x[-1], theta)
    return jnp.append(costs, final)


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


def _stage_functions(model: Model, theta: Theta, n: int):
    """Cost and dynamics of one stage as functions of z = (x, u)."""

    def cost(z, t):
        return model.cost(z[:n], z[n:], t, theta)

    def dynamics(z, t):
        return model.dynamics(z[:n], z[n:], t, theta)

    return cost, dynamics


def first_order(model: Model, theta: Theta, x: Array, u: Array) -> FirstOrder:
    """Gradients, Jacobians and costates along the rollout x of u."""
    n, m = x.shape[1], u.shape[1]
    cost, dynamics = _stage_functions(model, theta, n)
    z, t = jnp.concatenate([x[:-1], u], axis=1), stages(u)
    c = jax.vmap(jax.grad(cost))(z, t)
    F = jax.vmap(jax.jacfwd(dynamics))(z, t)
    if model.terminal_cost is None:
        c_final = jnp.zeros_like(x[-1])
    else:
        c_final = jax.grad(model.terminal_cost)(x[-1], theta)

    def adjoint(costate, data):
        c, A = data
        costate = c + A.T @ costate
        return costate, costate

    _, costate = entrywise.scan(
        adjoint, c_final, (c[:, :n], F[:, :, :n]), entrywise=entrywise_pays(n, m), reverse=True
    )
    costate = jnp.concatenate([costate, c_final[None]])
    pull = jnp.einsum("tij,ti->tj", F[:, :, n:], costate[1:])
    return FirstOrder(c, F, c_final, costate, c[:, n:], pull)


def second_order(model: Model, theta: Theta, x: Array, u: Array, costate: Array) -> SecondOrder:
    """Hessians of the cost and of the Hamiltonian along the rollout."""
    n = x.shape[1]
    cost, dynamics = _stage_functions(model, theta, n)
    z, t = jnp.concatenate([x[:-1], u], axis=1), stages(u)
    C = jax.vmap(jax.hessian(cost))(z, t)
    bend = jax.vmap(jax.hessian(lambda z, t, costate: costate @ dynamics(z, t)))
    H = C + bend(z, t, costate[1:])
    if model.terminal_cost is None:
        C_final = jnp.zeros((n, n), x.dtype)
    else:
        C_final = jax.hessian(model.terminal_cost)(x[-1], theta)
    return SecondOrder(C, H, C_final)
