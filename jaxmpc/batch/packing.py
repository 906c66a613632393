"""A tree of arrays as one array of each dtype, for the carry of a loop.

What a loop carries is selected between, problem by problem, in every trip; each array takes a
kernel of its own for that, which has to be compiled and called.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """``arrays`` [entries, ...] of every dtype; the batch, where there is one, is the last axis."""

    arrays: dict[str, Array]
    tree: Any = dataclasses.field(metadata=dict(static=True))
    shapes: tuple = dataclasses.field(metadata=dict(static=True))  # (dtype, shape) of every leaf

    def unpack(self) -> Any:
        begins = dict.fromkeys(self.arrays, 0)
        leaves = []
        for dtype, shape in self.shapes:
            array, begin = self.arrays[dtype], begins[dtype]
            begins[dtype] = end = begin + math.prod(shape)
            leaves.append(array[begin:end].reshape(*shape, *array.shape[1:]))
        return jax.tree.unflatten(self.tree, leaves)


def pack(tree: Any, batch_axes: int) -> Packed:
    leaves, treedef = jax.tree.flatten(tree)
    parts: dict[str, list[Array]] = {}
    shapes = []
    for leaf in leaves:
        shape, batch = leaf.shape[: leaf.ndim - batch_axes], leaf.shape[leaf.ndim - batch_axes :]
        parts.setdefault(leaf.dtype.name, []).append(leaf.reshape(-1, *batch))
        shapes.append((leaf.dtype.name, shape))
    arrays = {dtype: jnp.concatenate(flat) for dtype, flat in parts.items()}
    return Packed(arrays, treedef, tuple(shapes))
