"""The LQR's KKT system with active rows against dense linear algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close

from jaxmpc.riccati.constrained import ActiveRows, System, backward_error, penalised, residual
from jaxmpc.riccati.kkt import PARALLEL, SEQUENTIAL
from jaxmpc.riccati.point import Point, Rhs, Rows
from jaxmpc.riccati.sequential import row_freedom

N, M, T = 3, 2, 12


def problem(seed, p=1, q=1, units=False):
    """(C, F, C_final), G, active, rhs; rows at every third stage, and at the end."""
    rng = np.random.default_rng(seed)
    normal, both = rng.normal, N + M
    A = normal(size=(T, N, N))
    A /= np.abs(np.linalg.eigvals(A)).max(1)[:, None, None]
    F = np.concatenate([A, normal(size=(T, N, M))], 2)
    L, L_final = normal(size=(T, both, both)), normal(size=(N, N))
    C = L @ L.transpose(0, 2, 1) / both + 0.1 * np.eye(both)
    C_final = L_final @ L_final.T / N + 0.1 * np.eye(N)
    G = Rows(normal(size=(T, p, both)), normal(size=(q, N)))
    active = Rows(np.zeros((T, p), bool), np.ones(q, bool))
    active.stage[1:-3:3] = True
    g = Rows(normal(size=(T, p)), normal(size=q))
    rhs = Rhs(normal(size=N), normal(size=(T, both)), normal(size=(T, N)), normal(size=N), g)
    if units:
        of_z = 10.0 ** rng.uniform(-4, 4, both)
        of_x, of_cost = of_z[:N], 1e-6
        of_rows = Rows(10.0 ** rng.uniform(-6, 6, p), 10.0 ** rng.uniform(-6, 6, q))
        C, C_final = of_cost * C * np.outer(of_z, of_z), of_cost * C_final * np.outer(of_x, of_x)
        F = F * of_z / of_x[:, None]
        G = Rows(*(G * s[:, None] * of_z[: G.shape[-1]] for G, s in zip(G, of_rows, strict=True)))
        rhs = Rhs(
            rhs.x_init / of_x, of_cost * rhs.c * of_z, rhs.f / of_x, of_cost * rhs.c_final * of_x,
            Rows(*(g * s for g, s in zip(g, of_rows, strict=True))),
        )  # fmt: skip
    return (C, F, C_final), G, active, rhs


def chain(held):
    """A double integrator whose position is held over many stages: nearly dependent rows."""
    steps = 40
    h = 1 / steps
    F = np.tile(np.array([[1, h, h * h / 2], [0, 1, h]]), (steps, 1, 1))
    C = np.tile(np.diag([0, 0, h]), (steps, 1, 1))
    G = Rows(np.tile(np.array([[[1.0, 0, 0]]]), (steps, 1, 1)), np.eye(2))
    active = Rows(np.zeros((steps, 1), bool), np.ones(2, bool))
    active.stage[held] = True
    normal = np.random.default_rng(0).normal
    g = Rows(normal(size=(steps, 1)), normal(size=2))
    rhs = Rhs(normal(size=2), normal(size=(steps, 3)), normal(size=(steps, 2)), normal(size=2), g)
    return (C, F, np.zeros((2, 2))), G, active, rhs


def dense(matrices, G):
    """The matrices of z = (x_0, u_0, x_1, …), of the dynamics and of all rows."""
    C, F, C_final = matrices
    steps, n, both = F.shape
    size = steps * both + n
    H, D = np.zeros((size, size)), np.zeros(((steps + 1) * n, size))
    J = np.zeros((G.stage.shape[0] * G.stage.shape[1] + len(G.final), size))
    D[:n, :n] = -np.eye(n)
    p = G.stage.shape[1]
    for t in range(steps):
        here, after = slice(t * both, (t + 1) * both), slice((t + 1) * both, (t + 1) * both + n)
        rows = slice((t + 1) * n, (t + 2) * n)
        H[here, here], D[rows, here], D[rows, after] = C[t], F[t], -np.eye(n)
        J[t * p : (t + 1) * p, here] = G.stage[t]
    H[-n:, -n:], J[steps * p :, -n:] = C_final, G.final
    return H, D, J


def oracle(matrices, G, active, rhs):
    """By LU in equilibrated units, refined with residuals of extended precision."""
    n, steps = rhs.x_init.size, len(rhs.c)
    H, D, J = dense(matrices, G)
    on = np.concatenate([active.stage.ravel(), active.final])
    E = np.concatenate([D, J[on]])
    K = np.block([[H, E.T], [E, np.zeros((len(E), len(E)))]])
    g = np.concatenate([rhs.g.stage.ravel(), rhs.g.final])
    f = np.concatenate([rhs.x_init, rhs.f.ravel()])
    b = -np.concatenate([rhs.c.ravel(), rhs.c_final, f, g[on]])
    scale = np.ones(len(K))
    for _ in range(20):
        scale /= np.sqrt(np.max(np.abs(K * scale[:, None] * scale), axis=1))
    K, b = K * scale[:, None] * scale, b * scale
    y, K_long = np.zeros(len(K), np.longdouble), K.astype(np.longdouble)
    for _ in range(6):
        y += np.linalg.solve(K, (b - K_long @ y).astype(float))
    y = np.asarray(y * scale, float)
    z, costate = y[: len(H)], y[len(H) : len(H) + len(D)]
    nu = np.zeros(len(J))
    nu[on] = y[len(H) + len(D) :]
    of_stages, p = z[:-n].reshape(steps, -1), active.stage.shape[1]
    x = np.concatenate([of_stages[:, :n], z[None, -n:]])
    nu = Rows(nu[: steps * p].reshape(steps, p), nu[steps * p :])
    return Point(x, of_stages[:, n:], costate.reshape(-1, n), nu)


def plain(method, matrices, free):
    return method.factorize(matrices[0], matrices[1], matrices[2], free)


@jax.jit
def freedom(matrices, G, free):
    return row_freedom(plain(SEQUENTIAL, matrices, free), matrices[1], G)[0]


def everywhere(matrices):
    steps, n, both = matrices[1].shape
    return np.ones((steps, both - n), bool)


def weights(matrices, G, held=1e6):
    """So many times what a row has of its own to resist with."""
    free = freedom(matrices, G, everywhere(matrices))
    return jax.tree.map(lambda v: held / np.where(v > 0, v, 1), free)


def solve_with(method):
    @jax.jit
    def solve(matrices, rows, rhs):
        C, F, C_final = matrices
        free = jnp.ones((F.shape[0], F.shape[2] - F.shape[1]), bool)
        C_, C_final_ = penalised(C, C_final, rows)
        factors = method.factorize(C_, F, C_final_, free)
        system = System(factors, C, F, C_final, free, rows)
        point = method.solve_rows(system, rhs)
        left = backward_error(system, point, rhs, residual(system, point, rhs))
        return point, jnp.maximum(*left)

    return lambda *args: solve(*jax.tree.map(jnp.asarray, args))


solve, solve_parallel = solve_with(SEQUENTIAL), solve_with(PARALLEL)


def assert_point(got, want, tolerance):
    for a, b in zip(got[:3], want[:3], strict=True):
        assert_close(a, b, tolerance)
    scale = max(np.max(np.abs(nu), initial=0) for nu in want.multiplier)
    assert_close(got.multiplier, want.multiplier, tolerance, scale=scale)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("held", [1e2, 1e4, 1e8])
def test_rows_are_solved_to_the_last_digit_whatever_the_units(units, held):
    for seed in range(3):
        matrices, G, active, rhs = problem(seed, units=units)
        rows = ActiveRows(G, active, weights(matrices, G, held))
        point, left = solve(matrices, rows, rhs)
        assert_point(point, oracle(matrices, G, active, rhs), 1e-11)
        assert left <= 1e-14


@pytest.mark.parametrize("off", [1e-4, 1e4])
def test_weights_that_are_off_for_some_rows_cost_corrections_and_no_digits(off):
    matrices, G, active, rhs = problem(0)
    good = weights(matrices, G, 1e4)
    good.stage[::2] *= off
    point, _ = solve(matrices, ActiveRows(G, active, good), rhs)
    assert_point(point, oracle(matrices, G, active, rhs), 1e-10)


@pytest.mark.parametrize("held", [range(20, 22), range(10, 31)])
def test_a_state_that_is_held_for_long(held):
    matrices, G, active, rhs = chain(list(held))
    point, left = solve(matrices, ActiveRows(G, active, weights(matrices, G, 1e7)), rhs)
    assert_point(point, oracle(matrices, G, active, rhs), 1e-9)
    assert left <= 1e-14


def test_the_parallel_method_solves_the_same():
    matrices, G, active, rhs = problem(0)
    point, _ = solve_parallel(matrices, ActiveRows(G, active, weights(matrices, G)), rhs)
    assert_point(point, oracle(matrices, G, active, rhs), 1e-10)


def doubled(rows):
    return Rows(np.repeat(rows.stage, 2, axis=1), np.repeat(rows.final, 2, axis=0))


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_rows_that_stand_there_twice_share_in_halves_and_meet_in_the_middle(apart):
    matrices, G, active, rhs = problem(1)
    want = oracle(matrices, G, active, rhs)
    twice = doubled(rhs.g)
    twice.stage[:, 0] -= apart
    twice.stage[:, 1] += apart
    rows = ActiveRows(doubled(G), doubled(active), doubled(weights(matrices, G, 1e4)))
    point, _ = solve(matrices, rows, rhs._replace(g=twice))
    halves = jax.tree.map(lambda nu: nu / 2, doubled(want.multiplier))
    assert_point(point, want._replace(multiplier=halves), 1e-9)


def test_a_row_that_no_control_moves_leaves_the_others_alone():
    matrices, G, active, rhs = problem(2)
    want = oracle(matrices, G, active, rhs)
    W = weights(matrices, G)
    G.stage[0, 0, N:], active.stage[0] = 0, True
    W.stage[0] = W.stage[1]
    point, _ = solve(matrices, ActiveRows(G, active, W), rhs)
    assert_point(point, want, 1e-9)


def test_float32_ends_at_its_own_rounding():
    matrices, G, active, rhs = problem(0)
    W = weights(matrices, G, 1e3)
    low = jax.tree.map(lambda a: np.asarray(a, np.float32), (matrices, G, W, rhs))
    point, left = solve(low[0], ActiveRows(low[1], active, low[2]), low[3])
    assert point.x.dtype == jnp.float32
    assert left <= 1e-5
    assert_point(point, oracle(matrices, G, active, rhs), 1e-3)


def test_the_freedom_of_rows_is_the_diagonal_of_the_dense_inverse():
    matrices, G, _, _ = problem(0, p=2, q=2)
    H, D, J = dense(matrices, G)
    null = np.linalg.svd(D)[2][len(D) :].T
    want = np.einsum("ri,ij,rj->r", J @ null, np.linalg.inv(null.T @ H @ null), J @ null)
    got = freedom(matrices, G, everywhere(matrices))
    assert_close(np.concatenate([np.ravel(got.stage), got.final]), want, 1e-10)
