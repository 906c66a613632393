"""The problem whose bounds and inequalities stand in its cost, as barriers.

    bound             −τ log(upper − u) − τ log(u − lower)
    hard inequality   −τ log(−g)
    soft inequality   its price, linear σ + ½ quadratic σ², − τ log σ − τ log(σ − g), at the slack σ
                      where that is least

Its solution is a plan inside of all of them, which moves with everything that shapes it, and as
τ → 0 goes to that of the problem itself. Equal bounds and equalities stay what they are.

Source: Fiacco and McCormick 1968, Nonlinear Programming: Sequential Unconstrained Minimization
Techniques.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.problem.constraints import KINDS
from jaxmpc.problem.prices import Prices, present
from jaxmpc.problem.problem import Data, Problem, Theta
from jaxmpc.riccati.point import Rows, no_rows
from jaxmpc.riccati.rows import per_row

# Newton's method for a slack: trips, and the most that the logarithm changes in one.
_ITERATIONS, _FURTHEST = 20, 4.0


def with_barrier(problem: Problem, data: Data, tau: Array) -> tuple[Problem, Data]:
    """The problem with the barrier ``tau``, as a function of everything that moves the original."""
    dtype, prices = data.x_init.dtype, data.prices
    stage_rows, final_rows = prices.linear.stage.size > 0, prices.linear.final.size > 0
    equal = data.u_lower == data.u_upper
    lower = jnp.where(equal, -jnp.inf, data.u_lower)
    upper = jnp.where(equal, jnp.inf, data.u_upper)
    there = inequalities(data.prices)
    barrier = dict(tau=tau, lower=lower, upper=upper, prices=data.prices, there=there)

    def own(theta: Theta, part: str, t: Array | int = 0) -> tuple[Array, ...]:
        given = theta.constants["barrier"]
        rows = given["there"], given["prices"].linear, given["prices"].quadratic
        each = (getattr(a, part) for a in rows)
        return given["tau"], *(a[t] if part == "stage" else a for a in each)

    def cost(x, u, t, theta):
        given = theta.constants["barrier"]
        inside = -given["tau"] * (_log(given["upper"][t] - u) + _log(u - given["lower"][t]))
        value = problem.cost(x, u, t, theta) + jnp.sum(inside)
        if stage_rows:
            g = problem.constraint(x, u, t, theta)
            value += jnp.sum(row_barrier(g, *own(theta, "stage", t)))
        return value

    def terminal_cost(x, theta):
        value = problem.terminal_cost(x, theta)
        if final_rows:
            value += jnp.sum(row_barrier(problem.final_constraint(x, theta), *own(theta, "final")))
        return value

    theta = dataclasses.replace(data.theta, constants=data.theta.constants | dict(barrier=barrier))
    inner = problem._replace(
        cost=cost,
        terminal_cost=terminal_cost,
        given=tuple(name for name in problem.given if name == "dynamics"),
    )
    data = data._replace(
        theta=theta,
        u_lower=jnp.where(equal, data.u_lower, -jnp.inf),
        u_upper=jnp.where(equal, data.u_upper, jnp.inf),
        x_guess=None,
    )
    if _has_equalities(problem):
        # Rows without a price are absent.
        linear, quadratic = (
            per_row(lambda a, there: jnp.where(there, 0, a), price, there)
            for price in (data.prices.linear, data.prices.quadratic)
        )
        nothing = per_row(lambda a, there: jnp.where(there, 0, a), data.multipliers, there)
        prices = Prices(data.prices.lower, linear, quadratic)
        return inner, data._replace(prices=prices, multipliers=nothing)
    none = no_rows(len(data.u_init), dtype)
    inner = inner._replace(
        constraint=lambda *args: jnp.zeros(0, dtype),
        final_constraint=lambda *args: jnp.zeros(0, dtype),
        counts=(),
    )
    return inner, data._replace(
        prices=Prices(none, none, none), multipliers=none, unmoved=jnp.zeros(0, bool)
    )


def with_tau(theta: Theta, tau: Array) -> Theta:
    """Those of a problem with a barrier, with another τ."""
    barrier = theta.constants["barrier"] | dict(tau=tau)
    return dataclasses.replace(theta, constants=theta.constants | dict(barrier=barrier))


def inequalities(prices: Prices) -> Rows:
    """The rows that a barrier stands for."""
    return per_row(lambda there, low: there & (low == 0), present(prices), prices.lower)


def _has_equalities(problem: Problem) -> bool:
    """Whether there may be some: state bounds make one where they are equal."""
    kinds = [kind for kind, count in zip(KINDS, problem.counts, strict=False) if count]
    both = {kind.below for kind in kinds if kind.name == "state"}
    return any(kind.equality for kind in kinds) or len(both) == 2


def forces(g: Rows, theta: Theta, multipliers: Rows) -> Rows:
    """The multipliers of all rows of a plan with the barrier, from their values and those of the
    equalities."""
    given = theta.constants["barrier"]
    prices = given["prices"]

    def force(g, there, linear, quadratic):
        return jax.grad(lambda g: jnp.sum(row_barrier(g, given["tau"], there, linear, quadratic)))(
            g
        )

    found = per_row(force, g, given["there"], prices.linear, prices.quadratic)
    return per_row(jnp.add, found, multipliers) if multipliers.num else found


def _log(a: Array) -> Array:
    finite = a != jnp.inf
    return jnp.where(finite, jnp.log(jnp.where(finite, a, 1)), 0)


def row_barrier(g: Array, tau: Array, there: Array, linear: Array, quadratic: Array) -> Array:
    """What rows cost with the barrier; those that are not ``there``, nothing."""
    soft = there & jnp.isfinite(linear)
    hard = there & ~soft
    inside = -tau * jnp.log(jnp.where(hard, -g, 1))
    linear, quadratic = jnp.where(soft, linear, 1), jnp.where(soft, quadratic, 0)
    g = jnp.where(soft, g, 0)
    slack, room = _slack(g, _above(g, tau, linear, quadratic))
    paid = (linear + 0.5 * quadratic * slack) * slack - tau * (jnp.log(slack) + jnp.log(room))
    return jnp.where(soft, paid, jnp.where(hard, inside, 0))


def _slack(g: Array, above: Array) -> tuple[Array, Array]:
    """σ and σ − g of a slack that is so much above max(g, 0)."""
    return jnp.where(g > 0, g + above, above), jnp.where(g > 0, above, above - g)


@jax.custom_jvp
def _above(g: Array, tau: Array, linear: Array, quadratic: Array) -> Array:
    """How far above max(g, 0) the slack σ is, where linear + quadratic σ = τ / σ + τ / (σ − g)."""

    def improve(_, above):
        slack, room = _slack(g, above)
        miss = linear + quadratic * slack - tau / slack - tau / room
        slope = quadratic + tau / slack**2 + tau / room**2
        # In the logarithm, so that it stays positive.
        return above * jnp.exp(jnp.clip(-miss / (slope * above), -_FURTHEST, _FURTHEST))

    first = jnp.minimum(2 * tau / linear, jnp.sqrt(2 * tau / quadratic))
    return jax.lax.fori_loop(0, _ITERATIONS, improve, first)


@_above.defjvp
def _above_jvp(primals, tangents):
    g, tau, _, quadratic = primals
    dg, dtau, dlinear, dquadratic = tangents
    above = _above(*primals)
    slack, room = _slack(g, above)
    of_slack, of_room = tau / slack**2, tau / room**2
    # Above g where that is positive, above 0 elsewhere.
    push = jnp.where(g > 0, -(quadratic + of_slack), of_room) * dg
    push += (1 / slack + 1 / room) * dtau - dlinear - slack * dquadratic
    return above, push / (quadratic + of_slack + of_room)
