"""What ``Options.record`` writes down of a search, and what shows it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Action, Constraints, Options, Status, mpc_solve, plot_record, summarize
from jaxmpc.systems import pendulum

T, PARAMS = 8, pendulum.default_params()
LENGTH = 6


def plan(angle, length=LENGTH, **more):
    return mpc_solve(
        pendulum.cost, pendulum.dynamics, pendulum.state(angle, 0.0), jnp.zeros((T, 1)), PARAMS,
        u_lower=-2.0, u_upper=2.0, options=Options(record=length), **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def batch():
    return jax.jit(jax.vmap(plan))(jnp.linspace(0.1, 3.0, 5))


def one(batch, i):
    return jax.tree.map(lambda a: a[i], batch)


def test_a_record_tells_how_the_solution_came(batch):
    assert np.all(np.asarray(batch.status) == Status.CONVERGED)
    for i in range(5):
        s = one(batch, i)
        count = min(int(s.iterations) + 1, LENGTH)
        record = {name: np.asarray(a) for name, a in vars(s.record).items()}
        assert np.all(np.isfinite(record["objective"][:count]))
        assert np.all(np.isnan(record["objective"][count:]))
        assert np.all(np.diff(record["objective"][:count]) <= 1e-12)
        assert np.all(record["step"][: count - 1] > 0)
        if count <= int(s.iterations):
            continue
        assert record["action"][count - 1] == Action.STOP
        assert_close(record["objective"][count - 1], s.objective, 1e-14)
        assert record["active"][count - 1] == np.sum(~np.asarray(s.free))


def test_the_first_entry_is_that_of_the_rollout(batch):
    x, total = pendulum.state(0.1, 0.0), 0.0
    for t in range(T):
        total += pendulum.cost(x, jnp.zeros(1), t, PARAMS)
        x = pendulum.dynamics(x, jnp.zeros(1), t, PARAMS)
    assert_close(batch.record.objective[0, 0], total, 1e-12)


def test_text_and_picture_show_it(batch):
    pytest.importorskip("matplotlib")
    s = one(batch, 4)
    text = summarize(s, show=LENGTH)
    assert "STOP" in text
    assert f"{float(s.record.objective[0]):.6g}" in text
    assert "STOP" not in summarize(batch)
    figure = plot_record(s)
    drawn = figure.axes[0].lines[0].get_ydata()
    assert_close(drawn, np.asarray(s.record.objective)[: len(drawn)], 1e-15)


def test_errors_name_what_is_wrong(batch):
    with pytest.raises(ValueError, match="one problem, got a batch"):
        plot_record(batch)
    with pytest.raises(ValueError, match="no record"):
        plot_record(dataclasses.replace(one(batch, 0), record=None))
    with pytest.raises(TypeError, match=r"must be a jaxmpc\.Solution"):
        plot_record(3)
    for length, error in ((-1, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=r"options\.record"):
            plan(0.1, length)


@pytest.mark.slow
def test_with_constraints_it_names_the_parts_of_the_method():
    fastest = Constraints(x_upper=jnp.array([jnp.inf, jnp.inf, 1.0]))
    s = jax.jit(lambda angle: plan(angle, 40, constraints=fastest))(2.5)
    assert int(s.status) == Status.CONVERGED
    actions = np.asarray(s.record.action)[: int(s.iterations) + 1].tolist()
    assert actions[0] == Action.MEASURE
    assert actions[-1] == Action.STOP
    assert {Action.BARRIER, Action.FINISH} <= set(actions)
    tau = np.asarray(s.record.barrier)[1 : int(s.iterations)]
    assert np.all(np.diff(tau) <= 0)
