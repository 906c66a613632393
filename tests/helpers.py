"""What several test files share: a comparison that NaN cannot pass, and the objective as a plain
function of the controls, rolled out without any code of the solvers."""

import jax
import jax.numpy as jnp
import numpy as np


def assert_close(got, want, rtol, scale=None):
    """The largest error of every leaf is at most ``rtol`` times ``scale``, by default the largest
    entry of the wanted leaf (1 where that is all zeros). Shapes agree, and NaN never passes."""
    got, want = jax.tree.leaves_with_path(got), jax.tree.leaves_with_path(want)
    assert [path for path, _ in got] == [path for path, _ in want]
    for (path, a), (_, b) in zip(got, want, strict=True):
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert a.shape == b.shape, f"{jax.tree_util.keystr(path)}: {a.shape} against {b.shape}"
        if not b.size:
            continue
        size = scale if scale is not None else np.max(np.abs(b)) or 1.0
        error = np.max(np.abs(a - b))
        assert error <= rtol * size, (
            f"{jax.tree_util.keystr(path)}: error {error:.3g} exceeds {rtol:.3g} x {size:.3g}"
        )


def rolled_out(cost, dynamics, x_init, u, params=None, terminal_cost=None, push=None):
    """The objective of u [T, m] and its states [T+1, n].

    ``push`` [T+1, n] is added to the states; at zero the objective's gradient in it is the
    costates.
    """
    T = u.shape[0]
    push = jnp.zeros((T + 1, *x_init.shape), x_init.dtype) if push is None else push

    def step(x, now):
        u, t, push = now
        return dynamics(x, u, t, params) + push, (cost(x, u, t, params), x)

    stages = jnp.arange(T, dtype=jnp.int32)
    x_final, (costs, x) = jax.lax.scan(step, x_init + push[0], (u, stages, push[1:]))
    final = 0.0 if terminal_cost is None else terminal_cost(x_final, params)
    return jnp.sum(costs) + final, jnp.concatenate([x, x_final[None]])
