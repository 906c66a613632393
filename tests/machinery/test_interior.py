"""The parts of the interior-point method, each by what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc.problem.prices import Prices
from jaxmpc.riccati.point import Rows
from jaxmpc.solver.interior import active_set, barrier, filter
from jaxmpc.solver.interior.barrier import Eliminated, Layout, Pairs, Sides
from jaxmpc.solver.interior.filter import Candidate
from jaxmpc.solver.interior.newton import newton


@pytest.fixture(autouse=True)
def any_rank():
    """What the loop does for the solver: a number a problem meets arrays of it."""
    with jax.numpy_rank_promotion("allow"):
        yield


TAU = jnp.array([0.3])  # a batch of one, as everywhere in the solver


def flags(*which):
    return jnp.array([[flag] for flag in which])


# A hard and a soft inequality, an equality, one that is absent, and a bound.
SIDES = Sides(
    inequality=flags(True, True, False, False, True),
    equality=flags(False, False, True, False, False),
    soft=flags(False, True, False, False, False),
    linear=jnp.array([[0.0], [2.0], [0.0], [0.0], [0.0]]),
    quadratic=jnp.array([[0.0], [3.0], [0.0], [0.0], [0.0]]),
    row=flags(True, True, True, True, False),
)
NU, CENTRE, WEIGHT = jnp.array([[0.7], [0.9], [-0.4], [0.0], [0.2]]), 0.6, 50.0
AT = Pairs(
    jnp.array([[0.5], [0.8], [1.0], [1.0], [0.3]]), NU,
    jnp.array([[1.0], [0.4], [1.0], [1.0], [1.0]]),
    jnp.array([[1.0], [1.3], [1.0], [1.0], [1.0]]),
)  # fmt: skip
G = jnp.array([[0.2], [-0.1], [0.25], [4.0], [-0.3]])  # that of a bound is its distance, negated


def step(move) -> tuple[Eliminated, Pairs]:
    eliminated = barrier.eliminate(
        SIDES, AT, G, TAU, jnp.full(NU.shape, CENTRE), jnp.full(NU.shape, WEIGHT)
    )
    return eliminated, barrier.changes(SIDES, AT, eliminated, move)


def test_a_step_solves_the_equations_of_newton():
    move = jnp.array([[-0.3], [0.2], [0.1], [5.0], [-0.15]])
    _, d = step(move)
    inequality, soft, equality = (
        np.asarray(a) for a in (SIDES.inequality, SIDES.soft, SIDES.equality)
    )
    w, nu, sigma, zeta = (a + da for a, da in zip(AT, d, strict=True))
    slack = jnp.where(soft, sigma, 0)
    assert_close((G + move + w - slack)[inequality], np.zeros(3), 1e-12, scale=1)
    centred = AT.w * AT.nu + AT.w * d.nu + AT.nu * d.w
    assert_close(centred[inequality], np.full(3, 0.3), 1e-12)
    centred = AT.sigma * AT.zeta + AT.sigma * d.zeta + AT.zeta * d.sigma
    assert_close(centred[soft], np.full(1, 0.3), 1e-12)
    assert_close((nu + zeta)[soft], (2.0 + 3.0 * sigma)[soft], 1e-12)
    assert_close(nu[equality], (CENTRE + WEIGHT * (G + move))[equality], 1e-12)
    assert all(float(a[3, 0]) == 0 for a in d)


def test_the_slope_is_the_derivative_of_the_value():
    _, d = step(jnp.array([[-0.3], [0.2], [0.1], [5.0], [-0.15]]))
    _, want = jax.jvp(lambda at: barrier.value(SIDES, at, TAU), (AT,), (d,))
    assert_close(barrier.slope(SIDES, AT, d, TAU), want, 1e-12)


def test_a_step_ends_before_the_boundary():
    _, d = step(jnp.array([[4.0], [3.0], [0.1], [5.0], [4.0]]))
    primal, dual = barrier.shares(SIDES, AT, d, jnp.array([0.9]))
    after = barrier.moved(SIDES, AT, d, primal, dual, TAU)
    inequality, soft = np.asarray(SIDES.inequality), np.asarray(SIDES.soft)
    left = [(after.w / AT.w)[inequality], (after.sigma / AT.sigma)[soft]]
    assert_close(min(map(np.min, left)), 0.1, 1e-12)
    left = [(after.nu / AT.nu)[inequality], (after.zeta / AT.zeta)[soft]]
    assert min(map(np.min, left)) >= 0.1 - 1e-12
    assert float(primal[0]) < 1


def test_which_bounds_there_are():
    rows = Rows(jnp.zeros((1, 0, 1)), jnp.zeros((0, 1)))
    low, high = jnp.array([[[-1.0], [-jnp.inf], [0.5]]]), jnp.array([[[jnp.inf], [2.0], [0.5]]])
    layout = Layout(1, 0, 0, 3)
    upper, lower = layout.bounds(
        barrier.sides_of(layout, Prices(rows, rows, rows), low, high).inequality
    )
    assert upper[0, :, 0].tolist() == [False, True, False]  # none where a control has no freedom
    assert lower[0, :, 0].tolist() == [True, False, False]


def test_the_filter_remembers_where_it_was():
    one = jnp.ones(1)
    here, new = Candidate(one, 10 * one), Candidate(0.9 * one, 5 * one)
    begun = filter.begun(filter.empty(one), one > 0, here.theta, one)

    def accepts(entries, new):
        return bool(filter.accepts(entries, here, new, -one, one, one, 0 * one)[0][0])

    assert accepts(begun, new)
    for theta, phi, good in ((0.5, 4.0, False), (0.5, 6.0, True), (0.95, 4.0, True)):
        entries = filter.with_entry(begun, Candidate(theta * one, phi * one), one > 0)
        assert accepts(entries, new) == good
    assert not accepts(begun, Candidate(1.1 * one, 11 * one))
    assert not accepts(begun, Candidate(jnp.nan * one, 5 * one))


def test_a_feasible_step_has_to_lower_the_objective_by_what_its_slope_says():
    one = jnp.ones(1)
    here = Candidate(0 * one, 10 * one)
    begun = filter.begun(filter.empty(one), one > 0, here.theta, one)
    for phi, good in ((9.5, True), (10 - 1e-6, False), (10.5, False)):
        new = Candidate(0 * one, phi * one)
        found, by_objective = filter.accepts(begun, here, new, -one, one, one, 0 * one)
        assert bool(found[0]) == bool(by_objective[0]) == good


def test_the_pieces_of_the_rows():
    """By ν + W g, W = 50: held, let go, past its price; an equality is held whatever its sign."""
    g, nu = jnp.array([[0.01], [0.3], [-0.25], [4.0], [1.0]]), NU.at[1].set(0.5)
    state = active_set.state_of(SIDES, nu, g, jnp.full(nu.shape, WEIGHT))
    assert state.active[:, 0].tolist() == [True, False, True, False, False]
    assert state.beyond[:, 0].tolist() == [False, True, False, False, False]
    assert_close(state.nu[:, 0], np.array([0.7, 2.0 + 3.0 * 0.3, -0.4, 0, 0]), 1e-12)
    state = active_set.state_of(SIDES, nu, g.at[:2].set(-1.0), jnp.full(nu.shape, WEIGHT))
    assert not np.any(state.active[:2])
    assert not np.any(state.beyond)
    # One that is held at its price has no more than that for a multiplier.
    state = active_set.state_of(
        SIDES, nu.at[1].set(2.5), g.at[1].set(-0.001), jnp.full(nu.shape, WEIGHT)
    )
    assert_close(state.nu[1, 0], 2.0, 1e-12)


def test_newton_solves_the_lqr_with_gaps_and_pinned_controls():
    T, n, m = 4, 3, 2
    key = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape):
        return jax.random.normal(next(key), shape)

    def definite(*batch, k):
        A = normal(*batch, k, k)
        return A @ jnp.swapaxes(A, -1, -2) + jnp.eye(k).reshape((1,) * len(batch) + (k, k))

    H, H_final, F = definite(T, k=n + m), definite(k=n), normal(T, n, n + m)
    c, c_final, gaps, offset = normal(T, n + m), normal(n), normal(T, n), normal(T, m)
    free = jnp.array([[True, False], [True, True], [False, False], [False, True]])
    at = H, H_final, F, c, c_final, gaps, free, offset, jnp.full((T, m), jnp.inf)
    run = jax.jit(lambda *at: newton(*at, jnp.zeros(1), jnp.zeros(1) > 0))
    d = jax.tree.map(lambda a: a[..., 0], run(*(a[..., None] for a in at)))

    def trajectory(du):
        dx = [jnp.zeros(n)]
        for t in range(T):
            dx.append(F[t] @ jnp.concatenate([dx[t], du[t]]) + gaps[t])
        return jnp.stack(dx)

    def objective(du):
        dx = trajectory(du)
        dz = jnp.concatenate([dx[:-1], du], axis=1)
        total = 0.5 * jnp.einsum("ti,tij,tj", dz, H, dz) + jnp.sum(c * dz)
        return total + 0.5 * dx[-1] @ H_final @ dx[-1] + c_final @ dx[-1]

    assert_close(d.dx, trajectory(d.du), 1e-10)
    assert_close(d.du[~free], offset[~free], 1e-12)
    slope = jax.grad(objective)(d.du)
    assert_close(slope[free], jnp.zeros(int(free.sum())), 1e-9, scale=1)
    dz = jnp.concatenate([d.dx[:-1], d.du], axis=1)
    for t in range(T):
        want = (H[t] @ dz[t] + c[t])[:n] + F[t][:, :n].T @ d.costate[t + 1]
        assert_close(d.costate[t], want, 1e-9)
    assert_close(d.costate[T], H_final @ d.dx[T] + c_final, 1e-10)
