"""Pendulum and cartpole problems whose gradients are checked, and a loss of all that comes back."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmpc import mpc_solve
from jaxmpc.systems import cartpole, pendulum

T = 20


def weighted(system, control_weight):
    params = system.default_params()
    q = params.cost.q.at[-1].set(control_weight)
    return params._replace(cost=params.cost._replace(q=q))


def large_angles(system, num):
    """Starts at any angle, the upright ones included."""
    key = jax.random.key(7)
    if system is cartpole:
        return cartpole.sample_states(key, num)
    angle, rate = jax.random.uniform(key, (2, num), minval=-1, maxval=1)
    return jax.vmap(pendulum.state)(jnp.pi * angle, rate)


def loss(out):
    """Of everything that is differentiable, with no symmetry to hide behind."""
    weights = jnp.cos(jnp.arange(out["u"].size)).reshape(out["u"].shape)
    return (
        jnp.sum((out["u"] - weights) ** 2)
        + 0.3 * jnp.sum(jnp.sin(out["x"]))
        + 0.1 * jnp.sum(jnp.cos(out["costate"]))
        + 0.2 * out["objective"]
    )


def solve(system, inputs, **kwargs):
    return mpc_solve(
        system.cost,
        system.dynamics,
        inputs["x_init"],
        jnp.zeros_like(inputs["u_lower"]),
        inputs["params"],
        u_lower=inputs["u_lower"],
        u_upper=inputs["u_upper"],
        **kwargs,
    )


def value(system, inputs, **kwargs):
    solution = solve(system, inputs, **kwargs)
    return loss({k: getattr(solution, k) for k in ("x", "u", "costate", "objective")}), solution


def inputs_of(system, params, bound, x_init):
    return {
        "x_init": x_init,
        "params": params,
        "u_lower": jnp.full((T, 1), -bound),
        "u_upper": jnp.full((T, 1), bound),
    }


CASES = {
    "bang-bang pendulum": (pendulum, 1e-3, 2.0),
    "pendulum at any angle": (pendulum, 0.1, 2.0),
    "free pendulum": (pendulum, 0.1, np.inf),
    "cartpole with some bounds": (cartpole, 1e-3, 10.0),
    "cartpole": (cartpole, 1e-3, 100.0),
}
