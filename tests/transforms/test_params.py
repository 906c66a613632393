"""Params that hold functions, flags and names beside arrays, as modules of neural networks do."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Status, certify, check_gradients, mpc_solve, receding_horizon

X, U = np.array([1.0, -0.5]), np.zeros((3, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Network:
    """A layer with whatever it needs as leaves, some of them no arrays."""

    weight: jax.Array
    bias: jax.Array
    activation: Callable
    layers: int
    residual: bool
    mode: str
    nothing: None = None

    def __call__(self, x, u):
        assert self.mode == "plan"
        out = x
        for _ in range(self.layers):
            out = self.activation(self.weight @ jnp.concatenate([out, u]) + self.bias)
        return x + 0.1 * out if self.residual else out


NETWORK = Network(
    weight=jnp.array([[0.3, -0.2, 0.5], [0.7, 0.1, -0.4]]), bias=jnp.array([0.1, -0.2]),
    activation=jnp.tanh, layers=2, residual=True, mode="plan",
)  # fmt: skip


def cost(x, u, t, network):
    return jnp.sum(x**2) + 0.1 * jnp.sum(u**2)


def dynamics(x, u, t, network):
    return network(x, u)


def as_arrays(weight, bias):
    """The same by a plain function of arrays, the rest written out."""

    def dynamics(x, u, t, params):
        out = x
        for _ in range(2):
            out = jnp.tanh(weight @ jnp.concatenate([out, u]) + bias)
        return x + 0.1 * out

    return mpc_solve(cost, dynamics, X, U, u_lower=-1.0, u_upper=1.0)


def of_parts(weight, bias):
    """What libraries of modules call combining: the arrays of a pytree are differentiated, and put
    back into the whole."""
    network = dataclasses.replace(NETWORK, weight=weight, bias=bias)
    return mpc_solve(cost, dynamics, X, U, network, u_lower=-1.0, u_upper=1.0)


def test_plan_and_gradient_are_those_of_the_arrays_alone():
    def loss(solve):
        return lambda *parts: (lambda s: (jnp.sum(jnp.sin(s.u)), s))(solve(*parts))

    parts = NETWORK.weight, NETWORK.bias
    both = [
        jax.jit(jax.value_and_grad(loss(solve), (0, 1), has_aux=True))(*parts)
        for solve in (of_parts, as_arrays)
    ]
    assert both[0][0][1].status == Status.CONVERGED
    assert_close(*both, 1e-12)
    assert np.max(np.abs(both[0][1][0])) > 1e-3


@pytest.mark.slow
def test_a_batch_of_networks():
    weights = jnp.stack([0.5 * NETWORK.weight, NETWORK.weight])
    together = jax.jit(jax.vmap(lambda w: of_parts(w, NETWORK.bias).u))(weights)
    assert_close(together[1], of_parts(NETWORK.weight, NETWORK.bias).u, 1e-9)
    assert_close(together[0], as_arrays(weights[0], NETWORK.bias).u, 1e-9)


@pytest.mark.slow
def test_everything_that_takes_params_takes_them():
    solution = of_parts(NETWORK.weight, NETWORK.bias)
    bounds = dict(u_lower=-1.0, u_upper=1.0)
    assert certify(cost, dynamics, X, solution, NETWORK, **bounds).kkt_residual < 1e-8
    episode = receding_horizon(cost, dynamics, X, U, NETWORK, num_steps=1, **bounds)
    assert_close(episode.u[0], solution.u[0], 1e-9)
    report = check_gradients(cost, dynamics, X, U, NETWORK, **bounds)
    assert report.ok
    names = ["params.weight", "params.bias", "u_lower", "u_upper", "x_init"]
    assert [check.name for check in report.checks] == names


def test_numbers_returned_promote_nothing():
    x, u = X.astype(np.float32), U.astype(np.float32)
    solution = mpc_solve(lambda x, u, t, p: 1.0, lambda x, u, t, p: x + u, x, u,
                         terminal_cost=lambda x, p: 2)  # fmt: skip
    assert solution.u.dtype == jnp.float32
    assert solution.objective == 5.0
    assert np.all(solution.u == 0)
