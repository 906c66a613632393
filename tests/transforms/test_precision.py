"""Products in the arrays' own precision on every device, and programs for the platform that they
are lowered for. Nothing here runs: what is looked at is what JAX is told to compute."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxmpc import (
    Affine,
    Constraints,
    Options,
    Quadratic,
    Rate,
    Slack,
    certify,
    check_gradients,
    gradient_check,
    ilqr_box,
    ilqr_unrolled,
    lqr_solve,
    mpc_solve,
    receding_horizon,
    tracking,
)

T, M = 3, 2
# A product of few terms is written out, and needs no precision; one of many does.
SMALL, LARGE = 4, 20


def jaxprs_in(value):
    if isinstance(value, list | tuple):
        for part in value:
            yield from jaxprs_in(part)
    value = getattr(value, "jaxpr", value)
    if hasattr(value, "eqns"):
        yield value


def products(jaxpr):
    """The precisions of all products that a jaxpr makes, however deep inside."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn.params["precision"]
        for value in eqn.params.values():
            for inner in jaxprs_in(value):
                yield from products(inner)


def precisions(fn, *args):
    return list(products(jax.make_jaxpr(fn)(*args).jaxpr))


HIGHEST = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)


def params_of(n):
    return {"A": 0.9 * jnp.eye(n), "B": jnp.ones((n, M)), "Q": jnp.eye(n), "kernel": jnp.ones(3)}


def cost(x, u, t, p):
    smooth = jnp.convolve(x, p["kernel"], mode="same")
    return 0.5 * x @ p["Q"] @ x + u @ u + 0.1 * smooth @ jnp.tanh(x)


def dynamics(x, u, t, p):
    return jnp.tanh(p["A"] @ x) + p["B"] @ u


def terminal_cost(x, p):
    return x @ p["Q"] @ x


def constraints_of():
    return Constraints(
        inequality=lambda x, u, t, p: p["Q"][:2] @ x - 3,
        terminal_equality=lambda x, p: p["A"][:1] @ x - 1,
        slack=Slack(linear=10.0),
        rate=Rate(previous=jnp.zeros(M), limit=1.0),
        x_upper=5.0,
    )


def solved_by(solver, *given, **options):
    def run(x_init, p):
        functions = given or (cost, dynamics)
        if not given and solver is mpc_solve:
            options.setdefault("terminal_cost", terminal_cost)
        solution = solver(
            *functions, x_init, jnp.zeros((T, M)), p, u_lower=-1.0, u_upper=1.0, **options
        )
        return [solution.x, solution.u, solution.costate, solution.objective, solution.K]

    return run


def by_matrices(x_init, p):
    n = len(x_init)
    given = Quadratic(jnp.eye(n + M)), Affine(jnp.concatenate([p["A"], p["B"]], axis=1))
    return solved_by(mpc_solve, *given, terminal_cost=Quadratic(p["Q"]))(x_init, p)


def matrices_as_functions(x_init, p):
    """With a rate the matrices are functions like any others."""
    n = len(x_init)
    given = Quadratic(jnp.eye(n + M)), Affine(jnp.concatenate([p["A"], p["B"]], axis=1))
    rate = Rate(previous=jnp.zeros(M), weight=1.0)
    return solved_by(mpc_solve, *given, constraints=Constraints(rate=rate))(x_init, p)


def tracked(x_init, p):
    n = len(x_init)
    task = tracking.Tracking(jnp.zeros(n), p["Q"], jnp.eye(M))
    run = solved_by(mpc_solve, tracking.cost, lambda x, u, t, q: dynamics(x, u, t, q["model"]))
    return run(x_init, {"tracking": task, "model": p})


def constrained(x_init, p):
    return solved_by(mpc_solve, constraints=constraints_of())(x_init, p)


def in_closed_loop(x_init, p):
    episode = receding_horizon(
        cost, dynamics, x_init, jnp.zeros((T, M)), p, num_steps=2, plant=dynamics
    )
    return [episode.x, episode.u, episode.costs]


def regulated(method):
    def run(x_init, p):
        n = len(x_init)
        F = jnp.tile(jnp.concatenate([p["A"], p["B"]], axis=1), (T, 1, 1))
        C, c = jnp.tile(jnp.eye(n + M), (T, 1, 1)), jnp.zeros((T, n + M))
        s = lqr_solve(x_init, C, c, F, C_final=p["Q"], method=method)
        return [s.x, s.u, s.costate, s.K, s.k]

    return run


DIFFERENTIABLE = {
    "mpc_solve": solved_by(mpc_solve),
    "mpc_solve, parallel": solved_by(mpc_solve, options=Options(riccati="parallel")),
    "mpc_solve, ilqr": solved_by(
        mpc_solve, options=Options(hessian="ilqr", backward_hessian="ilqr")
    ),
    "constraints": constrained,
    "Quadratic and Affine": by_matrices,
    "Quadratic and Affine as functions": matrices_as_functions,
    "tracking": tracked,
    "receding_horizon": in_closed_loop,
    "lqr_solve": regulated("sequential"),
    "lqr_solve, parallel": regulated("parallel"),
    "ilqr_unrolled": solved_by(ilqr_unrolled, num_iterations=2),
}


# What is looked at each time; the rest is slow to trace, and made of the same parts.
QUICK = {
    ("mpc_solve", LARGE),
    ("constraints", LARGE),
    ("Quadratic and Affine", LARGE),
    ("lqr_solve", LARGE),
    ("lqr_solve, parallel", SMALL),
}
CASES = [
    pytest.param(name, n, marks=[] if (name, n) in QUICK else pytest.mark.slow)
    for name in DIFFERENTIABLE
    for n in (SMALL, LARGE)
]


@pytest.mark.parametrize("name, n", CASES)
def test_no_product_has_the_default_precision(name, n):
    def loss(*args):
        return sum(jnp.sum(jnp.sin(a)) for a in DIFFERENTIABLE[name](*args))

    gradient, params = jax.grad(jax.jit(loss), (0, 1)), params_of(n)
    found = precisions(gradient, jnp.ones(n), params)
    found += precisions(jax.vmap(gradient, (0, None)), jnp.ones((2, n)), params)
    assert len(found) > (10 if n == LARGE else 0)
    assert set(found) <= {HIGHEST}


@pytest.mark.slow
@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_nor_has_one_of_a_second_derivative(n):
    def slope(*args):
        gradients = jax.grad(lambda *args: jnp.sum(DIFFERENTIABLE["mpc_solve"](*args)[1]))(*args)
        return jnp.sum(gradients)

    assert set(precisions(jax.grad(slope), jnp.ones(n), params_of(n))) == {HIGHEST}


@pytest.mark.parametrize("n", [pytest.param(SMALL, marks=pytest.mark.slow), LARGE])
def test_nor_has_one_where_nothing_is_differentiated(n):
    def run(x_init, p):
        problem, rows = (cost, dynamics, x_init), constraints_of()
        solution = ilqr_box(*problem, jnp.zeros((T, M)), p, constraints=rows)
        return solution, certify(*problem, solution, p, constraints=rows)

    assert set(precisions(run, jnp.ones(n), params_of(n))) == {HIGHEST}


def test_nor_has_one_of_check_gradients(monkeypatch):
    """It runs outside of ``jit``: what it traces is looked at when it compiles."""
    found, jit = [], jax.jit

    def watched(fn, **kwargs):
        def call(*args):
            compiled = jit(fn, **kwargs)
            found.extend(products(compiled.trace(*args).jaxpr.jaxpr))
            return compiled(*args)

        return call

    monkeypatch.setattr(gradient_check.jax, "jit", watched)
    problem = Quadratic(jnp.eye(2)), Affine(jnp.array([[0.9, 1.0]])), jnp.ones(1)
    assert check_gradients(*problem, jnp.zeros((2, 1))).ok
    assert set(found) == {HIGHEST}


TF32 = (lax.Precision.HIGH, lax.Precision.HIGH)


def test_whoever_asks_for_a_precision_gets_it_in_his_functions():
    def asks(x, u, t, p):
        return x @ jnp.dot(p["Q"], x, precision="high") + u @ u

    def plan(x_init, p, cost=cost):
        return ilqr_box(cost, dynamics, x_init, jnp.zeros((T, M)), p).u

    n = LARGE
    found = precisions(lambda *args: plan(*args, asks), jnp.ones(n), params_of(n))
    assert set(found) == {HIGHEST, TF32}
    with jax.default_matmul_precision("high"):
        found = precisions(plan, jnp.ones(n), params_of(n))
    assert set(found) == {HIGHEST, TF32}  # the library's, and the user's


def test_the_program_is_that_of_the_platform_it_is_lowered_for():
    """Whichever platform it is traced on."""

    def plan(x_init):
        return ilqr_box(
            Quadratic(jnp.eye(4)), Affine(jnp.ones((2, 4))), x_init, jnp.zeros((T, M)),
            u_upper=0.5,
        ).u  # fmt: skip

    def regulate(x_init):
        return lqr_solve(x_init, jnp.ones((T, 4, 4)), jnp.ones((T, 4)), jnp.ones((T, 2, 4))).u

    for solve in (plan, regulate):
        traced = jax.jit(jax.vmap(solve)).trace(jnp.ones((256, 2)))
        text = {
            platform: traced.lower(lowering_platforms=(platform,)).as_text()
            for platform in ("cpu", "cuda", "tpu")
        }
        # Results stored by calls that are not inlined, and blocks that fit into the caches.
        assert ['inlineable = "false"' in text[name] for name in text] == [True, False, False]
        assert ["x128xf64" in text[name] for name in text] == [True, False, False]
