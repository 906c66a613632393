"""The loop of the forward solver: trips of a method until every problem has come to an end.

There are two methods: without rows control-limited DDP (``box``), with rows a primal-dual
interior-point method (``interior``).
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.batch.batchwise import batchwise
from jaxmpc.batch.turns import in_turns
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.solver import box
from jaxmpc.solver.interior import method as interior
from jaxmpc.solver.judgement import RUNNING
from jaxmpc.solver.linearization import Linearization
from jaxmpc.solver.recorder import recorder, written
from jaxmpc.types import Options, Solution


def _method(problem: Problem) -> ModuleType:
    """The module whose ``start``, ``trip`` and ``report`` solve it.

    Their states have a ``status``; from the start it is that of problems that do not run, unless
    they are ``wanted``. A trip returns the next state, and a ``Record`` of itself.
    """
    return interior if problem.constrained else box


class _Loop:
    """The loop of a problem: its state is that of the method, with a record if there is one."""

    def __init__(self, problem: Problem):
        self.problem, self.method = problem, _method(problem)

    def start(self, data: Data, options: Options, wanted: Array):
        state = self.method.start(self.problem, data, options, wanted)
        return state, recorder(options.record, jnp.zeros(wanted.shape, data.x_init.dtype))

    def running(self, carry) -> Array:
        state, _ = carry
        return state.status == RUNNING

    def trip(self, data: Data, options: Options, carry):
        state, record = carry
        after, entry = self.method.trip(self.problem, data, options, state)
        return after, written(record, entry, state.status == RUNNING)

    def report(self, data: Data, carry) -> tuple[Solution, Linearization]:
        state, record = carry
        solution, linearization = self.method.report(data, state)
        if record is not None:
            solution = dataclasses.replace(solution, record=record.entries)
        return solution, linearization


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
