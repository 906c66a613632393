"""A filter: a step has to lower the violation or the objective of all that came before.

Source: Wächter and Biegler 2006, Mathematical Programming 106, section 2.3.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

_ENTRIES = 12
_MARGIN = 1e-5  # of violation and objective against the entries
_ARMIJO = 1e-4
_MOST = 1e4  # the largest violation allowed, relative to the first
_LITTLE = 1e-4  # the violation below which the objective has to fall, likewise


class Filter(NamedTuple):
    theta: Array  # [entries], violations
    phi: Array  # [entries], objectives
    next: Array  # where the next entry goes
    most: Array  # the largest violation allowed; 0: to begin anew


class Candidate(NamedTuple):
    """A point as the filter sees it."""

    theta: Array
    phi: Array


def empty(one: Array) -> Filter:
    """``one``: one a problem."""
    entries = jnp.full((_ENTRIES, *one.shape), jnp.inf, one.dtype)
    return Filter(entries, entries, jnp.zeros(one.shape, jnp.int32), jnp.zeros_like(one))


def begun(filter: Filter, anew: Array, theta: Array, scale: Array) -> Filter:
    """Without its entries, where ``anew``."""
    return Filter(
        jnp.where(anew, jnp.inf, filter.theta),
        jnp.where(anew, jnp.inf, filter.phi),
        filter.next,
        jnp.where(anew, _MOST * jnp.maximum(theta, scale), filter.most),
    )


def accepts(
    filter: Filter,
    here: Candidate,
    new: Candidate,
    slope: Array,
    alpha: Array,
    scale: Array,
    noise: Array,
) -> tuple[Array, Array]:
    """Whether the point after a step of length alpha is accepted, and whether that is for its
    objective alone; ``slope`` is the objective's along the step, ``noise`` its rounding."""
    lower_theta = new.theta <= (1 - _MARGIN) * filter.theta
    lower_phi = new.phi <= filter.phi - _MARGIN * filter.theta
    passes = jnp.isfinite(new.theta) & jnp.isfinite(new.phi) & (new.theta <= filter.most)
    passes &= jnp.all(lower_theta | lower_phi, axis=0)
    gain = jnp.maximum(-slope, 0)
    # With the objective's scale for a unit, the exponents are those of the source.
    switching = (slope < 0) & (alpha * (gain / scale) ** 2.3 > (here.theta / scale) ** 1.1)
    by_objective = switching & (here.theta <= _LITTLE * jnp.maximum(scale, filter.most / _MOST))
    falls = new.phi <= here.phi - _ARMIJO * alpha * gain + noise
    either = new.theta <= (1 - _MARGIN) * here.theta
    either |= new.phi <= here.phi - _MARGIN * here.theta + noise
    good = passes & jnp.where(by_objective, falls, either)
    return good, by_objective & falls


def with_entry(filter: Filter, here: Candidate, adds: Array) -> Filter:
    """With the point that a step led away from, where ``adds``."""
    slots = jnp.arange(_ENTRIES, dtype=jnp.int32).reshape((-1,) + (1,) * adds.ndim)
    there = (slots == filter.next % _ENTRIES) & adds
    return filter._replace(
        theta=jnp.where(there, (1 - _MARGIN) * here.theta, filter.theta),
        phi=jnp.where(there, here.phi - _MARGIN * here.theta, filter.phi),
        next=filter.next + jnp.where(adds, 1, 0).astype(filter.next.dtype),
    )
