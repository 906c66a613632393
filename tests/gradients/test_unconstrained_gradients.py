"""The gradients of ``mpc_solve`` in all inputs at once, against dense autodiff."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from gradient_cases import CASES, T, inputs_of, large_angles, loss, solve, value, weighted
from helpers import assert_close
from jax.flatten_util import ravel_pytree

from jaxmpc import Options, Status, mpc_solve
from jaxmpc.systems import cartpole, pendulum

ALL = ["bang-bang pendulum", "pendulum at any angle"]
ALL += [pytest.param(case, marks=pytest.mark.slow) for case in CASES.keys() - set(ALL)]


@functools.cache
def gradients_and_oracle(system):
    """Compiled once for all weights and bounds."""

    def both(x_init, params, bound):
        inputs = inputs_of(system, params, bound, x_init)
        grad, solution = jax.grad(value, 1, has_aux=True)(system, inputs)
        want = oracle.gradient(loss, system.cost, system.dynamics, None, solution.u, inputs)
        return grad, want, solution

    return jax.jit(jax.vmap(both, (0, None, None)))


@pytest.mark.parametrize("case", sorted(ALL, key=str))
def test_gradients_match_dense_autodiff_in_every_input(case):
    system, control_weight, bound = CASES[case]
    params = weighted(system, control_weight)
    grad, want, solution = gradients_and_oracle(system)(large_angles(system, 16), params, bound)
    assert np.all(np.asarray(solution.status) == Status.CONVERGED)
    shares = 1 - np.mean(solution.free, axis=(1, 2))
    if np.isfinite(bound) and bound < 100:
        assert np.min(shares) < np.max(shares)  # bounds mixed: none, some, many
    for i in range(16):
        one, true = (jax.tree.map(lambda a, i=i: a[i], tree) for tree in (grad, want))
        scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(true))
        assert_close(one, true, 1e-9, scale=scale)


def random_network(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {"W": jax.random.normal(k, (b, a)) / jnp.sqrt(a), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


class Network:
    """A neural network as dynamics with two controls, a nonquadratic cost and a terminal cost."""

    params: ClassVar = {
        "net": random_network(jax.random.key(1), [5, 16, 3]),
        "goal": jnp.array([0.5, -0.2, 0.1]),
    }

    @staticmethod
    def dynamics(x, u, t, params):
        h = jnp.concatenate([x, u])
        for layer in params["net"][:-1]:
            h = jnp.tanh(layer["W"] @ h + layer["b"])
        last = params["net"][-1]
        return x + 0.3 * (last["W"] @ h + last["b"])

    @staticmethod
    def cost(x, u, t, params):
        return (
            jnp.sum(jnp.sqrt(1 + (x - params["goal"]) ** 2))
            + 1.5 * u @ u
            + 0.01 * t.astype(x.dtype) * x[0]
        )

    @staticmethod
    def terminal_cost(x, params):
        return 3 * jnp.sum((x - params["goal"]) ** 2) + jnp.cosh(x[1])


def test_network_dynamics_with_terminal_cost_and_time_varying_bounds():
    def run(inputs):
        solution = mpc_solve(
            Network.cost, Network.dynamics, inputs["x_init"], jnp.zeros((12, 2)), inputs["params"],
            terminal_cost=Network.terminal_cost,
            u_lower=inputs["u_lower"], u_upper=inputs["u_upper"],
        )  # fmt: skip
        return loss({k: getattr(solution, k) for k in ("x", "u", "costate", "objective")}), solution

    wave = 0.3 + 0.5 * jnp.abs(jnp.sin(jnp.arange(24.0))).reshape(12, 2)
    inputs = {
        "x_init": jnp.array([1.0, -1.0, 0.4]),
        "params": Network.params,
        "u_lower": -wave,
        "u_upper": wave.at[3].set(-wave[3]),  # equal bounds at one stage
    }
    grad, solution = jax.jit(jax.grad(run, has_aux=True))(inputs)
    assert solution.status == Status.CONVERGED
    assert 0 < np.mean(solution.free) < 1
    assert not np.any(solution.free[3])
    assert np.all(solution.u[3] == -wave[3])
    want = jax.jit(
        lambda u: oracle.gradient(
            loss, Network.cost, Network.dynamics, Network.terminal_cost, u, inputs
        )
    )(solution.u)
    # At equal bounds the oracle, too, names the bound by the sign of the multiplier.
    assert_close(grad, want, 1e-9, scale=float(jnp.max(jnp.abs(want["x_init"]))))


def test_the_objective_alone_costs_no_linear_solve_and_is_the_envelope():
    inputs = inputs_of(pendulum, weighted(pendulum, 0.1), 2.0, pendulum.state(2.0, 0.5))

    def objective(inputs):
        solution = solve(pendulum, inputs)
        return solution.objective, solution

    def plan(inputs):
        solution = solve(pendulum, inputs)
        return jnp.sum(solution.u), solution

    traced = jax.jit(jax.grad(objective, has_aux=True)).trace(inputs)
    grad, solution = traced.lower().compile()(inputs)
    want = jax.jit(
        lambda u: oracle.gradient(
            lambda out: out["objective"], pendulum.cost, pendulum.dynamics, None, u, inputs
        )
    )(solution.u)
    assert_close(grad, want, 1e-9, scale=float(jnp.max(jnp.abs(want["x_init"]))))
    assert_close(grad["x_init"], solution.costate[0], 1e-12)
    # Backward of the plan: two more scans, the two substitutions of the LQR solve.
    of_a_plan = jax.make_jaxpr(jax.grad(plan, has_aux=True))(inputs)
    assert str(traced.jaxpr).count(" scan[") + 2 <= str(of_a_plan).count(" scan[")


def test_the_gain_has_the_derivative_of_finite_differences():
    inputs = inputs_of(pendulum, weighted(pendulum, 0.1), 2.0, pendulum.state(2.5, -0.5))

    @jax.jit
    @jax.value_and_grad
    def gains(physics):
        params = inputs["params"]._replace(physics=physics)
        return jnp.sum(jnp.sin(solve(pendulum, {**inputs, "params": params}).K))

    physics = inputs["params"].physics
    _, grad = gains(physics)
    for name in physics._fields:
        h = 1e-5
        up, _ = gains(physics._replace(**{name: getattr(physics, name) + h}))
        down, _ = gains(physics._replace(**{name: getattr(physics, name) - h}))
        assert_close(getattr(grad, name), (up - down) / (2 * h), 1e-6)


def test_neither_u_init_nor_the_options_have_a_gradient():
    params, x_init = weighted(pendulum, 0.1), pendulum.state(1.0, 0.5)

    def run(u_init, tolerance):
        options = dataclasses.replace(Options(), tolerance=tolerance)
        s = mpc_solve(pendulum.cost, pendulum.dynamics, x_init, u_init, params,
                      u_lower=-2.0, u_upper=2.0, options=options)  # fmt: skip
        return jnp.sum(s.u) + s.objective

    in_u_init, in_tolerance = jax.jit(jax.grad(run, (0, 1)))(jnp.full((T, 1), 0.1), 1e-8)
    assert np.all(np.asarray(in_u_init) == 0)
    assert in_tolerance == 0


def test_equal_bounds_share_the_sensitivity_where_the_multiplier_is_zero():
    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def run(lower, upper):
        s = mpc_solve(
            lambda x, u, t, p: u @ u, lambda x, u, t, p: x + u, jnp.ones(1), jnp.zeros((1, 1)),
            u_lower=lower, u_upper=upper,
        )  # fmt: skip
        return s.u[0, 0]

    def at(bound):
        return run(jnp.asarray(bound), jnp.asarray(bound))

    assert_close(at(0.0), (jnp.array(0.5), jnp.array(0.5)), 1e-12)
    assert_close(at(1.0), (jnp.array(1.0), jnp.array(0.0)), 1e-12)
    assert_close(at(-1.0), (jnp.array(0.0), jnp.array(1.0)), 1e-12)


ILQR = Options(backward_hessian="ilqr")


class Mixed:
    """Affine dynamics and the pendulum's, with the pendulum's cost: the share of the latter is the
    last entry of the state."""

    @staticmethod
    def cost(x, u, t, params):
        return pendulum.cost(x[:3], u, t, params)

    @staticmethod
    def dynamics(x, u, t, params):
        A = jnp.array([[1.0, 0.1, 0.0], [0.0, 1.0, 0.1], [0.0, 0.0, 0.9]])
        affine = A @ x[:3] + params.physics.g * jnp.array([0.0, 0.0, 0.1]) * u[0]
        swings = x[3] > 0.5
        moved = jnp.where(swings, pendulum.dynamics(x[:3], u, t, params), affine)
        return jnp.append(moved, x[3])


def test_the_ilqr_backward_is_right_for_affine_dynamics_and_wrong_otherwise():
    @jax.jit
    @jax.vmap
    def both(share):
        x_init = jnp.append(pendulum.state(2.5, 0.5), share)
        inputs, options = inputs_of(pendulum, weighted(pendulum, 0.1), 2.0, x_init), ILQR
        grad, solution = jax.grad(value, 1, has_aux=True)(Mixed, inputs, options=options)
        want = oracle.gradient(loss, Mixed.cost, Mixed.dynamics, None, solution.u, inputs)
        return ravel_pytree(grad)[0], ravel_pytree(want)[0]

    affine_and_pendulum = jnp.array([0.0, 1.0])
    ilqr, exact = map(np.asarray, both(affine_and_pendulum))
    apart = np.linalg.norm(exact - ilqr, axis=1) / np.linalg.norm(exact, axis=1)
    assert apart[0] <= 1e-10
    assert apart[1] > 0.05


def float32_gradients(system, params, bound):
    def one(x_init):
        inputs = inputs_of(system, params, bound, x_init)
        inputs = jax.tree.map(lambda a: a.astype(jnp.float32), inputs)
        return jax.grad(value, 1, has_aux=True)(system, inputs)

    return jax.jit(jax.vmap(one))


@pytest.mark.parametrize(
    "system, weight, bound",
    [(pendulum, 0.1, 2.0), pytest.param(cartpole, 1e-3, 10.0, marks=pytest.mark.slow)],
)
def test_float32_gradients_are_those_of_float64_where_the_active_set_is_the_same(
    system, weight, bound
):
    params = weighted(system, weight)
    low_of = float32_gradients(system, params, bound)
    found = []
    for x_init in jnp.split(large_angles(system, 64), 4):  # by as many as are compiled already
        low, low_solution = low_of(x_init)
        high, _, high_solution = gradients_and_oracle(system)(x_init, params, bound)
        flat = (jax.vmap(lambda g: ravel_pytree(g["params"])[0])(g) for g in (low, high))
        found.append((*flat, low_solution, high_solution))
    low, high, low_solution, high_solution = jax.tree.map(lambda *a: np.concatenate(a), *found)
    assert low_solution.u.dtype == jnp.float32
    assert np.all(high_solution.status == Status.CONVERGED)
    assert np.all(low_solution.status == Status.CONVERGED)
    same = np.all(low_solution.free == high_solution.free, axis=(1, 2))
    # Another local minimum is another problem.
    same &= np.abs(low_solution.objective - high_solution.objective) < 1e-3
    assert np.mean(same) > 0.9
    for i in np.flatnonzero(same):
        assert_close(low[i], high[i], 1e-3)
