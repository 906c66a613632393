"""Wrong constraints are refused where they are given, by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmpc import Constraints, Multipliers, Rate, Slack, Status, mpc_solve

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
    "bounds of another shape": (
        dict(x_lower=np.zeros(3)),
        ValueError,
        r"constraints.x_lower must broadcast to \[T\+1, n\] = \[4, 2\], got \[3\]",
    ),
    "bounds of the stages alone": (
        dict(x_upper=np.zeros((3, 2))),
        ValueError,
        r"constraints.x_upper must broadcast to \[T\+1, n\] = \[4, 2\], got \[3, 2\]",
    ),
    "bounds that are no numbers": (
        dict(x_upper=np.array([True, False])),
        TypeError,
        "constraints.x_upper must be a real number or array, got dtype bool",
    ),
    "a bound that is no array": (
        dict(x_upper="1"),
        TypeError,
        "constraints.x_upper must be an array, got str",
    ),
    "bounds that cross": (
        dict(x_lower=np.array([0.0, 0.5]), x_upper=np.array([[1.0, 1.0]] * 3 + [[1.0, 0.25]])),
        ValueError,
        r"constraints.x_lower must be at most constraints.x_upper, got "
        r"constraints.x_lower\[3, 1\] = 0.5 and constraints.x_upper\[3, 1\] = 0.25",
    ),
    "sizes of another shape": (
        GOOD | dict(x_size=np.ones(3)),
        ValueError,
        r"constraints.x_size must broadcast to \[n\] = \[2\], got \[3\]",
    ),
    "a negative size": (
        GOOD | dict(u_size=-1.0),
        ValueError,
        "constraints.u_size must be non-negative and finite, got -1.0",
    ),
    "multipliers of the states at the stages alone": (
        dict(x_lower=0.0, multipliers=Multipliers(state=np.zeros((3, 2)))),
        ValueError,
        r"constraints.multipliers.state must have shape \[T\+1, n\] = \[4, 2\], got \[3, 2\]",
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
    with pytest.raises(error, match=message):  # What is concrete is checked inside of jit, too.
        jax.eval_shape(lambda: refused(Constraints(**parts)).u)


def refused(constraints):
    return mpc_solve(
        lambda x, u, t, p: x @ x + u @ u, lambda x, u, t, p: x + jnp.sum(u), np.zeros(N),
        np.zeros((T, M)), constraints=constraints,
    )  # fmt: skip


def test_refuses_what_is_no_constraints():
    with pytest.raises(TypeError, match=r"constraints must be a jaxmpc\.Constraints, got function"):
        refused(GOOD["inequality"])


def test_no_constraints_at_all_are_none():
    solution = refused(Constraints())
    assert solution.status == Status.CONVERGED
    assert solution.violation == 0
