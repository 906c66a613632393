"""Imitation of a linear-quadratic expert: section 5.2 of the paper.

    min Σ_{t<T} ½ (‖x_t‖² + ‖u_t‖²) + pᵀ(x_t, u_t)   s.t.   x_{t+1} = A x_t + B u_t,   |u_t| ≤ 1

with n = m = 3, T = 5, p = 0. The learner knows everything but A and B, and minimises the imitation
loss E_x ‖τ(x; θ) − τ(x; θ̂)‖², τ = (x_t, u_t) for t < T, over x_0 ~ N(0, I) with a batch of 32 an
iteration. A = I + 0.2 N(0, 1), B = N(0, 1) for the expert and for every start. The model loss is
the mean of (θ − θ̂)².

The published code differs from the text: no bounds, p ~ N(0, I), batches of 128; and its loss is
the mean over x plus the mean over u, a fifteenth of the one above. The text does not say RMSprop's
settings; the code has a learning rate of 1e-2 and PyTorch's decay of 0.99.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from bench.paper.trials import Run
from jaxmpc import Status, mpc_solve

N, T = 3, 5
TEXT, PUBLISHED = "text", "published code"


class Setting(NamedTuple):
    variant: str = TEXT
    expert: int = 42  # seed
    batch: int = 32


def _sample_model(key: Array) -> tuple[Array, Array]:
    a, b = jax.random.split(key)
    return jnp.eye(N) + 0.2 * jax.random.normal(a, (N, N)), jax.random.normal(b, (N, N))


def _cost(x, u, t, params):
    _, _, p = params
    return 0.5 * (jnp.sum(x**2) + jnp.sum(u**2)) + jnp.dot(p, jnp.concatenate((x, u)))


def _dynamics(x, u, t, params):
    A, B, _ = params
    return A @ x + B @ u


def _plans(setting: Setting, model, p, x_init):
    """τ [batch, T, 2n] and whether each problem converged."""
    limit = 1.0 if setting.variant == TEXT else jnp.inf

    def solve(x_init):
        zeros = jnp.zeros((T, N))
        return mpc_solve(
            _cost, _dynamics, x_init, zeros, (*model, p), u_lower=-limit, u_upper=limit
        )

    solution = jax.vmap(solve)(x_init)
    tau = jnp.concatenate((solution.x[:, :-1], solution.u), -1)
    return tau, solution.status == Status.CONVERGED


_OPTIMIZER = optax.rmsprop(1e-2, decay=0.99, eps=1e-8, eps_in_sqrt=False)


def _iteration(setting: Setting, seed: Array, state, number: Array):
    model, optimizer = state
    expert_key = jax.random.key(setting.expert)
    expert = _sample_model(expert_key)
    linear = jax.random.normal(jax.random.fold_in(expert_key, 2), (2 * N,))
    p = linear if setting.variant == PUBLISHED else jnp.zeros(2 * N)
    key = jax.random.fold_in(jax.random.key(seed), number + 1)
    x_init = jax.random.normal(key, (setting.batch, N))

    def loss(model):
        tau, converged = _plans(setting, model, p, x_init)
        wanted, expert_converged = _plans(setting, expert, p, x_init)
        error = jnp.mean(jnp.sum((tau - wanted) ** 2, (-2, -1)))
        return error, jnp.mean(converged & expert_converged)

    (imitation, converged), gradient = jax.value_and_grad(loss, has_aux=True)(model)
    step, optimizer = _OPTIMIZER.update(gradient, optimizer)
    model = optax.apply_updates(model, step)
    error = jnp.concatenate([(a - b).ravel() for a, b in zip(model, expert, strict=True)])
    curves = dict(imitation=imitation, model=jnp.mean(error**2), converged=converged)
    return (model, optimizer), curves


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(setting: Setting, chunk: int, seeds: Array, state, number: Array):
    def iterate(state, number):
        one = functools.partial(_iteration, setting)
        return jax.vmap(one, (0, 0, None))(seeds, state, number)

    return lax.scan(iterate, state, number + jnp.arange(chunk))


def run(setting: Setting, seeds: list[int], num_iterations: int, chunk: int) -> Run:
    """A run of ``trials``, a random start for each seed; an epoch is an iteration."""

    def start():
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))
        model = jax.vmap(_sample_model)(keys(jnp.array(seeds)))
        return model, jax.vmap(_OPTIMIZER.init)(model)

    words = ["lqr", setting.variant, str(setting.expert)]
    return Run(
        name="-".join(words).replace(" ", "_"),
        settings=setting._asdict() | dict(seeds=seeds),
        num_epochs=num_iterations,
        chunk=chunk,
        start=start,
        advance=lambda state, number: _advance(setting, chunk, jnp.array(seeds), state, number),
        weight=float(setting.batch),
    )
