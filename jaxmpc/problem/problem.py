"""One problem as the solvers see it: pure functions, and every array that they depend on."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

from jaxmpc.problem.prices import Prices
from jaxmpc.riccati.point import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Theta:
    """What the functions depend on beside state, control and stage."""

    params: Any  # as the user passed them
    constants: dict[str, Any]  # of each function, by name: what it closes over, or its matrices
    # Of a batch, on the last axis: its size, and which leaves have it. () for one problem.
    lanes: tuple[int, ...] = dataclasses.field(default=(), metadata=dict(static=True))
    batched: tuple[bool, ...] = dataclasses.field(default=(), metadata=dict(static=True))


class Problem(NamedTuple):
    """Pure functions of one problem, and how the user's constraints lie among its rows."""

    cost: Callable[[Array, Array, Array, Theta], Array]
    dynamics: Callable[[Array, Array, Array, Theta], Array]
    terminal_cost: Callable[[Array, Theta], Array]
    constraint: Callable[[Array, Array, Array, Theta], Array]  # the rows of a stage, [p]
    final_constraint: Callable[[Array, Theta], Array]  # those of the end, [q]
    given: tuple[str, ...]  # which of cost, dynamics and terminal_cost are given by matrices
    num_states: int  # of the user; behind them stands the control before, if it counts
    forward_only: tuple[str, ...] = ()  # the functions that have no reverse mode
    counts: tuple[int, ...] = ()  # how many rows each of ``constraints.KINDS`` has

    @property
    def gradient(self) -> Callable:
        """``jax.grad``, in the mode that there is."""
        return jax.jacfwd if self.forward_only else jax.grad

    @property
    def hessian(self) -> Callable:
        """``jax.hessian``, likewise."""
        if not self.forward_only:
            return jax.hessian
        return lambda fn: jax.jacfwd(jax.jacfwd(fn))

    @property
    def constrained(self) -> bool:
        return any(self.counts)


class Data(NamedTuple):
    """Every array that the solution depends on, of one floating dtype where they are states,
    controls or bounds. The solution does not depend on ``u_init``, ``x_guess``, ``multipliers``
    and ``sizes``, but which one is found does."""

    theta: Theta
    x_init: Array  # [n]
    u_init: Array  # [T, m]
    u_lower: Array  # [T, m]
    u_upper: Array  # [T, m]
    prices: Prices
    multipliers: Rows  # where the search starts
    unmoved: Array  # [p] bool, the hard rows of the first stage that its control does not move
    x_guess: Array | None = None  # [T+1, n], where the states start; None: at the rollout
    # [n+m], how large states and controls are; 0, or None for all: for the solver to find.
    sizes: Array | None = None
