"""The derivative of a plan without any code of the solvers: dense autodiff of the rolled-out
objective J(u, inputs), one dense solve with its Hessian on the free controls, and clamped controls
that move with their bound."""

import jax
import jax.numpy as jnp
from helpers import rolled_out


def outputs(cost, dynamics, terminal_cost, x_init, u, params):
    """x, u, costate and objective as functions of the controls."""
    push = jnp.zeros((u.shape[0] + 1, *x_init.shape), u.dtype)

    def objective(push):
        return rolled_out(cost, dynamics, x_init, u, params, terminal_cost, push)

    (value, x), costate = jax.value_and_grad(objective, has_aux=True)(push)
    return {"x": x, "u": u, "costate": costate, "objective": value}


def active_set(cost, dynamics, terminal_cost, x_init, u, params, u_lower, u_upper):
    """Which controls the multipliers hold at their lower and at their upper bound."""
    gradient = jax.grad(lambda u: rolled_out(cost, dynamics, x_init, u, params, terminal_cost)[0])(
        u
    )
    return (u <= u_lower) & (gradient > 0), (u >= u_upper) & (gradient < 0)


def gradient(loss, cost, dynamics, terminal_cost, u, inputs):
    """∂loss/∂inputs at the plan u, for inputs = dict(x_init, params, u_lower, u_upper)."""
    x_init, params = inputs["x_init"], inputs["params"]
    bounds = inputs["u_lower"], inputs["u_upper"]
    at_lower, at_upper = active_set(cost, dynamics, terminal_cost, x_init, u, params, *bounds)
    free = ~(at_lower | at_upper).ravel()
    size = u.size

    def J(u, x_init, params):
        return rolled_out(cost, dynamics, x_init, u, params, terminal_cost)[0]

    def total(u, x_init, params):
        return loss(outputs(cost, dynamics, terminal_cost, x_init, u, params))

    in_u, in_x, in_params = jax.grad(total, (0, 1, 2))(u, x_init, params)
    hessian = jax.hessian(J)(u, x_init, params).reshape(size, size)
    reduced = jnp.where(free[:, None] & free[None, :], hessian, jnp.eye(size))
    w = -jnp.linalg.solve(reduced, jnp.where(free, in_u.ravel(), 0))

    def stationarity(x_init, params):
        return jnp.vdot(w, jax.grad(J)(u, x_init, params).ravel())

    more_x, more_params = jax.grad(stationarity, (0, 1))(x_init, params)
    on_bounds = (in_u.ravel() + hessian @ w).reshape(u.shape)
    return {
        "x_init": in_x + more_x,
        "params": jax.tree.map(jnp.add, in_params, more_params),
        "u_lower": jnp.where(at_lower, on_bounds, 0),
        "u_upper": jnp.where(at_upper, on_bounds, 0),
    }
