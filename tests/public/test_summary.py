import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmpc import Solution, Status, summarize


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


def test_an_empty_batch():
    assert summarize(jax.tree.map(lambda a: a[:0], BATCH)).startswith("0 problems")


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"must be a jaxmpc\.Solution, got dict"):
        summarize(dataclasses.asdict(BATCH))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda s: len(summarize(s)))(BATCH)
