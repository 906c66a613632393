"""Inside ``jax.shard_map`` with what it checks by default: the plans and gradients of ``vmap``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax.sharding import AxisType, PartitionSpec

from jaxmpc import (
    Constraints,
    Rate,
    Slack,
    certify,
    ilqr_unrolled,
    lqr_solve,
    mpc_solve,
    receding_horizon,
)

U = np.zeros((3, 1))
ALL, SPREAD = PartitionSpec(), PartitionSpec("batch")
A = jnp.array([[1.0, 0.1], [-0.1, 0.9]])


def problem(gain, wind):
    """Everything that user code may close over: constants, what is the same on all devices, what
    is not; with a loop and a call inside."""

    @jax.jit
    def turned(x):
        return A @ x

    def dynamics(x, u, t, params):
        def substep(x, _):
            return x + 0.05 * jnp.stack([x[1], u[0] - gain * jnp.sin(x[0]) + wind]), None

        return turned(jax.lax.scan(substep, x, None, length=2)[0])

    return lambda x, u, t, params: x @ x + 0.1 * gain * (u @ u), dynamics


def bounded(gain, wind, x):
    return mpc_solve(*problem(gain, wind), x, U, u_lower=-0.5, u_upper=0.5).u


def constrained(gain, wind, x):
    parts = Constraints(
        inequality=lambda x, u, t, params: x[1:] - 0.3, slack=Slack(gain), x_upper=2.0,
        rate=Rate(jnp.zeros(1), limit=0.4),
    )  # fmt: skip
    return mpc_solve(*problem(gain, wind), x, U, constraints=parts).u


def same_start(gain, wind, x):
    """What varies does so in the closure alone."""
    return mpc_solve(*problem(gain, wind), jnp.ones(2), U).u * x[0]


def episode(gain, wind, x):
    return receding_horizon(*problem(gain, 0.0), jnp.ones(2), U, num_steps=2,
                            plant=problem(gain, wind)[1]).u * x[0]  # fmt: skip


def unrolled(gain, wind, x):
    box = dict(u_lower=-0.5, u_upper=0.5)
    return ilqr_unrolled(*problem(gain, wind), x, U, num_iterations=3, **box).u


def lqr(gain, wind, x):
    F = jnp.tile(jnp.concatenate([A, jnp.ones((2, 1))], 1), (3, 1, 1)) * wind
    C = jnp.eye(3) * jnp.stack([1.0, 1.0, gain])[:, None]
    return lqr_solve(x, jnp.tile(C, (3, 1, 1)), jnp.zeros((3, 3)), F).u


def both(solve):
    """The plans on devices, and in one batch."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(AxisType.Auto,))

    def batch(gain, winds, x):
        return jax.vmap(lambda x: solve(gain, winds[0], x))(x)

    def together(gain, winds, x):
        halves = x.reshape(2, -1, 2)
        return jnp.concatenate([batch(gain, winds[i:], halves[i]) for i in range(2)])

    specs = dict(in_specs=(ALL, SPREAD, SPREAD), out_specs=SPREAD)
    return jax.shard_map(batch, mesh=mesh, **specs), together


def inputs():
    x = np.random.default_rng(0).normal(size=(4, 2))
    return jnp.array(2.0), jnp.array([0.3, 0.5]), jnp.asarray(x)


@pytest.mark.parametrize(
    "solve",
    [
        bounded,
        pytest.param(lqr, marks=pytest.mark.slow),
        pytest.param(unrolled, marks=pytest.mark.slow),
        pytest.param(same_start, marks=pytest.mark.slow),
        pytest.param(constrained, marks=pytest.mark.slow),
        pytest.param(episode, marks=pytest.mark.slow),
    ],
)
def test_plans_and_gradients_are_those_of_vmap(solve):
    gain, winds, x = inputs()
    loss = [
        jax.jit(jax.value_and_grad(lambda *args, f=f: jnp.sum(jnp.sin(f(*args))), (0, 1, 2)))
        for f in both(solve)
    ]
    got, want = (f(gain, winds, x) for f in loss)
    assert_close(got, want, 1e-11)


def test_second_derivatives_are_refused_by_name():
    spread, _ = both(bounded)
    gain, winds, x = inputs()
    slope = jax.grad(lambda gain: jnp.sum(spread(gain, winds, x)))
    with pytest.raises(TypeError, match=r"second derivatives .*shard_map .*check_vma=False"):
        jax.eval_shape(jax.jacrev(slope), gain)


@pytest.mark.slow
def test_outside_of_jit_and_what_looks_at_a_plan():
    gain, winds, x = inputs()

    def smallest(gain, wind, x):
        functions = problem(gain, wind)
        plan = mpc_solve(*functions, x, U, u_lower=-0.5, u_upper=0.5)
        numbers = certify(*functions, x, plan, u_lower=-0.5, u_upper=0.5)
        return numbers.curvature

    spread, together = both(smallest)
    assert_close(spread(gain, winds, x), jax.jit(together)(gain, winds, x), 1e-9)
