"""Rollouts, and the Taylor expansions of cost and dynamics along them (eq. 12 and 13).

For one problem, or for a batch on the last axis of every array (``lanes``).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.problem import Model, Theta
from jaxmpc.riccati.rows import Rows, add_pull


def stages(u: Array) -> Array:
    return jnp.arange(u.shape[0], dtype=jnp.int32)


def along(model: Model, fn, theta: Theta, *arrays: Array) -> Array:
    """``fn(*arrays_t, t, theta)`` of one problem, at every stage t and across the batch."""
    each = model.across(fn)
    return jax.vmap(lambda *args: each(*args, theta))(*arrays, stages(arrays[0]))


def transition(model: Model, theta: Theta, u: Array):
    """The dynamics as a function of (x, u, now), and what ``now`` is at each stage."""
    if "dynamics" in model.given:
        affine = model.matrices("dynamics", theta)
        shared = _shared(model, affine.F, 2), _shared(model, affine.f, 1)
        own = (None if one else a for a, one in zip((affine.F, affine.f), shared, strict=True))

        def step(x, u, now):
            F, f = (
                a if one else of_stage
                for a, one, of_stage in zip((affine.F, affine.f), shared, now, strict=True)
            )
            return lanes.materialize(
                lambda F, z, f: lanes.matvec(F, z) + f, F, jnp.concatenate([x, u]), f
            )

        return step, tuple(own)
    dynamics = model.across(model.dynamics)
    return (lambda x, u, t: dynamics(x, u, t, theta)), stages(u)


def rollout(model: Model, theta: Theta, x_init: Array, u: Array) -> Array:
    """x [T+1, n] of the controls u [T, m]."""
    step, at = transition(model, theta, u)

    def advance(x, data):
        u, now = data
        return step(x, u, now), x

    x_final, x = lax.scan(advance, x_init, (u, at))
    return jnp.concatenate([x, x_final[None]])


def stage_costs(model: Model, theta: Theta, x: Array, u: Array) -> Array:
    """The T stage costs, and the terminal cost last: [T+1]."""
    if "cost" in model.given:
        given = model.matrices("cost", theta)
        z = jnp.concatenate([x[:-1], u], axis=1)
        costs = _per_stage(model, _quadratic, given, z)
    else:
        costs = along(model, model.cost, theta, x[:-1], u)
    if model.terminal_cost is None:
        final = jnp.zeros_like(costs[0])
    elif "terminal_cost" in model.given:
        given = model.matrices("terminal_cost", theta)
        final = _quadratic(given.C, given.c, x[-1])
    else:
        final = model.across(model.terminal_cost)(x[-1], theta)
    return jnp.concatenate([costs, final[None]])


def _shared(model: Model, given: Array, rank: int) -> bool:
    """Whether a given matrix or vector is there once for all stages."""
    return given.ndim == rank + len(model.batch)


def _per_stage(model: Model, fn, given, z: Array) -> Array:
    """``fn(C_t, c_t, z_t)`` at every stage."""
    axes = (None if _shared(model, a, rank) else 0 for a, rank in ((given.C, 2), (given.c, 1)))
    return jax.vmap(fn, (*axes, 0))(given.C, given.c, z)


def _at_all_stages(model: Model, given: Array, T: int) -> Array:
    return jnp.broadcast_to(given, (T, *given.shape)) if _shared(model, given, 2) else given


def _quadratic(C, c, z):
    return lanes.dot(z, 0.5 * lanes.matvec(C, z) + c)


def constraint_values(model: Model, theta: Theta, x: Array, u: Array) -> Rows | None:
    """The constraint functions along a trajectory; None for a problem without any."""
    if not model.constrained:
        return None
    stage = final = None
    if model.constraint is not None:
        stage = along(model, model.constraint, theta, x[:-1], u)
    if model.final_constraint is not None:
        final = model.across(model.final_constraint)(x[-1], theta)
    return Rows(stage, final)


class Expansion(NamedTuple):
    """Taylor expansions along a rollout: cost to second order, the rest to first."""

    c: Array  # [T, n+m], ∇cost
    C: Array  # [T, n+m, n+m], ∇²cost
    F: Array  # [T, n, n+m], the Jacobian of the dynamics
    c_final: Array  # [n]
    C_final: Array  # [n, n]
    G: Any  # Rows or None; [T, p, n+m] and [q, n], the Jacobians of the constraints


class FirstOrder(NamedTuple):
    """Gradients of the Lagrangian: the costates λ, and the multipliers ν of the constraints."""

    c: Array  # [T, n+m], ∇(cost + νᵀg)
    c_final: Array  # [n]
    costate: Array  # [T+1, n]
    control_cost: Array  # [T, m], the part of c in u
    control_pull: Array  # [T, m], Bᵀλ; ∇_u J is the sum of the two


def _stage_functions(model: Model, n: int):
    """Cost, dynamics and constraints of one stage as functions of z = (x, u)."""

    def of_z(fn):
        return lambda z, t, theta: fn(z[:n], z[n:], t, theta)

    return of_z(model.cost), of_z(model.dynamics), of_z(model.constraint)


@lanes.any_rank
def expand(model: Model, theta: Theta, x: Array, u: Array) -> Expansion:
    """The expansions along the rollout x of u."""
    n = x.shape[1]
    cost, dynamics, constraint = _stage_functions(model, n)
    z = jnp.concatenate([x[:-1], u], axis=1)
    if "cost" in model.given:
        given = model.matrices("cost", theta)
        c = _per_stage(model, lambda C, c, z: lanes.matvec(C, z) + c, given, z)
        C = _at_all_stages(model, given.C, len(z))
    else:
        c, C = along(model, jax.grad(cost), theta, z), along(model, jax.hessian(cost), theta, z)
    if "dynamics" in model.given:
        F = _at_all_stages(model, model.matrices("dynamics", theta).F, len(z))
    else:
        F = along(model, jax.jacfwd(dynamics), theta, z)
    if model.terminal_cost is None:
        c_final, C_final = jnp.zeros_like(x[-1]), jnp.zeros((n, *x.shape[1:]), x.dtype)
    elif "terminal_cost" in model.given:
        given = model.matrices("terminal_cost", theta)
        c_final, C_final = lanes.matvec(given.C, x[-1]) + given.c, given.C
    else:
        c_final = model.across(jax.grad(model.terminal_cost))(x[-1], theta)
        C_final = model.across(jax.hessian(model.terminal_cost))(x[-1], theta)
    G = None
    if model.constrained:
        stage = final = None
        if model.constraint is not None:
            stage = along(model, jax.jacfwd(constraint), theta, z)
        if model.final_constraint is not None:
            final = model.across(jax.jacfwd(model.final_constraint))(x[-1], theta)
        G = Rows(stage, final)
    return Expansion(c, C, F, c_final, C_final, G)


@lanes.any_rank
def first_order(expansion: Expansion, multipliers: Rows | None = None) -> FirstOrder:
    """The gradients of the Lagrangian, from an expansion."""
    c, _, F, c_final, _, G = expansion
    n = c_final.shape[0]
    if G is not None:
        c, c_final = add_pull(c, c_final, G, multipliers)

    def adjoint(costate, data):
        c, A = data
        costate = c + lanes.matvec_t(A, costate)
        return costate, costate

    _, costate = lax.scan(adjoint, c_final, (c[:, :n], F[:, :, :n]), reverse=True)
    costate = jnp.concatenate([costate, c_final[None]])
    pull = jax.vmap(lanes.matvec_t)(F[:, :, n:], costate[1:])
    return FirstOrder(c, c_final, costate, c[:, n:], pull)


@lanes.any_rank
def hessians(
    model: Model,
    theta: Theta,
    x: Array,
    u: Array,
    expansion: Expansion,
    costate: Array,
    multipliers: Any = None,
) -> tuple[Array, Array]:
    """[T, n+m, n+m], ∇² of the Hamiltonian cost + λᵀ dynamics + νᵀ g along a rollout; and [n, n],
    that of the terminal cost + νᵀ g."""
    _, dynamics, constraint = _stage_functions(model, x.shape[1])
    z = jnp.concatenate([x[:-1], u], axis=1)
    H = expansion.C
    # What bends, each with its multipliers.
    curved = [] if "dynamics" in model.given else [(dynamics, costate[1:])]
    curved += [] if model.constraint is None else [(constraint, multipliers.stage)]
    if curved:
        functions, weights = zip(*curved, strict=True)

        def bending(z, *rest):
            *weights, t, theta = rest
            return sum(w @ fn(z, t, theta) for fn, w in zip(functions, weights, strict=True))

        H = H + along(model, jax.hessian(bending), theta, z, *weights)
    H_final = expansion.C_final
    final = model.final_constraint
    if final is not None:
        bend = jax.hessian(lambda x, nu, theta: nu @ final(x, theta))
        H_final = H_final + model.across(bend)(x[-1], multipliers.final, theta)
    return H, H_final
