"""The functions of one problem applied at every stage, and across a batch on the last axis."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import trailing
from jaxmpc.problem import matrices
from jaxmpc.problem.problem import Problem, Theta


def stages(u: Array) -> Array:
    """The number t of every stage, [T], of controls u [T, m]."""
    return jnp.arange(u.shape[0], dtype=jnp.int32)


def _across(fn: Callable, theta: Theta) -> Callable:
    """``fn(*arrays, theta)`` of one problem as a function of the arrays, across the batch if there
    is one. All arrays have the batch but the stage, a scalar."""
    if not theta.lanes:
        return lambda *arrays: fn(*arrays, theta)
    of_theta = jax.tree.unflatten(jax.tree.structure(theta), theta.batched)

    def one(*args):
        *arrays, theta = args
        return fn(*arrays, dataclasses.replace(theta, lanes=(), batched=()))

    def call(*arrays):
        flags = (*(jnp.ndim(a) > 0 for a in arrays), of_theta)
        return trailing.vmap(one, flags, theta.lanes)(*arrays, theta)

    return call


def along(fn: Callable, theta: Theta, *arrays: Array) -> Array:
    """``fn(*arrays_t, t, theta)`` of one problem at every stage t."""
    return jax.vmap(_across(fn, theta))(*arrays, stages(arrays[0]))


def at_end(fn: Callable, theta: Theta, *arrays: Array) -> Array:
    """``fn(*arrays, theta)`` of one problem, at the end of the horizon."""
    return _across(fn, theta)(*arrays)


def transition(problem: Problem, theta: Theta, u: Array):
    """The dynamics as a function of (x, u, now), and what ``now`` is at each stage."""
    if "dynamics" in problem.given:
        return matrices.transition(theta, "dynamics")
    return _across(problem.dynamics, theta), stages(u)
