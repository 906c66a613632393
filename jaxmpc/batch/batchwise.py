"""A batch seen as a whole.

Under ``jax.vmap`` every problem is on its own: it cannot look at the others. ``batchwise`` gives a
function a second implementation that sees them all, for what pays only there: to stop when
everyone is done, to set aside those who are. Of a batch that is spread over devices, each device
sees its part (``devices``).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxmpc.batch.devices import Axes, dealt, sizes

# The largest leaf, in numbers a problem, that is copied along batch axes which it lacks: physical
# constants rather than a network's weights.
_COPIED = 1024


def batchwise(one: Callable, many: Callable) -> Callable:
    """``one``, which under ``jax.vmap`` is ``many``: called on each device's part of the batch.

    Args:
      one: (*args) -> out, a single problem; pytrees of arrays.
      many: (size, batched, *args) -> out, ``size`` problems at once. ``batched`` is ``args`` with a
        bool for each leaf: whether it has a leading axis of the problems, or is shared by them.
        Every leaf of out has that axis. Which part of a batch ``many`` gets must not matter to any
        problem in it, and like ``one`` it may not close over traced values.
    """

    def solve(*args):
        leaves, tree = jax.tree.flatten(args)
        return _nested(one, many, tree, [()] * len(leaves))(*leaves)

    return solve


def _nested(one: Callable, many: Callable, tree, axes: Axes) -> Callable:
    """The function of the leaves, some of which have batch axes; ``vmap`` adds one outside."""

    @custom_vmap
    def solve(*leaves):
        if not any(axes):
            return one(*jax.tree.unflatten(tree, leaves))
        return dealt(partial(_together, many, tree, axes), axes, leaves)

    @solve.def_vmap
    def rule(size, batched, *leaves):
        del size
        inner = [tuple(k + 1 for k in own) for own in axes]
        outer = [(0,) if new else () for new in batched]
        both = [a + b for a, b in zip(outer, inner, strict=True)]
        out = _nested(one, many, tree, both)(*leaves)
        return out, jax.tree.map(lambda _: True, out)

    return solve


def _together(many: Callable, tree, axes: Axes, *leaves):
    """``many`` on the nested batch: as one long batch, with what is small copied along the axes
    that it lacks, or under a ``vmap`` over the outermost axis where something large lacks some."""
    shape = sizes(axes, leaves)
    completed = [_completed(leaf, own, shape) for leaf, own in zip(leaves, axes, strict=True)]
    leaves, axes = zip(*completed, strict=True)
    if len({own for own in axes if own}) > 1:
        outer = [0 if 0 in own else None for own in axes]
        inner = [tuple(k - 1 for k in own if k > 0) for own in axes]
        return jax.vmap(partial(_together, many, tree, inner), outer)(*leaves)
    size, num = math.prod(shape), len(shape)
    long = [
        leaf.reshape(size, *leaf.shape[num:]) if own else leaf
        for leaf, own in zip(leaves, axes, strict=True)
    ]
    batched = jax.tree.unflatten(tree, [bool(own) for own in axes])
    out = many(size, batched, *jax.tree.unflatten(tree, long))
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), out)


def _completed(leaf, own: tuple[int, ...], sizes: tuple[int, ...]):
    """A leaf that has some of the axes, copied along the others if it is small, and its axes."""
    whole = tuple(range(len(sizes)))
    shape = leaf.shape[len(own) :]
    if own in ((), whole) or math.prod(shape) > _COPIED:
        return leaf, own
    apart = leaf.reshape(*(size if k in own else 1 for k, size in enumerate(sizes)), *shape)
    return jnp.broadcast_to(apart, (*sizes, *shape)), whole
