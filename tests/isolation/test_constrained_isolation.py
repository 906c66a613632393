"""Batches of constrained problems: each as if it were alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constrained_problems import PROBLEMS
from constrained_solves import (
    BAD,
    assert_gradients_close,
    compiled,
    fields_of,
    lane,
    plain,
    spoiled,
    value,
)
from helpers import assert_close

pytestmark = pytest.mark.xdist_group("constrained")  # they share compiled programs


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
