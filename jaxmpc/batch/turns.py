"""More problems than lanes: whoever is done makes room for the next.

A batch that runs until its last problem has converged mostly waits for a few stragglers, and one
that is larger than the caches waits for memory. So a fixed number of lanes works through it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxmpc.batch import lanes

# The share of lanes that may stand idle before new problems come in, all at once, for that
# costs a rollout, a gather and a scatter whoever comes.
_IDLE = 4


def in_turns(size: int, width: int, take, start, step, running, report):
    """``report`` of ``size`` problems, the batch first, solved on ``width`` lanes.

    Args:
      take: (index [width]) -> the data of these problems, on lanes.
      start: (data, wanted [width]) -> the state to begin with; not running where not ``wanted``.
      step: (data, state) -> the next state of the lanes that run; the others stay as they are.
      running: (state) -> bool [width].
      report: (data, state) -> a pytree of arrays with the lanes on the last axis.
    """
    index = jnp.full(width, size, jnp.int32)  # of the problem that a lane works on; `size` for none
    data = jax.eval_shape(take, index)
    state = jax.eval_shape(start, data, index < size)
    reported = jax.eval_shape(report, data, state)
    leaves, treedef = jax.tree.flatten(reported)
    # Wide enough for the counts among what is reported.
    floats = [leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    dtype = max([jnp.dtype(jnp.float32), *floats], key=lambda dtype: dtype.itemsize)

    def turn(carry):
        state, index, upcoming, rows = carry
        vacant = index == size
        place = upcoming + jnp.cumsum(vacant, dtype=jnp.int32) - 1
        index = jnp.where(vacant, jnp.minimum(place, size), index)
        upcoming = jnp.minimum(upcoming + jnp.sum(vacant, dtype=jnp.int32), size)
        data = take(jnp.minimum(index, size - 1))
        fresh = start(data, index < size)
        state = lanes.select(vacant, fresh, state)

        least = jnp.where(upcoming < size, width - width // _IDLE, 0)
        state = lax.while_loop(
            lambda state: jnp.sum(running(state)) > least, lambda state: step(data, state), state
        )
        done = ~running(state)
        # One array for everything that is reported: the rows are scattered once.
        flat = [a.reshape(-1, width).astype(dtype) for a in jax.tree.leaves(report(data, state))]
        rows = rows.at[jnp.where(done, index, size)].set(jnp.concatenate(flat).T, mode="drop")
        return state, jnp.where(done, size, index), upcoming, rows

    columns = [leaf.size // width for leaf in leaves]
    state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
    rows = jnp.zeros((size, sum(columns)), dtype)
    *_, rows = lax.while_loop(
        lambda carry: (carry[2] < size) | jnp.any(carry[1] < size),
        turn,
        (state, index, jnp.int32(0), rows),
    )
    parts, begin = [], 0
    for leaf, number in zip(leaves, columns, strict=True):
        part = rows[:, begin : begin + number].astype(leaf.dtype)
        parts.append(part.reshape(size, *leaf.shape[:-1]))
        begin += number
    return jax.tree.unflatten(treedef, parts)
