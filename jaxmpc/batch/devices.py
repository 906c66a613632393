"""A batch dealt out to the devices that it lives on.

What looks at a batch as a whole reduces and gathers along it, and of a batch that is spread over
devices the compiler would make communication out of that, in every trip of a loop. Problems are
independent, so there is no need for any: here every device gets its part of the batch, as a batch
of its own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

# Which of the batch's axes each leaf has, by number, 0 the outermost: batches nest, and in
# vmap(vmap(f, (0, None)), (0, 0)) one argument has both axes and the other only the outer one.
Axes = Sequence[tuple[int, ...]]


def sizes(axes: Axes, leaves) -> tuple[int, ...]:
    """Those of the batch's axes."""
    found: dict[int, int] = {}
    for own, leaf in zip(axes, leaves, strict=True):
        found |= dict(zip(own, leaf.shape, strict=False))
    return tuple(found[k] for k in sorted(found))


def dealt(f: Callable, axes: Axes, leaves):
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
    along = sizes(axes, leaves)
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True):
        if kind == AxisType.Auto:
            for k, size in enumerate(along):
                names = (*spread.get(k, ()), name)
                if size % math.prod(mesh.shape[name] for name in names) == 0:
                    spread[k] = names
                    break
    return jax.shard_map(
        f,
        mesh=mesh,
        in_specs=tuple(_spec(spread, own) for own in axes),
        out_specs=_spec(spread, range(len(along))),
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
