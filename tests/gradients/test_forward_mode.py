"""Forward mode, ``derivative="jvp"``: tangents, Jacobians and Hessians are those of reverse mode,
which has rules of its own and is compared with dense autodiff elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constrained_problems import PROBLEMS
from constrained_solves import as_dict
from constrained_solves import solve as solve_constrained
from helpers import assert_close, rolled_out
from jax.flatten_util import ravel_pytree
from lqr_problems import random_problem

from jaxmpc import Options, Status, lqr_solve, mpc_solve, receding_horizon
from jaxmpc.systems import pendulum

T = 8
FORWARD = Options(derivative="jvp")
REVERSE = Options()
FIELDS = ("x", "u", "costate", "objective", "K")


def outputs(solution):
    return {name: getattr(solution, name) for name in FIELDS}


def weighted(physics):
    params = pendulum.default_params()
    q = params.cost.q.at[-1].set(0.1)
    return params._replace(physics=physics, cost=params.cost._replace(q=q))


def plan(inputs, options=FORWARD):
    return mpc_solve(
        pendulum.cost, pendulum.dynamics, inputs["x_init"], jnp.zeros((T, 1)),
        weighted(inputs["physics"]), u_lower=inputs["u_lower"], u_upper=inputs["u_upper"],
        options=options,
    )  # fmt: skip


INPUTS = {
    "x_init": pendulum.state(2.4, -0.5),  # some controls end at their bounds, most do not
    "physics": pendulum.Physics(10.0, 1.0, 1.0),
    "u_lower": jnp.full((T, 1), -1.2),
    "u_upper": jnp.full((T, 1), 1.2),
}


def equations(jaxpr):
    """The names of all that a jaxpr does, the insides of its linear solves left out."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        yield name
        if name != "custom_linear_solve":
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda a: hasattr(a, "jaxpr")
            ):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def jacobians(run, reverse, inputs):
    """By pushing forward, by the transpose of that, and by the rule of reverse mode. Pushing
    forward is one linear solve with stored factors, and no iteration of the solver."""
    _, push = jax.linearize(run, inputs)
    found = list(equations(jax.make_jaxpr(push)(inputs).jaxpr))
    assert found.count("custom_linear_solve") == 1
    assert "while" not in found
    return jax.jacfwd(push)(inputs), jax.jacrev(push)(inputs), jax.jacrev(reverse)(inputs)


def test_a_plan_between_bounds_has_the_jacobians_of_reverse_mode():
    """Of all that comes back, in all that it depends on."""

    @jax.jit
    def found(inputs):
        def of(options):
            return lambda inputs: outputs(plan(inputs, options))

        return jacobians(of(FORWARD), of(REVERSE), inputs), plan(inputs).free

    (forth, back, want), free = found(INPUTS)
    assert 0 < np.mean(free) < 1
    assert_close(forth, want, 1e-12)
    assert_close(back, want, 1e-12)


def moved(tree, seed=0):
    """A direction in everything that is finite."""
    flat, unravel = ravel_pytree(jax.tree.map(jnp.asarray, tree))
    noise = np.random.default_rng(seed).normal(size=flat.size)
    return unravel(jnp.where(jnp.isfinite(flat), noise, 0))


@pytest.mark.parametrize(
    "name", ["soft"] + [pytest.param(n, marks=pytest.mark.slow) for n in PROBLEMS if n != "soft"]
)
def test_a_plan_with_constraints_moves_as_in_reverse_mode(name):
    """In every number of its constraints, too. K is left out: it holds active rows by weights, and
    they leave its derivative half of the digits."""
    problem = PROBLEMS[name]

    def of(options):
        def run(inputs):
            solution = solve_constrained(problem, inputs, options)
            return outputs(solution) | {"K": ()} | as_dict(solution.multipliers), solution.status

        return run

    @jax.jit
    def both(inputs, direction, weights):
        found, tangent, status = jax.jvp(of(FORWARD), (inputs,), (direction,), has_aux=True)
        _, pull = jax.vjp(lambda inputs: of(REVERSE)(inputs)[0], inputs)
        # Nothing of the solver: the states that the tangent's controls lead to.
        _, states = jax.jvp(
            lambda inputs, u: rolled_out(
                problem.cost, problem.dynamics, inputs["x_init"], u, inputs["params"]
            )[1],
            (inputs, found["u"]),
            (direction, tangent["u"]),
        )
        return tangent, states, pull(weights)[0], status

    shapes = jax.eval_shape(lambda: of(REVERSE)(problem.at(jnp.asarray(problem.x_init)[0]))[0])
    ones = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), shapes)
    for i, x_init in enumerate(jnp.asarray(problem.x_init)):
        inputs = jax.tree.map(jnp.asarray, problem.at(x_init))
        direction, weights = moved(inputs, i), moved(ones, 10 + i)
        tangent, states, slopes, status = both(inputs, direction, weights)
        assert status == Status.CONVERGED
        assert_close(tangent["x"], states, 1e-12)
        pairs = (tangent, weights), (direction, slopes)
        terms = [[np.asarray(ravel_pytree(a)[0]) for a in pair] for pair in pairs]
        got, want = (a @ b for a, b in terms)
        assert_close(got, want, 1e-12, scale=sum(np.sum(np.abs(a * b)) for a, b in terms))


@pytest.mark.parametrize("method", ["sequential", pytest.param("parallel", marks=pytest.mark.slow)])
def test_the_lqr_has_the_jacobians_of_reverse_mode(method):
    problem, free = random_problem(2, 2, 4)

    def of(derivative):
        def run(problem):
            x_init, C, c, F, f, C_final, c_final = problem
            s = lqr_solve(
                x_init, C, c, F, f, C_final=C_final, c_final=c_final, free=free, method=method,
                derivative=derivative,
            )  # fmt: skip
            fields = dataclasses.asdict(s)
            del fields["status"]
            return fields

        return run

    found = jax.jit(lambda problem: jacobians(of("jvp"), of("vjp"), problem))
    forth, back, want = found(problem)
    assert_close(forth, want, 1e-12, scale=10.0)
    assert_close(back, want, 1e-12, scale=10.0)


def of_the_lqr(derivative):
    F, c = 0.5 * jnp.cos(jnp.arange(24.0)).reshape(4, 2, 3), jnp.sin(jnp.arange(12.0))

    def loss(theta):
        C = jnp.tile(jnp.eye(3), (4, 1, 1)) * theta[0]
        s = lqr_solve(theta[1:3], C, c.reshape(4, 3), F * theta[3], derivative=derivative)
        values = jnp.sum(jnp.sin(s.u)) + jnp.sum(s.x**2) + jnp.sum(s.costate * s.x)
        return values + jnp.sum(jnp.sin(s.K)) + jnp.sum(s.k**2)

    return loss, jnp.array([1.3, 0.4, -0.7, 0.9])


def of_the_plan(derivative):
    def loss(theta):
        inputs = INPUTS | {
            "physics": pendulum.Physics(theta[0], 1.0, theta[1]),
            "u_upper": jnp.full((T, 1), theta[2]),
            "x_init": pendulum.state(theta[3], -0.5),
        }
        s = plan(inputs, Options(derivative=derivative))
        values = jnp.sum(jnp.sin(s.u)) + jnp.sum(s.x**2) + 0.1 * jnp.sum(s.costate**2)
        return values + s.objective

    return loss, jnp.array([10.0, 1.0, 1.2, 2.4])


@pytest.mark.parametrize("of", [of_the_lqr, pytest.param(of_the_plan, marks=pytest.mark.slow)])
def test_hessians_are_those_of_reverse_over_reverse(of):
    (loss, theta), (reverse, _) = of("jvp"), of("vjp")
    want = jax.jit(jax.jacrev(jax.jacrev(reverse)))(theta)
    assert_close(jax.jit(jax.hessian(loss))(theta), want, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("of", [of_the_lqr, of_the_plan])
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
@pytest.mark.parametrize("inner", [jax.jacfwd, jax.jacrev])
def test_modes_nest_in_any_order(of, outer, inner):
    (loss, theta), (reverse, _) = of("jvp"), of("vjp")
    want = jax.jit(jax.jacrev(jax.jacrev(reverse)))(theta)
    assert_close(jax.jit(outer(inner(loss)))(theta), want, 1e-12)


@pytest.mark.slow
def test_third_derivatives_are_differences_of_the_hessian():
    loss, theta = of_the_lqr("jvp")
    third = jax.jit(jax.jacfwd(jax.jacfwd(jax.jacfwd(loss))))(theta)
    hessian, h = jax.jit(jax.hessian(loss)), 1e-5
    want = [(hessian(theta + h * e) - hessian(theta - h * e)) / (2 * h) for e in jnp.eye(4)]
    assert_close(third, jnp.stack(want, -1), 1e-7)


def of_the_good(tree):
    """Of a batch whose problem 1 is bad."""
    return jax.tree.map(lambda a: a[np.array([0, 2])], tree)


STARTS = jax.vmap(pendulum.state)(jnp.array([2.4, 0.3, -1.0]), jnp.array([-0.5, 0.1, 0.2]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["nan", *(pytest.param(p, marks=pytest.mark.slow) for p in ("zero", "implicit"))]
)
def test_a_bad_problem_of_a_batch_is_none_of_the_others_business(policy):
    options = dataclasses.replace(FORWARD, unconverged=policy)

    def one(x_init):
        solution = plan(INPUTS | {"x_init": x_init}, options)
        return outputs(solution), solution.status

    @jax.jit
    def run(x_inits):
        return jax.vmap(jax.jacfwd(one, has_aux=True))(x_inits)

    want, status = run(STARTS)
    assert np.all(np.asarray(status) == Status.CONVERGED)
    alone, _ = jax.jit(jax.jacfwd(one, has_aux=True))(STARTS[0])
    assert_close(jax.tree.map(lambda a: a[0], want), alone, 1e-12)
    for bad in (jnp.nan, jnp.inf, 1e300):
        got, status = run(STARTS.at[1, 2].set(bad))
        assert status[1] == Status.NONFINITE
        assert_close(of_the_good(got), of_the_good(want), 1e-12)
        own = ravel_pytree(jax.tree.map(lambda a: a[1], got))[0]
        assert np.all(np.isnan(own) if policy == "nan" else np.asarray(own) == 0)


def test_a_bad_tangent_is_none_of_the_others_business():
    def one(x_init, physics):
        return outputs(plan(INPUTS | {"x_init": x_init, "physics": physics}))

    @jax.jit
    def run(tangents):
        batch = jax.vmap(one, (0, None))
        primals = STARTS, INPUTS["physics"]
        return jax.jvp(batch, primals, (tangents, pendulum.Physics(0.3, 0.2, 0.1)))[1]

    tangents = jnp.cos(jnp.arange(9.0)).reshape(3, 3)
    want, got = run(tangents), run(tangents.at[1].set(jnp.nan))
    assert_close(of_the_good(got), of_the_good(want), 1e-12)
    assert np.all(np.isnan(got["u"][1]))


@pytest.mark.slow
def test_a_shared_gradient_by_transposing_is_that_of_the_good_problems():
    def total(physics, x_inits, options):
        def one(x):
            return plan(INPUTS | {"x_init": x, "physics": physics}, options)

        solutions = jax.vmap(one)(x_inits)
        good = solutions.status == Status.CONVERGED
        return jnp.sum(jnp.where(good[:, None, None], jnp.sin(solutions.u), 0))

    slopes = [
        jax.jit(jax.grad(total), static_argnums=2)(
            INPUTS["physics"], STARTS.at[1, 2].set(jnp.nan), options
        )
        for options in (FORWARD, REVERSE)
    ]
    assert_close(*slopes, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [dict(riccati="parallel"), dict(backward_hessian="ilqr")], ids=str
)
def test_other_options_move_the_plan_as_in_reverse_mode(changes):
    def of(derivative):
        options = Options(derivative=derivative, **changes)
        return lambda inputs: outputs(plan(inputs, options))

    want = jax.jit(jax.jacrev(of("vjp")))(INPUTS)
    assert_close(jax.jit(jax.jacfwd(of("jvp")))(INPUTS), want, 1e-12)


@pytest.mark.slow
def test_a_closed_loop_moves_as_in_reverse_mode():
    def of(options):
        def run(x_init, physics):
            episode = receding_horizon(
                pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), weighted(physics),
                num_steps=3, u_lower=-1.2, u_upper=1.2, options=options,
            )  # fmt: skip
            return episode.x, episode.u, episode.costs

        return run

    at = INPUTS["x_init"], INPUTS["physics"]
    want = jax.jit(jax.jacrev(of(REVERSE), (0, 1)))(*at)
    assert_close(jax.jit(jax.jacfwd(of(FORWARD), (0, 1)))(*at), want, 1e-12)
