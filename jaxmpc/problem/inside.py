"""Derivatives from inside the bounds of the controls.

A simulator clips its actuators to the range that u_lower and u_upper name as well. Between the
bounds the clip is the identity, but at a bound, where a saturated plan sits, JAX gives it the slope
½, and other ways to write it have the slope 0: what counts for a plan within the bounds is the
derivative from inside. So a function with a kink that depends on the control is differentiated a
few roundings inside. Its values are those at the control itself.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from jaxmpc.batch import lanes
from jaxmpc.problem.matrices import at_stage

# How far inside: more than what a change of units in front of a clip rounds away.
_ROUNDINGS = 8
# What has kinks or jumps, or is how they are made.
_KINKED = frozenset(
    """abs argmax argmin ceil clamp cond cummax cummin eq floor ge gt is_finite le lt max min ne
    reduce_max reduce_min reduce_precision rem round select_n sign sort top_k while""".split()
)


def has_kinks(jaxpr: core.Jaxpr, varies: list[bool]) -> bool:
    """Whether there may be kinks in the inputs that vary."""
    moving = {var for var, moves in zip(jaxpr.invars, varies, strict=True) if moves}
    for eqn in jaxpr.eqns:
        if any(isinstance(a, core.Var) and a in moving for a in eqn.invars):
            if eqn.primitive.name in _KINKED:
                return True
            if any(has_kinks(a, [True] * len(a.invars)) for a in core.jaxprs_in_params(eqn.params)):
                return True
            moving.update(eqn.outvars)
    return False


def inner_bounds(lower: Array, upper: Array) -> tuple[Array, Array]:
    """What lies between the bounds [T, m] but for a few roundings; constants to differentiation.

    A rounding is one of the bound or, where that is less, of the range of this control along the
    horizon: it may be normalized to its range before it is clipped. A range that is no range, a
    large number in place of no bound, must not become a step: it counts up to eps^(-¼), and none at
    all as 1. Between equal bounds nothing is inside: then it is towards the middle of the range, or
    without one towards 0, and from 0 upwards.
    """
    lower, upper = lax.stop_gradient((lower, upper))
    lowest = jnp.min(lower, axis=0, keepdims=True)
    highest = jnp.max(upper, axis=0, keepdims=True)
    width = highest - lowest
    most = lanes.eps(lower) ** -0.25

    def step(bound):
        size = jnp.abs(bound)
        usable = (width > 0) & jnp.isfinite(width)
        alone = jnp.where(bound == 0, 1, size)
        size = jnp.where(usable, jnp.maximum(size, jnp.minimum(width, most)), alone)
        return jnp.where(jnp.isfinite(bound), _ROUNDINGS * lanes.eps(bound) * size, 0)

    low, high = lower + step(lower), upper - step(upper)
    middle = 0.5 * (lower + upper)
    up = jnp.where(lowest == highest, lower <= 0, lower - lowest < highest - lower)
    beside = jnp.where(up, lower + step(lower), lower - step(lower))
    middle = jnp.where(lower == upper, beside, middle)
    crossed = low > high
    return jnp.where(crossed, middle, low), jnp.where(crossed, middle, high)


def inner(u: Array, low: Array, high: Array) -> Array:
    """u moved to between the inner bounds, which does not count as a function of u."""
    return u + lax.stop_gradient(jnp.clip(u, low, high) - u)


def from_inside(fn: Callable) -> Callable:
    """``fn(x, u, t, theta)`` with the derivatives that it has inside of ``theta``'s bounds."""
    call = jax.custom_jvp(fn)

    def rule(primals, tangents):
        x, u, t, theta = primals
        low, high = (at_stage(a, 1, t) for a in theta.constants["inside"])
        return call(*primals), _pushforward(fn, (x, inner(u, low, high), t, theta), tangents)

    call.defjvp(rule, symbolic_zeros=True)
    return call


def _pushforward(fn: Callable, primals: tuple, tangents: tuple) -> Any:
    """The tangent of ``fn(*primals)``.

    To ``jax.jvp`` a tangent of zeros is a tangent like any other: a network's weights would be
    pushed forward through every derivative in states and controls.
    """
    leaves, tree = jax.tree.flatten(primals)
    directions = jax.tree.leaves(tangents)
    moved = [i for i, a in enumerate(directions) if not isinstance(a, SymbolicZero)]

    def of_moved(*some):
        every = list(leaves)
        for i, a in zip(moved, some, strict=True):
            every[i] = a
        return fn(*jax.tree.unflatten(tree, every))

    _, tangent = jax.jvp(of_moved, [leaves[i] for i in moved], [directions[i] for i in moved])
    return tangent
