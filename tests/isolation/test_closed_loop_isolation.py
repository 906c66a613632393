"""Batches of episodes: a bad one spoils nothing of the others.

The controller plans one stage ahead, so that what it does has a closed form.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc import Options, Status, receding_horizon

N, PRICE, UPPER = 3, 0.5, 0.6
SHARED = {"drift": jnp.array([[0.2, 0.3], [-0.1, 0.4]]), "weight": jnp.array(2.0)}
GOOD = {
    name: jnp.asarray(value)
    for name, value in dict(x=[1.0, -0.5], gain=0.1, wind=0.02, lower=-0.6).items()
}
# What is bad about the second of two episodes, and the status of its first step.
BAD = {
    "x NaN": ("x", [np.nan, 0.0], Status.NONFINITE),
    "x infinite": ("x", [0.0, np.inf], Status.NONFINITE),
    "x huge": ("x", [1e200, 0.0], Status.NONFINITE),
    "x large": ("x", [1e30, 0.0], Status.CONVERGED),  # the plant goes to 1e90, then overflows
    "x where the plant has no derivative": ("x", [0.0, 0.0], Status.CONVERGED),
    "parameter NaN": ("gain", np.nan, Status.NONFINITE),
    "parameter infinite": ("gain", -np.inf, Status.NONFINITE),
    "parameter huge": ("gain", 1e300, Status.CONVERGED),
    "closure NaN": ("wind", np.nan, Status.NONFINITE),
    "bounds cross": ("lower", 1.0, Status.INFEASIBLE),
    "bound NaN": ("lower", np.nan, Status.INFEASIBLE),
}


def moved_on(x, u, shared, own):
    """Drag has no derivative at rest."""
    drag = 0.1 * x * jnp.linalg.norm(x)
    drift = 0.1 * jnp.tanh(shared["drift"] @ x)
    return x + u + drift - drag - own["gain"] * x**3 + own["wind"]


def episode(shared, own, **options):
    """One of the library; its plant closes over the wind."""

    def plant(x, u, t, params):
        shared, gain = params
        return moved_on(x, u, shared, own | {"gain": gain})

    return receding_horizon(
        lambda x, u, t, params: 0.5 * PRICE * u @ u,
        lambda x, u, t, params: x + u,
        own["x"], jnp.zeros((1, 2)), (shared, own["gain"]), num_steps=N, plant=plant,
        terminal_cost=lambda x, params: 0.5 * params[0]["weight"] * x @ x,
        u_lower=own["lower"], u_upper=UPPER, options=Options(**options),
    )  # fmt: skip


def closed_form(shared, own, steps=N):
    """The same without any solver: x and u of an episode, and its stage costs."""
    x, found = own["x"], []
    for _ in range(steps):
        u = jnp.clip(-shared["weight"] / (PRICE + shared["weight"]) * x, own["lower"], UPPER)
        found.append((x, u, 0.5 * PRICE * u @ u))
        x = moved_on(x, u, shared, own)
    xs, us, costs = (jnp.stack(a) for a in zip(*found, strict=True))
    return jnp.concatenate([xs, x[None]]), us, costs


def loss(x, u, costs):
    return jnp.sum(jnp.sin(x)) + jnp.sum(u**2) + jnp.sum(costs)


def both(**second):
    """Two episodes, the second spoilt."""
    return {name: jnp.stack([a, jnp.asarray(second.get(name, a))]) for name, a in GOOD.items()}


@jax.jit
def masked(shared, own):
    """The gradient of a loss that leaves out what its status does not vouch for."""

    def total(shared, own):
        e = jax.vmap(episode, (None, 0))(shared, own)
        ok = jnp.all(e.status == Status.CONVERGED, axis=1) & ~jnp.array([False, True])
        return jnp.sum(jnp.where(ok, jax.vmap(loss)(e.x, e.u, e.costs), 0)), e

    return jax.grad(total, (0, 1), has_aux=True)(shared, own)


WANT = jax.grad(lambda *args: loss(*closed_form(*args)), (0, 1))(SHARED, GOOD)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_episode_leaves_values_and_gradients_of_the_others_alone(kind):
    name, value, status = BAD[kind]
    (shared, own), e = masked(SHARED, both(**{name: value}))
    assert e.status[1, 0] == status
    assert np.all(np.asarray(e.status[0]) == Status.CONVERGED)
    assert_close((e.x[0], e.u[0], e.costs[0]), closed_form(SHARED, GOOD), 1e-12)
    assert_close(shared, WANT[0], 1e-10)
    for name in GOOD:
        assert_close(own[name][0], WANT[1][name], 1e-10)
        assert np.all(np.asarray(own[name][1]) == 0)


def test_an_episode_whose_steps_all_converged_is_finite():
    for name, value, _ in BAD.values():
        _, e = masked(SHARED, both(**{name: value}))
        if np.all(np.asarray(e.status[1]) == Status.CONVERGED):
            assert np.all(np.isfinite(e.x[1]))
            assert np.all(np.isfinite(e.costs[1]))
    # The last step of the plant overflows: no solve comes after it.
    _, e = masked(SHARED, both(gain=1e300))
    assert not np.all(np.isfinite(e.x[1]))


def test_what_the_loss_makes_of_bad_rows_does_not_matter():
    """Neither does a loss of NaN, nor one whose slope there is infinite."""

    @jax.jit
    @jax.grad
    def slope(shared, own):
        e = jax.vmap(episode, (None, 0))(shared, own)
        each = jax.vmap(loss)(e.x, e.u, e.costs)
        steep = jnp.sum(jnp.exp(e.x[1] ** 2)) + jnp.sum(jnp.exp(e.costs[1]))
        return each[0] + jnp.where(jnp.isfinite(steep), steep, 0)

    for kind in ("x NaN", "x huge", "parameter infinite", "closure NaN"):
        name, value, _ = BAD[kind]
        assert_close(slope(SHARED, both(**{name: value})), WANT[0], 1e-10)


@pytest.mark.slow
def test_with_the_rule_of_forward_mode_too():
    @jax.jit
    @jax.grad
    def slope(shared, own):
        e = jax.vmap(lambda own: episode(shared, own, derivative="jvp"))(own)
        return loss(e.x[0], e.u[0], e.costs[0])

    for kind in ("x NaN", "x huge", "parameter infinite"):
        name, value, _ = BAD[kind]
        assert_close(slope(SHARED, both(**{name: value})), WANT[0], 1e-10)


def test_what_happened_before_an_episode_went_bad_counts():
    """Until the plant overflows its derivatives are there."""
    own = GOOD | {"x": jnp.array([0.5, 0.1]), "gain": jnp.array(-1e40)}

    def first(x, u, costs):
        return jnp.sum(u[0]) + jnp.sum(x[1]) + jnp.sum(costs[0])

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def slope(shared):
        e = episode(shared, own)
        return first(e.x, e.u, e.costs), e

    got, e = slope(SHARED)
    assert list(np.isfinite(np.asarray(e.x)).all(axis=1)) == [True, True, True, False]
    assert_close(got, jax.grad(lambda shared: first(*closed_form(shared, own, 1)))(SHARED), 1e-12)


def test_the_policy_nan_stops_at_a_bad_plant():
    """Where every solve converges, and the plant has no derivative."""

    @jax.jit
    @jax.grad
    def slope(shared, x):
        return jnp.sum(episode(shared, GOOD | {"x": x}, unconverged="nan").x)

    assert np.all(np.isfinite(slope(SHARED, jnp.array([0.1, 0.0]))["drift"]))
    assert np.all(np.isnan(slope(SHARED, jnp.zeros(2))["drift"]))


def test_a_plant_that_no_one_differentiates_need_not_be_differentiable():
    def plant(x, u, t, params):
        return jax.lax.while_loop(lambda x: jnp.max(x) > 1, lambda x: x / 2, x + u)

    e = receding_horizon(
        lambda x, u, t, params: u @ u, lambda x, u, t, params: x + u,
        jnp.array([3.0]), jnp.zeros((1, 1)), num_steps=2, plant=plant,
    )  # fmt: skip
    assert_close(e.x[:, 0], jnp.array([3.0, 0.75, 0.75]), 1e-12)


def test_a_plant_may_define_its_own_derivative():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (twice(x), None), lambda _, slope: (3 * slope,))

    @jax.jit
    @jax.grad
    def slope(x):
        def one(x):
            return receding_horizon(
                lambda x, u, t, params: u @ u, lambda x, u, t, params: x + u,
                x, jnp.zeros((1, 1)), num_steps=2, plant=lambda x, u, t, params: twice(x),
            )  # fmt: skip

        return jnp.sum(jax.vmap(one)(x).x[:, -1])

    assert_close(slope(jnp.ones((2, 1))), jnp.full((2, 1), 9.0), 1e-12)


def test_a_plant_with_effects_is_called_once_a_step(capfd):
    def plant(x, u, t, params):
        jax.debug.print("step {t}", t=t)
        return x + u

    @jax.jit
    @jax.grad
    def slope(x):
        return jnp.sum(receding_horizon(
            lambda x, u, t, params: u @ u, lambda x, u, t, params: x + u,
            x, jnp.zeros((1, 1)), num_steps=2, plant=plant,
        ).x)  # fmt: skip

    slope(jnp.ones(1)).block_until_ready()
    jax.effects_barrier()
    assert re.findall(r"step \d", capfd.readouterr().out) == ["step 0", "step 1"]


def test_weights_that_episodes_share_have_no_gradient_per_episode_in_memory():
    """Nor does the loop keep them for each of its steps."""
    batch, width, steps = 37, 101, 5
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (width, 2)), jax.random.normal(keys[1], (2, width))

    def plant(x, u, t, weights):
        V, W = weights
        return x + u + 0.1 * (W @ jnp.tanh(V @ x)) / width

    def total(weights, x_init):
        def one(x):
            return receding_horizon(
                lambda x, u, t, weights: u @ u, lambda x, u, t, weights: x + u,
                x, jnp.zeros((1, 2)), weights, num_steps=steps, plant=plant,
            )  # fmt: skip

        return jnp.sum(jax.vmap(one)(x_init).x ** 2)

    x_init = jax.random.normal(keys[2], (batch, 2))
    text = jax.jit(jax.grad(total)).lower(weights, x_init).compile().as_text()
    # What is inside of a fused loop is never stored.
    text = re.sub(r"(?ms)^%\S*(fused|wrapped)_\S* \(.*?^}$", "", text)
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f64\[([\d,]+)\]", text)}
    assert any(batch in s and width in s for s in shapes)  # the activations
    assert [
        s for s in shapes if width in s and ({batch, 2} <= set(s) or {steps, 2} <= set(s))
    ] == []
