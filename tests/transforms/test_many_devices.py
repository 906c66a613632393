"""Batches that are spread over devices, and over processes."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmpc import Status, mpc_solve
from jaxmpc.systems import pendulum

ROOT = Path(__file__).parents[2]
COLLECTIVE = r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("


def plans(params, x_init):
    def plan(x):
        return mpc_solve(pendulum.cost, pendulum.dynamics, x, jnp.zeros((5, 1)), params,
                         u_lower=-2.0, u_upper=2.0)  # fmt: skip

    return jax.vmap(plan)(x_init)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def run(params, x_init):
    solution = plans(params, x_init)
    return jnp.mean(jnp.sin(solution.u)) + jnp.mean(solution.x**2), solution


@pytest.fixture(scope="module")
def problems():
    """The parameters and initial states: on one device, and on all."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    params = pendulum.default_params()
    x_init = pendulum.sample_states(jax.random.key(0), 2 * jax.device_count())
    return (params, x_init), (
        jax.device_put(params, NamedSharding(mesh, PartitionSpec())),
        jax.device_put(x_init, NamedSharding(mesh, PartitionSpec("batch"))),
    )


@pytest.fixture(scope="module")
def found(problems):
    """By one device, and by all."""
    alone, on_all = problems
    return run(*alone), run(*on_all)


def test_plans_are_those_of_one_device_and_stay_where_they_are(problems, found):
    ((_, want), _), ((_, got), _) = found
    assert np.all(np.asarray(want.status) == Status.CONVERGED)
    assert_close((got.x, got.u, got.costate), (want.x, want.u, want.costate), 1e-12)
    assert np.array_equal(got.status, want.status)
    assert got.u.sharding.is_equivalent_to(problems[1][1].sharding, got.u.ndim)


def test_the_gradient_is_that_of_one_device(found):
    ((value, _), slope), ((got_value, _), got_slope) = found
    assert_close((got_value, got_slope), (value, slope), 1e-12)
    assert got_value.sharding.is_fully_replicated


def test_no_device_waits_for_another(problems):
    assert re.findall(COLLECTIVE, jax.jit(plans).lower(*problems[1]).compile().as_text()) == []


def start(*arguments):
    """The example, in short."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "notebooks" / "many_devices.py"),
         "--devices", "4", "--batch", "8", "--epochs", "5", *arguments],
        env={**os.environ, "PYTHONPATH": search_path, "JAX_ENABLE_X64": "1",
             "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},  # most of the time goes into compiling
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def records(process):
    """What it printed, [epochs, numbers in a line]."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    number = r"(?<![\w²])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
    return np.array([[float(x) for x in re.findall(number, line)] for line in lines])


@pytest.mark.slow
def test_several_processes_learn_what_one_does():
    together, apart = start(), start("--processes", "2")
    got, want = records(apart), records(together)
    assert want.shape == (5, 5)
    np.testing.assert_array_equal(want[:, 0], np.arange(5))
    assert np.all(want[:, 2] == 100)  # per cent converged
    np.testing.assert_allclose(got, want, rtol=1e-9)
    assert want[-1, 1] < 0.7 * want[0, 1]
