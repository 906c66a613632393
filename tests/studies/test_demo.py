"""The demonstration: its quick version from start to end, its model, and what it says where
something that it needs is not installed."""

import functools
import re
import subprocess
import sys

import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmpc import demo
from jaxmpc.systems import pendulum


def run(*command):
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The folder that the quick demo has written, and what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    result = run("-m", "jaxmpc.demo", "--quick", "--output", str(folder))
    assert result.returncode == 0, result.stderr
    return folder, result


def number(pattern, text):
    (found,) = re.findall(pattern + r"\s+(-?[\d.]+)", text)
    return float(found)


@pytest.mark.slow
def test_swings_up_and_balances(quick):
    _, result = quick
    swing_up, _ = result.stdout.split("Pendulum learned")
    assert number("return", swing_up) > -310
    assert number("final angle", swing_up) < 0.5
    assert number("converged", swing_up) > 95


@pytest.mark.slow
def test_learns_what_torques_identify(quick):
    _, result = quick
    _, learning = result.stdout.split("Pendulum learned")
    np.testing.assert_allclose(number(r"g/l\s+\(1/s²\)", learning), 10, rtol=1e-2)
    np.testing.assert_allclose(number(r"m l²\s+\(kg m²\)", learning), 1, rtol=1e-2)
    assert number("converged", learning) > 95


@pytest.mark.slow
def test_shows_progress(quick):
    _, result = quick
    for bar in ("swing-up: 100%", "learning: 100%", "animation: 100%", "loss=", "converged="):
        assert bar in result.stderr


@pytest.mark.slow
def test_writes_the_files_that_it_names(quick):
    folder, result = quick
    last_line = result.stdout.splitlines()[-1]
    assert {path.name for path in folder.iterdir()} == {"demo.png", "swing_up.gif"}
    for name, frames in (("demo.png", 1), ("swing_up.gif", 16)):
        assert str(folder / name) in last_line
        with Image.open(folder / name) as image:
            assert getattr(image, "n_frames", 1) == frames
            low, high = image.convert("L").getextrema()
            assert low < 50
            assert high > 200


def test_model_is_the_step_of_the_environment():
    env = gymnasium.make("Pendulum-v1")
    env.reset(seed=0)
    plant = env.unwrapped
    assert plant.dt == pendulum.DT
    params = pendulum.default_params()._replace(
        physics=pendulum.Physics(plant.g, plant.m, plant.l),
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        angle, rate = rng.uniform([-np.pi, -6], [np.pi, 6])  # no rate near the clip at 8 rad/s
        torque = rng.uniform(-plant.max_torque, plant.max_torque, 1)
        plant.state = np.array([angle, rate])
        plant.step(torque)
        x_next = pendulum.dynamics(pendulum.state(angle, rate), jnp.asarray(torque), 0, params)
        np.testing.assert_allclose(x_next, pendulum.state(*plant.state), rtol=0, atol=1e-12)


def test_cost_is_the_negative_reward_upright_and_hanging():
    env = gymnasium.make("Pendulum-v1")
    env.reset(seed=0)
    for angle in (0.0, np.pi):
        env.unwrapped.state = np.array([angle, 1.3])
        torque = np.array([0.7])
        _, reward, *_ = env.unwrapped.step(torque)
        cost = demo.swing_up_cost(pendulum.state(angle, 1.3), torque, 0, None)
        np.testing.assert_allclose(cost, -reward, rtol=1e-12)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "module", ["tqdm", *map(slow, ["gymnasium", "matplotlib", "optax", "PIL"])]
)
def test_says_what_to_install(module):
    code = f"import runpy, sys; sys.modules[{module!r}] = None; runpy.run_module('jaxmpc.demo')"
    result = run("-c", code)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert module in line
    assert 'pip install "jaxmpc[demo]"' in line
