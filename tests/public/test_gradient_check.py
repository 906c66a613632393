"""Gradients against re-solved problems that are spoiled on purpose."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from gradient_cases import T, weighted

from jaxmpc import Options, Status, check_gradients
from jaxmpc.systems import pendulum

x_init = pendulum.state(1.2, -0.5)
params = weighted(pendulum, 0.1)
check = partial(
    check_gradients, pendulum.cost, pendulum.dynamics, x_init, jnp.zeros((T, 1)), params
)


def test_good_gradients_pass():
    report = check(u_lower=-2.0, u_upper=2.0)
    assert report.ok, str(report)
    names = [c.name for c in report.checks]
    assert names == [
        "params.physics.g", "params.physics.m", "params.physics.l",
        "params.cost.q", "params.cost.p", "u_lower", "u_upper", "x_init",
    ]  # fmt: skip
    # Not for want of something to compare.
    assert max(abs(c.gradient) for c in report.checks) > 0.1
    assert "CONVERGED" in str(report)
    assert "WRONG" not in str(report)
    for c in report.checks:
        assert c.gradient == pytest.approx(c.difference, rel=1e-4, abs=1e-6)


def reasons(report):
    assert not report.ok
    assert "WRONG" in str(report)
    return {c.name: c.reason for c in report.checks if not c.ok}


def test_the_papers_hessian_is_found_out():
    found = reasons(check(u_lower=-2.0, u_upper=2.0, options=Options(backward_hessian="ilqr")))
    assert "params.physics.g" in found
    assert all("defined by hand" in reason for reason in found.values())


def scalar(cost, theta, **kwargs):
    """One stage whose plan is the minimiser of cost(u, theta)."""
    return check_gradients(
        lambda x, u, t, theta: cost(u[0], theta["a"]) + 0.5 * x[0] ** 2,
        lambda x, u, t, theta: 0.5 * x,
        jnp.ones(1), jnp.zeros((1, 1)), {"a": theta}, **kwargs,
    )  # fmt: skip


def test_a_plan_that_is_none():
    report = scalar(lambda u, a: (u - a) ** 4 + u**2, 1.0, options=Options(max_iterations=1))
    assert report.status == Status.MAX_ITERATIONS
    assert "not converged at the plan" in reasons(report)["params['a']"]


def test_a_bound_just_where_the_plan_would_be():
    report = scalar(lambda u, a: 0.5 * (u - a) ** 2, 1.0, u_upper=1.0)
    assert "degenerate: u[0, 0]" in reasons(report)["params['a']"]
    certificate = report.certificate
    assert min(float(certificate.multiplier), float(certificate.slack)) < 1e-12


def test_a_jump():
    report = scalar(lambda u, a: 0.5 * (u - jnp.where(a > 1.0, 3.0, 1.0)) ** 2, 1.0)
    assert "jumps" in reasons(report)["params['a']"]


def test_a_kink():
    report = scalar(lambda u, a: 0.5 * (u - jnp.abs(a - 1.0)) ** 2, 1.0)
    assert "kink in cost" in reasons(report)["params['a']"]


def test_a_wrong_rule_and_what_is_left_alone():
    @jax.custom_jvp
    def wrong(a):
        return a**2

    wrong.defjvp(lambda primals, tangents: (wrong(*primals), 3.0 * tangents[0]))
    found = reasons(scalar(lambda u, a: 0.5 * (u - wrong(a)) ** 2, 1.0))
    assert list(found) == ["params['a']"]
    assert "defined by hand" in found["params['a']"]


def test_infinite_bounds_integers_and_equal_bounds():
    report = check_gradients(
        lambda x, u, t, p: 0.5 * jnp.sum((u - p["a"] * p["k"]) ** 2) + 0.5 * x[0] ** 2,
        lambda x, u, t, p: 0.5 * x + u[:1],
        jnp.ones(1), jnp.zeros((2, 2)), {"a": 0.3, "k": 2},
        u_lower=jnp.array([-jnp.inf, 0.1]), u_upper=jnp.array([0.2, 0.1]),
    )  # fmt: skip
    assert report.ok, str(report)
    assert [c.name for c in report.checks] == ["params['a']", "u_lower", "u_upper", "x_init"]
    assert dataclasses.asdict(report.checks[0])["ok"] is True
