"""The user's functions as pure functions of arrays.

Cost and dynamics may close over anything, traced values included. Tracing each of them once to a
jaxpr and hoisting all of its constants gives functions of (x, u, t, theta) alone, where the pytree
``theta`` holds ``params`` and everything that was closed over: whatever shapes the solution is then
an explicit input, to ``lax.while_loop``, to ``vmap`` and to differentiation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from jaxmpc import trailing, validation

Theta = Any  # {"params": ..., "constants": ...}


class Model(NamedTuple):
    """Pure functions of one problem; the terminal cost is None where there is none."""

    cost: Callable[[Array, Array, Array, Theta], Array]
    dynamics: Callable[[Array, Array, Array, Theta], Array]
    terminal_cost: Callable[[Array, Theta], Array] | None
    # For a batch, on the last axis of every array: its size, and which leaves of theta have it.
    batch: tuple[int, ...] = ()
    batched: Any = False

    def across(self, fn: Callable) -> Callable:
        """``fn(*arrays, theta)`` of one problem, across the batch if there is one.

        All arrays have the batch but the stage, a scalar.
        """
        if not self.batch:
            return fn

        def call(*args):
            *arrays, theta = args
            flags = (*(jnp.ndim(a) > 0 for a in arrays), self.batched)
            return trailing.vmap(fn, flags, self.batch)(*arrays, theta)

        return call


class Data(NamedTuple):
    """Every array that the solution depends on, of one floating dtype where they are states,
    controls or bounds. The solution does not depend on ``u_init``, but which one is found does."""

    theta: Theta
    x_init: Array  # [n]
    u_init: Array  # [T, m]
    u_lower: Array  # [T, m]
    u_upper: Array  # [T, m]


def trace(
    cost, dynamics, x_init, u_init, params, terminal_cost, u_lower, u_upper
) -> tuple[Model, Data]:
    """Check the arguments and trace the user's functions."""
    x_init, u_init, u_lower, u_upper = validation.mpc_arguments(x_init, u_init, u_lower, u_upper)
    validation.check_params(params)
    named = dict(cost=cost, dynamics=dynamics)
    if terminal_cost is not None:
        named["terminal_cost"] = terminal_cost
    for name, fn in named.items():
        validation.check_callable(name, fn)

    dtype = jnp.result_type(x_init, u_init, u_lower, u_upper)
    while True:
        x, u = _abstract(x_init, dtype), _abstract(u_init[0], dtype)
        traced = {
            name: _hoist(fn, (x, params) if name == "terminal_cost" else (x, u, _STAGE, params))
            for name, fn in named.items()
        }
        wider = _check_outputs({name: out for name, (_, _, out) in traced.items()}, x, dtype)
        if wider == dtype:
            break
        # A constant or a parameter of a wider dtype: promoted together, as NumPy would.
        dtype = wider

    def pure(name):
        if name not in traced:
            return None
        fn, _, _ = traced[name]

        def call(*args):
            *point, theta = args
            out = fn(theta["constants"][name], *point, theta["params"])
            return out.astype(dtype)

        return call

    constants = {name: constants for name, (_, constants, _) in traced.items()}
    theta = {"params": params, "constants": constants}
    model = Model(pure("cost"), pure("dynamics"), pure("terminal_cost"))
    arrays = (a.astype(dtype) for a in (x_init, u_init, u_lower, u_upper))
    return model, Data(theta, *arrays)


_STAGE = jax.ShapeDtypeStruct((), jnp.int32)


def _abstract(a: Array, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, dtype)


def _hoist(fn, args):
    """``fn`` as a function of (constants, *args), its constants, and its output's shape."""
    # Without the mesh of devices that is in use: the solver deals the batch out itself.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)

    def hoisted(constants, *args):
        flat = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, constants))(*jax.tree.leaves(args))
        return flat[0]

    return hoisted, closed.consts, out


def _check_outputs(outputs: dict[str, Any], x: jax.ShapeDtypeStruct, dtype):
    """The outputs' shapes; returns the dtype that states, costs and controls have in common."""
    for name, out in outputs.items():
        if not isinstance(out, jax.ShapeDtypeStruct):
            raise TypeError(f"{name} must return one array, got {type(out).__name__}")
        shape = x.shape if name == "dynamics" else ()
        if out.shape != shape:
            meaning = f"a state of shape [n] = {list(shape)}" if shape else "a scalar, of shape []"
            raise ValueError(f"{name} must return {meaning}, got shape {list(out.shape)}")
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"{name} must return floating-point values, got dtype {out.dtype}")
    return jnp.result_type(dtype, *(out.dtype for out in outputs.values()))
