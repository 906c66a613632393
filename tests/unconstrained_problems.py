"""Unconstrained problems, and what is true of a plan by the rolled-out objective's own derivatives:
no code of the solvers."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, rolled_out

from jaxmpc import Options, ilqr_box
from jaxmpc.systems import cartpole, pendulum

T, COUNT = 20, 64
TOLERANCE = 1e-10
OPTIONS = Options(tolerance=TOLERANCE)


class Model(NamedTuple):
    cost: Any
    dynamics: Any
    terminal_cost: Any = None


class Inputs(NamedTuple):
    """A batch of problems with one model."""

    x_init: jax.Array
    u_init: jax.Array
    params: Any
    lower: jax.Array
    upper: jax.Array


@functools.cache
def solver(model):
    def one(inputs, options):
        x_init, u_init, params, lower, upper = inputs
        return ilqr_box(
            model.cost,
            model.dynamics,
            x_init,
            u_init,
            params,
            terminal_cost=model.terminal_cost,
            u_lower=lower,
            u_upper=upper,
            options=options,
        )

    return jax.jit(jax.vmap(one, (0, None)))


def solve(model, inputs, options=OPTIONS):
    return jax.tree.map(np.asarray, solver(model)(inputs, options))


class Facts(NamedTuple):
    """What is true of a plan, by autodiff of the rolled-out objective alone."""

    x: np.ndarray
    costate: np.ndarray
    K: np.ndarray
    free: np.ndarray
    objective: np.ndarray
    kkt_residual: np.ndarray
    terms: np.ndarray  # the largest of the terms that cancel in ∇_u J
    curvature: np.ndarray  # the smallest eigenvalue of ∇²_uu J on the free controls


@functools.cache
def derivatives(model):
    def one(inputs, u):
        x_init, _, params, _, _ = inputs
        T = u.shape[0]

        def J(u, push):
            return rolled_out(*model[:2], x_init, u, params, model.terminal_cost, push)

        still = jnp.zeros((T + 1, *x_init.shape), u.dtype)
        (objective, x), (gradient, costate) = jax.value_and_grad(J, (0, 1), has_aux=True)(u, still)
        ((Huu, Hux), _), _ = jax.hessian(J, (0, 1), has_aux=True)(u, still)
        stage_gradient = jax.vmap(jax.grad(model.cost, 1), (0, 0, 0, None))
        of_cost = stage_gradient(x[:-1], u, jnp.arange(T, dtype=jnp.int32), params)
        bends = jax.vmap(jax.hessian(model.cost, 1), (0, 0, 0, None))
        price = jnp.abs(bends(x[:-1], u, jnp.arange(T, dtype=jnp.int32), params))
        price = jnp.einsum("tij,tj->ti", price, jnp.abs(u))
        # What cancels in the costates, before the dynamics multiply them.
        along = x[:-1], u, jnp.arange(T, dtype=jnp.int32), params
        A, B = jax.vmap(jax.jacfwd(model.dynamics, (0, 1)), (0, 0, 0, None))(*along)
        of_state = jnp.abs(jax.vmap(jax.grad(model.cost, 0), (0, 0, 0, None))(*along))
        of_state += jnp.einsum("tij,ti->tj", jnp.abs(A), jnp.abs(costate[1:]))
        of_state = jnp.concatenate([of_state[1:], jnp.abs(costate[-1:])])
        pull = jnp.einsum("tij,ti->tj", jnp.abs(B), of_state)
        return objective, x, costate, gradient, of_cost, jnp.maximum(price, pull), Huu, Hux

    return jax.jit(jax.vmap(one))


def facts(model, inputs, u):
    u = np.asarray(u)
    # The linear algebra is NumPy's: two batched LAPACK calls in one XLA program can block
    # each other for ever where there are few cores.
    arrays = jax.tree.map(np.asarray, derivatives(model)(inputs, u))
    objective, x, costate, gradient, of_cost, price, Huu, Hux = arrays
    lower, upper = np.asarray(inputs.lower), np.asarray(inputs.upper)
    B, T, m = u.shape
    ends = ((u == lower) & (gradient > 0)) | ((u == upper) & (gradient < 0))
    free = ~(ends | (lower == upper))
    Huu = Huu.reshape(B, T * m, T * m)

    def on(keep):
        keep = keep.reshape(B, T * m)
        return np.where(keep[:, :, None] & keep[:, None, :], Huu, np.eye(T * m))

    K = np.zeros((B, T, m, x.shape[-1]))
    for t in range(T):  # how u_t answers a push of x_t while the later controls answer too
        keep = free & (np.arange(T) >= t)[:, None]
        push = np.where(keep[..., None], Hux[:, :, :, t], 0).reshape(B, T * m, -1)
        K[:, t] = -np.linalg.solve(on(keep), push).reshape(B, T, m, -1)[:, t]

    def largest(a):
        return np.max(np.abs(a), axis=(1, 2))

    return Facts(
        x=x,
        costate=costate,
        K=K,
        free=free,
        objective=objective,
        kkt_residual=largest(np.clip(u - gradient, lower, upper) - u),
        terms=np.maximum(np.maximum(largest(of_cost), largest(price)), largest(gradient - of_cost)),
        curvature=np.linalg.eigvalsh(on(free))[:, 0],
    )


def is_strict_minimum(facts, tolerance=TOLERANCE):
    """Of every problem, from the facts alone; twice the tolerance, since rounding differs."""
    stationary = facts.kkt_residual <= 2 * tolerance * np.maximum(1, facts.terms)
    return stationary & (facts.curvature > 0)


def assert_describes(solution, facts):
    """Every field against the facts; the gains where the curvature determines them well."""
    for name in ("x", "objective", "costate"):
        assert_close(getattr(solution, name), getattr(facts, name), 1e-11)
    assert_close(solution.kkt_residual, facts.kkt_residual, 1e-11, scale=1 + np.max(facts.terms))
    assert np.array_equal(solution.free, facts.free)
    definite = facts.curvature > 1e-6
    assert np.any(definite)
    assert_close(solution.K[definite], facts.K[definite], 1e-8)
    assert np.all(solution.K[~solution.free] == 0)


# name: (module, model, default params, bound of |u|)
SYSTEMS = {
    "pendulum": (
        pendulum,
        Model(pendulum.cost, pendulum.dynamics),
        pendulum.default_params,
        pendulum.U_UPPER,
    ),
    "damped pendulum": (
        pendulum,
        Model(pendulum.cost, pendulum.damped_dynamics),
        pendulum.default_damped_params,
        pendulum.U_UPPER,
    ),
    "cartpole": (
        cartpole,
        Model(cartpole.cost, cartpole.dynamics),
        cartpole.default_params,
        cartpole.U_UPPER,
    ),
}
SYSTEMS["weak cartpole"] = (*SYSTEMS["cartpole"][:3], 10.0)  # its bounds are active
each_system = pytest.mark.parametrize("system", ["pendulum", "cartpole"])
each_with_active_bounds = pytest.mark.parametrize("system", ["pendulum", "weak cartpole"])


def model_of(system):
    return SYSTEMS[system][1]


def inputs_of(system, dtype=jnp.float64, count=COUNT, seed=0):
    """Random starts of the paper's problems, from u_init = 0."""
    module, _, default_params, bound = SYSTEMS[system]
    params = default_params(dtype)
    return Inputs(
        module.sample_states(jax.random.key(seed), count, dtype),
        jnp.zeros((count, T, 1), dtype),
        jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), params),
        jnp.full((count, T, 1), -bound, dtype),
        jnp.full((count, T, 1), bound, dtype),
    )


@functools.cache
def solved(system):
    return solve(model_of(system), inputs_of(system))


def at_most(iterations):
    return dataclasses.replace(OPTIONS, max_iterations=iterations)


def random_controls(inputs, factor, seed=0):
    """Uniform within ``factor`` times the bounds."""
    uniform = np.random.default_rng(seed).uniform(-factor, factor, inputs.upper.shape)
    return jnp.asarray(uniform * inputs.upper)


def network_dynamics(x, u, t, params):
    return x + 0.3 * jnp.tanh(params["A"] @ x + params["B"] @ u)


def network_cost(x, u, t, params):
    error = x - params["goal"][t]
    return error @ error + 0.05 * u @ u + 0.02 * jnp.sum(jnp.cos(2 * u)) + params["tilt"] @ u


def network_terminal_cost(x, params):
    return 2 * jnp.sum(jnp.sqrt(1 + (x - params["goal"][-1]) ** 2))


NETWORK = Model(network_cost, network_dynamics, network_terminal_cost)


def network_inputs(n, m, T, count=32):
    """Random recurrent networks with bounds of all kinds: finite, infinite, equal."""
    rng = np.random.default_rng([n, m, T])
    params = dict(
        A=rng.normal(size=(count, n, n)),
        B=rng.normal(size=(count, n, m)),
        goal=rng.normal(size=(count, T + 1, n)),
        tilt=0.1 * rng.normal(size=(count, m)),
    )
    lower, upper = rng.uniform(-1, 0, (count, T, m)), rng.uniform(0, 1, (count, T, m))
    kind = rng.choice(5, size=lower.shape)
    lower[(kind == 1) | (kind == 3)] = -np.inf
    upper[(kind == 2) | (kind == 3)] = np.inf
    lower[kind == 4] = upper[kind == 4]
    inputs = Inputs(rng.normal(size=(count, n)), np.zeros((count, T, m)), params, lower, upper)
    return jax.tree.map(jnp.asarray, inputs)


def single(model, x_init, u_init, params=None, lower=-np.inf, upper=np.inf, options=OPTIONS):
    """One problem, as a batch of one."""
    x_init, u_init = jnp.asarray(x_init, float), jnp.asarray(u_init, float)
    bounds = (jnp.broadcast_to(jnp.asarray(b, float), u_init.shape) for b in (lower, upper))
    inputs = jax.tree.map(lambda a: jnp.asarray(a)[None], Inputs(x_init, u_init, params, *bounds))
    return inputs, solve(model, inputs, options)


def integrator(x, u, t, params):
    return x + u
