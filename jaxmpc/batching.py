"""A batch seen as a whole, and dealt out to the devices that it lives on.

Under ``jax.vmap`` every problem is on its own: it cannot look at the others. ``batchwise`` gives a
function a second implementation that sees them all, for what pays only there: to stop when
everyone is done, to set aside those who are. Such an implementation reduces and gathers along the
batch, and of a batch that is spread over devices the compiler would make communication out of that,
in every trip of a loop. Problems are independent, so there is no need for any: here every device
gets its part of the batch, as a batch of its own.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Which of the batch's axes each leaf has, by number, 0 the outermost: batches nest, and in
# vmap(vmap(f, (0, None)), (0, 0)) one argument has both axes and the other only the outer one.
Axes = Sequence[tuple[int, ...]]

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
        return _dealt(partial(_together, many, tree, axes), axes, leaves)

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
    sizes = _sizes(axes, leaves)
    completed = [_completed(leaf, own, sizes) for leaf, own in zip(leaves, axes, strict=True)]
    leaves, axes = zip(*completed, strict=True)
    if len({own for own in axes if own}) > 1:
        outer = [0 if 0 in own else None for own in axes]
        inner = [tuple(k - 1 for k in own if k > 0) for own in axes]
        return jax.vmap(partial(_together, many, tree, inner), outer)(*leaves)
    shape = tuple(sizes)
    size, num = math.prod(shape), len(shape)
    long = [
        leaf.reshape(size, *leaf.shape[num:]) if own else leaf
        for leaf, own in zip(leaves, axes, strict=True)
    ]
    batched = jax.tree.unflatten(tree, [bool(own) for own in axes])
    out = many(size, batched, *jax.tree.unflatten(tree, long))
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), out)


def _completed(leaf, own: tuple[int, ...], sizes: list[int]):
    """A leaf that has some of the axes, copied along the others if it is small, and its axes."""
    whole = tuple(range(len(sizes)))
    shape = leaf.shape[len(own) :]
    if own in ((), whole) or math.prod(shape) > _COPIED:
        return leaf, own
    apart = leaf.reshape(*(size if k in own else 1 for k, size in enumerate(sizes)), *shape)
    return jnp.broadcast_to(apart, (*sizes, *shape)), whole


def _sizes(axes: Axes, leaves) -> list[int]:
    sizes: dict[int, int] = {}
    for own, leaf in zip(axes, leaves, strict=True):
        sizes |= dict(zip(own, leaf.shape, strict=False))
    return [sizes[k] for k in sorted(sizes)]


def _dealt(f: Callable, axes: Axes, leaves):
    """``f(*leaves)``, where every device calls ``f`` on its part of the batch.

    The types of the arrays say which mesh of devices they are on. Along its explicit axes they also
    say how the batch is spread, and so it stays. Its automatic axes are the compiler's to use: the
    batch is spread along each that divides it. What is spread along none, every device computes.
    """
    mesh = _mesh(leaves)
    if mesh is None:
        return f(*leaves)
    spread = _explicit(axes, leaves)
    if AxisType.Explicit in mesh.axis_types:
        leaves = [
            jax.reshard(leaf, NamedSharding(mesh, _spec(spread, own)))
            for leaf, own in zip(leaves, axes, strict=True)
        ]
    sizes = _sizes(axes, leaves)
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Auto:
            for k, size in enumerate(sizes):
                names = (*spread.get(k, ()), name)
                if size % math.prod(mesh.shape[name] for name in names) == 0:
                    spread[k] = names
                    break
    return jax.shard_map(
        f,
        mesh=mesh,
        in_specs=tuple(_spec(spread, own) for own in axes),
        out_specs=_spec(spread, range(len(sizes))),
        check_vma=False,
    )(*leaves)


def _mesh(leaves) -> Any:
    """The mesh of the arrays; None if there is none to use."""
    found = {jax.typeof(leaf).sharding.mesh for leaf in leaves}
    meshes = [mesh for mesh in found | {jax.sharding.get_abstract_mesh()} if not mesh.empty]
    if len(meshes) != 1 or AxisType.Manual in meshes[0].axis_types:
        return None  # inside a shard_map, every device has its part already
    return meshes[0]


def _explicit(axes: Axes, leaves) -> dict[int, tuple[str, ...]]:
    """For each of the batch's axes, the mesh axes that it is spread along by type."""
    spread: dict[int, tuple[str, ...]] = {}
    for own, leaf in zip(axes, leaves, strict=True):
        for k, names in zip(own, jax.typeof(leaf).sharding.spec, strict=False):
            names = (names,) if isinstance(names, str) else names or ()
            if k not in spread and names and not set(names) & set(sum(spread.values(), ())):
                spread[k] = names
    return spread


def _spec(spread: dict[int, tuple[str, ...]], own) -> PartitionSpec:
    return PartitionSpec(*(spread.get(k) for k in own))
