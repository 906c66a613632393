"""``trailing.vmap`` against ``jax.vmap``: any primitive, whichever operands the batch is in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close
from jax import lax

from jaxmpc import Options, Status, lqr_solve, mpc_solve
from jaxmpc.batch import trailing

N, B = 3, 5


@jax.custom_jvp
def cube(x):
    return x**3


cube.defjvp(lambda primals, tangents: (cube(primals[0]), 3 * primals[0] ** 2 * tangents[0]))


def printing(x, p):
    jax.debug.print("{}", x[0])
    return x


FUNCTIONS = {
    "elementwise": lambda x, p: jnp.arctan2(jnp.sin(x) * p[0], 1 + x**2) - jnp.clip(x, -1, p[1]),
    "constant": lambda x, p: jnp.ones(2) * p[0],
    "the argument itself": lambda x, p: (x, p),
    "stack and slice": lambda x, p: jnp.stack([x[1], x[0] + p[2], x[-1]])[::-1],
    "reductions": lambda x, p: (
        jnp.sum(x),
        jnp.max(x * p),
        jnp.min(x),
        jnp.prod(x),
        jnp.all(x > 0),
    ),
    "long sum": lambda x, p: jnp.sum(jnp.outer(jnp.tile(x, 9), p)),
    "products": lambda x, p: (x @ p, p @ x, jnp.outer(x, x) @ jnp.outer(p, x), x @ x),
    "three axes": lambda x, p: jnp.einsum("ijk,kl->jli", jnp.ones((2, 3, N)) * x, jnp.outer(p, x)),
    "paired axes": lambda x, p: jnp.einsum("bi,bij->bj", jnp.outer(p, x), jnp.ones((N, N, 2))),
    "wide layer": lambda x, p: jnp.tanh(jnp.ones((40, N)) @ x) @ jnp.ones((40, 2)) * p[0],
    "where": lambda x, p: jnp.where(x[0] > 0, x, p) + jnp.where(x > p, 1.0, x),
    "index": lambda x, p: (p[jnp.argmax(x)], x[jnp.argmin(p)], x.at[1].set(p[0])),
    "dynamic slice": lambda x, p: lax.dynamic_slice(jnp.tile(p, 4), (jnp.argmax(x),), (2,)),
    "sort": lambda x, p: (jnp.sort(x), jnp.cumsum(x * p), jnp.flip(x)),
    "pad": lambda x, p: jnp.pad(x, (1, 2), constant_values=p[0]),
    "pad with its own": lambda x, p: lax.pad(p, x[0], [(1, 0, 1)]),
    "cond": lambda x, p: lax.cond(x[0] > 0, lambda: x * 2, lambda: p),
    "scan": lambda x, p: lax.scan(lambda c, a: (c * a, c + p), x, x),
    "while": lambda x, p: lax.while_loop(lambda c: c[0] < 9, lambda c: c + jnp.abs(p) + 1, x),
    "solve": lambda x, p: jnp.linalg.solve(jnp.eye(N) * 3 + jnp.outer(x, p), x),
    "custom rules": lambda x, p: cube(x) + cube(p) + jax.nn.relu(p) + jax.nn.softplus(x),
    "jit and checkpoint": lambda x, p: jax.jit(jax.checkpoint(lambda x: jnp.sin(x) * p))(x),
    "integers": lambda x, p: (jnp.floor(x).astype(int) % 3, jnp.arange(3) * p),
    "complex": lambda x, p: jnp.abs(x + 1j * p),
    "a key": lambda x, p: x * jax.random.normal(jax.random.key(3), (N,)) * p,
    "callbacks": printing,
    "gradient": lambda x, p: jax.grad(lambda x: jnp.linalg.norm(x) * jnp.tanh(x @ p))(x),
    "hessian": lambda x, p: jax.hessian(lambda x: jnp.sum(jnp.cos(x) * p) * x[0])(x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("own", [(True, False), (True, True)], ids=["shared", "own"])
def test_agrees_with_vmap(name, own):
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=(N, B) if flag else N)) for flag in own]
    fn = FUNCTIONS[name]
    want = jax.vmap(fn, tuple(-1 if flag else None for flag in own), -1)(*args)
    got = jax.jit(trailing.vmap(fn, own, (B,)))(*args)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-12)


def solve(x, p, **options):
    return mpc_solve(
        lambda x, u, t, p: jnp.sum((x - p) ** 2) + jnp.sum(u**2),
        lambda x, u, t, p: jnp.tanh(0.9 * x + p * jnp.concatenate([u, u])),
        x,
        jnp.zeros((3, 1)),
        p,
        u_lower=-0.5,
        u_upper=0.5,
        options=Options(**options),
    )


X = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))


@pytest.mark.parametrize(
    "p, axis",
    [pytest.param(0.7, None, marks=pytest.mark.slow), (jnp.array([0.7, 0.8, 0.9]), 0)],
)
def test_a_checkpoint_inside_of_grad_inside_of_vmap(p, axis):
    def loss(p, x):
        return jnp.sum(solve(x, p).u ** 2)

    got = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss), (0, 1)), (axis, 0)))(p, X)
    want = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (axis, 0)))(p, X)
    assert np.any(np.abs(np.asarray(want[0])) > 1e-3)
    assert_close(got, want, 1e-12)


def test_a_user_may_forbid_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        batch = jax.jit(jax.vmap(lambda x: solve(x, 0.7)))(X)
        alone = jax.jit(lambda x: solve(x, 0.7))(X[0])
    assert np.all(batch.status == Status.CONVERGED)
    assert_close(batch.u[0], alone.u, 1e-12)


def test_a_batch_of_none():
    assert jax.jit(jax.vmap(lambda x: solve(x, 0.7)))(X[:0]).u.shape == (0, 3, 1)


def test_matrices_too_large_for_the_cache():
    n = 80
    F = jnp.tile(jnp.concatenate([0.9 * jnp.eye(n), jnp.ones((n, 1))], 1), (2, 1, 1))
    C = jnp.tile(jnp.eye(n + 1), (2, 1, 1))
    x_init = jnp.stack([jnp.ones(n), jnp.arange(n) / n])

    def plan(x):
        return lqr_solve(x, C, jnp.zeros((2, n + 1)), F).u

    assert_close(jax.jit(jax.vmap(plan))(x_init)[1], jax.jit(plan)(x_init[1]), 1e-12)
