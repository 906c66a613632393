import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmpc import Multipliers, Solution, Status, Violations, summarize


def solutions(status, iterations, residual, free):
    size = len(status)
    return Solution(
        x=jnp.zeros((size, 4, 3)),
        u=jnp.zeros((size, 3, 2)),
        costate=jnp.zeros((size, 4, 3)),
        K=jnp.zeros((size, 3, 2, 3)),
        free=jnp.broadcast_to(jnp.asarray(free), (size, 3, 2)),
        objective=jnp.arange(float(size)),
        kkt_residual=jnp.asarray(residual),
        iterations=jnp.asarray(iterations),
        status=jnp.asarray(status),
    )


BATCH = solutions(
    [0, 2, 0, 3], [4, 90, 7, 0], [1e-12, 3e-2, 1e-11, np.nan], np.array([True, False])
)


def test_a_batch_is_counted_and_the_worst_come_first():
    text = summarize(BATCH)
    assert "4 problems, T = 3, n = 3, m = 2, float64" in text
    for kind, count, share in (("CONVERGED", 2, 50.0), ("STALLED", 1, 25.0), ("NONFINITE", 1, 25)):
        assert any(
            line.split()[:3] == [kind, str(count), f"{share:.1f}"] for line in text.splitlines()
        )
    assert "u[0] 0.0 %  u[1] 100.0 %" in text
    assert "not finite in 1" in text
    listed = [line.strip() for line in text.splitlines() if line.startswith("    problem")]
    assert listed[0].startswith("problem 1: STALLED after 90 iterations, KKT residual 3.0e-02")
    assert listed[1].startswith("problem 3: NONFINITE")
    assert listed[2].startswith("problem 2: CONVERGED after 7")


def test_it_shows_only_so_many():
    assert "and 3 more" in summarize(BATCH, show=1)


def test_one_problem_and_nested_batches():
    one = jax.tree.map(lambda a: a[1], BATCH)
    assert summarize(one).startswith("1 problem,")
    assert Status(int(one.status)).name in summarize(one)
    nested = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), BATCH)
    assert "problem (0, 1): STALLED" in summarize(nested)


def constrained(batch, initial=0.0, **rows):
    """``batch`` with constraints; the violation of a problem is that of its hard rows."""
    violations = {name: jnp.asarray(a) for name, a in rows.items() if name != "violation"}
    zero = jnp.zeros(batch.status.shape)
    return dataclasses.replace(
        batch,
        multipliers=Multipliers(),
        violation=zero + jnp.asarray(rows["violation"]),
        violations=Violations(**violations),
        initial_violation=zero + initial,
    )


def test_the_constraints_that_are_violated_most_come_by_name_and_stage():
    inequality, state = np.zeros((4, 3, 2)), np.zeros((4, 4, 3))
    inequality[1, 2, 1] = 0.5  # the second problem did not converge
    inequality[3, 1, 1] = 0.25
    state[1, 3, 0] = 0.02
    state[:, 1, 2] = 1e-12  # rounding
    text = summarize(
        constrained(
            BATCH, inequality=inequality, state=state, terminal_equality=np.full((4, 1), 1e-13),
            violation=[1e-12, 0.5, 1e-12, 0.25],
        )
    )  # fmt: skip
    lines = [line.strip() for line in text.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith("violated"))
    assert lines[at].split(maxsplit=1)[1] == "inequality[1] at t = 2: 0.5 (in 2 of 4 problems)"
    assert lines[at + 1] == "state[0] at t = 3: 0.02 (in 1 of 4 problems)"
    assert lines[at + 2].startswith("clamped")
    assert "x_init" not in text


def test_what_is_soft_or_of_the_first_state_is_told_too():
    """Of a problem that converged: past what it leaves of its hard constraints."""
    one = constrained(
        jax.tree.map(lambda a: a[0], BATCH), inequality=[[0.1, 0.0], [0.0, 0.3], [0.0, 0.0]],
        terminal_inequality=[0.2, 1e-12], violation=1e-12, initial=0.1,
    )  # fmt: skip
    text = summarize(one)
    assert "violated       inequality[1] at t = 1: 0.3\n" in text
    assert "terminal_inequality[0] at t = 3: 0.2\n" in text
    assert "inequality[0] at t = 0: 0.1\n" in text
    assert "of x_init    1.0e-01, which no plan can lessen" in text
    assert "… and 2 more" in summarize(one, show=1)


def test_where_no_constraint_is_violated_none_is_named():
    zeros = np.zeros((4, 3, 2))
    text = summarize(constrained(BATCH, inequality=zeros, violation=0.0))
    assert "violated" not in text


def test_an_empty_batch():
    assert summarize(jax.tree.map(lambda a: a[:0], BATCH)).startswith("0 problems")


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"must be a jaxmpc\.Solution, got dict"):
        summarize(dataclasses.asdict(BATCH))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda s: len(summarize(s)))(BATCH)
