"""``mpc_solve`` of the constrained problems, compiled once for all tests that need it."""

import functools

import jax
import jax.numpy as jnp
import pytest
from constrained_problems import PROBLEMS
from helpers import assert_close

from jaxmpc import Constraints, Options, Rate, Slack, Status, mpc_solve

FIELDS = ("x", "u", "costate", "objective", "multipliers", "status", "iterations", "violation")


def as_dict(multipliers):
    return {name: a for name, a in vars(multipliers).items() if a is not None}


def solve(problem, inputs, options=Options(), u_init=None, multipliers=None):
    weights = {k: Slack(**inputs[k]) for k in ("slack", "terminal_slack") if k in inputs}
    if "rate" in inputs:
        weights["rate"] = Rate(**inputs["rate"])
    weights |= {k: inputs[k] for k in ("x_lower", "x_upper") if k in inputs}
    functions = ("inequality", "equality", "terminal_inequality", "terminal_equality")
    return mpc_solve(
        problem.cost,
        problem.dynamics,
        inputs["x_init"],
        jnp.asarray(problem.u_init, inputs["x_init"].dtype) if u_init is None else u_init,
        inputs["params"],
        terminal_cost=problem.terminal_cost,
        u_lower=inputs["u_lower"],
        u_upper=inputs["u_upper"],
        constraints=Constraints(
            **{name: getattr(problem, name) for name in functions},
            **weights,
            multipliers=multipliers,
        ),
        options=options,
    )


def loss(out):
    """Of everything that is differentiable, with no symmetry to hide behind."""
    wave = jnp.cos(jnp.arange(out["u"].size, dtype=out["u"].dtype)).reshape(out["u"].shape)
    total = jnp.sum((out["u"] - wave) ** 2) + 0.3 * jnp.sum(jnp.sin(out["x"]))
    total += 0.1 * jnp.sum(jnp.cos(out["costate"])) + 0.2 * out["objective"]
    for name, nu in out["multipliers"].items():
        wave = jnp.cos(len(name) + jnp.arange(nu.size, dtype=nu.dtype)).reshape(nu.shape)
        total += 0.3 * jnp.sum(wave * jnp.sin(nu))
    return total


def value(problem, inputs, *args, fold=lambda nu: nu, **kwargs):
    solution = solve(problem, inputs, *args, **kwargs)
    out = {k: getattr(solution, k) for k in ("x", "u", "costate", "objective")}
    return loss({**out, "multipliers": fold(as_dict(solution.multipliers))}), solution


def over_starts(inputs):
    """Axes for ``vmap``: the problems of a batch differ in x_init."""
    return {name: 0 if name == "x_init" else None for name in inputs}


def program(problem, **kwargs):
    """(inputs, u_init, multipliers) -> gradient, solution; x_init and what follows in a batch."""

    def one(inputs, u_init, multipliers):
        more = dict(u_init=u_init, multipliers=multipliers, **kwargs)
        return jax.grad(value, 1, has_aux=True)(problem, inputs, **more)

    return jax.jit(jax.vmap(one, (over_starts(problem.inputs), 0, 0)))


@functools.cache
def compiled(name):
    """Shared by all tests with this problem: most of their time goes into compiling."""
    problem = PROBLEMS[name]
    run, x_init = program(problem), jnp.asarray(problem.x_init)
    shapes = jax.eval_shape(lambda: jax.vmap(lambda x: solve(problem, problem.at(x)))(x_init))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes.multipliers)
    u_init = jnp.tile(problem.u_init, (len(x_init), 1, 1))

    def call(inputs=None, u_init=u_init, multipliers=zeros, **changes):
        inputs = {**problem.at(x_init), **(inputs or {}), **changes}
        return run(jax.tree.map(jnp.asarray, inputs), u_init, multipliers)

    return call


@functools.cache
def plain(name):
    return compiled(name)()


def lane(tree, i):
    return jax.tree.map(lambda a: a[i], tree)


def fields_of(solution):
    return {name: getattr(solution, name) for name in FIELDS}


def assert_gradients_close(got, want, rtol):
    """One scale for all inputs: the largest entry of all."""
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want))
    assert_close(got, want, rtol, scale=scale)


QUICK = ["soft", "everything"]
each_problem = pytest.mark.parametrize(
    "name",
    QUICK + [pytest.param(n, marks=pytest.mark.slow) for n in PROBLEMS if n not in QUICK],
)


@functools.cache
def one_by_one(name):
    """The gradient of the objective alone, and the solution, of problems without a batch."""
    problem = PROBLEMS[name]

    @jax.jit
    def run(inputs):
        def objective(inputs):
            solution = solve(problem, inputs)
            return solution.objective, solution

        return jax.grad(objective, has_aux=True)(inputs)

    return [run(jax.tree.map(jnp.asarray, problem.at(x_init))) for x_init in problem.x_init]


BAD = {  # the second of three starts
    "out of the box": (jnp.array([0.5, 2.0]), Status.INFEASIBLE),
    "nan": (jnp.array([jnp.nan, 0.0]), Status.NONFINITE),
}


def spoiled(name, which):
    return jnp.asarray(PROBLEMS[name].x_init).at[1].set(BAD[which][0])
