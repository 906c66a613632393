"""What a status says is true: of bad problems, saddles, degenerate minima and infeasible rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from unconstrained_problems import (
    Model,
    at_most,
    facts,
    inputs_of,
    integrator,
    is_strict_minimum,
    model_of,
    single,
    solve,
    solved,
)

from jaxmpc import Status

# One bad problem in a batch.


def spoiled(inputs, **values):
    """The batch with other values in its problem 3."""
    return inputs._replace(
        **{name: getattr(inputs, name).at[3].set(value) for name, value in values.items()}
    )


def assert_others_unaffected(solution):
    def others(solution):
        return jax.tree.map(lambda a: np.delete(a, 3, axis=0), solution)

    assert_close(others(solution), others(solved("pendulum")), 0)


@pytest.mark.parametrize(
    "values",
    [dict(x_init=np.nan), dict(x_init=1e200), dict(x_init=np.inf), dict(u_init=np.nan)],
    ids=str,
)
def test_what_is_not_finite_is_said_and_stays_alone(values):
    solution = solve(model_of("pendulum"), spoiled(inputs_of("pendulum"), **values))
    assert solution.status[3] == Status.NONFINITE
    assert_others_unaffected(solution)


@pytest.mark.parametrize("values", [dict(lower=3.0), dict(upper=-3.0), dict(lower=np.nan)], ids=str)
def test_crossed_bounds_are_infeasible_and_stay_alone(values):
    inputs = inputs_of("pendulum")
    values = {name: getattr(inputs, name)[3].at[7].set(value) for name, value in values.items()}
    solution = solve(model_of("pendulum"), spoiled(inputs, **values))
    assert solution.status[3] == Status.INFEASIBLE
    assert_others_unaffected(solution)


# Saddles and degenerate minima.


def test_it_leaves_the_pendulum_hanging_at_rest():
    inputs = spoiled(inputs_of("pendulum"), x_init=jnp.array([-1.0, 0.0, 0.0]))
    rest = facts(model_of("pendulum"), inputs, inputs.u_init)
    assert_close(rest.objective[3], 30.0, 1e-14)
    assert rest.kkt_residual[3] < 1e-15
    assert rest.curvature[3] < 0
    stuck = solve(model_of("pendulum"), inputs, at_most(0))
    assert stuck.status[3] == Status.INDEFINITE
    solution = solve(model_of("pendulum"), inputs)
    assert solution.status[3] == Status.CONVERGED
    assert solution.objective[3] < 28
    assert is_strict_minimum(facts(model_of("pendulum"), inputs, solution.u))[3]


def test_a_control_without_effect_is_degenerate():
    model = Model(lambda x, u, t, params: x @ x, lambda x, u, t, params: 0.5 * x)
    _, solution = single(model, [1.0], np.ones((3, 1)))
    assert solution.status == Status.INDEFINITE
    assert np.array_equal(solution.u[0], np.ones((3, 1)))


def test_a_minimum_without_curvature_is_degenerate():
    model = Model(lambda x, u, t, params: x @ x + u[0] ** 4, lambda x, u, t, params: 0.5 * x)
    _, solution = single(model, [1.0], np.zeros((3, 1)))
    assert solution.status == Status.INDEFINITE


def test_it_leaves_a_saddle_whose_diagonal_has_no_sign():
    def cost(x, u, t, params):
        return u[0] * u[1] + 0.1 * jnp.sum(u**4)

    _, solution = single(Model(cost, integrator), [0.0, 0.0], np.zeros((2, 2)))
    assert solution.status == Status.CONVERGED
    assert solution.objective < -0.1


def test_with_a_kink_it_stalls():
    def cost(x, u, t, params):
        return jnp.maximum(u[0] - 0.3, -2 * (u[0] - 0.3))

    _, solution = single(Model(cost, integrator), [0.0], np.full((1, 1), 0.3))
    assert solution.status == Status.STALLED
    assert solution.u[0, 0, 0] == 0.3
