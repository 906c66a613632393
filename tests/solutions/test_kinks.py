"""Prices with kinks: what `summarize` says of them, and their exact forms without kinks.

Optimality is checked by that of convex functions, 0 in the subdifferential, on dense matrices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Constraints, Slack, Status, mpc_solve, summarize

T, WEIGHT = 8, 0.3
A, B = np.array([[1.0, 0.3], [0.0, 1.0]]), np.array([[0.0], [0.3]])
X_INIT = np.array([1.0, -0.4])


def dynamics(x, u, t, params):
    return A @ x + B @ u


def stage(x, u):
    return 0.5 * x @ x + 0.05 * u @ u


def dense():
    """The smooth part of the objective is ½ uᵀ H u + hᵀ u + …; x_T = end + reach u."""

    def states(u):
        x, found = X_INIT, []
        for t in range(T):
            found.append(x)
            x = A @ x + B @ u[t : t + 1]
        return np.array(found), x

    still, end = states(np.zeros(T))
    moves = [states(e) for e in np.eye(T)]
    of_x = np.array([(m[0] - still).ravel() for m in moves])
    reach = np.array([m[1] - end for m in moves]).T
    return of_x @ of_x.T + 0.1 * np.eye(T), of_x @ still.ravel(), end, reach


H, LINEAR, END, REACH = dense()


def with_kinks():
    """w |u| as it stands."""
    return mpc_solve(
        lambda x, u, t, params: stage(x, u) + WEIGHT * jnp.sum(jnp.abs(u)),
        dynamics, jnp.asarray(X_INIT), jnp.full((T, 1), 0.1),
    )  # fmt: skip


@jax.jit
@functools.partial(jax.jacrev, has_aux=True)
def split(weight):
    """How u moves with w, u, and the solution: u = a − b with a, b ≥ 0, at the price w (a + b)."""
    s = mpc_solve(
        lambda x, ab, t, weight: stage(x, ab[:1] - ab[1:]) + weight * jnp.sum(ab),
        lambda x, ab, t, weight: dynamics(x, ab[:1] - ab[1:], t, weight),
        jnp.asarray(X_INIT), jnp.full((T, 2), 0.1), weight, u_lower=0.0,
    )  # fmt: skip
    u = s.u[:, 0] - s.u[:, 1]
    return u, (u, s)


def test_a_price_on_size_by_two_controls():
    got, (u, s) = split(WEIGHT)
    assert s.status == Status.CONVERGED
    assert s.iterations <= 8
    u = np.asarray(u)
    moves = u != 0
    assert 0 < np.sum(moves) < T
    slope = H @ u + LINEAR
    assert_close(slope[moves], -WEIGHT * np.sign(u[moves]), 1e-9)
    assert np.all(np.abs(slope[~moves]) < WEIGHT)
    # What is 0 stays so, and the others answer.
    want = np.zeros(T)
    want[moves] = -np.linalg.solve(H[np.ix_(moves, moves)], np.sign(u[moves]))
    assert_close(got, want, 1e-9)


def test_a_relu_network_as_value_by_soft_rows():
    rng = np.random.default_rng(0)
    W, b, v = rng.normal(size=(6, 2)), 0.3 * rng.normal(size=6), np.abs(rng.normal(size=6))
    rows = Constraints(
        terminal_inequality=lambda x, params: W @ x + b, terminal_slack=Slack(linear=v)
    )

    def solve():
        return mpc_solve(
            lambda x, u, t, params: stage(x, u), dynamics, jnp.asarray(X_INIT), jnp.zeros((T, 1)),
            constraints=rows,
        )  # fmt: skip

    s = jax.jit(solve)()
    assert s.status == Status.CONVERGED
    u, share = np.asarray(s.u)[:, 0], np.asarray(s.multipliers.terminal_inequality) / v
    g = W @ (END + REACH @ u) + b
    # The slope of the network: of each unit a share in [0, 1], 0 or 1 off its kink.
    assert np.all((share >= -1e-9) & (share <= 1 + 1e-9))
    assert_close(share[np.abs(g) > 1e-9], (g > 0)[np.abs(g) > 1e-9], 1e-9, scale=1.0)
    assert_close(H @ u + LINEAR + REACH.T @ (W.T @ (v * share)), np.zeros(T), 1e-9, scale=1.0)


@pytest.fixture(scope="module")
def stalled():
    return jax.jit(with_kinks)()


def test_what_ends_at_a_kink_is_told(stalled):
    assert stalled.status == Status.STALLED
    text = summarize(stalled)
    assert "kink" in text
    assert "rounding" not in text
    # It is near: the objective of the minimum is that of the split problem.
    _, (_, s) = split(WEIGHT)
    least = float(s.objective)
    assert least <= stalled.objective <= 1.05 * least


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_what_rounding_ends_is_not(stalled, scale):
    """Whatever the cost's units: a residual of a few roundings of what cancels."""
    eps = np.finfo(float).eps
    by_rounding = dataclasses.replace(
        stalled,
        objective=stalled.objective * scale,
        costate=stalled.costate * scale,
        kkt_residual=1e3 * eps * scale * jnp.max(jnp.abs(stalled.costate)),
    )
    assert "rounding" in summarize(by_rounding)
    at_kink = dataclasses.replace(
        by_rounding, kkt_residual=1e-3 * scale * jnp.max(jnp.abs(stalled.costate))
    )
    assert "rounding" not in summarize(at_kink)
    both = jax.tree.map(lambda *a: jnp.stack(a), by_rounding, at_kink, stalled)
    assert "rounding" in summarize(both)
    assert " 2          (at a kink" in summarize(both)
