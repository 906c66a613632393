"""The constraints of the user as rows of two functions, that of a stage and that of the end.

What bounds or prices the change of the controls needs the control before. With a ``Rate`` the state
is therefore (x_t, u_{t−1}), and the rate a cost and two rows a control like any others.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmpc import validation
from jaxmpc.problem.prices import Prices
from jaxmpc.problem.problem import Data, Layout, Model
from jaxmpc.riccati.rows import Rows
from jaxmpc.types import Constraints, Multipliers, Rate, Slack, Solution

_STAGE = ("inequality", "equality")
_FINAL = ("terminal_inequality", "terminal_equality")


def constraint_functions(constraints: Constraints) -> dict[str, Callable]:
    """The user's functions, by the names that errors give them."""
    given = {f"constraints.{name}": getattr(constraints, name) for name in (*_STAGE, *_FINAL)}
    return {name: fn for name, fn in given.items() if fn is not None}


def with_constraints(
    model: Model,
    data: Data,
    functions: dict[str, Callable],
    sizes: dict[str, int],
    constraints: Constraints,
) -> tuple[Model, Data]:
    """The problem with its constraints; ``functions`` are pure, and ``sizes`` their rows."""
    T, m = data.u_init.shape
    dtype = data.x_init.dtype
    named = {name: functions.get(f"constraints.{name}") for name in (*_STAGE, *_FINAL)}
    counts = {name: sizes.get(f"constraints.{name}") for name in named}
    rate = constraints.rate
    limited = rate is not None and rate.limit is not None
    layout = Layout(
        **counts,
        rate=m if limited else None,
        states=None if rate is None else data.x_init.shape[0],
    )
    stage = [named[name] for name in _STAGE]
    change = None
    if rate is not None:
        model, data, stage, change = _with_rate(model, data, stage, rate)
    model = model._replace(
        constraint=_together([stage[0], change, stage[1]]),
        final_constraint=_together([named[name] for name in _FINAL]),
        layout=layout,
    )
    if not model.constrained:
        return model, data

    inequality, equality = (
        None if count is None else (T, count) for count in (counts[name] for name in _STAGE)
    )
    end_inequality, end_equality = (
        None if count is None else (count,) for count in (counts[name] for name in _FINAL)
    )
    stages = [
        _inequality("slack", constraints.slack, inequality, "[T, p]", dtype),
        _inequality("rate", None, (T, 2 * m) if limited else None, "", dtype),
        _equality(equality, dtype),
    ]
    ends = [
        _inequality("terminal_slack", constraints.terminal_slack, end_inequality, "[q]", dtype),
        _equality(end_equality, dtype),
    ]
    stage_prices, end_prices = _join(stages), _join(ends)
    prices = Prices(*(Rows(*both) for both in zip(stage_prices, end_prices, strict=True)))
    mu = _pack(layout, constraints.multipliers or Multipliers(), T, dtype)
    return model, data._replace(prices=prices, multipliers=mu)


def _together(functions):
    functions = [fn for fn in functions if fn is not None]
    if len(functions) < 2:
        return functions[0] if functions else None
    return lambda *args: jnp.concatenate([fn(*args) for fn in functions])


def _inequality(name, slack: Slack | None, shape, meaning, dtype):
    """The three prices of a block of inequalities; None where there is no such block."""
    if shape is None:
        if slack is not None:
            raise ValueError(
                f"constraints.{name} is a price of inequalities, but there are none of that kind"
            )
        return None
    linear, quadratic = (np.inf, 0.0) if slack is None else (slack.linear, slack.quadratic)
    where = f"constraints.{name}"
    linear = validation.weight(f"{where}.linear", linear, shape, meaning)
    quadratic = validation.weight(f"{where}.quadratic", quadratic, shape, meaning, finite=True)
    return jnp.zeros(shape, dtype), linear.astype(dtype), quadratic.astype(dtype)


def _equality(shape, dtype):
    if shape is None:
        return None
    return tuple(jnp.full(shape, value, dtype) for value in (-np.inf, np.inf, 0.0))


def _join(blocks):
    blocks = [block for block in blocks if block is not None]
    if not blocks:
        return None, None, None
    return tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*blocks, strict=True))


def _with_rate(model: Model, data: Data, stage: list, rate: Rate):
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
        value = model.cost(x[:n], u, t, theta)
        if "weight" in theta["rate"]:
            value += 0.5 * jnp.sum(theta["rate"]["weight"][t] * (u - x[n:]) ** 2)
        return value

    def change(x, u, t, theta):
        limit = theta["rate"]["limit"][t]
        # No limit, no row: any number below 0 will do.
        finite = jnp.isfinite(limit)
        limit = jnp.where(finite, limit, 0)
        up, down = u - x[n:] - limit, x[n:] - u - limit
        return jnp.concatenate([jnp.where(finite, up, -1), jnp.where(finite, down, -1)])

    def of_state(fn):
        return None if fn is None else lambda x, *rest: fn(x[:n], *rest)

    def dynamics(x, u, t, theta):
        return jnp.concatenate([model.dynamics(x[:n], u, t, theta), u])

    augmented = model._replace(
        cost=cost, dynamics=dynamics, terminal_cost=of_state(model.terminal_cost), given=()
    )
    data = data._replace(
        theta=data.theta | {"rate": given},
        x_init=jnp.concatenate([data.x_init, previous.astype(dtype)]),
    )
    return augmented, data, [of_state(fn) for fn in stage], change if "limit" in given else None


def _pack(layout: Layout, mu: Multipliers, T: int, dtype) -> Rows:
    """The multipliers that a search starts with, by rows."""

    def block(name, count, shape, meaning):
        value = getattr(mu, name)
        if count is None:
            return []
        if value is None:
            return [jnp.zeros(shape, dtype)]
        array = validation.floating(f"constraints.multipliers.{name}", value).astype(dtype)
        validation.has_shape(f"constraints.multipliers.{name}", array, shape, meaning)
        return [array]

    rate = block("rate", layout.rate, (T, layout.rate), "[T, m]")
    stage = [
        *block("inequality", layout.inequality, (T, layout.inequality), "[T, p]"),
        *(jnp.maximum(sign * array, 0) for array in rate for sign in (1, -1)),
        *block("equality", layout.equality, (T, layout.equality), "[T, r]"),
    ]
    final = [
        *block(
            "terminal_inequality", layout.terminal_inequality, (layout.terminal_inequality,), "[q]"
        ),
        *block("terminal_equality", layout.terminal_equality, (layout.terminal_equality,), "[s]"),
    ]
    return Rows(*(jnp.concatenate(parts, axis=-1) if parts else None for parts in (stage, final)))


def named_multipliers(layout: Layout, rows: Rows) -> Multipliers:
    """Multipliers by the user's names."""
    found: dict[str, Array] = {}

    def take(array, name, count):
        if count is None:
            return array
        found[name] = array[..., :count]
        return array[..., count:]

    rest = take(rows.stage, "inequality", layout.inequality)
    if layout.rate is not None:
        m = layout.rate
        found["rate"] = rest[..., :m] - rest[..., m : 2 * m]
        rest = rest[..., 2 * m :]
    take(rest, "equality", layout.equality)
    rest = take(rows.final, "terminal_inequality", layout.terminal_inequality)
    take(rest, "terminal_equality", layout.terminal_equality)
    return Multipliers(**found)


def for_user(model: Model, solution: Solution) -> Solution:
    """A solution in the terms of the user's problem."""
    layout = model.layout
    if layout.states is not None:
        n = layout.states
        solution = dataclasses.replace(
            solution, x=solution.x[:, :n], costate=solution.costate[:, :n]
        )
    if model.constrained:
        multipliers = named_multipliers(layout, solution.multipliers)
        solution = dataclasses.replace(solution, multipliers=multipliers)
    return solution
