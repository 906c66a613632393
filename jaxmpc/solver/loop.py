"""The loop of the forward solver: trips of a method until every problem has come to an end.

There are two methods: without rows control-limited DDP (``box``), with rows a primal-dual
interior-point method (``interior``).
"""

import dataclasses
import functools
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.batch.batchwise import batchwise
from jaxmpc.batch.packing import Packed, pack
from jaxmpc.batch.turns import in_turns
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.solver import box
from jaxmpc.solver.interior import method as interior
from jaxmpc.solver.judgement import CROSSED, RUNNING
from jaxmpc.solver.linearization import Evaluation, Linearization
from jaxmpc.solver.recorder import Recorder, recorder, written
from jaxmpc.types import Options, Solution, Status


def _method(problem: Problem) -> ModuleType:
    """The module whose ``start``, ``trip`` and ``report`` solve it.

    Their states have a ``status``; from the start it is that of problems that do not run, unless
    they are ``wanted``. They have an ``evaluation`` of the point that the last trip began with. A
    trip returns the next state, and a ``Record`` of itself.
    """
    return interior if problem.constrained else box


class _Carry(NamedTuple):
    search: Packed  # the state of the method, without its evaluation
    evaluation: Evaluation
    record: Recorder | None


class _Loop:
    """The loop of a problem."""

    def __init__(self, problem: Problem):
        self.problem, self.method = problem, _method(problem)

    def start(self, data: Data, options: Options, wanted: Array) -> _Carry:
        state = self.method.start(self.problem, data, options, wanted)
        record = recorder(options.record, jnp.zeros(wanted.shape, data.x_init.dtype))
        return _Carry(*_packed(state), record)

    def running(self, carry: _Carry) -> Array:
        return carry.search.unpack().status == RUNNING

    def trip(self, data: Data, options: Options, carry: _Carry) -> _Carry:
        running = self.running(carry)
        after, entry = self.method.trip(self.problem, data, options, _state(carry))
        search, evaluation = _packed(after)
        # The others wait for the last problem of the batch, at a point that stays: their evaluation
        # comes out the same again, and the largest arrays need no selection.
        search = lanes.select(running, search, carry.search)
        return _Carry(search, evaluation, written(carry.record, entry, running))

    def report(self, data: Data, carry: _Carry) -> tuple[Solution, Linearization]:
        state = _state(carry)
        # Where bounds exclude each other nothing was evaluated.
        crossed = state.status == CROSSED
        evaluation = jax.tree.map(
            lambda a: jnp.where(crossed, jnp.zeros((), a.dtype) if a.dtype == bool else jnp.nan, a),
            state.evaluation,
        )
        status = jnp.where(crossed, Status.INFEASIBLE, state.status).astype(jnp.int32)
        state = state._replace(evaluation=evaluation, status=status)
        solution, linearization = self.method.report(data, state)
        if carry.record is not None:
            solution = dataclasses.replace(solution, record=carry.record.entries)
        return solution, linearization


def _packed(state) -> tuple[Packed, Evaluation]:
    return pack(state._replace(evaluation=None), state.status.ndim), state.evaluation


def _state(carry: _Carry):
    return carry.search.unpack()._replace(evaluation=carry.evaluation)


@lanes.any_rank
def forward(problem: Problem, data: Data, options: Options) -> tuple[Solution, Linearization]:
    """Solve one problem, or a batch; the linearization is that at the returned point."""
    loop = _Loop(problem)
    end = lax.while_loop(
        lambda carry: jnp.any(loop.running(carry)),
        lambda carry: loop.trip(data, options, carry),
        loop.start(data, options, jnp.ones(data.x_init.shape[1:], bool)),
    )
    return loop.report(data, end)


def solver(problem: Problem):
    """``forward`` of ``problem``; under ``vmap`` the whole batch at once, on lanes."""
    loop = _Loop(problem)

    @lanes.any_rank
    def many(size, batched, *problems):
        x_init, u_init = problems[0].x_init, problems[0].u_init
        num = x_init.shape[-1] + u_init.shape[-1]

        def on_lanes(width, *problems):
            def take(index):
                def one(a, own):
                    if not own:
                        return a
                    return jnp.moveaxis(a if index is None else a[index], 0, -1)

                data, options = jax.tree.map(one, problems, tuple(batched))
                # States, controls and bounds on every lane; what theta or options share stays
                # shared.
                arrays = jax.tree.map(
                    lambda a, own: a if own else lanes.spread(a, width), data[1:], batched[0][1:]
                )
                if options.trust_region is not None and not batched[1].trust_region:
                    reach = lanes.spread(options.trust_region, width)
                    options = dataclasses.replace(options, trust_region=reach)
                flags = tuple(jax.tree.leaves(batched[0].theta))
                theta = dataclasses.replace(data.theta, lanes=(width,), batched=flags)
                return Data(theta, *arrays), options

            if width == size:
                out = forward(problem, *take(None))
                return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), out)
            return in_turns(
                size,
                width,
                take,
                start=lambda problems, wanted: loop.start(*problems, wanted),
                step=lambda problems, carry: loop.trip(*problems, carry),
                running=loop.running,
                report=lambda problems, carry: loop.report(problems[0], carry),
            )

        return lanes.of_width(on_lanes, size, num**2 * x_init.dtype.itemsize, *problems)

    return batchwise(functools.partial(forward, problem), many)
