"""What a trip makes of its iterate: go on from it, go back, or stop there.

Every field is a bool for each problem.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver.assessment import Assessment
from jaxmpc.types import Status

RUNNING = -1  # the status of a problem that goes on
CROSSED = -2  # of one whose bounds exclude each other, from the start
# A residual of so many samples of rounding is most likely rounding; of so many it may be.
_HIDDEN, _ROUNDINGS = 0.5, 4.0


class Judgement(NamedTuple):
    """Before a step is proposed."""

    moved: Array  # a step led here
    finite: Array  # the iterate, and what its derivatives show so far
    small: Array  # the residual is within the tolerance
    settled: Array  # on this way there is nothing more to gain
    back: Array  # the step that led here was for the worse: the iterate before is the one
    out_of_time: Array
    certify: Array  # this may be the last trip: the exact KKT matrix of the active set, no step


def judge(
    here: Assessment,
    residual_before: Array,
    *,
    running: Array,
    moved: Array,
    noisy: Array,
    finish: Array,
    out_of_time: Array,
    tolerance: Array,
    goal: Array,
    noise: Array,
) -> Judgement:
    """Of an iterate that was reached by a ``noisy`` step if the objective changed by rounding only;
    with ``finish`` nothing is left to try; ``noise`` is the size of rounding in the residual."""
    within = jnp.maximum(here.rest, _HIDDEN * noise)
    there = here.finite & (here.residual <= jnp.maximum(goal * here.size, within))
    within = jnp.maximum(here.rest, _ROUNDINGS * noise)
    small = here.finite & (here.residual <= jnp.maximum(tolerance * here.size, within))
    # A step that changed the objective by rounding only has to halve the residual, or there is
    # nothing more to gain on this way; it has to lower it at all to be kept.
    settled = noisy & ~(here.residual < 0.5 * residual_before)
    worse = noisy & ~there & ~(here.residual < residual_before)
    return Judgement(
        moved=moved,
        finite=here.finite,
        small=small,
        settled=settled,
        back=moved & ~finish & (~here.finite | worse),
        out_of_time=out_of_time,
        certify=~running | there | (small & settled) | finish | out_of_time,
    )


class Verdict(NamedTuple):
    """With the factors of the KKT matrix."""

    escape: Array  # at a saddle: leave along negative curvature
    converged: Array
    stuck: Array  # the last trip, and the residual is not within the tolerance
    stop: Array  # no step from here


def conclude(judged: Judgement, factors: Factors, running: Array) -> Verdict:
    threshold = definite_threshold(factors.curvature.dtype)
    definite = lanes.every(factors.curvature > threshold)
    stationary = judged.finite & judged.certify & judged.small
    converged = stationary & definite
    stuck = judged.certify & ~judged.small
    return Verdict(
        escape=running & stationary & ~definite,
        converged=converged,
        stuck=stuck,
        stop=~judged.finite | judged.back | converged | stuck | judged.out_of_time,
    )


def status(judged: Judgement, verdict: Verdict, exhausted: Array) -> Array:
    """The ``Status`` that a running problem gets, where it ends; ``exhausted``: no step helps."""
    stays = ~judged.back
    nowhere_to_go = exhausted | judged.out_of_time
    ends = {
        Status.NONFINITE: ~judged.finite & ~judged.moved,
        Status.CONVERGED: verdict.converged & stays,
        Status.INDEFINITE: judged.small & verdict.escape & stays & nowhere_to_go,
        Status.MAX_ITERATIONS: judged.out_of_time & stays,
        Status.STALLED: verdict.stuck & stays,
    }
    return jnp.select(list(ends.values()), list(ends), RUNNING).astype(jnp.int32)
