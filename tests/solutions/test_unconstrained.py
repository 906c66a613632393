"""Plans of ``ilqr_box`` against the rolled-out objective's own derivatives, and against IPOPT."""

import dataclasses
import functools

import casadi
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, rolled_out
from unconstrained_problems import (
    COUNT,
    NETWORK,
    SYSTEMS,
    Inputs,
    Model,
    T,
    assert_describes,
    at_most,
    each_system,
    each_with_active_bounds,
    facts,
    inputs_of,
    integrator,
    is_strict_minimum,
    model_of,
    network_inputs,
    random_controls,
    single,
    solve,
    solved,
)

from jaxmpc import Options, Status

# What a solution says.


@each_system
def test_every_start_converges_to_a_strict_minimum(system):
    inputs, solution = inputs_of(system), solved(system)
    assert np.all(solution.status == Status.CONVERGED)
    assert np.all(is_strict_minimum(facts(model_of(system), inputs, solution.u)))


@pytest.mark.parametrize("max_iterations", [0, 1, 3, 200])
@each_with_active_bounds
def test_every_field_describes_the_returned_point(system, max_iterations):
    inputs = inputs_of(system)._replace(u_init=random_controls(inputs_of(system), 1.5))
    solution = solve(model_of(system), inputs, at_most(max_iterations))
    assert_describes(solution, facts(model_of(system), inputs, solution.u))
    assert np.all(solution.iterations <= max_iterations)


@each_with_active_bounds
def test_controls_stay_within_the_bounds_and_clamped_ones_equal_them(system):
    inputs, solution = inputs_of(system), solved(system)
    assert np.all((solution.u >= inputs.lower) & (solution.u <= inputs.upper))
    at_bound = (solution.u == inputs.lower) | (solution.u == inputs.upper)
    assert np.array_equal(~solution.free, at_bound)
    assert np.any(at_bound)


@each_system
def test_a_solution_is_a_fixed_point(system):
    again = solve(model_of(system), inputs_of(system)._replace(u_init=solved(system).u))
    assert np.all(again.iterations == 0)
    same = dataclasses.replace(solved(system), iterations=again.iterations)
    assert_close((again.x, again.u, again.objective), (same.x, same.u, same.objective), 0)
    # The costates are those under feedback, then those of the rollout: what is left of the
    # residual, a difference of terms of their size, is so much rounding apart.
    size = np.max(np.abs(same.costate))
    assert_close(again.kkt_residual, same.kkt_residual, 1e-14, scale=size)
    assert_close(dataclasses.replace(again, kkt_residual=same.kkt_residual), same, 1e-13)


# Against IPOPT, on models written again with the angle as a state.


def casadi_pendulum(state, u):
    th, thd = state[0], state[1]
    cost = 0.5 * (1 + 0.1 * thd**2 + 0.001 * u**2) - casadi.cos(th)
    thd_next = thd + 0.05 * (15 * casadi.sin(th) + 3 * u)
    return cost, casadi.vertcat(th + 0.05 * thd_next, thd_next)


def casadi_cartpole(state, u):
    y, yd, th, thd = (state[i] for i in range(4))
    cost = 0.5 * (0.1 * (y**2 + yd**2 + thd**2) + 1 + 0.001 * u**2) - casadi.cos(th)
    a = (u + 0.05 * thd**2 * casadi.sin(th)) / 1.1
    thdd = (9.8 * casadi.sin(th) - a * casadi.cos(th)) / (
        0.5 * (4 / 3 - 0.1 * casadi.cos(th) ** 2 / 1.1)
    )
    ydd = a - 0.05 * thdd * casadi.cos(th) / 1.1
    return cost, state + 0.05 * casadi.vertcat(yd, ydd, thd, thdd)


CASADI = {"pendulum": (casadi_pendulum, 2), "weak cartpole": (casadi_cartpole, 4)}


def ipopt(system):
    """A function from the bound, the states [T+1, ·] and the controls [T] to IPOPT's answer."""
    step, n = CASADI[system]
    x, u = casadi.SX.sym("x", n, T + 1), casadi.SX.sym("u", T)
    objective, gaps = 0, []
    for t in range(T):
        cost, x_next = step(x[:, t], u[t])
        objective += cost
        gaps.append(x[:, t + 1] - x_next)
    problem = dict(x=casadi.vertcat(casadi.vec(x), u), f=objective, g=casadi.vertcat(*gaps))
    settings = dict(
        tol=1e-11, print_level=0, sb="yes", bound_relax_factor=0, mu_init=1e-9, bound_push=1e-10,
        bound_frac=1e-10, max_iter=100,
    )  # fmt: skip
    program = casadi.nlpsol("program", "ipopt", problem, dict(ipopt=settings, print_time=False))

    def answer(bound, x, u):
        low, high = (np.full(x.shape, side * np.inf) for side in (-1, 1))
        low[0] = high[0] = x[0]
        result = program(
            x0=np.concatenate([x.ravel(), u]),
            lbx=np.concatenate([low.ravel(), np.full(T, -bound)]),
            ubx=np.concatenate([high.ravel(), np.full(T, bound)]),
            lbg=0,
            ubg=0,
        )
        assert program.stats()["success"]
        return float(result["f"]), np.asarray(result["x"])[-T:, 0]

    return answer


@each_with_active_bounds
def test_ipopt_started_at_the_solution_stays_there(system):
    module, *_, bound = SYSTEMS[system]
    solution, answer = solved(system), ipopt(system)
    for i in range(8):
        angles = np.unwrap(np.asarray(module.angle(solution.x[i])))
        # The state with its angle in place of cosine and sine.
        states = np.column_stack([solution.x[i][:, :-3], angles, solution.x[i][:, -1]])
        objective, u = answer(bound, states, solution.u[i][:, 0])
        assert_close(solution.objective[i], objective, 1e-9)
        assert_close(solution.u[i][:, 0], u, 1e-5, scale=bound)


# What does not matter.


@pytest.mark.parametrize("system", ["pendulum", pytest.param("cartpole", marks=pytest.mark.slow)])
def test_the_papers_hessian_reaches_the_same_objective(system):
    options = Options(tolerance=1e-6, hessian="ilqr", max_iterations=500)
    solution = solve(model_of(system), inputs_of(system), options)
    assert np.mean(solution.status == Status.CONVERGED) > 0.95
    assert_close(solution.objective, solved(system).objective, 1e-9)


@each_system
def test_the_unit_of_the_cost_does_not_matter(system):
    inputs = inputs_of(system)
    thousand = jax.tree.map(lambda a: 1000 * a, inputs.params.cost)
    scaled = inputs._replace(params=inputs.params._replace(cost=thousand))
    got, want = solve(model_of(system), scaled), solved(system)
    assert np.array_equal(got.status, want.status)
    assert_close(got.u, want.u, 1e-7)
    assert_close(got.objective, 1000 * want.objective, 1e-11)


@pytest.mark.parametrize("system", ["pendulum", pytest.param("cartpole", marks=pytest.mark.slow)])
def test_a_float32_problem_ends_converged_or_with_nothing_left_to_gain(system):
    inputs = [inputs_of(system, jnp.float32, seed=seed) for seed in range(4)]
    solutions = [solve(model_of(system), some, Options()) for some in inputs]
    assert {s.u.dtype for s in solutions} == {np.dtype("float32")}
    status = np.concatenate([s.status for s in solutions])
    assert np.all((status == Status.CONVERGED) | (status == Status.STALLED))
    assert np.mean(status == Status.CONVERGED) > 0.95


# Where it begins and how it goes on.


@each_system
def test_the_start_is_clipped_into_the_bounds(system):
    inputs = inputs_of(system)
    u_init = random_controls(inputs, 3)
    solution = solve(model_of(system), inputs._replace(u_init=u_init), at_most(0))
    assert np.array_equal(solution.u, np.clip(u_init, inputs.lower, inputs.upper))
    assert np.all(solution.status == Status.MAX_ITERATIONS)
    assert np.all(solution.iterations == 0)


@each_system
def test_the_objective_never_exceeds_that_of_the_start(system):
    inputs = inputs_of(system)
    before = np.full(COUNT, np.inf)
    for count in (0, 1, 2, 5, 200):
        start = inputs._replace(u_init=random_controls(inputs, 2))
        objective = solve(model_of(system), start, at_most(count)).objective
        assert np.all(objective <= before * (1 + 1e-12 * np.sign(before)))
        before = objective


# Problems of other shapes.


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("n, m, T", [slow(1, 1, 1), slow(3, 2, 6), (4, 3, 6), slow(3, 10, 4)])
def test_networks_of_any_shape_with_bounds_of_any_kind(n, m, T):
    inputs = network_inputs(n, m, T)
    solution = solve(NETWORK, inputs)
    converged = solution.status == Status.CONVERGED
    want = facts(NETWORK, inputs, solution.u)
    assert np.mean(converged) > 0.95
    assert np.all(is_strict_minimum(want)[converged])
    assert_describes(solution, want)
    equal = inputs.lower == inputs.upper
    assert np.array_equal(solution.u[equal], inputs.lower[equal])
    assert not np.any(solution.free[equal])


def test_a_control_that_creeps_up_to_its_bound_gets_there():
    solution = solve(NETWORK, network_inputs(4, 3, 6))
    assert np.all(solution.status == Status.CONVERGED)


def test_a_short_step_next_to_a_bound_still_reaches_it():
    """Random networks on whose minima shortened steps used to halve the distance, 300 times."""

    def dynamics(x, u, t, params):
        return x + 0.25 * jnp.tanh(jnp.concatenate([x, u]) @ params["into"]) @ params["out"]

    def cost(x, u, t, params):
        return 0.5 * ((x[0] - 1) ** 2 + x[1] ** 2 + 0.1 * x[2] ** 2 + 0.05 * u[0] ** 2)

    def draw(seed):
        into, out, x_init = jax.random.split(jax.random.key(seed), 3)
        params = {
            "into": jax.random.normal(into, (4, 16)),
            "out": 0.5 * jax.random.normal(out, (16, 3)),
        }
        return params, jax.random.normal(x_init, (3,))

    params, x_init = jax.vmap(draw)(jnp.array([898, 1624, 8087, 8163]))
    u_init = jnp.zeros((4, 20, 1))
    bounds = (jnp.full_like(u_init, b) for b in (-2.0, 2.0))
    solution = solve(Model(cost, dynamics), Inputs(x_init, u_init, params, *bounds))
    assert np.all(solution.status == Status.CONVERGED)
    assert np.max(solution.iterations) < 100


def test_a_cost_that_is_not_convex_in_the_control():
    def cost(x, u, t, params):
        return jnp.sum(jnp.cos(3 * u)) + 0.1 * u @ u + 0.5 * x @ x

    model = Model(cost, integrator)
    u_init = jnp.linspace(-3, 3, 32 * 4).reshape(32, 4, 1).at[0].set(0)  # 0 is a maximum
    bounds = (jnp.full_like(u_init, b) for b in (-4.0, 4.0))
    inputs = Inputs(jnp.zeros((32, 1)), u_init, None, *bounds)
    solution = solve(model, inputs)
    assert np.all(solution.status == Status.CONVERGED)
    assert np.all(is_strict_minimum(facts(model, inputs, solution.u)))


def test_steps_into_overflow_are_shortened():
    def dynamics(x, u, t, params):
        return x + jnp.exp(u)

    def cost(x, u, t, params):
        return 0.5 * (x - 100) @ (x - 100) + 1e-3 * u @ u

    model = Model(cost, dynamics)
    inputs, solution = single(model, [0.0], np.full((3, 1), -6.0))
    overshoot = rolled_out(cost, dynamics, inputs.x_init[0], inputs.u_init[0] + 1000.0)[0]
    assert not np.isfinite(overshoot)
    assert solution.status == Status.CONVERGED
    assert is_strict_minimum(facts(model, inputs, solution.u))


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_of_a_thousand_starts_nearly_all_converge_and_none_falsely(system):
    inputs = inputs_of(system, count=1000, seed=1)
    solution = solve(model_of(system), inputs, Options())
    converged = solution.status == Status.CONVERGED
    want = facts(model_of(system), inputs, solution.u)
    assert np.mean(converged) >= 0.99
    assert np.all(is_strict_minimum(want)[converged])


def test_the_slowest_of_many_cartpoles_is_not_far_behind():
    """With ∇²cost alone, where the exact Hessian is not convex, the slowest took 52 iterations."""
    for seed in (5, 6):
        s = solve(model_of("cartpole"), inputs_of("cartpole", seed=seed))
        assert np.all(s.status == Status.CONVERGED)
        assert np.max(s.iterations) <= 20
