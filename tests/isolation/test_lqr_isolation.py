"""Batches of linear-quadratic problems: a bad one spoils nothing of the others, and its status
tells."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from lqr_problems import dense_gains, dense_plan, plan_of, random_problem, random_weights, wavy

from jaxmpc import Status, lqr_solve

N, M, T = 2, 2, 3
PROBLEM, FREE = random_problem(N, M, T)
OWN = ("x_init", "C", "c", "f", "C_final", "c_final")  # the batch shares F
WEIGHTS = random_weights((dense_plan(PROBLEM, FREE), dense_gains(PROBLEM, FREE)))


def of_dense(F):
    problem = PROBLEM._replace(F=F)
    return wavy((dense_plan(problem, FREE), dense_gains(problem, FREE)), WEIGHTS)


WANT = jax.jit(jax.grad(of_dense))(PROBLEM.F)


def of_batch(F, own, method, derivative="vjp"):
    """The loss of the problems that are fine, and the status of all."""

    def one(own):
        x_init, C, c, f, C_final, c_final = own
        return lqr_solve(
            x_init, C, c, F, f, C_final=C_final, c_final=c_final, free=FREE, method=method,
            derivative=derivative,
        )  # fmt: skip

    s = jax.vmap(one)(own)
    each = jax.vmap(lambda s: wavy((plan_of(s), (s.K, s.k)), WEIGHTS))(s)
    return jnp.sum(jnp.where(s.status == Status.CONVERGED, each, 0)), s.status


def spoilt(name, value):
    """Two problems, the first entry of the second one's argument spoilt."""
    pairs = {field: jnp.stack([getattr(PROBLEM, field)] * 2) for field in OWN}
    array = np.array(pairs[name])
    array[1].flat[0] = value
    return tuple((pairs | {name: jnp.asarray(array)}).values())


@pytest.mark.parametrize(
    "method, derivative",
    [
        ("sequential", "vjp"),
        pytest.param("sequential", "jvp", marks=pytest.mark.slow),
        pytest.param("parallel", "vjp", marks=pytest.mark.slow),
    ],
)
def test_a_bad_problem_leaves_the_shared_gradient_alone(method, derivative):
    @jax.jit
    def slopes(F, own):
        return jax.grad(of_batch, (0, 1), has_aux=True)(F, own, method, derivative)

    for name in OWN:
        for value in (np.nan, np.inf):
            (shared, own), status = slopes(PROBLEM.F, spoilt(name, value))
            assert list(np.asarray(status)) == [Status.CONVERGED, Status.NONFINITE]
            assert_close(shared, WANT, 1e-9)
            for slope in own:
                assert np.all(np.asarray(slope[1]) == 0)


@pytest.mark.slow
def test_second_derivatives_too():
    flat = jnp.asarray(np.random.default_rng(0).normal(size=PROBLEM.F.shape))

    @jax.jit
    @jax.grad
    def bend(F, own):
        return jnp.vdot(flat, jax.grad(lambda F: of_batch(F, own, "sequential")[0])(F))

    want = jax.jit(jax.grad(lambda F: jnp.vdot(flat, jax.grad(of_dense)(F))))(PROBLEM.F)
    for name in ("x_init", "C"):
        assert_close(bend(PROBLEM.F, spoilt(name, np.nan)), want, 1e-8)


def test_the_status_tells_a_minimum_from_other_stationary_points():
    @jax.jit
    @jax.vmap
    def status(C):
        return lqr_solve(PROBLEM.x_init, C, PROBLEM.c, PROBLEM.F).status

    def smallest(C):
        """The smallest eigenvalue of the dense Hessian in the controls."""
        still = jnp.zeros((T, M))

        def value(u):
            x, total = jnp.zeros(N), 0.0
            for t in range(T):
                z = jnp.concatenate([x, u[t]])
                x, total = PROBLEM.F[t] @ z, total + 0.5 * z @ C[t] @ z
            return total

        return np.linalg.eigvalsh(jax.hessian(value)(still).reshape(T * M, T * M)).min()

    C = jnp.stack([PROBLEM.C.at[1, -1, -1].add(shift) for shift in (0.0, -0.5, -1.0, -2.0, -4.0)])
    least = np.array([smallest(a) for a in C])
    assert least[0] > 0 > least[-1]
    want = np.where(least > 0, Status.CONVERGED, Status.INDEFINITE)
    np.testing.assert_array_equal(status(C), want)
    # A control that nothing prices: Q_uu of the last stage is singular.
    singular = PROBLEM.C.at[-1, -1, :].set(0).at[-1, :, -1].set(0)
    assert status(singular[None])[0] != Status.CONVERGED
