"""The user's functions as pure functions of arrays.

Cost and dynamics may close over anything, traced values included. Tracing each of them once to a
jaxpr and hoisting all of its constants gives functions of (x, u, t, theta) alone, where the pytree
``theta`` holds ``params`` and everything that was closed over: whatever shapes the solution is then
an explicit input, to ``lax.while_loop``, to ``vmap`` and to differentiation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.batch.unchecked import jaxpr_of
from jaxmpc.problem.constraints import constraint_functions, with_constraints
from jaxmpc.problem.inside import from_inside, has_kinks, inner_bounds
from jaxmpc.problem.matrices import Affine, Quadratic, checked
from jaxmpc.problem.modes import Hoisted, has_reverse
from jaxmpc.problem.params import split
from jaxmpc.problem.prices import Prices
from jaxmpc.problem.problem import Data, Problem, Theta
from jaxmpc.riccati.point import no_rows
from jaxmpc.types import Constraints, Cost, Dynamics, Options, TerminalCost


def trace(
    cost: Cost,
    dynamics: Dynamics,
    x_init: ArrayLike,
    u_init: ArrayLike,
    params: Any,
    *,
    x_guess: ArrayLike | None = None,
    terminal_cost: TerminalCost | None = None,
    u_lower: ArrayLike | None = None,
    u_upper: ArrayLike | None = None,
    constraints: Constraints | None = None,
    options: Options = Options(),
) -> tuple[Problem, Data, Options]:
    """Check the arguments of a public call, and trace the user's functions."""
    validation.check_options(options)
    bounds = [a for a in (u_lower, u_upper) if a is not None]
    x_init, u_init, u_lower, u_upper = validation.mpc_arguments(x_init, u_init, u_lower, u_upper)
    if x_guess is not None:
        x_guess = validation.state_guess(x_guess, len(u_init), len(x_init))
    params, whole = split(params)
    named: dict[str, Callable] = dict(cost=cost, dynamics=dynamics)
    if terminal_cost is not None:
        named["terminal_cost"] = terminal_cost
    if constraints is None:
        constraints = Constraints()
    validation.check_constraints(constraints)
    named |= constraint_functions(constraints)
    (n,), (T, m) = x_init.shape, u_init.shape
    given = []
    for name, fn in named.items():
        validation.check_callable(name, fn)
        if isinstance(fn, Affine if name == "dynamics" else Quadratic):
            given.append(name)
            named[name] = checked(name, fn, n, m, T)

    floats = (x_init, u_init, u_lower, u_upper) + (() if x_guess is None else (x_guess,))
    dtype = jnp.result_type(*floats)
    while True:
        x, u = _abstract(x_init, dtype), _abstract(u_init[0], dtype)
        points = {name: (x,) if "terminal" in name else (x, u, _STAGE) for name in named}
        traced = {name: _hoist(name, fn, whole, points[name], params) for name, fn in named.items()}
        wider = _check_outputs({name: function.out for name, function in traced.items()}, x, dtype)
        if wider == dtype:
            break
        # A constant or a parameter of a wider dtype: promoted together, as NumPy would.
        dtype = wider

    kinked = [
        name for name, function in traced.items()
        if bounds and "terminal" not in name and has_kinks_in_u(function)
    ]  # fmt: skip

    def pure(name):
        function = traced[name]

        def call(*args):
            *point, theta = args
            return jnp.asarray(function.call(theta.constants[name], *point, theta.params), dtype)

        return from_inside(call) if name in kinked else call

    constants = {name: function.constants for name, function in traced.items()}
    constants |= {name: jax.tree.map(lambda a: a.astype(dtype), named[name]) for name in given}
    functions = {name: pure(name) for name in traced}
    none = no_rows(T, dtype)
    problem = Problem(
        cost=functions.pop("cost"),
        dynamics=functions.pop("dynamics"),
        terminal_cost=functions.pop("terminal_cost", lambda x, theta: jnp.zeros((), dtype)),
        constraint=lambda *args: none.final,
        final_constraint=lambda *args: none.final,
        given=tuple(given),
        num_states=n,
        forward_only=tuple(
            name
            for name, function in traced.items()
            if not has_reverse(name, function, params, points[name])
        ),
    )
    x_init, u_init, u_lower, u_upper = (a.astype(dtype) for a in (x_init, u_init, u_lower, u_upper))
    if kinked:
        low, high = inner_bounds(u_lower, u_upper)
        if all(jnp.ndim(a) < 2 for a in bounds):  # the same at all stages
            low, high = low[0], high[0]
        constants["inside"] = low, high
    theta, prices = Theta(params, constants), Prices(none, none, none)
    unmoved = jnp.zeros(0, bool)
    if x_guess is not None:
        x_guess = jnp.concatenate([x_init[None], x_guess[1:].astype(dtype)])
        x_guess = lax.stop_gradient(x_guess)
    data = Data(theta, x_init, u_init, u_lower, u_upper, prices, none, unmoved, x_guess)
    sizes = {name: traced[name].out.shape[0] for name in functions}
    problem, data = with_constraints(problem, data, functions, sizes, constraints)
    return problem, data, validation.with_trust_region(options, data.u_init)


_STAGE = jax.ShapeDtypeStruct((), jnp.int32)


def _abstract(a: Array, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, dtype)


def _hoist(name, fn, whole, point, params) -> Hoisted:
    if isinstance(fn, Affine | Quadratic):
        out = jax.eval_shape(fn, *point, params)
        return Hoisted(lambda given, *args: given(*args), fn, out, None)
    function = hoist(
        lambda *args: validation.call(name, fn, *args[:-1], whole(args[-1])), *point, params
    )
    if function.jaxpr is not None and isinstance(function.out, jax.ShapeDtypeStruct):
        return function._replace(out=function.jaxpr.outvars[0].aval)
    return function


def hoist(fn: Callable, *args) -> Hoisted:
    """A function that may close over traced values, with those as an argument."""
    with jax.default_matmul_precision(_precision()):
        closed, out = jaxpr_of(fn, *args)

    @precise  # The derivative rules inside are traced here.
    def call(constants, *args):
        flat = core.jaxpr_as_fun(core.ClosedJaxpr(closed.jaxpr, constants))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), flat)

    return Hoisted(call, closed.consts, out, closed.jaxpr)


def has_kinks_in_u(function: Hoisted) -> bool:
    """Whether a function of (x, u, …) may have."""
    if function.jaxpr is None:
        return False
    return has_kinks(function.jaxpr, [i == 1 for i in range(len(function.jaxpr.invars))])


def precise(fn: Callable) -> Callable:
    """``fn``, a function of the user, with all digits in the products that ask for no precision,
    unless a ``jax.default_matmul_precision`` around this says otherwise (see ``lanes``)."""
    precision = _precision()

    @functools.wraps(fn)
    def call(*args):
        with jax.default_matmul_precision(precision):
            return fn(*args)

    return call


def _precision() -> Any:
    config: Any = jax.config
    return config.jax_default_matmul_precision or "highest"


def _check_outputs(outputs: dict[str, Any], x: jax.ShapeDtypeStruct, dtype):
    """The outputs' shapes; returns the dtype that states, costs and controls have in common."""
    dtypes = [dtype]
    for name, out in outputs.items():
        if not hasattr(out, "dtype"):
            raise TypeError(f"{name} must return one array, got {type(out).__name__}")
        shape = x.shape if name == "dynamics" else ()
        if name.startswith("constraints."):
            if len(out.shape) != 1 or not out.shape[0]:
                raise ValueError(
                    f"{name} must return a vector, one entry a constraint, "
                    f"got shape {list(out.shape)}"
                )
        elif out.shape != shape:
            meaning = f"a state of shape [n] = {list(shape)}" if shape else "a scalar, of shape []"
            raise ValueError(f"{name} must return {meaning}, got shape {list(out.shape)}")
        if out.weak_type and not jnp.issubdtype(out.dtype, jnp.complexfloating):
            continue  # a Python number, which promotes nothing
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"{name} must return floating-point values, got dtype {out.dtype}")
        dtypes.append(out.dtype)
    return jnp.result_type(*dtypes)
