"""The constraints of the user as rows of two functions, that of a stage and that of the end.

What bounds or prices the change of the controls needs the control before. With a ``Rate`` the state
is therefore (x_t, u_{t−1}), and the rate a cost and two rows a control like any others.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmpc import validation
from jaxmpc.problem.prices import Prices
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.riccati.point import Rows
from jaxmpc.types import Constraints, Multipliers, Rate, Slack, Solution


class Kind(NamedTuple):
    """One kind of constraint. It has the same name in ``Constraints`` and in ``Multipliers``."""

    name: str
    rows: str  # the letter of their number
    final: bool = False
    equality: bool = False
    slack: str | None = None  # the entry of ``Constraints`` that makes them soft


# Every kind, in the order in which they lie among the rows. All but the rate are functions.
KINDS = (
    Kind("inequality", "p", slack="slack"),
    Kind("rate", "m"),  # the upper limits, then as many lower ones
    Kind("equality", "r", equality=True),
    Kind("terminal_inequality", "q", final=True, slack="terminal_slack"),
    Kind("terminal_equality", "s", final=True, equality=True),
)


def constraint_functions(constraints: Constraints) -> dict[str, Callable]:
    """The user's functions, by the names that errors give them."""
    given = {kind.name: getattr(constraints, kind.name) for kind in KINDS if kind.name != "rate"}
    return {f"constraints.{name}": fn for name, fn in given.items() if fn is not None}


def with_constraints(
    problem: Problem,
    data: Data,
    functions: dict[str, Callable],
    sizes: dict[str, int],
    constraints: Constraints,
) -> tuple[Problem, Data]:
    """The problem with its constraints; ``functions`` are pure, and ``sizes`` their rows."""
    T, m = data.u_init.shape
    dtype = data.x_init.dtype
    functions = {name.removeprefix("constraints."): fn for name, fn in functions.items()}
    counts = {name.removeprefix("constraints."): size for name, size in sizes.items()}
    rate = constraints.rate
    if rate is not None:
        problem, data, functions = _with_rate(problem, data, functions, rate)
        counts["rate"] = 2 * m if rate.limit is not None else 0
    problem = problem._replace(
        constraint=_together((functions.get(k.name) for k in KINDS if not k.final), dtype),
        final_constraint=_together((functions.get(k.name) for k in KINDS if k.final), dtype),
        counts=tuple(counts.get(kind.name, 0) for kind in KINDS),
    )
    prices, multipliers = [], []
    for kind, count in zip(KINDS, problem.counts, strict=True):
        shape = (count,) if kind.final else (T, count)
        prices.append(_prices(kind, shape, constraints, dtype))
        multipliers.append(_first_multipliers(kind, shape, constraints.multipliers, dtype))
    return problem, data._replace(
        prices=Prices(*(_as_rows(part) for part in zip(*prices, strict=True))),
        multipliers=_as_rows(multipliers),
    )


def _together(functions, dtype):
    functions = [fn for fn in functions if fn is not None]
    if not functions:
        return lambda *args: jnp.zeros(0, dtype)
    if len(functions) == 1:
        return functions[0]
    return lambda *args: jnp.concatenate([fn(*args) for fn in functions])


def _as_rows(blocks) -> Rows:
    """Something for each kind of constraint, as one array for the stages and one for the end."""
    blocks = list(zip(KINDS, blocks, strict=True))
    stage = [block for kind, block in blocks if not kind.final]
    final = [block for kind, block in blocks if kind.final]
    return Rows(jnp.concatenate(stage, axis=-1), jnp.concatenate(final, axis=-1))


def _prices(kind: Kind, shape, constraints: Constraints, dtype) -> tuple[Array, Array, Array]:
    """Those of one kind, as in ``Prices``."""
    slack: Slack | None = getattr(constraints, kind.slack) if kind.slack else None
    where = f"constraints.{kind.slack}"
    if slack is None:
        slack = Slack(np.inf, 0.0)
    elif not shape[-1]:
        raise ValueError(f"{where} is a price of inequalities, but there are none of that kind")
    letters = f"[{kind.rows}]" if kind.final else f"[T, {kind.rows}]"
    weight = functools.partial(validation.weight, shape=shape, meaning=letters)
    linear = weight(f"{where}.linear", slack.linear)
    quadratic = weight(f"{where}.quadratic", slack.quadratic, finite=True)
    lower = jnp.full(shape, -np.inf if kind.equality else 0, dtype)
    return lower, linear.astype(dtype), quadratic.astype(dtype)


def _first_multipliers(kind: Kind, shape, given: Multipliers | None, dtype) -> Array:
    """Where the search starts: 0, if the user does not say."""
    value = getattr(given, kind.name) if given is not None and shape[-1] else None
    if value is None:
        return jnp.zeros(shape, dtype)
    where = f"constraints.multipliers.{kind.name}"
    array = validation.floating(where, value).astype(dtype)
    if kind.name == "rate":
        validation.has_shape(where, array, (shape[0], shape[1] // 2), "[T, m]")
        return jnp.maximum(jnp.concatenate([array, -array], axis=1), 0)
    letters = f"[{kind.rows}]" if kind.final else f"[T, {kind.rows}]"
    validation.has_shape(where, array, shape, letters)
    return array


def _with_rate(problem: Problem, data: Data, functions: dict[str, Callable], rate: Rate):
    """The problem with the control before in its state, and the rows that bound the change."""
    T, m = data.u_init.shape
    n, dtype = data.x_init.shape[0], data.x_init.dtype
    previous = validation.floating("constraints.rate.previous", rate.previous)
    validation.has_shape("constraints.rate.previous", previous, (m,), "[m]")
    given = {
        name: validation.weight(
            f"constraints.rate.{name}", value, (T, m), "[T, m]", finite=name == "weight"
        ).astype(dtype)
        for name, value in (("limit", rate.limit), ("weight", rate.weight))
        if value is not None
    }

    def cost(x, u, t, theta):
        value = problem.cost(x[:n], u, t, theta)
        if "weight" in given:
            value += 0.5 * jnp.sum(theta.constants["rate"]["weight"][t] * (u - x[n:]) ** 2)
        return value

    def change(x, u, t, theta):
        limit = theta.constants["rate"]["limit"][t]
        # No limit, no row: any number below 0 will do.
        finite = jnp.isfinite(limit)
        limit = jnp.where(finite, limit, 0)
        up, down = u - x[n:] - limit, x[n:] - u - limit
        return jnp.concatenate([jnp.where(finite, up, -1), jnp.where(finite, down, -1)])

    def of_state(fn):
        return lambda x, *rest: fn(x[:n], *rest)

    def dynamics(x, u, t, theta):
        return jnp.concatenate([problem.dynamics(x[:n], u, t, theta), u])

    augmented = problem._replace(
        cost=cost, dynamics=dynamics, terminal_cost=of_state(problem.terminal_cost), given=()
    )
    constants = data.theta.constants | {"rate": given}
    data = data._replace(
        theta=dataclasses.replace(data.theta, constants=constants),
        x_init=jnp.concatenate([data.x_init, previous.astype(dtype)]),
    )
    functions = {name: of_state(fn) for name, fn in functions.items()}
    return augmented, data, functions | ({"rate": change} if "limit" in given else {})


def named_multipliers(problem: Problem, rows: Rows) -> Multipliers:
    """Multipliers by the user's names; None for those that the problem does not have."""
    found: dict[str, Array] = {}
    begins = {False: 0, True: 0}
    for kind, count in zip(KINDS, problem.counts, strict=True):
        if count:
            begin = begins[kind.final]
            own = (rows.final if kind.final else rows.stage)[..., begin : begin + count]
            if kind.name == "rate":
                own = own[..., : count // 2] - own[..., count // 2 :]
            found[kind.name] = own
            begins[kind.final] += count
    return Multipliers(**found)


def for_user(problem: Problem, solution: Solution) -> Solution:
    """A solution in the terms of the user's problem."""
    n = problem.num_states
    multipliers = None
    if problem.constrained:
        multipliers = named_multipliers(problem, solution.multipliers)
    return dataclasses.replace(
        solution, x=solution.x[:, :n], costate=solution.costate[:, :n], multipliers=multipliers
    )
