"""The constraints of the user as rows of two functions, that of a stage and that of the end.

What bounds or prices the change of the controls needs the control before. With a ``Rate`` the state
is therefore (x_t, u_{t−1}), and the rate a cost and two rows a control like any others.

Some rows are absent: nothing bounds them, or no plan can move them. They are there in arrays, and
their price is zero (``prices.present``).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxmpc import validation
from jaxmpc.batch.unchecked import unchecked
from jaxmpc.problem.expansions import constraint_values
from jaxmpc.problem.prices import Prices, present
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.riccati.point import Rows
from jaxmpc.riccati.rows import per_row
from jaxmpc.types import ByConstraint, Constraints, Multipliers, Rate, Slack, Solution, Violations


class Kind(NamedTuple):
    """Rows of one kind."""

    name: str  # in ``Multipliers`` and ``Violations``; in ``Constraints`` if a function gives them
    rows: str  # the letter of their number
    final: bool = False
    equality: bool = False
    below: bool = False  # they bound from below: in ``Multipliers`` they count negatively
    slack: str | None = None  # the entry of ``Constraints`` that makes them soft


# Every kind, in the order in which they lie among the rows.
KINDS = (
    Kind("inequality", "p", slack="slack"),
    Kind("rate", "m"),
    Kind("rate", "m", below=True),
    Kind("state", "n"),
    Kind("state", "n", below=True),
    Kind("equality", "r", equality=True),
    Kind("terminal_inequality", "q", final=True, slack="terminal_slack"),
    Kind("state", "n", final=True),
    Kind("state", "n", final=True, below=True),
    Kind("terminal_equality", "s", final=True, equality=True),
)
# Those that are functions of the user.
FUNCTIONS = {kind.name: kind for kind in KINDS if kind.name not in ("rate", "state")}


class _Block(NamedTuple):
    """The rows of one kind."""

    fn: Callable
    prices: tuple[Array, Array, Array]  # [T, p] or [q] each, as in ``Prices``

    @property
    def shape(self) -> tuple[int, ...]:
        return self.prices[0].shape


_Blocks = dict[Kind, _Block]


def constraint_functions(constraints: Constraints) -> dict[str, Callable]:
    """The user's functions, by the names that errors give them."""
    given = {name: getattr(constraints, name) for name in FUNCTIONS}
    return {f"constraints.{name}": fn for name, fn in given.items() if fn is not None}


def with_constraints(
    problem: Problem,
    data: Data,
    functions: dict[str, Callable],
    sizes: dict[str, int],
    constraints: Constraints,
) -> tuple[Problem, Data]:
    """The problem with its constraints; ``functions`` are pure, and ``sizes`` their rows."""
    T, dtype = len(data.u_init), data.x_init.dtype
    blocks: _Blocks = {}
    for name, kind in FUNCTIONS.items():
        size = sizes.get(f"constraints.{name}", 0)
        own = _prices(kind, (size,) if kind.final else (T, size), constraints, dtype)
        if size:
            blocks[kind] = _Block(functions[f"constraints.{name}"], own)
    data, blocks = _with_state_bounds(data, blocks, constraints)
    if constraints.rate is not None:
        problem, data, blocks = _with_rate(problem, data, blocks, constraints.rate)
    problem = problem._replace(
        constraint=_together((b.fn for kind, b in _in_order(blocks) if not kind.final), dtype),
        final_constraint=_together((b.fn for kind, b in _in_order(blocks) if kind.final), dtype),
        counts=tuple(blocks[k].shape[-1] if k in blocks else 0 for k in KINDS),
    )
    if not problem.constrained:
        return problem, data

    def as_rows(part: Callable) -> Rows:
        stage, final = [jnp.zeros((T, 0), dtype)], [jnp.zeros(0, dtype)]
        for kind, block in _in_order(blocks):
            (final if kind.final else stage).append(part(kind, block))
        return Rows(jnp.concatenate(stage, axis=-1), jnp.concatenate(final))

    prices = Prices(*(as_rows(lambda kind, b, i=i: b.prices[i]) for i in range(3)))
    prices, unmoved = _without_unmoved(problem, data._replace(prices=prices))
    start = as_rows(lambda kind, b: _first_multipliers(kind, b.shape, problem, data, constraints))
    start = per_row(
        lambda nu, lower, there: jnp.where(there, jnp.maximum(nu, lower), 0),
        start, prices.lower, present(prices),
    )  # fmt: skip
    known = _sizes(problem, data, constraints)
    return problem, data._replace(prices=prices, unmoved=unmoved, multipliers=start, sizes=known)


def _sizes(problem: Problem, data: Data, constraints: Constraints) -> Array | None:
    """Those that the user gives; 0 for the others, None where there are none."""
    n, m, dtype = problem.num_states, data.u_init.shape[1], data.x_init.dtype
    x, u = (
        None if value is None else validation.weight(
            f"constraints.{name}", value, (size,), letter, finite=True
        )
        for name, value, size, letter in (
            ("x_size", constraints.x_size, n, "[n]"), ("u_size", constraints.u_size, m, "[m]")
        )
    )  # fmt: skip
    if x is None and u is None:
        return None
    x, u = (
        jnp.zeros(size, dtype) if given is None else lax.stop_gradient(given).astype(dtype)
        for given, size in ((x, n), (u, m))
    )
    before = [u] if len(data.x_init) > n else []  # with a rate, the control before is a state
    return jnp.concatenate([x, *before, u])


def _in_order(blocks: _Blocks):
    return [(kind, blocks[kind]) for kind in KINDS if kind in blocks]


def _together(functions, dtype):
    functions = list(functions)
    if not functions:
        return lambda *args: jnp.zeros(0, dtype)
    if len(functions) == 1:
        return functions[0]
    return lambda *args: jnp.concatenate([fn(*args) for fn in functions])


def _prices(
    kind: Kind, shape: tuple[int, ...], constraints: Constraints, dtype
) -> tuple[Array, Array, Array]:
    """Those of the rows of a function, as in ``Prices``."""
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


def _within(value: Array, bound: Array) -> Array:
    """The rows value ≤ bound. Those without a bound are absent: any number below 0 will do."""
    exists = bound != jnp.inf
    return jnp.where(exists, value - jnp.where(exists, bound, 0), -1)


def _bound_prices(bound: Array, equality: Array | bool = False) -> tuple[Array, Array, Array]:
    """Those of the rows of ``_within``."""
    exists = bound != jnp.inf
    none, hard = jnp.zeros_like(bound), jnp.full_like(bound, jnp.inf)
    return jnp.where(exists & equality, -hard, none), jnp.where(exists, hard, none), none


def _with_state_bounds(data: Data, blocks: _Blocks, constraints: Constraints):
    """With rows for x_lower and x_upper, absent at the first stage."""
    shape = len(data.u_init) + 1, len(data.x_init)
    lower, upper = validation.state_bounds(constraints, shape, data.x_init.dtype)
    equal = jnp.zeros(shape, bool)
    if lower is not None and upper is not None:
        # Between equal bounds two inequalities have no interior: one equality has, and half of the
        # derivative goes to either bound.
        equal = lower == upper
        upper = 0.5 * (upper + jnp.where(equal, lower, upper))
        lower = jnp.where(equal, -jnp.inf, lower)
    bounds = {}  # of x and of −x
    if upper is not None:
        bounds[False] = upper.at[0].set(jnp.inf)
    if lower is not None:
        bounds[True] = -lower.at[0].set(-jnp.inf)

    def at_stage(x, u, t, theta, below):
        return _within(-x if below else x, theta.constants["state"][below][t])

    def at_end(x, theta, below):
        return at_stage(x, None, -1, theta, below)

    for kind in KINDS:
        if kind.name == "state" and kind.below in bounds:
            fn = functools.partial(at_end if kind.final else at_stage, below=kind.below)
            equality = equal & (not kind.below)
            own = -1 if kind.final else slice(-1)
            blocks[kind] = _Block(fn, _bound_prices(bounds[kind.below][own], equality[own]))
    return _with_constants(data, state=bounds), blocks


def _with_constants(data: Data, **more) -> Data:
    constants = data.theta.constants | more
    return data._replace(theta=dataclasses.replace(data.theta, constants=constants))


def _with_rate(problem: Problem, data: Data, blocks: _Blocks, rate: Rate):
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

    def change(x, u, t, theta, sign):
        return _within(sign * (u - x[n:]), theta.constants["rate"]["limit"][t])

    def of_state(fn):
        return lambda x, *rest: fn(x[:n], *rest)

    def dynamics(x, u, t, theta):
        return jnp.concatenate([problem.dynamics(x[:n], u, t, theta), u])

    augmented = problem._replace(
        cost=cost, dynamics=dynamics, terminal_cost=of_state(problem.terminal_cost), given=()
    )
    blocks = {kind: block._replace(fn=of_state(block.fn)) for kind, block in blocks.items()}
    for kind in KINDS:
        if kind.name == "rate" and "limit" in given:
            fn = functools.partial(change, sign=-1 if kind.below else 1)
            blocks[kind] = _Block(fn, _bound_prices(given["limit"]))
    data = _with_constants(data, rate=given)
    x_init, x_guess = jnp.concatenate([data.x_init, previous.astype(dtype)]), data.x_guess
    if x_guess is not None:
        before = jnp.concatenate([x_init[None, n:], data.u_init])
        x_guess = lax.stop_gradient(jnp.concatenate([x_guess, before], axis=1))
    data = data._replace(x_init=x_init, x_guess=x_guess)
    return augmented, data, blocks


def _without_unmoved(problem: Problem, data: Data) -> tuple[Prices, Array]:
    """The prices without the hard rows of the first stage that its control does not move, and which
    they are: no plan can do anything about them.

    Their derivative in the control is exactly 0, wherever one looks.
    """

    def moved(theta, x, u, lower, upper):
        u, lower, upper = jnp.clip(u, lower, upper)[None], lower[None], upper[None]
        share = jnp.asarray(np.random.default_rng(0).random((2, u.shape[1])), u.dtype)
        # Where user code may be looked at: between the bounds, or near to u, on its side of 0.
        inside = jnp.isfinite(lower) & jnp.isfinite(upper)
        step = (share - 0.5) * jnp.where(u == 0, 0.1, jnp.abs(u))
        step = jnp.where((u + step < lower) | (u + step > upper), -step, step)
        low, high = (jnp.where(inside, a, 0) for a in (lower, upper))
        between = low + share * (high - low)
        looks = jnp.where(inside, between, jnp.clip(u + step, lower, upper))
        in_u = jax.jacfwd(lambda u: problem.constraint(x, u, jnp.int32(0), theta))
        return jnp.any(jax.vmap(in_u)(jnp.concatenate([u, looks])) != 0, axis=(0, 2))

    prices = data.prices
    now = data.theta, data.x_init, data.u_init[0], data.u_lower[0], data.u_upper[0]
    moves = unchecked(jax.jit(moved))(*lax.stop_gradient(now))
    unmoved = ~moves & (prices.linear.stage[0] == jnp.inf)

    def left_out(rows: Rows) -> Rows:
        first = jnp.where(unmoved, 0, rows.stage[0])
        return rows._replace(stage=rows.stage.at[0].set(first))

    lower, linear = left_out(prices.lower), left_out(prices.linear)
    return prices._replace(lower=lower, linear=linear), unmoved


# Between rows and the names of the user.


def _first_multipliers(
    kind: Kind, shape: tuple[int, ...], problem: Problem, data: Data, constraints: Constraints
) -> Array:
    """Where the search starts: 0, if the user does not say."""
    dtype = data.u_init.dtype
    value = getattr(constraints.multipliers, kind.name, None)
    if value is None:
        return jnp.zeros(shape, dtype)
    where = f"constraints.multipliers.{kind.name}"
    array = validation.floating(where, value).astype(dtype)
    if kind.name == "state":
        expected = len(data.u_init) + 1, problem.num_states
        validation.has_shape(where, array, expected, "[T+1, n]")
        array = array[-1] if kind.final else array[:-1]
    letters = f"[{kind.rows}]" if kind.final else f"[T, {kind.rows}]"
    validation.has_shape(where, array, shape, letters)
    return -array if kind.below else array


def _by_kind(problem: Problem, rows: Rows) -> dict[Kind, Array]:
    """``rows`` apart, for the kinds that there are."""
    found = {}
    begins = {False: 0, True: 0}
    for kind, count in zip(KINDS, problem.counts, strict=True):
        begin = begins[kind.final]
        begins[kind.final] += count
        if count:
            own = rows.final if kind.final else rows.stage
            found[kind] = own[..., begin : begin + count]
    return found


def _named(what: type[ByConstraint], rows: Mapping[Kind, Array], both: Callable):
    """What the rows have by the user's names; ``both`` makes one of those of two bounds."""
    parts: dict[tuple[str, bool], Array] = {}
    for kind, own in rows.items():
        name = kind.name, kind.final
        parts[name] = both(parts.get(name, jnp.zeros_like(own)), own) if kind.below else own
    named = {name: own for (name, _), own in parts.items()}
    if "state" in named:
        named["state"] = jnp.concatenate([parts["state", False], parts["state", True][None]])
    return what(**named)


def named_multipliers(problem: Problem, rows: Rows) -> Multipliers:
    """Multipliers by the user's names."""
    return _named(Multipliers, _by_kind(problem, rows), jnp.subtract)


def for_user(problem: Problem, data: Data, solution: Solution) -> Solution:
    """A solution in the terms of the user's problem."""
    n = problem.num_states
    multipliers, violations, initial = None, None, jnp.zeros_like(solution.violation)
    if problem.constrained:
        multipliers = named_multipliers(problem, solution.multipliers)
        missed = _missed(problem, *lax.stop_gradient((data, solution.x, solution.u)))
        violations = _named(Violations, missed, jnp.maximum)
        first = [jnp.zeros(0, initial.dtype)] + [a[0] for k, a in missed.items() if not k.final]
        initial = jnp.max(jnp.where(data.unmoved, jnp.concatenate(first), 0), initial=0)
    return dataclasses.replace(
        solution,
        x=solution.x[:, :n],
        costate=solution.costate[:, :n],
        multipliers=multipliers,
        violations=violations,
        initial_violation=initial,
    )


def _missed(problem: Problem, data: Data, x: Array, u: Array) -> dict[Kind, Array]:
    """By how much a plan violates every row, hard or soft."""
    g = _by_kind(problem, constraint_values(problem, data.theta, x, u))
    lower = _by_kind(problem, data.prices.lower)
    return {
        kind: jnp.where(kind.equality | (lower[kind] < 0), jnp.abs(a), jnp.maximum(a, 0))
        for kind, a in g.items()
    }
