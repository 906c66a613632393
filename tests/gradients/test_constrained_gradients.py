"""Gradients of constrained plans in every input at once, against dense autodiff of the KKT
conditions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constrained_problems import PROBLEMS, gradient
from constrained_solves import (
    as_dict,
    assert_gradients_close,
    each_problem,
    lane,
    loss,
    one_by_one,
    over_starts,
    plain,
    value,
)
from helpers import assert_close
from jax.flatten_util import ravel_pytree

from jaxmpc import Constraints, Status, mpc_solve

pytestmark = pytest.mark.xdist_group("constrained")  # they share compiled programs


@each_problem
def test_gradients_match_dense_autodiff_in_every_input(name):
    problem, (grads, solutions) = PROBLEMS[name], plain(name)

    @jax.jit
    def oracle(inputs, u, multipliers):
        return gradient(loss, problem, u, multipliers, inputs)

    for i, x_init in enumerate(jnp.asarray(problem.x_init)):
        solution = lane(solutions, i)
        want = oracle(problem.at(x_init), solution.u, as_dict(solution.multipliers))
        assert_gradients_close(lane(grads, i), want, 1e-7)


def test_the_objective_has_the_lagrangian_as_its_derivative():
    """costate[0] in x_init, and multipliers on bounds, weights and limits: the envelope theorem."""
    problem = PROBLEMS["soft"]

    @jax.jit
    def oracle(inputs, u, multipliers):
        return gradient(lambda out: out["objective"], problem, u, multipliers, inputs)

    for x_init, (grad, solution) in zip(problem.x_init, one_by_one("soft"), strict=True):
        want = oracle(problem.at(x_init), solution.u, as_dict(solution.multipliers))
        assert_gradients_close(grad, want, 1e-9)
        assert_close(grad["x_init"], solution.costate[0], 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_gradients_are_those_of_float64(name):
    problem = PROBLEMS[name]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(over_starts(problem.inputs),))
    def run(inputs):
        return jax.grad(value, 1, has_aux=True)(problem, inputs)

    inputs = problem.at(jnp.asarray(problem.x_init))
    grads, low = run(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), inputs))
    want_grads, high = plain(name)
    assert low.u.dtype == low.violation.dtype == jnp.float32
    assert np.all(np.asarray(low.status) == Status.CONVERGED)
    assert_close(low.objective, high.objective, 1e-5)
    assert_close(low.u, high.u, 1e-3)
    assert np.max(low.violation) <= 1e-4
    for i in range(3):
        assert_gradients_close(lane(grads, i), lane(want_grads, i), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, key",
    [
        ("terminal equality", "x_init"),
        ("soft", "x_init"),
        ("soft", "slack"),
        ("rate", "u_lower"),
        ("rate", "rate"),
        ("everything", "params"),
    ],
)
def test_second_derivatives_in_one_input_alone_are_those_of_differences(name, key):
    """In none but one: what the others are perturbed by must not matter."""
    problem = PROBLEMS[name]
    inputs = jax.tree.map(jnp.asarray, problem.inputs)
    flat, unravel = ravel_pytree(inputs[key])
    direction = jnp.where(jnp.isfinite(flat), jnp.sin(1 + jnp.arange(flat.size)), 0)

    def along(s):
        return value(problem, {**inputs, key: unravel(flat + s * direction)})[0]

    first, second, h = jax.jit(jax.grad(along)), jax.jit(jax.grad(jax.grad(along)))(0.0), 1e-5
    assert_close(second, (first(h) - first(-h)) / (2 * h), 1e-5)


def test_the_gain_of_a_plan_with_rows_has_the_derivative_of_finite_differences():
    """K holds the active rows by large weights, and so do the plans beside it."""

    def dynamics(x, u, t, mass):
        return jnp.stack([x[0] + 0.5 * x[1], x[1] + 0.5 * u[0] / mass - 0.1 * x[1] ** 2])

    def cost(x, u, t, mass):
        return 0.5 * (x @ x + 0.3 * u @ u) + 0.05 * jnp.sum(u**4)

    arrives = Constraints(terminal_equality=lambda x, mass: x[:1])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def gains(mass):
        solution = mpc_solve(
            cost, dynamics, jnp.array([1.0, 0.2]), jnp.zeros((4, 1)), mass, constraints=arrives
        )
        return jnp.sum(jnp.sin(solution.K)), solution.status

    (_, status), slope = gains(1.3)
    assert status == Status.CONVERGED
    h = 1e-4
    (above, _), _ = gains(1.3 + h)
    (below, _), _ = gains(1.3 - h)
    assert_close(slope, (above - below) / (2 * h), 1e-4)
