"""One problem as the solvers see it: pure functions, and every array that they depend on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes, trailing

Theta = Any  # {"params": ..., "constants": ...}


class Layout(NamedTuple):
    """Where the user's constraints are among the rows: how many rows each has, in this order."""

    inequality: int | None = None
    rate: int | None = None  # upper limits, then as many lower ones
    equality: int | None = None
    terminal_inequality: int | None = None
    terminal_equality: int | None = None
    states: int | None = None  # of the user; behind them the control before, if it counts


class Model(NamedTuple):
    """Pure functions of one problem; None where there are none."""

    cost: Callable[[Array, Array, Array, Theta], Array]
    dynamics: Callable[[Array, Array, Array, Theta], Array]
    terminal_cost: Callable[[Array, Theta], Array] | None
    constraint: Callable[[Array, Array, Array, Theta], Array] | None = None  # [p]
    final_constraint: Callable[[Array, Theta], Array] | None = None  # [q]
    layout: Layout = Layout()
    # Of cost, dynamics and terminal_cost, those that are given by their matrices.
    given: tuple[str, ...] = ()
    # For a batch, on the last axis of every array: its size, and which leaves of theta have it.
    batch: tuple[int, ...] = ()
    batched: Any = False

    def matrices(self, name: str, theta: Theta):
        """Those of a given function, for every stage or once for all; of a batch, on every lane."""
        given = theta["constants"][name]
        if not self.batch:
            return given
        (width,) = self.batch
        own = self.batched["constants"][name]
        return jax.tree.map(lambda a, own: a if own else lanes.spread(a, width), given, own)

    @property
    def constrained(self) -> bool:
        return self.constraint is not None or self.final_constraint is not None

    def across(self, fn: Callable) -> Callable:
        """``fn(*arrays, theta)`` of one problem, across the batch if there is one.

        All arrays have the batch but the stage, a scalar.
        """
        if not self.batch:
            return fn

        def call(*args):
            *arrays, theta = args
            flags = (*(jnp.ndim(a) > 0 for a in arrays), self.batched)
            return trailing.vmap(fn, flags, self.batch)(*arrays, theta)

        return call


class Data(NamedTuple):
    """Every array that the solution depends on, of one floating dtype where they are states,
    controls or bounds. The solution does not depend on ``u_init``, but which one is found does."""

    theta: Theta
    x_init: Array  # [n]
    u_init: Array  # [T, m]
    u_lower: Array  # [T, m]
    u_upper: Array  # [T, m]
    # Of the constraints, if there are any.
    prices: Any = None  # Prices
    multipliers: Any = None  # Rows, where the search starts
