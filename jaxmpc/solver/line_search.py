"""The rollout of a step and the search for its length: the second half of Algorithm 2."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import stage_costs
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.problem.stages import transition
from jaxmpc.solver.iterate import Iterate

_MAX_TRIES = 12  # step lengths tried in one search
_SUFFICIENT = 1e-4  # share of the predicted decrease that a step has to achieve
# Multiple of a predicted rise, for gaps that close, that a step may cost: that at which the merit
# objective + weight · |gaps|₁ falls by what is predicted, where half its weight pays for the rise.
_RISE = 2.0
# Share of the predicted decrease at which the model counts as right.
_RIGHT = 0.25


class Step(NamedTuple):
    """A proposal: u + α (target − u) + K dx, clipped to the bounds; target + K dx where the target
    is nearer than α reach. Of the gaps it closes the share α."""

    target: Array  # [T, m]
    reach: Array  # [T, m]
    K: Array  # [T, m, n]
    slope: Array  # the predicted change of the objective is α slope + α² bend
    bend: Array


class Length(NamedTuple):
    """How the search for the length of a step ended."""

    accepted: Array
    alpha: Array  # the last step length that was tried
    noisy: Array  # the objective changed by rounding only
    hopeless: Array  # if it failed: a shorter step would not succeed either
    right: Array  # a full step, and the objective fell as the model says


def take_step(problem: Problem, data: Data, at: Iterate, step: Step, alpha: Array) -> Iterate:
    """The forward recursion of Algorithm 2 on the true dynamics, inside the bounds.

    A share 1 − α of every gap stays (Mastalli et al. 2020, Crocoddyl, section II-D), until half of
    the digits of the states agree with the dynamics: then they are closed for good.
    """
    transit, stages = transition(problem, data.theta, at.u)
    gaps = (1 - alpha) * at.gaps
    largest = jnp.max(jnp.abs(at.x), axis=0)
    closed = lanes.every(jnp.abs(gaps) <= lanes.eps(gaps) ** 0.5 * largest, 2)
    gaps = jnp.where(closed, 0, gaps)

    def advance(x_new, stage):
        u, target, reach, K, x, lower, upper, gap, now = stage
        # The target itself for a full step: u + (bound − u) may miss the bound by an ulp.
        there = (alpha == 1) | (jnp.abs(target - u) < alpha * reach)
        straight = jnp.where(there, target, u + alpha * (target - u))
        u_new = jnp.clip(straight + lanes.matvec(K, x_new - x), lower, upper)
        return transit(x_new, u_new, now) - gap, (x_new, u_new)

    u, x = at.u, at.x
    along = (u, step.target, step.reach, step.K, x[:-1], data.u_lower, data.u_upper, gaps, stages)
    x_final, (x_new, u_new) = lax.scan(advance, data.x_init, along)
    x_new = jnp.concatenate([x_new, x_final[None]])
    return Iterate(u_new, x_new, stage_costs(problem, data.theta, x_new, u_new), gaps)


def line_search(
    problem: Problem,
    data: Data,
    at: Iterate,
    step: Step,
    escape: Array,
    wanted: Array,
    noise: Array,
    decay: Array,
    *,
    gaping: Array | None = None,
    forced: Array | None = None,
) -> tuple[Iterate, Length]:
    """Shorten the step until the objective falls; along negative curvature try both directions.

    Nothing is tried unless ``wanted``; with ``escape`` the step is along negative curvature;
    ``noise`` is the size of rounding in the objective. Where the iterate is ``gaping``, to close
    the gaps may cost something; ``forced`` steps close them whatever it costs.
    """
    no = jnp.zeros_like(wanted)
    gaping, forced = (no if a is None else a for a in (gaping, forced))
    # Near a solution the decrease drowns in rounding before the residual does: take the full step,
    # and let the next trip judge by the residual.
    decrease = -(step.slope + step.bend)
    drowned = ~escape & (decrease <= noise)
    hopeless = escape | (jnp.abs(decrease) <= lanes.eps(noise) * jnp.sum(jnp.abs(at.costs), axis=0))
    # What cancels inside the user's cost is not in the noise: where less than half of the digits
    # would change, and no length is seen to help, the residual judges the full step as well.
    doubtful = ~escape & (decrease <= noise / lanes.eps(noise) ** 0.5)
    last = jnp.where(doubtful, _MAX_TRIES, -1)
    max_tries = jnp.where(escape, 2 * _MAX_TRIES, jnp.where(doubtful, _MAX_TRIES + 1, _MAX_TRIES))

    def unfinished(carry):
        _, length, tries = carry
        return wanted & ~length.accepted & (tries < max_tries)

    def attempt(carry):
        before, length, tries = carry
        pair = (tries // 2).astype(noise.dtype)
        both_ways = jnp.where(tries % 2 == 0, decay ** (2 * pair), -(decay ** (2 * pair)))
        alpha = jnp.where(escape, both_ways, decay ** tries.astype(noise.dtype))
        alpha = jnp.where(tries == last, 1, alpha)
        new = take_step(problem, data, at, step, alpha)
        change = jnp.sum(new.costs - at.costs, axis=0)
        predicted = alpha * step.slope + alpha**2 * step.bend
        enough = change <= _SUFFICIENT * jnp.minimum(predicted, 0)
        closes = forced | (
            change <= alpha * jnp.maximum(-_SUFFICIENT * decrease, -_RISE * decrease)
        )
        falls = jnp.where(gaping, closes, jnp.where(escape, change < -noise, enough))
        noisy = drowned & (tries == 0) & (jnp.abs(change) <= noise)
        noisy |= (tries == last) & (jnp.abs(change) <= noise / lanes.eps(noise) ** 0.5)
        noisy &= ~gaping
        right = (alpha == 1) & (gaping | (change <= _RIGHT * predicted))
        after = new, Length(falls | noisy, alpha, noisy, hopeless, right)
        return *lanes.select(unfinished(carry), after, (before, length)), tries + 1

    start = (at, Length(no, jnp.zeros_like(noise), no, hopeless, no), jnp.int32(0))
    new, length, _ = lax.while_loop(lambda carry: jnp.any(unfinished(carry)), attempt, start)
    return new, length
