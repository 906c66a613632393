"""``box_qp`` against the enumeration of all active sets, ``masked_inverse`` against NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc.batch import lanes
from jaxmpc.riccati.pivots import masked_inverse, smallest_pivot
from jaxmpc.solver.box_qp import box_qp

COUNT = 60  # problems of one size, solved together
FORMS = pytest.mark.parametrize("form", ["vmap", "lanes"])


@functools.cache
def in_form(function, form):
    """``function`` on a batch, compiled; with the batch on the last axis if the form is "lanes"."""
    if form == "vmap":
        return jax.jit(jax.vmap(function))
    many = lanes.last(function, lambda Q, q, *_: (0, q.shape[0]))
    return jax.jit(lambda *args: many(len(args[0]), (True,) * len(args), *args))


def solve(Q, q, lower, upper, form="vmap"):
    scale = jnp.abs(jnp.diagonal(Q, axis1=1, axis2=2))
    return [np.asarray(a) for a in in_form(box_qp, form)(Q, q, lower, upper, scale)]


def random_spd(rng, m, count=COUNT):
    A = rng.normal(size=(count, m, m))
    return A @ np.swapaxes(A, 1, 2) + 0.1 * np.eye(m)


def random_problems(m):
    """Problems with 0 within the bounds: finite, infinite on one or both sides, equal, or at 0."""
    rng = np.random.default_rng(m)
    Q, q = random_spd(rng, m), 2 * rng.normal(size=(COUNT, m))
    lower, upper = rng.uniform(-1, 0, (COUNT, m)), rng.uniform(0, 1, (COUNT, m))
    kind = rng.choice(6, size=(COUNT, m), p=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    lower[(kind == 1) | (kind == 3)] = -np.inf
    upper[(kind == 2) | (kind == 3)] = np.inf
    lower[(kind == 4) | (kind == 5)] = 0
    upper[kind == 4] = 0
    return Q, q, lower, upper


def enumerate_active_sets(Q, q, lower, upper):
    """The best feasible candidate of all 3^m choices of free, at the lower, at the upper bound."""
    best, minimiser = np.inf, None
    for choice in itertools.product(("free", "lower", "upper"), repeat=q.size):
        choice = np.array(choice)
        d = np.where(choice == "lower", lower, np.where(choice == "upper", upper, 0))
        if not np.all(np.isfinite(d)):
            continue
        free = np.flatnonzero(choice == "free")
        d[free] = np.linalg.solve(Q[np.ix_(free, free)], -(Q @ d + q)[free])
        value = 0.5 * d @ Q @ d + q @ d
        if np.all((d >= lower) & (d <= upper)) and value < best:
            best, minimiser = value, d
    return minimiser


def inverse_on(free, Q):
    inverse = np.zeros_like(Q)
    free = np.flatnonzero(free)
    inverse[np.ix_(free, free)] = np.linalg.inv(Q[np.ix_(free, free)])
    return inverse


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_minimiser_is_the_best_of_all_active_sets(m):
    problems = random_problems(m)
    d, _, free = solve(*problems)
    assert_close(
        d, np.stack([enumerate_active_sets(*p) for p in zip(*problems, strict=True)]), 1e-9
    )
    assert 0.2 < np.mean(free) < 0.9  # the problems are no trivial ones


@pytest.mark.parametrize("m", [1, 2, 3, 5, 9])
def test_kkt_conditions_hold_with_clamped_entries_exactly_at_their_bound(m):
    Q, q, lower, upper = random_problems(m)
    d, inverse, free = solve(Q, q, lower, upper)
    gradient = np.einsum("bij,bj->bi", Q, d) + q
    at_lower = (d == lower) & (gradient > 0)
    at_upper = (d == upper) & (gradient < 0)
    assert np.all(~free == (at_lower | at_upper | (lower == upper)))
    assert np.all((d >= lower) & (d <= upper))
    assert_close(gradient[free], np.zeros(free.sum()), 1e-10)
    assert_close(inverse, np.stack([inverse_on(*p) for p in zip(free, Q, strict=True)]), 1e-9)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_both_forms_agree(m):
    problems = random_problems(m)
    assert_close(solve(*problems, form="lanes"), solve(*problems, form="vmap"), 1e-12)


@pytest.mark.parametrize("m", [1, 3])
def test_without_bounds_it_is_the_newton_step(m):
    Q, q, *_ = random_problems(m)
    d, _, free = solve(Q, q, np.full_like(q, -np.inf), np.full_like(q, np.inf))
    assert np.all(free)
    assert_close(d, -np.linalg.solve(Q, q[..., None])[..., 0], 1e-10)


@FORMS
@pytest.mark.parametrize("m", [1, 3])
def test_an_entry_that_meets_its_bound_with_multiplier_zero_is_free(m, form):
    Q = np.tile(np.diag([2.0, 4.0, 1.0]), (2, 1, 1))
    q = np.array([[2.0, -4.0, 1.0], [3.0, -5.0, 1.0]])  # minimisers on the bounds, and beyond
    d, _, free = solve(Q[:, :m, :m], q[:, :m], -np.ones((2, m)), np.ones((2, m)), form)
    assert np.array_equal(d, np.tile([-1, 1, -1], (2, 1))[:, :m])
    assert np.array_equal(free, np.array([[True, True, True], [False, False, True]])[:, :m])


@FORMS
@pytest.mark.parametrize("m", [1, 2])
def test_equal_bounds_clamp_whatever_the_multiplier(m, form):
    Q = np.tile(np.array([[2.0, 1.0], [1.0, 2.0]]), (3, 1, 1))
    q = np.array([[1.0, -2.0], [-1.0, -2.0], [0.0, 0.0]])
    bounds = np.tile(np.array([0.0, 5.0]), (3, 1))
    d, inverse, free = solve(Q[:, :m, :m], q[:, :m], -bounds[:, :m], bounds[:, :m], form)
    assert np.array_equal(d, np.array([[0, 1], [0, 1], [0, 0]])[:, :m])
    assert np.array_equal(free, np.tile([False, True], (3, 1))[:, :m])
    assert np.array_equal(inverse, np.tile(np.diag([0, 0.5]), (3, 1, 1))[:, :m, :m])


@pytest.mark.parametrize("magnitude", [1e-8, 1e8])
def test_units_do_not_matter(magnitude):
    Q, q, lower, upper = random_problems(3)
    d, inverse, free = solve(Q, q, lower, upper)
    scaled = solve(magnitude * Q, magnitude * q, lower, upper)
    assert_close([scaled[0], magnitude * scaled[1], scaled[2]], [d, inverse, free], 1e-10)


def random_masked(m, count=COUNT):
    """Symmetric matrices of all signatures, with random masks; the first is all pinned."""
    rng = np.random.default_rng(m)
    basis = np.linalg.qr(rng.normal(size=(count, m, m)))[0]
    eigenvalues = rng.uniform(0.5, 2, (count, m)) * rng.choice([-1, 1], (count, m), p=[0.2, 0.8])
    Q = np.einsum("bij,bj,bkj->bik", basis, eigenvalues, basis)
    free = rng.uniform(size=(count, m)) < 0.8
    free[0] = False
    return Q, free


@pytest.mark.parametrize(
    "m, form",
    [(1, "lanes"), (2, "lanes"), (4, "lanes"), (10, "lanes"), (1, "vmap"), (4, "vmap")],
)
def test_masked_inverse_and_the_sign_of_its_smallest_pivot(m, form):
    Q, free = random_masked(m)
    scale = np.full((COUNT, m), 2.0)
    inverse, smallest = in_form(masked_inverse, form)(Q, free, scale)
    want = np.stack([inverse_on(*pair) for pair in zip(free, Q, strict=True)])
    # A pivot close to zero on the way costs digits where the matrix is indefinite.
    for got, want_one in zip(inverse, want, strict=True):
        assert_close(got, want_one, 1e-8)
    masked = np.where(free[:, :, None] & free[:, None, :], Q, np.eye(m))
    eigenvalues = np.linalg.eigvalsh(masked)
    assert np.array_equal(smallest > 0, eigenvalues[:, 0] > 0)
    assert 0.1 < np.mean(smallest > 0) < 0.95
    # The same without the inverse.
    alone = in_form(smallest_pivot, form)(Q, free, scale)
    assert_close(alone, smallest, 1e-8)


@FORMS
def test_the_smallest_pivot_is_that_of_ldlt_relative_to_the_scale(form):
    rng = np.random.default_rng(0)
    Q, scale = random_spd(rng, 3), rng.uniform(0.5, 4, (COUNT, 3))
    _, smallest = in_form(masked_inverse, form)(Q, np.ones((COUNT, 3), bool), scale)
    pivots = np.diagonal(np.linalg.cholesky(Q), axis1=1, axis2=2) ** 2
    assert_close(smallest, np.min(pivots / scale, axis=1), 1e-10)
