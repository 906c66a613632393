"""Code that need not say, inside of ``jax.shard_map``, what varies between the devices.

There every array has a type that names the mesh axes along which it varies, and by default JAX
checks that all operands, the carry of every loop and every cotangent agree in it. Problems are
independent of one another: nothing in the solver communicates, so there is nothing to check. What
goes in is made to vary along every axis along which any of it does, and what comes out does.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec


def manual_axes() -> frozenset[str]:
    """Those of the ``jax.shard_map`` around."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return frozenset(name for name, kind in kinds if kind == AxisType.Manual)


def axes_of(tree: Any) -> frozenset[str]:
    """The mesh axes along which any leaf varies; none outside of ``jax.shard_map``."""
    return frozenset().union(*(jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """``tree``, varying along these axes; in reverse mode, a sum over the devices along those that
    are new."""

    def one(leaf: Any) -> Any:
        new = tuple(sorted(axes - axes_of(leaf)))
        return lax.pcast(jnp.asarray(leaf), new, to="varying") if new else leaf

    return jax.tree.map(one, tree)


def unchecked(f: Callable) -> Callable:
    """``f``, a function of pytrees of arrays that closes over no traced values."""

    def call(*args: Any) -> Any:
        axes = axes_of(args)
        if not axes:
            return f(*args)
        return _together(*_unchecked(f, axes)(*_apart(vary(args, axes))))

    return call


def jaxpr_of(fn: Callable, *args: Any) -> tuple[core.ClosedJaxpr, Any]:
    """The jaxpr of a function that may close over traced values, and what it returns as shapes."""
    found: list[Any] = []

    def trace() -> tuple[()]:
        found.extend(jax.make_jaxpr(fn, return_shape=True)(*args))
        return ()

    axes = manual_axes()
    if axes:
        _inside(trace, axes)()
    else:  # Without the mesh of devices that is in use: the solver deals the batch out itself.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            trace()
    closed, out = found
    return closed, out


def _inside(fn: Callable, axes: frozenset[str]) -> Callable:
    """``fn`` where nothing is checked. Every device has its part already."""
    none = PartitionSpec()
    return jax.jit(
        jax.shard_map(fn, in_specs=none, out_specs=none, axis_names=axes, check_vma=False)
    )


def _apart(tree: Any) -> tuple[Any, Any]:
    """The floats of a tree, and the rest: None in either stands for a leaf of the other."""

    def is_float(leaf: Any) -> bool:
        return jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact)

    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, tree)
    return floats, jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, tree)


def _together(floats: Any, rest: Any) -> Any:
    return jax.tree.map(
        lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda leaf: leaf is None
    )


def _untyped(leaf: Array) -> Array:
    """The leaf, of which nobody knows any more what it varies along: where that is not checked, no
    operation says it of its result, but arguments from outside still come with it."""
    return lax.squeeze(lax.expand_dims(leaf, (0,)), (0,))


def _unchecked(f: Callable, axes: frozenset[str]) -> Callable:
    """``f``, of arguments and with a result that are apart, all varying along the axes.

    The rule for reverse mode is what differentiation would do, unchecked too: across the border
    of what is checked, the types of cotangents are not what they should be.
    """

    def of_parts(floats: Any, rest: Any) -> tuple[Any, Any]:
        return _apart(f(*_together(floats, rest)))

    def with_pull(floats: Any, rest: Any) -> tuple[Any, Callable, Any]:
        return jax.vjp(lambda floats: of_parts(floats, rest), floats, has_aux=True)

    def pulled(pull: Callable, cotangent: Any) -> Any:
        return pull(cotangent)[0]

    @jax.custom_vjp
    def run(floats: Any, rest: Any) -> tuple[Any, Any]:
        return _across(of_parts, axes)(floats, rest)

    def forward(floats: Any, rest: Any) -> tuple[tuple[Any, Any], Callable]:
        out, pull, rest_out = _across(with_pull, axes)(floats, rest)
        return (out, rest_out), pull

    def backward(pull: Callable, cotangents: tuple[Any, Any]) -> tuple[Any, None]:
        return _across(pulled, axes)(pull, cotangents[0]), None

    run.defvjp(forward, backward)
    return run


def _across(fn: Callable, axes: frozenset[str]) -> Callable:
    """``fn`` inside, what it returns varying along the axes; not differentiable."""

    def untyped(*args: Any) -> Any:
        return fn(*jax.tree.map(_untyped, args))

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return vary(_inside(untyped, manual_axes())(*args), axes)

    def backward(_: None, cotangent: Any) -> NoReturn:
        raise TypeError(
            "second derivatives of a plan are not to be had inside a jax.shard_map that checks "
            "what varies along its axes: give it check_vma=False"
        )

    call.defvjp(lambda *args: (call(*args), None), backward)
    return call
