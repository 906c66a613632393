"""The paper's `nn`: an LSTM that reads a state and writes the sequence of controls for it.

The text says no more than "an LSTM that takes the state x as input and predicts the nominal action
sequence". As in the published code, the state is embedded by three layers and fed to an LSTM cell;
three layers decode its cell state into a control, and that control, embedded, is the next input.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

Params = dict[str, Any]


def init(key: Array, n: int, m: int, hidden: int) -> Params:
    """Uniform within ±1/√(inputs), ±1/√hidden for the cell."""
    embed_x, embed_u, decode, cell = jax.random.split(key, 4)
    return dict(
        embed_x=_init_layers(embed_x, (n, hidden, hidden, hidden)),
        embed_u=_init_layers(embed_u, (m, hidden, hidden, hidden)),
        decode=_init_layers(decode, (hidden, hidden, hidden, m)),
        cell=_init_layer(cell, 2 * hidden, 4 * hidden, 1 / math.sqrt(hidden)),
    )


def controls(params: Params, x: Array, T: int) -> Array:
    """The controls [batch, T, m] for states x [batch, n]."""

    def step(carry, _):
        y, h, c = carry
        gates = _layer(params["cell"], jnp.concatenate((y, h), -1))
        i, f, g, o = jnp.split(gates, 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        u = _layers(params["decode"], c)
        return (_layers(params["embed_u"], u), h, c), u

    y = _layers(params["embed_x"], x)
    zeros = jnp.zeros_like(y)
    _, u = lax.scan(step, (y, zeros, zeros), None, T)
    return jnp.moveaxis(u, 0, 1)


def _init_layer(key, inputs: int, outputs: int, bound: float):
    weights, bias = jax.random.split(key)
    draw = dict(minval=-bound, maxval=bound)
    return jax.random.uniform(weights, (inputs, outputs), **draw), jax.random.uniform(
        bias, (outputs,), **draw
    )


def _init_layers(key, sizes):
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [_init_layer(key, a, b, 1 / math.sqrt(a)) for key, a, b in pairs]


def _layer(params, x):
    weights, bias = params
    return x @ weights + bias


def _layers(params, x):
    *inner, last = params
    for layer in inner:
        x = jax.nn.relu(_layer(layer, x))
    return _layer(last, x)
