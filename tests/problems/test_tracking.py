"""The tracking cost against NumPy, and through the solver against dense autodiff."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import assert_close

from jaxmpc import Status, mpc_solve, tracking
from jaxmpc.tracking import Tracking, chord, wrap

N, M, T = 3, 2, 10
RNG = np.random.default_rng(0)


def spd(*shape):
    root = RNG.normal(size=(*shape, shape[-1]))
    return root @ np.swapaxes(root, -1, -2) + np.eye(shape[-1])


REFERENCES = {"constant": (RNG.normal(size=N), RNG.normal(size=M))}
REFERENCES["moving"] = RNG.normal(size=(T + 1, N)), RNG.normal(size=(T, M))
WEIGHTS = {
    "diagonal": (RNG.uniform(1, 2, N), RNG.uniform(1, 2, M), RNG.uniform(1, 2, N)),
    "matrix": (spd(N), spd(M), spd(N)),
    "matrices": (spd(T, N), spd(T, M), spd(N)),
}


def short_way(difference):
    return (difference + np.pi) % (2 * np.pi) - np.pi


def as_arrays(x_ref, u_ref, Q, R, Q_final, **static):
    arrays = dict(x_ref=x_ref, u_ref=u_ref, Q=Q, R=R, Q_final=Q_final)
    return Tracking(**{name: jnp.asarray(a) for name, a in arrays.items()}, **static)


# Values.


@pytest.mark.parametrize("references", REFERENCES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("angle_error", ["wrap", "chord"])
def test_values_are_the_equation(references, weights, angle_error):
    (x_ref, u_ref), (Q, R, Q_final) = REFERENCES[references], WEIGHTS[weights]
    task = as_arrays(x_ref, u_ref, Q, R, Q_final, angles=(1,), angle_error=angle_error)
    x, u = RNG.normal(size=N) + np.array([0, 20, 0]), RNG.normal(size=M)

    def quadratic(weight, e):
        return 0.5 * e @ (np.diag(weight) if weight.ndim == 1 else weight) @ e

    def at(array, t, rank):
        return array[t] if array.ndim > rank else array

    def error(t):
        e = x - at(x_ref, t, 1)
        e[1] = short_way(e[1])
        if angle_error == "chord":
            e[1] = 2 * np.sin(e[1] / 2)
        return e

    for t in (0, 3, T - 1):
        want = quadratic(at(Q, t, 2), error(t)) + quadratic(at(R, t, 2), u - at(u_ref, t, 1))
        got = jax.jit(tracking.cost)(jnp.array(x), jnp.array(u), t, task)
        assert got.shape == ()
        np.testing.assert_allclose(got, want, rtol=1e-13)
    got = tracking.terminal_cost(jnp.array(x), task)
    np.testing.assert_allclose(got, quadratic(Q_final, error(-1)), rtol=1e-13)


def test_no_u_ref_is_zero():
    x, u = jnp.ones(N), jnp.array([2.0, 3.0])
    task = Tracking(jnp.ones(N), jnp.ones(N), jnp.array([1.0, 10.0]))
    np.testing.assert_allclose(tracking.cost(x, u, 0, task), 0.5 * (4 + 90), rtol=1e-15)


class Parameters(NamedTuple):
    tracking: Tracking
    mass: float


def test_the_params_may_hold_more():
    task = Tracking(jnp.zeros(N), jnp.ones(N), jnp.ones(M), Q_final=jnp.full(N, 3.0))
    x, u = jnp.ones(N), jnp.ones(M)
    for params in (task, {"tracking": task, "mass": 1.0}, Parameters(task, 1.0)):
        np.testing.assert_allclose(tracking.cost(x, u, 0, params), 2.5)
        np.testing.assert_allclose(tracking.terminal_cost(x, params), 4.5)


# Angles.


def test_wrap_and_chord():
    angles = np.linspace(-20, 20, 1001)
    np.testing.assert_allclose(wrap(angles), short_way(angles), atol=1e-13)
    np.testing.assert_allclose(chord(angles), 2 * np.sin(short_way(angles) / 2), atol=1e-13)
    np.testing.assert_allclose(np.abs(wrap(jnp.array([-np.pi, np.pi, 3 * np.pi]))), np.pi)
    for fn in (wrap, chord):
        assert fn(jnp.float32(4.0)).dtype == jnp.float32


def test_derivatives_of_the_squared_error():
    """Exact near 0 and far from it, whole turns away too; the chord's at the cut as well."""

    def square(fn):
        return lambda angle: 0.5 * fn(angle) ** 2

    for turns in (-6 * np.pi, 0.0, 2 * np.pi):
        for e in (-3.0, -1e-9, 0.0, 0.4, 3.0):
            angle = turns + e
            slope, bend = jax.grad(square(wrap)), jax.grad(jax.grad(square(wrap)))
            np.testing.assert_allclose(slope(angle), e, rtol=1e-13, atol=1e-14)
            assert bend(angle) == 1.0
    for angle in (-np.pi, 0.0, 0.4, 3.0, np.pi, 4.0, 30.0):
        slope, bend = jax.grad(square(chord)), jax.grad(jax.grad(square(chord)))
        np.testing.assert_allclose(slope(angle), np.sin(angle), atol=1e-13)
        np.testing.assert_allclose(bend(angle), np.cos(angle), atol=1e-13)


def turning(x, u, t, params):
    """An angle and its rate."""
    return jnp.stack((x[0] + 0.1 * x[1], x[1] + 0.1 * u[0]))


@pytest.mark.parametrize("angle_error", ["wrap", "chord"])
def test_across_the_cut_the_way_is_short(angle_error):
    """From 3 rad to −3 rad: 0.28 rad up, not 6 rad down."""
    task = Tracking(
        jnp.array([-3.0, 0.0]), jnp.array([1.0, 0.1]), jnp.array([0.01]),
        Q_final=jnp.array([100.0, 10.0]), angles=(0,), angle_error=angle_error,
    )  # fmt: skip
    solution = mpc_solve(
        tracking.cost, turning, jnp.array([3.0, 0.0]), jnp.zeros((20, 1)), task,
        terminal_cost=tracking.terminal_cost,
    )  # fmt: skip
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose(solution.x[-1, 0], 2 * np.pi - 3, atol=0.02)


# Through the solver.


def moving_task():
    stages = jnp.arange(T + 1.0)
    return Tracking(
        x_ref=jnp.stack((3 + 0.2 * jnp.sin(stages), 0.1 * stages), axis=1),
        u_ref=jnp.cos(jnp.arange(T))[:, None],
        Q=jnp.array([2.0, 0.3]),
        R=jnp.linspace(0.5, 1.0, T)[:, None, None],
        Q_final=jnp.array([[5.0, 0.2], [0.2, 1.0]]),
        angles=(0,),
        angle_error="chord",
    )


def test_an_attainable_moving_reference_is_attained():
    u_ref = jnp.sin(jnp.arange(T))[:, None]
    x_ref = [jnp.array([0.5, 0.0])]
    for u in u_ref:
        x_ref.append(turning(x_ref[-1], u, 0, None))
    ones = jnp.ones(2)
    task = Tracking(jnp.stack(x_ref), ones, ones[:1], u_ref, ones, angles=(0,))
    solution = mpc_solve(
        tracking.cost, turning, x_ref[0] + jnp.array([2 * jnp.pi, 0.0]), jnp.zeros((T, 1)),
        {"tracking": task}, terminal_cost=tracking.terminal_cost,
    )  # fmt: skip
    assert solution.status == Status.CONVERGED
    np.testing.assert_allclose(solution.u, u_ref, atol=1e-9)
    np.testing.assert_allclose(solution.objective, 0, atol=1e-15)


def test_gradients_in_references_and_weights_match_dense_autodiff():
    def dynamics(x, u, t, params):
        angle, rate = x
        push = params["gain"] * jnp.sin(angle) + u[0]
        return jnp.stack((angle + 0.2 * rate, rate + 0.2 * push))

    def loss(out):
        weights = jnp.cos(jnp.arange(T))[:, None]
        return jnp.sum((out["u"] - weights) ** 2) + 0.3 * jnp.sum(jnp.sin(out["x"]))

    def value(inputs):
        solution = mpc_solve(
            tracking.cost, dynamics, inputs["x_init"], jnp.zeros((T, 1)), inputs["params"],
            terminal_cost=tracking.terminal_cost,
            u_lower=inputs["u_lower"], u_upper=inputs["u_upper"],
        )  # fmt: skip
        return loss({"x": solution.x, "u": solution.u}), solution

    @jax.jit
    def both(inputs):
        grad, solution = jax.grad(value, has_aux=True)(inputs)
        costs = (tracking.cost, dynamics, tracking.terminal_cost)
        return grad, oracle.gradient(loss, *costs, solution.u, inputs), solution

    bound = jnp.full((T, 1), 0.8)
    params = {"tracking": moving_task(), "gain": jnp.array(0.7)}
    inputs = dict(x_init=jnp.array([-2.5, 0.1]), params=params, u_lower=-bound, u_upper=bound)
    grad, want, solution = both(inputs)
    assert solution.status == Status.CONVERGED
    assert 0.1 < np.mean(solution.free) < 1
    task = grad["params"]["tracking"]
    for name in ("x_ref", "u_ref", "Q", "R", "Q_final"):
        assert np.max(np.abs(getattr(task, name))) > 1e-3, name
    assert np.max(np.abs(task.x_ref[-1])) > 1e-3  # read by the terminal cost alone
    assert_close(grad, want, 1e-10, scale=max(map(np.max, map(np.abs, jax.tree.leaves(want)))))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_is_kept_under_strict_promotion(dtype):
    task = jax.tree.map(lambda a: a.astype(dtype), moving_task())
    x, u = jnp.ones(2, dtype), jnp.ones(1, dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        costs = tracking.cost(x, u, 0, task), tracking.terminal_cost(x, task)
        gradient = jax.grad(tracking.cost, 3)(x, u, 2, task)
    assert {leaf.dtype for leaf in jax.tree.leaves((costs, gradient))} == {jnp.dtype(dtype)}


# Errors.


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(x_ref=jnp.zeros(2)),
            r"x_ref must have shape \[n\] = \[3\] or \[T\+1, n\] .* got \[2\]",
        ),
        (dict(u_ref=jnp.zeros((4, 3))), r"u_ref must have shape \[m\] = \[2\] .* got \[4, 3\]"),
        (dict(u_ref=jnp.zeros(())), r"u_ref must have shape .* got \[\]"),
        (dict(Q=jnp.ones((T, 3))), r"Q must have shape .* or \[T, n, n\] .* got \[10, 3\]"),
        (dict(R=jnp.ones(3)), r"R must have shape \[m\] = \[2\] .* got \[3\]"),
        (dict(angles=(3,)), r"angles must be indices of states, from 0 to 2, got \(3,\)"),
        (dict(angle_error="sine"), r"angle_error must be one of .* got 'sine'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    task = Tracking(jnp.zeros(N), jnp.ones(N), jnp.ones(M), Q_final=jnp.ones(N))
    bad = dataclasses.replace(task, **change)
    with pytest.raises(ValueError, match=message):
        tracking.cost(jnp.zeros(N), jnp.zeros(M), 0, bad)


def test_terminal_weights_have_to_be_there_and_do_not_vary():
    task = Tracking(jnp.zeros(N), jnp.ones(N), jnp.ones(M))
    with pytest.raises(ValueError, match=r"terminal_cost needs Q_final, .* got None"):
        tracking.terminal_cost(jnp.zeros(N), task)
    task = dataclasses.replace(task, Q_final=jnp.ones((T, N, N)))
    with pytest.raises(ValueError, match=r"Q_final must have shape .* got \[10, 3, 3\]"):
        tracking.terminal_cost(jnp.zeros(N), task)


@pytest.mark.parametrize("params", [None, {"cost": 1.0}, {"tracking": 1.0}, jnp.zeros(3)])
def test_params_without_a_tracking_are_refused(params):
    with pytest.raises(TypeError, match="params must be a Tracking or hold one"):
        tracking.cost(jnp.zeros(N), jnp.zeros(M), 0, params)
