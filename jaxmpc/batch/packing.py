"""A tree of arrays as a few, several of a dtype in each, for the carry of a loop.

What a loop carries is computed and selected between, problem by problem, in every trip; each array
takes a kernel of its own for that, which has to be compiled and called.
"""

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# XLA computes so many arrays and what concatenates them in one kernel; more in one each, and one
# that copies them.
_TOGETHER = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """``arrays`` [entries, ...]; the batch, where there is one, is the last axis."""

    arrays: dict[str, Array]
    tree: Any = dataclasses.field(metadata=dict(static=True))
    shapes: tuple = dataclasses.field(metadata=dict(static=True))  # (array, shape) of every leaf

    def unpack(self) -> Any:
        begins = dict.fromkeys(self.arrays, 0)
        leaves = []
        for name, shape in self.shapes:
            array, begin = self.arrays[name], begins[name]
            begins[name] = end = begin + math.prod(shape)
            leaves.append(array[begin:end].reshape(*shape, *array.shape[1:]))
        return jax.tree.unflatten(self.tree, leaves)


def pack(tree: Any, batch_axes: int) -> Packed:
    leaves, treedef = jax.tree.flatten(tree)
    parts: dict[str, list[Array]] = {}
    seen: collections.Counter[str] = collections.Counter()
    shapes = []
    for leaf in leaves:
        shape, batch = leaf.shape[: leaf.ndim - batch_axes], leaf.shape[leaf.ndim - batch_axes :]
        name = f"{leaf.dtype.name} {seen[leaf.dtype.name] // _TOGETHER}"
        seen[leaf.dtype.name] += 1
        parts.setdefault(name, []).append(leaf.reshape(math.prod(shape), *batch))
        shapes.append((name, shape))
    arrays = {name: jnp.concatenate(flat) for name, flat in parts.items()}
    return Packed(arrays, treedef, tuple(shapes))
