"""The judge of the study ``constrained``, on a problem solved by hand and beside JAX's autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import constrained, kkt_judge
from bench.peers.constrained_problems import PROBLEMS, Problem

# x⁺ = x + u from 2, and x ≥ 1.5: the plan goes there and stays, with the multipliers 1 and 1.5.
BY_HAND = Problem(
    n=1, m=1, T=2, dynamics=lambda ops, x, u: x + u, weights=((1.0,), (1.0,), (1.0,)),
    x_ref=(0.0,), u_ref=(0.0,), u_lower=(-1.0,), u_upper=(1.0,), starts=lambda rng: np.full(1, 2.0),
    x_lower=(1.5,), x_upper=(np.inf,),
)  # fmt: skip


def judged(problem, *plans):
    u = np.array(plans).reshape(-1, problem.T, problem.m)
    return kkt_judge.judge(problem, problem.x_init(0, len(u)), u)


def test_a_solution_by_hand_and_what_is_none():
    right, inside, outside, nan = (-0.5, 0.0), (-0.4, 0.0), (-0.6, 0.0), (np.nan, 0.0)
    found = judged(BY_HAND, right, inside, outside, nan)
    assert found["objective"][0] == pytest.approx(4.375)
    assert found["kkt_residual"][0] < 1e-12
    assert found["violation"][:2].tolist() == [0.0, 0.0]
    assert found["kkt_residual"][1] > 0.05
    assert found["violation"][2] == pytest.approx(0.1)
    assert found["kkt_residual"][2] >= found["violation"][2]
    assert found["kkt_residual"][3] == found["violation"][3] == np.inf


def test_a_bound_that_pulls_is_no_solution():
    # At the bound, yet the objective falls towards the inside: a multiplier of the wrong sign.
    found = judged(BY_HAND, (-0.5, 1.0))
    assert found["violation"][0] == 0.0
    assert found["kkt_residual"][0] > 1.0


def test_the_bounds_of_controls_count():
    found = judged(BY_HAND, (-0.5, 1.25))
    assert found["violation"][0] == pytest.approx(0.25)


def test_without_an_inequality_nearby_there_is_no_multiplier():
    found = judged(BY_HAND, (0.5, 0.5))
    assert found["kkt_residual"][0] == pytest.approx(0.5 + 2.5 + 3.0)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_derivatives_are_those_of_autodiff(name):
    problem = PROBLEMS[name]
    (x_init,) = problem.x_init(3, 1)
    u = problem.u_init() + 0.1 * np.random.default_rng(0).normal(size=(problem.T, problem.m))
    x = kkt_judge.rollout(problem, x_init, u)
    moves = kkt_judge.sensitivities(problem, x, u)
    value, slope = kkt_judge.objective(problem, x, u, moves)
    g, G = kkt_judge.inequalities(problem, x, u, moves)
    Q, R, Q_end = map(np.array, problem.weights)
    with jax.enable_x64(True):

        def rolled_out(u):
            def step(x, u):
                new = problem.dynamics(constrained.JAX, x, u)
                return new, new

            states = jax.lax.scan(step, jnp.asarray(x_init), u)[1]
            before = jnp.concatenate([x_init[None], states[:-1]]) - np.array(problem.x_ref)
            end = states[-1] - np.array(problem.x_ref)
            push = u - np.array(problem.u_ref)
            total = 0.5 * (jnp.sum(Q * before**2) + jnp.sum(R * push**2) + jnp.sum(Q_end * end**2))
            # All the rows that move, each with a weight of its own.
            if problem.rows is not None:
                rows = jax.vmap(lambda x: problem.rows(constrained.JAX, x))(states[:-1])
            else:
                rows = states - np.array(problem.x_upper)
            weights = jnp.sin(jnp.arange(rows.size))
            return total, weights @ rows.ravel()

        def both(u):
            return rolled_out(u), jax.jacrev(rolled_out)(u)

        (expected, rows), (slope_of_all, row_slope) = jax.jit(both)(jnp.asarray(u))
    assert value == pytest.approx(float(expected), rel=1e-12)
    np.testing.assert_allclose(slope, np.ravel(slope_of_all), atol=1e-10)
    count = problem.n * problem.T
    if problem.rows is not None:
        count = len(problem.rows(kkt_judge.NUMPY, x[0])) * (problem.T - 1)
    weights = np.sin(np.arange(count))
    assert weights @ g[:count] == pytest.approx(float(rows), rel=1e-10)
    np.testing.assert_allclose(weights @ G[:count], np.ravel(row_slope), atol=1e-9)
