"""``mpc_solve`` with ``Constraints``: plans and multipliers against IPOPT, gradients in every input
at once against dense autodiff of the KKT conditions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constrained import PROBLEMS, SWERVE, active_set, gradient, ipopt, kkt_errors, rows
from helpers import assert_close
from jax.flatten_util import ravel_pytree

from jaxmpc import Constraints, Multipliers, Options, Rate, Slack, Status, mpc_solve

pytestmark = pytest.mark.usefixtures("compile_quickly")

FIELDS = ("x", "u", "costate", "objective", "multipliers", "status", "iterations", "violation")


def as_dict(multipliers):
    return {name: a for name, a in vars(multipliers).items() if a is not None}


def solve(problem, inputs, options=Options(), u_init=None, multipliers=None):
    weights = {k: Slack(**inputs[k]) for k in ("slack", "terminal_slack") if k in inputs}
    if "rate" in inputs:
        weights["rate"] = Rate(**inputs["rate"])
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
    wave = jnp.cos(jnp.arange(out["u"].size)).reshape(out["u"].shape)
    total = jnp.sum((out["u"] - wave) ** 2) + 0.3 * jnp.sum(jnp.sin(out["x"]))
    total += 0.1 * jnp.sum(jnp.cos(out["costate"])) + 0.2 * out["objective"]
    for name, nu in out["multipliers"].items():
        wave = jnp.cos(len(name) + jnp.arange(nu.size)).reshape(nu.shape)
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


# Plans and gradients.

QUICK = ["soft", "everything"]


@pytest.fixture(
    scope="module",
    params=QUICK + [pytest.param(n, marks=pytest.mark.slow) for n in PROBLEMS if n not in QUICK],
)
def name(request, compile_quickly):
    return request.param


def test_plans_and_multipliers_are_those_of_ipopt(name):
    problem, (_, solutions) = PROBLEMS[name], plain(name)
    assert np.all(np.asarray(solutions.status) == Status.CONVERGED)
    assert np.max(solutions.violation) <= 1e-9
    kinds = set()
    for i, x_init in enumerate(problem.x_init):
        solution, inputs = lane(solutions, i), problem.at(x_init)
        # Both start from the same plan; without that, they may find different local minima.
        want = ipopt(problem, inputs)
        assert_close(solution.objective, want.objective, 1e-9)
        assert_close(solution.u, want.u, 1e-6)
        assert_close(solution.x, want.x, 1e-6)
        assert_close(solution.costate, want.costate, 1e-6)
        multipliers = as_dict(solution.multipliers)
        scale = max(np.max(np.abs(nu)) for nu in want.multipliers.values())
        assert_close(multipliers, want.multipliers, 1e-6, scale=scale)
        errors = kkt_errors(problem, inputs, solution.u, multipliers)
        assert max(map(float, errors.values())) <= 1e-8, errors
        active = active_set(problem, inputs, solution.u, multipliers, margin=0)
        assert_close(~solution.free, active.at_lower | active.at_upper, 0)
        kinds |= {kind for kind in ("held", "paid") if _any(getattr(active, kind))}
        kinds |= {"bounds"} if np.any(~solution.free) else set()
        kinds |= {"no bounds"} if np.any(solution.free) else set()
    # The starts reach every kind of activity that the problem is there for.
    assert {"bounds", "no bounds", "held"} <= kinds
    assert ("paid" in kinds) == any(key in problem.inputs for key in ("slack", "terminal_slack"))


def test_tight_limits_of_the_rate():
    problem = PROBLEMS["slew"]
    run = jax.jit(jax.vmap(lambda x: solve(problem, jax.tree.map(jnp.asarray, problem.at(x)))))
    solutions = run(jnp.asarray(problem.x_init))
    assert np.all(solutions.status == Status.CONVERGED)
    for i, x_init in enumerate(problem.x_init):
        want = ipopt(problem, problem.at(x_init))
        assert np.sum(np.abs(want.multipliers["rate"]) > 1e-6) > 10
        assert_close(solutions.u[i], want.u, 1e-6)
        assert_close(solutions.objective[i], want.objective, 1e-9)


def test_a_disc_in_the_way():
    def plans(dtype):
        def plan(x):
            return solve(SWERVE, jax.tree.map(lambda a: jnp.asarray(a, dtype), SWERVE.at(x)))

        return jax.jit(jax.vmap(plan))(jnp.asarray(SWERVE.x_init, dtype))

    solutions, low = plans(jnp.float64), plans(jnp.float32)
    assert np.all(solutions.status == Status.CONVERGED)
    # Where multipliers are large, a penalty makes much of the rounding of what it multiplies.
    assert np.all(low.status == Status.CONVERGED)
    assert_close(low.u, solutions.u, 1e-2)
    assert_close(low.objective, solutions.objective, 1e-4)
    for i, x_init in enumerate(SWERVE.x_init):
        solution, inputs = lane(solutions, i), SWERVE.at(x_init)
        # From the same side: the other one has a local minimum of its own.
        want = ipopt(SWERVE, inputs, solution.u)
        assert np.max(want.multipliers["inequality"]) > 30
        assert_close(solution.u, want.u, 1e-6)
        assert_close(solution.objective, want.objective, 1e-9)
        errors = kkt_errors(SWERVE, inputs, solution.u, as_dict(solution.multipliers))
        assert max(map(float, errors.values())) <= 1e-7, errors


def _any(masks):
    return any(np.any(mask) for mask in masks.values())


def test_inactive_rows_have_no_multiplier_and_active_ones_no_slack(name):
    problem, (_, solutions) = PROBLEMS[name], plain(name)
    for i, x_init in enumerate(problem.x_init):
        solution, inputs = lane(solutions, i), problem.at(x_init)
        for key, row in rows(problem, inputs, solution.x, solution.u).items():
            nu = as_dict(solution.multipliers)[key]
            if "inequality" in key:
                assert np.all(nu >= 0)
                assert np.all(nu[row < -1e-6] == 0)
            elif key == "rate":
                limit, held = np.broadcast_to(inputs["rate"]["limit"], row.shape), nu != 0
                assert np.all(nu[np.abs(row) < limit - 1e-6] == 0)
                assert_close(row[held], np.sign(nu[held]) * limit[held], 1e-9)


def test_gradients_match_dense_autodiff_in_every_input(name):
    problem, (grads, solutions) = PROBLEMS[name], plain(name)

    @jax.jit
    def oracle(inputs, u, multipliers):
        return gradient(loss, problem, u, multipliers, inputs)

    for i, x_init in enumerate(jnp.asarray(problem.x_init)):
        solution = lane(solutions, i)
        want = oracle(problem.at(x_init), solution.u, as_dict(solution.multipliers))
        assert_gradients_close(lane(grads, i), want, 1e-7)


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


def test_the_objective_has_the_lagrangian_as_its_derivative():
    """costate[0] in x_init, and multipliers on bounds, weights and limits: the envelope theorem."""
    problem = PROBLEMS["soft"]

    @jax.jit
    def oracle(inputs, u, multipliers):
        return gradient(lambda out: out["objective"], problem, u, multipliers, inputs)

    for x_init, (grad, solution) in zip(problem.x_init, one_by_one("soft"), strict=True):
        want = oracle(problem.at(x_init), solution.u, as_dict(solution.multipliers))
        assert_gradients_close(grad, want, 1e-9)
        assert_close(grad["x_init"], solution.costate[0], 1e-12)


# Batches.

BAD = {  # the second of three starts
    "out of the box": (jnp.array([0.5, 2.0]), Status.INFEASIBLE),
    "nan": (jnp.array([jnp.nan, 0.0]), Status.NONFINITE),
}


def spoiled(name, which):
    return jnp.asarray(PROBLEMS[name].x_init).at[1].set(BAD[which][0])


def test_a_single_solve_equals_that_in_a_batch():
    _, solutions = plain("soft")
    for i, (_, alone) in enumerate(one_by_one("soft")):
        together = lane(solutions, i)
        assert int(alone.status) == int(together.status)
        # Their rounding differs, and with it, where ρ is large, the last digits.
        for field in ("x", "u", "costate", "objective", "multipliers"):
            assert_close(getattr(alone, field), getattr(together, field), 1e-8)


@pytest.mark.parametrize("which", BAD)
def test_a_bad_problem_leaves_the_others_as_they_are(which):
    want_grads, want = plain("soft")
    grads, got = compiled("soft")(x_init=spoiled("soft", which))
    assert got.status[1] == BAD[which][1]
    assert all(np.all(np.asarray(leaf[1]) == 0) for leaf in jax.tree.leaves(grads))
    for i in (0, 2):
        assert_close(fields_of(lane(got, i)), fields_of(lane(want, i)), 1e-12)
        assert_close(lane(grads, i), lane(want_grads, i), 1e-12)


def test_gradients_that_a_batch_shares_are_the_sum_of_its_own():
    problem = PROBLEMS["soft"]
    shared = {k: v for k, v in problem.inputs.items() if k != "x_init"}

    @jax.jit
    @jax.grad
    def run(shared, x_init, counts):
        each, _ = jax.vmap(lambda x: value(problem, {**shared, "x_init": x}))(x_init)
        return jnp.sum(jnp.where(counts, each, 0))

    grads, _ = plain("soft")
    grads = {k: v for k, v in grads.items() if k != "x_init"}
    everybody = jnp.ones(3, bool)
    got = run(shared, jnp.asarray(problem.x_init), everybody)
    assert_gradients_close(got, jax.tree.map(lambda g: jnp.sum(g, 0), grads), 1e-9)
    counts = jnp.array([True, False, True])
    want = jax.tree.map(lambda g: g[0] + g[2], grads)
    for which in BAD:
        got = run(shared, spoiled("soft", which), counts)
        assert_gradients_close(got, want, 1e-9)


# Infeasible problems.


def test_a_first_state_outside_of_the_box_is_infeasible_by_its_distance():
    _, solutions = compiled("soft")(x_init=spoiled("soft", "out of the box"))
    speed, fastest = BAD["out of the box"][0][1], PROBLEMS["soft"].inputs["params"]["fastest"]
    assert solutions.status[1] == Status.INFEASIBLE
    assert_close(solutions.violation[1], speed - fastest, 1e-6)
    # Two steps are enough to get below it, where the limit is hard.
    assert np.max(solutions.x[1, 2:-1, 1]) <= fastest + 1e-3


@pytest.mark.slow
def test_a_target_out_of_reach_is_missed_by_as_little_as_can_be():
    """In the sum of squares, which is what IPOPT minimises here in place of the cost."""
    problem, target = PROBLEMS["terminal equality"], np.array([-9.0, 0.5])
    params = {**problem.inputs["params"], "target": target}
    grads, solutions = compiled("terminal equality")(params=params)
    assert np.all(np.asarray(solutions.status) == Status.INFEASIBLE)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads))

    def miss(x, params):
        return (x[0] - params["target"][0]) ** 2 + (x[1] - params["target"][1]) ** 2

    nearest = dataclasses.replace(
        problem,
        cost=lambda x, u, t, params: 0.0 * u[0],
        terminal_cost=miss,
        terminal_equality=None,
    )
    for i, x_init in enumerate(problem.x_init):
        solution = lane(solutions, i)
        want = ipopt(nearest, {**problem.at(x_init), "params": params}, solution.u)
        missed = np.asarray(solution.x[-1]) - target
        assert_close(np.sum(missed**2), want.objective, 1e-3)
        assert_close(solution.violation, np.max(np.abs(missed)), 1e-12)


def test_the_least_violation_of_an_integrator_is_known():
    """From 0, ten steps of at most 0.1: 1 is as far as it gets of the 5 that it should."""

    @jax.jit
    def run(target):
        return mpc_solve(
            lambda x, u, t, p: u @ u, lambda x, u, t, p: x + 0.1 * u, jnp.zeros(1),
            jnp.zeros((10, 1)), target, u_lower=-1.0, u_upper=1.0,
            constraints=Constraints(terminal_equality=lambda x, target: x - target),
        )  # fmt: skip

    solution = run(5.0)
    assert solution.status == Status.INFEASIBLE
    assert_close(solution.violation, 4.0, 1e-9)
    assert_close(solution.u, jnp.ones((10, 1)), 1e-9)
    solution = run(0.8)  # of the plans that get there, the evenest
    assert solution.status == Status.CONVERGED
    assert_close(solution.u, jnp.full((10, 1), 0.8), 1e-9)
    assert_close(solution.multipliers.terminal_equality, jnp.array([-16.0]), 1e-8)


# Degenerate and equivalent formulations.


def twice(fn):
    return None if fn is None else lambda *args: jnp.concatenate([fn(*args), fn(*args)])


def folded(multipliers):
    """The sums of both; the rate is no function, and there once."""
    return {
        k: nu if k == "rate" else sum(jnp.split(nu, 2, axis=-1)) for k, nu in multipliers.items()
    }


TWICE = ["terminal equality", "stage equality", "friction cone", "state box"]


@pytest.mark.parametrize(
    "name", TWICE[:1] + [pytest.param(name, marks=pytest.mark.slow) for name in TWICE[1:]]
)
def test_a_constraint_that_stands_there_twice_is_the_same_constraint(name):
    """Only the sum of its multipliers is unique."""
    problem = PROBLEMS[name]
    functions = ("inequality", "equality", "terminal_inequality", "terminal_equality")
    doubled = dataclasses.replace(problem, **{k: twice(getattr(problem, k)) for k in functions})

    @jax.jit
    def run(x_init):
        def one(x_init):
            inputs = problem.at(x_init)
            grad, solution = jax.grad(value, 1, has_aux=True)(doubled, inputs, fold=folded)
            multipliers = folded(as_dict(solution.multipliers))
            want = gradient(loss, problem, solution.u, multipliers, inputs)
            return grad, want, solution, multipliers

        return jax.vmap(one)(x_init)

    grads, want_grads, solutions, multipliers = run(jnp.asarray(problem.x_init))
    assert np.all(np.asarray(solutions.status) == Status.CONVERGED)
    for i, x_init in enumerate(problem.x_init):
        want = ipopt(problem, problem.at(x_init))
        assert_close(solutions.u[i], want.u, 1e-6)
        assert_close(solutions.objective[i], want.objective, 1e-9)
        scale = max(np.max(np.abs(nu)) for nu in want.multipliers.values())
        assert_close(lane(multipliers, i), want.multipliers, 1e-6, scale=scale)
        assert_gradients_close(lane(grads, i), lane(want_grads, i), 1e-7)


@pytest.mark.slow
def test_a_rate_that_ends_in_a_bound_is_found():
    """Limit and bound hold one control at once: its multipliers are not unique, the plan is."""
    problem = PROBLEMS["rate"]
    rate = problem.inputs["rate"]
    rate = {**rate, "limit": np.tile([1.5, 0.6], (18, 1))}  # 0.5, −1, −2.5, −4, the bound
    _, solutions = compiled("rate")(rate=rate)
    assert np.all(np.asarray(solutions.status) == Status.CONVERGED)
    for i, x_init in enumerate(problem.x_init):
        want = ipopt(problem, {**problem.at(x_init), "rate": rate})
        assert_close(solutions.u[i], want.u, 1e-6)
        assert_close(solutions.objective[i], want.objective, 1e-9)
    assert np.any(np.abs(solutions.u[:, 2, 0]) == 4)


def test_an_infinite_slack_weight_is_a_hard_constraint():
    hard = PROBLEMS["state box"]
    infinite = {"linear": np.full((20, 2), np.inf), "quadratic": np.array([0.0, 0.5])}
    at_the_end = {"linear": np.full(3, np.inf), "quadratic": np.array([30.0, 5.0, 0.0])}
    grads, solutions = compiled("soft")(slack=infinite, terminal_slack=at_the_end)
    for key in ("slack", "terminal_slack"):
        assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(grads.pop(key)))

    @jax.jit
    def oracle(inputs, u, multipliers):
        return gradient(loss, hard, u, multipliers, inputs)

    for i, x_init in enumerate(hard.x_init):
        solution, want = lane(solutions, i), ipopt(hard, hard.at(x_init))
        assert solution.status == Status.CONVERGED
        assert solution.violation <= 1e-9
        assert_close(solution.u, want.u, 1e-6)
        assert_close(solution.objective, want.objective, 1e-9)
        multipliers = as_dict(solution.multipliers)
        assert_close(multipliers, want.multipliers, 1e-6)
        assert_gradients_close(
            lane(grads, i), oracle(hard.at(x_init), solution.u, multipliers), 1e-7
        )


@pytest.mark.slow
def test_an_infinite_rate_limit_is_none():
    problem = PROBLEMS["rate"]
    rate = {**problem.inputs["rate"], "limit": np.full((18, 2), np.inf)}
    grads, solutions = compiled("rate")(rate=rate)
    assert np.all(np.asarray(solutions.multipliers.rate) == 0)
    assert np.all(np.asarray(grads["rate"]["limit"]) == 0)
    unlimited = {k: v for k, v in rate.items() if k != "limit"}
    for i, x_init in enumerate(problem.x_init):
        want = ipopt(problem, {**problem.at(x_init), "rate": unlimited})
        assert solutions.status[i] == Status.CONVERGED
        assert_close(solutions.u[i], want.u, 1e-6)


def test_a_search_from_the_solution_ends_at_once():
    for name in ("soft", "everything"):
        _, cold = plain(name)
        grads, warm = compiled(name)(u_init=cold.u, multipliers=cold.multipliers)
        assert np.all(np.asarray(warm.status) == Status.CONVERGED)
        assert np.all(np.asarray(warm.iterations) <= np.minimum(cold.iterations / 2, 5))
        assert_close(warm.u, cold.u, 1e-8)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


# Precision, order, options.


@pytest.mark.parametrize(
    "name", ["soft"] + [pytest.param(n, marks=pytest.mark.slow) for n in PROBLEMS if n != "soft"]
)
def test_float32_gradients_are_those_of_float64(name):
    problem = PROBLEMS[name]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(over_starts(problem.inputs),))
    def run(inputs):
        return jax.grad(value, 1, has_aux=True)(problem, inputs)

    inputs = problem.at(jnp.asarray(problem.x_init))
    grads, low = run(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), inputs))
    want_grads, high = plain(name)
    assert low.u.dtype == low.violation.dtype == jnp.float32
    assert np.all(np.asarray(low.status) == Status.CONVERGED)
    assert_close(low.objective, high.objective, 1e-5)
    assert_close(low.u, high.u, 1e-3)
    assert np.max(low.violation) <= 1e-4
    for i in range(3):
        assert_gradients_close(lane(grads, i), lane(want_grads, i), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["obstacle", "soft", "everything"])
@pytest.mark.parametrize("options", [Options(riccati="parallel"), Options(hessian="ilqr")])
def test_options_change_the_way_and_not_the_answer(name, options):
    run = program(PROBLEMS[name], options=options)
    problem = PROBLEMS[name]
    inputs = jax.tree.map(jnp.asarray, problem.at(jnp.asarray(problem.x_init)))
    want_grads, want = plain(name)
    zeros = jax.tree.map(jnp.zeros_like, want.multipliers)
    grads, got = run(inputs, jnp.tile(problem.u_init, (3, 1, 1)), zeros)
    assert np.all(np.asarray(got.status) == Status.CONVERGED)
    assert_close(got.u, want.u, 1e-7)
    for i in range(3):
        assert_gradients_close(lane(grads, i), lane(want_grads, i), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, key",
    [
        ("terminal equality", "x_init"),
        ("soft", "x_init"),
        ("soft", "slack"),
        ("rate", "u_lower"),
        ("rate", "rate"),
        ("everything", "params"),
    ],
)
def test_second_derivatives_in_one_input_alone_are_those_of_differences(name, key):
    """In none but one: what the others are perturbed by must not matter."""
    problem = PROBLEMS[name]
    inputs = jax.tree.map(jnp.asarray, problem.inputs)
    flat, unravel = ravel_pytree(inputs[key])
    direction = jnp.where(jnp.isfinite(flat), jnp.sin(1 + jnp.arange(flat.size)), 0)

    def along(s):
        return value(problem, {**inputs, key: unravel(flat + s * direction)})[0]

    first, second, h = jax.jit(jax.grad(along)), jax.jit(jax.grad(jax.grad(along)))(0.0), 1e-5
    assert_close(second, (first(h) - first(-h)) / (2 * h), 1e-5)


# What is refused.

T, N, M = 3, 2, 1

GOOD = dict(inequality=lambda x, u, t, p: x - 1)
ERRORS = {
    "no constraints": (
        dict(inequality=3.0),
        TypeError,
        "constraints.inequality must be a callable, got float",
    ),
    "a scalar": (
        dict(inequality=lambda x, u, t, p: x[0]),
        ValueError,
        r"constraints.inequality must return a vector.*, got shape \[\]",
    ),
    "a matrix": (
        dict(equality=lambda x, u, t, p: jnp.outer(x, x)),
        ValueError,
        r"constraints.equality must return a vector.*, got shape \[2, 2\]",
    ),
    "no array": (
        dict(terminal_inequality=lambda x, p: [x[0], x[1]]),
        TypeError,
        "constraints.terminal_inequality must return one array, got list",
    ),
    "integers": (
        dict(terminal_equality=lambda x, p: jnp.zeros(2, int)),
        TypeError,
        "constraints.terminal_equality must return floating-point values, got dtype int64",
    ),
    "a negative linear weight": (
        GOOD | dict(slack=Slack(linear=-1.0)),
        ValueError,
        "constraints.slack.linear must be non-negative, got -1.0",
    ),
    "a negative quadratic weight": (
        GOOD | dict(slack=Slack(1.0, np.array([1.0, -2.0]))),
        ValueError,
        "constraints.slack.quadratic must be non-negative.*, got -2.0",
    ),
    "an infinite quadratic weight": (
        GOOD | dict(slack=Slack(1.0, np.inf)),
        ValueError,
        "constraints.slack.quadratic must be .*finite.*, got inf",
    ),
    "weights of another shape": (
        GOOD | dict(slack=Slack(np.ones(3))),
        ValueError,
        r"constraints.slack.linear must broadcast to \[T, p\] = \[3, 2\], got \[3\]",
    ),
    "a slack of no inequality": (
        GOOD | dict(terminal_slack=Slack(1.0)),
        ValueError,
        "constraints.terminal_slack",
    ),
    "a number for a slack": (
        GOOD | dict(slack=1.0),
        TypeError,
        "constraints.slack must be a jaxmpc.Slack, got float",
    ),
    "another previous control": (
        dict(rate=Rate(np.zeros(2), 1.0)),
        ValueError,
        r"constraints.rate.previous must have shape \[m\] = \[1\], got \[2\]",
    ),
    "a negative limit": (
        dict(rate=Rate(np.zeros(1), limit=-0.1)),
        ValueError,
        "constraints.rate.limit must be non-negative, got -0.1",
    ),
    "a rate's weight of another shape": (
        dict(rate=Rate(np.zeros(1), weight=np.ones(4))),
        ValueError,
        r"constraints.rate.weight must broadcast to \[T, m\] = \[3, 1\], got \[4\]",
    ),
    "multipliers of another shape": (
        GOOD | dict(multipliers=Multipliers(inequality=np.zeros(2))),
        ValueError,
        r"constraints.multipliers.inequality must have shape \[T, p\] = \[3, 2\], got \[2\]",
    ),
}


@pytest.mark.parametrize("parts, error, message", ERRORS.values(), ids=ERRORS)
def test_refuses(parts, error, message):
    with pytest.raises(error, match=message):
        refused(Constraints(**parts))


def refused(constraints):
    return mpc_solve(
        lambda x, u, t, p: x @ x + u @ u, lambda x, u, t, p: x + jnp.sum(u), np.zeros(N),
        np.zeros((T, M)), constraints=constraints,
    )  # fmt: skip


def test_refuses_what_is_no_constraints():
    with pytest.raises(TypeError, match="constraints must be a jaxmpc.Constraints, got function"):
        refused(GOOD["inequality"])


def test_no_constraints_at_all_are_none():
    solution = refused(Constraints())
    assert solution.status == Status.CONVERGED
    assert solution.violation == 0
