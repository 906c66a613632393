"""The paper's experiments: the learners, and that a killed run goes on as if it was not."""

import argparse
import csv
import functools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counting import counting

from bench.paper import figures, imitation, lqr, lstm, trials
from bench.paper.imitation import Setting
from jaxmpc.systems import pendulum

ROOT = Path(__file__).parents[2]


def start(folder, figure, *options):
    """The command line in another process, in a group of its own that can be killed."""
    command = [sys.executable, "-m", "bench.paper", figure, "--quick", *options]
    command += ["--output", str(folder / "out"), "--checkpoints", str(folder / "checkpoints")]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def checkpoints(folder):
    """The epochs that are saved, of all runs."""
    found = (folder / "checkpoints").glob("*/epochs/*")
    return sorted(int(path.name) for path in found if path.name.isdecimal())


def wait_for_a_checkpoint(folder, process):
    while not checkpoints(folder):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of Figure 3 that nothing stopped, and its CSV."""
    folder = tmp_path_factory.mktemp("undisturbed")
    text = finish(start(folder, "fig3"))
    assert "The paper: " in text
    assert (folder / "out" / "fig3.png").stat().st_size > 1000
    assert (folder / "out" / "fig3.md").read_text() in text
    return folder, (folder / "out" / "fig3.csv").read_bytes()


def test_a_killed_process_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # `train` adds to them
    plans = {"only": functools.partial(counting, tmp_path)}
    train = functools.partial(
        trials.train, plans, tmp_path / "runs", "counting", jobs=1, save_every=0
    )
    (tmp_path / "kill").touch()
    with pytest.raises(BrokenProcessPool):
        train()
    trained = train()["only"]
    np.testing.assert_array_equal(trained.curves["x"][:, 0], 2.0 ** np.arange(1, 7) - 1)
    begun = (tmp_path / "begun").read_text().split()
    assert [epoch for epoch in begun if epoch != "0"] == ["1", "2", "3", "4", "5"]  # each once


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on(tmp_path, undisturbed, how):
    process = start(tmp_path, "fig3", "--save-every", "0")
    wait_for_a_checkpoint(tmp_path, process)
    if how == signal.SIGKILL:
        os.killpg(process.pid, how)  # everything at once
    else:
        process.send_signal(how)  # as Ctrl-C does; its processes save what they have
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / "out" / "fig3.csv").exists()
    assert max(checkpoints(tmp_path)) < 200, "stopped too late to show anything"
    finish(start(tmp_path, "fig3"))
    assert (tmp_path / "out" / "fig3.csv").read_bytes() == undisturbed[1]
    assert max(checkpoints(tmp_path)) == 200


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_other_settings_are_refused(undisturbed):
    folder, first = undisturbed
    changed = [path.stat().st_mtime_ns for path in (folder / "checkpoints").glob("*/epochs/*")]
    finish(start(folder, "fig3"))
    again = [path.stat().st_mtime_ns for path in (folder / "checkpoints").glob("*/epochs/*")]
    assert again == changed
    assert len(again) > 0
    assert (folder / "out" / "fig3.csv").read_bytes() == first
    process = start(folder, "fig3", "--seed", "7")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "seeds was [0, 1], is [7, 8]" in output
    assert "--fresh" in output


@pytest.mark.slow
def test_all_figures_train(tmp_path):
    text = finish(start(tmp_path, "all"))
    names = {"fig2", "fig3", "fig4", "fig5", "fig6", "hessian"}
    for name in names:
        for ending in ("csv", "png", "md"):
            assert (tmp_path / "out" / f"{name}.{ending}").stat().st_size > 300, (name, ending)
    assert "100%" in text
    assert "left" in text
    with (tmp_path / "out" / "fig4.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == set(imitation.METHODS)
    assert {row["seed"] for row in rows} == {"0", "1"}
    for row in rows:
        assert float(row["test"]) > 0
        assert float(row["validation"]) > 0
        assert bool(row["physics0"]) == (row["method"] in imitation.LEARNS_PHYSICS)
        assert bool(row["logit0"]) == (row["method"] in imitation.LEARNS_COST)
    for method in imitation.METHODS:
        best = [row for row in rows if row["method"] == method and row["best"] == "1"]
        assert len(best) == 2


# The learners.


def curves_of(run, num_epochs):
    state = run.start()
    assert num_epochs % run.chunk == 0
    parts = []
    for epoch in range(0, num_epochs, run.chunk):
        state, curves = run.advance(state, epoch)
        parts.append(curves)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


@pytest.fixture(scope="module")
def learning_the_cost():
    return curves_of(imitation.run(Setting("pendulum", "mpc.cost", 10), [3, 4], 30, 5), 30)


@pytest.mark.slow
def test_the_halves_of_a_cost_take_turns(learning_the_cost):
    def moves(name):  # [epochs]
        values = learning_the_cost[name]
        before = np.concatenate([np.zeros_like(values[:1]), values[:-1]])
        return (values != before).any(axis=(1, 2))

    p_now = np.repeat([True, False, True], 10)
    np.testing.assert_array_equal(moves("p_hat"), p_now)
    np.testing.assert_array_equal(moves("logit"), ~p_now)


@pytest.mark.slow
def test_learning_lowers_the_loss(learning_the_cost):
    train = learning_the_cost["train"]
    assert (train[-1] < 0.9 * train[0]).all()
    assert (np.diff(train, axis=0) < 0).mean() > 0.9
    assert (learning_the_cost["converged"] == 1.0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pendulum", "cartpole"])
def test_the_experts_constants_imitate_perfectly(name):
    """And so its trajectories, the losses and the learner's problem agree with one another."""
    domain = imitation.DOMAINS[name]
    made, converged = imitation.sample_trials(name, jnp.array([5]))
    assert converged
    x, u = made.x[0, :8], made.u[0, :8]
    setting = Setting(name, "mpc.dx", 10)
    plans = jnp.zeros_like(u)
    true = jnp.array(domain.expert_params().physics)
    for physics, same in ((true, True), (true.at[1].mul(1.5), False)):
        predicted, _, _ = jax.jit(imitation._predict, static_argnums=0)(
            setting, dict(physics=physics), x[:, 0], plans
        )
        loss = imitation._imitation(predicted, u)
        assert float(loss) == pytest.approx(float(jnp.sum((predicted - u) ** 2)) / 8, rel=1e-12)
        transition = imitation._transition(setting, dict(physics=physics), x, u)
        assert (loss < 1e-8) == same, loss
        assert (transition < 1e-20) == same, transition


def test_the_starts_of_learning():
    keys = jax.vmap(jax.random.key)(jnp.arange(200))

    def starts(domain, method):
        return jax.vmap(lambda key: imitation._init(Setting(domain, method, 10), key))(keys)

    assert (starts("pendulum", "mpc.dx")["physics"] == jnp.array([15.0, 3.0, 0.5])).all()
    assert (starts("cartpole", "sysid")["physics"] == jnp.array([9.8, 3.0, 0.1, 1.0])).all()
    damped = np.asarray(starts("damped pendulum", "mpc.dx")["physics"])
    low, high = np.array([3.5, 0.5, 0.5]), np.array([6.5, 1.5, 1.5])
    assert (damped > low).all()
    assert (damped < high).all()
    np.testing.assert_allclose(damped.min(0), low, atol=0.05)
    np.testing.assert_allclose(damped.max(0), high, atol=0.05)
    assert starts("pendulum", "mpc.cost").keys() == {"logit", "p_hat"}
    assert starts("pendulum", "mpc.cost.dx").keys() == {"logit", "p_hat", "physics"}


def test_published_damping_is_the_damped_pendulum_but_for_the_damping():
    params = pendulum.default_damped_params()
    without = params._replace(physics=params.physics._replace(damping=0.0))
    x, u = pendulum.state(0.7, -0.3), jnp.array([0.4])
    for given in (params, without):
        published = imitation.published_damping(x, u, 0, given)
        damped = pendulum.damped_dynamics(x, u, 0, given)
        # The damping of the text takes dt·d·θ̇ from the rate, that of the code dt·d·θ.
        change = pendulum.DT * float(given.physics.damping) * (-0.3 - 0.7)
        assert float(published[2] - damped[2]) == pytest.approx(change, abs=1e-12)


def test_rmsprop_is_the_one_of_the_paper():
    """As PyTorch has it: v ← α v + (1 − α) g², θ ← θ − lr g / (√v + ε)."""
    gradients = np.random.default_rng(0).normal(size=(5, 3))
    optimizer = imitation._optimizer("mpc.dx")
    theta, v = np.zeros(3), np.zeros(3)
    state = optimizer.init(jnp.zeros(3))
    for g in gradients:
        step, state = optimizer.update(jnp.array(g), state)
        v = 0.5 * v + 0.5 * g**2
        np.testing.assert_allclose(step, -1e-2 * g / (np.sqrt(v) + 1e-8), rtol=1e-10)
        theta += step
    assert np.abs(theta).max() > 1e-3


def test_the_lstm():
    """Written out for one state, with the gates in PyTorch's order."""
    params = lstm.init(jax.random.key(0), 3, 2, 5)
    x = np.random.default_rng(1).normal(size=(4, 3))
    got = lstm.controls(params, jnp.array(x), 6)
    assert got.shape == (4, 6, 2)

    def layers(name, y):
        *inner, (weights, bias) = params[name]
        for w, b in inner:
            y = np.maximum(y @ np.asarray(w) + b, 0.0)
        return y @ np.asarray(weights) + bias

    def sigmoid(a):
        return 1.0 / (1.0 + np.exp(-a))

    for state, want in zip(x, got, strict=True):
        y, h, c = layers("embed_x", state), np.zeros(5), np.zeros(5)
        for u in want:
            weights, bias = params["cell"]
            i, f, g, o = np.split(np.concatenate([y, h]) @ np.asarray(weights) + bias, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            np.testing.assert_allclose(u, layers("decode", c), rtol=1e-10, atol=1e-12)
            y = layers("embed_u", np.asarray(u))


@pytest.mark.slow
def test_the_linear_expert_imitates_itself():
    setting = lqr.Setting()
    model = lqr._sample_model(jax.random.key(setting.expert))
    x_init = jax.random.normal(jax.random.key(1), (32, 3))
    tau, converged = lqr._plans(setting, model, jnp.zeros(6), x_init)
    assert converged.all()
    assert (jnp.abs(tau[..., 3:]) <= 1.0).all()
    assert (jnp.abs(tau[..., 3:]) == 1.0).any(), "no bound is active"


@pytest.mark.slow
def test_the_network_learns():
    curves = curves_of(imitation.run(Setting("pendulum", "nn", 10, hidden=32), [0, 1], 40, 40), 40)
    assert (np.diff(curves["train"], axis=0) < 0).mean() > 0.9
    assert np.isnan(curves["train_transition"]).all()


# What is reported.


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_figures_are_drawn(tmp_path, quick):
    """From curves that nobody trained."""
    rng = np.random.default_rng(0)
    for kind in figures.FIGURES[1:]:  # but the second, which the benchmark draws
        args = argparse.Namespace(
            quick=quick, seed=5, output=tmp_path, parser=argparse.ArgumentParser(prog="paper")
        )
        figure, trained = kind(args), {}
        for setting, plan in figure.plans().items():
            run = plan()
            trials_, epochs = len(run.settings["seeds"]), run.num_epochs
            names = {"imitation", "model", "converged"}
            if isinstance(setting, Setting):
                names = {*figures.LOSSES, "converged"}
            curves = {name: rng.uniform(1e-9, 2.0, (epochs, trials_)) for name in names}
            if isinstance(setting, Setting):
                system = imitation.DOMAINS[setting.domain].system
                if setting.method in imitation.LEARNS_PHYSICS:
                    k = len(imitation.DOMAINS[setting.domain].guess)
                    curves["physics"] = rng.uniform(0.5, 2.0, (epochs, trials_, k))
                if setting.method in imitation.LEARNS_COST:
                    both = (epochs, trials_, system.N + system.M)
                    curves |= {name: rng.normal(size=both) for name in ("logit", "p_hat")}
            trained[setting] = trials.Trained(curves, 60.0)
        figure.write(trained)
        for ending in ("csv", "png", "md"):
            assert (tmp_path / f"{kind.name}.{ending}").stat().st_size > 300
        text = (tmp_path / f"{kind.name}.md").read_text()
        minutes = len(trained)
        assert f"{minutes:.1f} minutes of one process" in text
        assert "nan" not in text
    with (tmp_path / "fig4.csv").open() as file:
        rows = list(csv.DictReader(file))
    for setting in figures.Figure4(args).settings():
        run = [r for r in rows if (r["domain"], r["method"], r["num_train"])
               == (setting.domain, setting.method, str(setting.num_train))]  # fmt: skip
        best = [row for row in run if row["best"] == "1"]
        assert [row["seed"] for row in best] == [str(5 + k) for k in range(2 if quick else 4)]
        for row in best:
            others = [r for r in run if r["seed"] == row["seed"]]
            assert float(row["validation"]) == min(float(r["validation"]) for r in others)


def test_the_best_epoch_and_what_it_identifies():
    physics = np.array([[[5.0, 9.0, 9.0]] * 2, [[20.0, 0.25, 2.0], [9.0, 1.0, 1.0]]])
    curves = dict(
        validation=np.array([[3.0, np.nan], [2.0, 1.0]]),
        test=np.array([[0.1, 0.2], [0.3, 0.4]]),
        physics=physics,
    )
    run = trials.Trained(curves, 1.0)
    np.testing.assert_array_equal(figures.best_epochs(run), [1, 1])
    np.testing.assert_array_equal(figures.at_best(run, "test"), [0.3, 0.4])
    # Twice the length, a quarter of the mass and twice the gravity are the same pendulum.
    error = figures.physics_error(Setting("pendulum", "mpc.dx", 10), run)
    np.testing.assert_allclose(error, [0.0, 0.1], atol=1e-12)


def test_a_cost_is_known_up_to_its_scale():
    q, p = (np.asarray(a, float) for a in pendulum.default_params().cost)
    q, p = 0.5 * q, 0.5 * p
    logit = np.log(q / (1.0 - q))
    curves = dict(
        validation=np.zeros((1, 1)), test=np.zeros((1, 1)), logit=logit[None, None],
        p_hat=(p / np.sqrt(q))[None, None],
    )  # fmt: skip
    setting = Setting("pendulum", "mpc.cost", 10)
    assert figures.cost_error(setting, trials.Trained(curves, 1.0)) == pytest.approx(0.0, abs=1e-7)
    curves["p_hat"] = curves["p_hat"] + 0.1
    assert figures.cost_error(setting, trials.Trained(curves, 1.0))[0] > 0.05
