"""The loop of the forward solver: trips of a method until every problem has come to an end.

There are two methods: without rows control-limited DDP (``box``), with rows a primal-dual
interior-point method (``interior``).
"""

import dataclasses
import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax

from jaxmpc.batch import lanes
from jaxmpc.batch.batchwise import batchwise
from jaxmpc.batch.turns import in_turns
from jaxmpc.problem.problem import Data, Problem
from jaxmpc.solver import box
from jaxmpc.solver.interior import method as interior
from jaxmpc.solver.judgement import RUNNING
from jaxmpc.solver.linearization import Linearization
from jaxmpc.types import Options, Solution


def _method(problem: Problem) -> ModuleType:
    """The module whose ``start``, ``trip`` and ``report`` solve it.

    Their states have a ``status``; from the start it is that of problems that do not run, unless
    they are ``wanted``.
    """
    return interior if problem.constrained else box


@lanes.any_rank
def forward(problem: Problem, data: Data, options: Options) -> tuple[Solution, Linearization]:
    """Solve one problem, or a batch; the linearization is that at the returned point."""
    method = _method(problem)
    end = lax.while_loop(
        lambda s: jnp.any(s.status == RUNNING),
        lambda s: method.trip(problem, data, options, s),
        method.start(problem, data, options, jnp.ones(data.x_init.shape[1:], bool)),
    )
    return method.report(data, end)


def solver(problem: Problem):
    """``forward`` of ``problem``; under ``vmap`` the whole batch at once, on lanes."""
    method = _method(problem)

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
                start=lambda problems, wanted: method.start(problem, *problems, wanted),
                step=lambda problems, s: method.trip(problem, *problems, s),
                running=lambda s: s.status == RUNNING,
                report=lambda problems, s: method.report(problems[0], s),
            )

        return lanes.of_width(on_lanes, size, num**2 * x_init.dtype.itemsize, *problems)

    return batchwise(functools.partial(forward, problem), many)
