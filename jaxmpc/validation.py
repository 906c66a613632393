"""Checks of what users pass, at trace time: every message names the argument, what came and what
was expected. Values can only be checked where they are concrete; traced ones end in a status."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmpc.types import (
    Constraints,
    DerivativeRule,
    Multipliers,
    Options,
    Rate,
    RiccatiMethod,
    Slack,
    Smoothed,
)


def floating(name: str, value: Any) -> Array:
    """``value`` as a floating-point array."""
    array = _as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must be a floating-point array, got dtype {array.dtype}: pass floats "
            f"(for example jnp.asarray({name}, float))"
        )
    return array


def _as_array(name: str, value: Any) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}: {error}") from error


def known(value: Any) -> np.ndarray | None:
    """The numbers of ``value`` where they are there at trace time, else None.

    To be asked of what the user passed: inside ``jit``, ``jnp.asarray`` makes a tracer of a number.
    """
    try:
        numbers = np.asarray(value)
    except (TypeError, RuntimeError):  # traced, or on the devices of another process
        return None
    return None if numbers.dtype == object else numbers


def one_array(name: str, returned: Any) -> Array:
    """What the function of that name returned."""
    if not hasattr(returned, "shape") or not hasattr(returned, "dtype"):
        raise TypeError(f"{name} must return one array, got {type(returned).__name__}")
    return jnp.asarray(returned)


def has_shape(name: str, array: Array, shape: tuple[int, ...], meaning: str) -> None:
    if array.shape != shape:
        raise ValueError(
            f"{name} must have shape {meaning} = {list(shape)}, got {list(array.shape)}"
        )


def _has_rank(name: str, array: Array, rank: int, meaning: str) -> None:
    if array.ndim != rank or 0 in array.shape:
        hint = "; batch with jax.vmap" if array.ndim > rank else ""
        raise ValueError(
            f"{name} must have shape {meaning} with every size at least 1, "
            f"got {list(array.shape)}{hint}"
        )


class LQRArguments(NamedTuple):
    x_init: Array
    C: Array
    c: Array
    F: Array
    f: Array
    C_final: Array
    c_final: Array
    free: Array


def lqr_arguments(
    x_init: Any, C: Any, c: Any, F: Any, f: Any, C_final: Any, c_final: Any, free: Any
) -> LQRArguments:
    """The arguments of ``lqr_solve`` with defaults filled in, of one dtype."""
    given = dict(x_init=x_init, C=C, c=c, F=F, f=f, C_final=C_final, c_final=c_final)
    arrays = {name: floating(name, a) for name, a in given.items() if a is not None}
    _has_rank("x_init", arrays["x_init"], 1, "[n]")
    _has_rank("c", arrays["c"], 2, "[T, n+m]")
    (n,) = arrays["x_init"].shape
    # What two of the three agree in: that names the one that does not fit.
    T, nm = (
        sorted(arrays[name].shape[i] if arrays[name].ndim else 0 for name in ("C", "c", "F"))[1]
        for i in (0, -1)
    )
    m = nm - n
    if m < 1:
        raise ValueError(
            f"C, c and F must have shapes [T, n+m, n+m], [T, n+m] and [T, n, n+m] with m at least "
            f"1: x_init gives n = {n}, they have {nm} columns"
        )
    dtype = jnp.result_type(*arrays.values())
    shapes = dict(
        c=((T, nm), "[T, n+m]"),
        C=((T, nm, nm), "[T, n+m, n+m]"),
        F=((T, n, nm), "[T, n, n+m]"),
        f=((T, n), "[T, n]"),
        C_final=((n, n), "[n, n]"),
        c_final=((n,), "[n]"),
    )
    for name, (shape, meaning) in shapes.items():
        if name in arrays:
            has_shape(name, arrays[name], shape, meaning)
        else:
            arrays[name] = jnp.zeros(shape, dtype)
    if free is None:
        free = jnp.ones((T, m), bool)
    free = _as_array("free", free)
    if free.dtype != bool:
        raise TypeError(f"free must be a boolean array, got dtype {free.dtype}")
    has_shape("free", free, (T, m), "[T, m]")
    return LQRArguments(free=free, **{name: a.astype(dtype) for name, a in arrays.items()})


def mpc_arguments(
    x_init: Any, u_init: Any, u_lower: Any, u_upper: Any
) -> tuple[Array, Array, Array, Array]:
    """x_init [n], u_init [T, m] and the bounds, checked and broadcast but not yet of one dtype."""
    x_init = floating("x_init", x_init)
    u_init = floating("u_init", u_init)
    _has_rank("x_init", x_init, 1, "[n]")
    _has_rank("u_init", u_init, 2, "[T, m]")
    expected = u_init.shape, "[T, m]", u_init.dtype
    given = (-np.inf if u_lower is None else u_lower), (np.inf if u_upper is None else u_upper)
    lower, upper = _bound("u_lower", given[0], *expected), _bound("u_upper", given[1], *expected)
    _not_crossed(("u_lower", "u_upper"), given, (lower, upper))
    return x_init, u_init, lower, upper


def state_guess(x_guess: Any, T: int, n: int) -> Array:
    """x_guess [T+1, n], checked but not yet of the dtype of the others."""
    array = floating("x_guess", x_guess)
    has_shape("x_guess", array, (T + 1, n), "[T+1, n]")
    return array


def state_bounds(
    constraints: Constraints, shape: tuple[int, int], dtype: Any
) -> tuple[Array | None, Array | None]:
    """x_lower and x_upper of ``constraints``, broadcast to [T+1, n]; None where there are none."""
    names = "constraints.x_lower", "constraints.x_upper"
    given = constraints.x_lower, constraints.x_upper
    lower, upper = (
        None if value is None else _bound(name, value, shape, "[T+1, n]", dtype).astype(dtype)
        for name, value in zip(names, given, strict=True)
    )
    if lower is not None and upper is not None:
        _not_crossed(names, given, (lower, upper), first=1)
    return lower, upper


def _not_crossed(
    names: tuple[str, str], given: tuple[Any, Any], arrays: tuple[Array, Array], first: int = 0
) -> None:
    """From stage ``first`` on, where both are known; ``arrays`` are what came of the ``given``."""
    numbers = [known(value) for value in given]
    if any(value is None for value in numbers):
        return
    lower, upper = (
        np.broadcast_to(value.astype(array.dtype), array.shape)  # type: ignore[union-attr]
        for value, array in zip(numbers, arrays, strict=True)
    )
    crossed = np.argwhere(~(lower <= upper)[first:])
    if crossed.size:
        t, i = crossed[0] + [first, 0]
        raise ValueError(
            f"{names[0]} must be at most {names[1]}, got {names[0]}[{t}, {i}] = {lower[t, i]} and "
            f"{names[1]}[{t}, {i}] = {upper[t, i]}"
        )


def _real(name: str, value: Any) -> Array:
    array = _as_array(name, value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)):
        raise TypeError(f"{name} must be a real number or array, got dtype {array.dtype}")
    return array


def _broadcast(name: str, array: Array, shape: tuple[int, ...], meaning: str) -> Array:
    try:
        return jnp.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} must broadcast to {meaning} = {list(shape)}, got {list(array.shape)}"
        ) from None


def _bound(name: str, value: Any, shape: tuple[int, int], meaning: str, dtype: Any) -> Array:
    array = _real(name, value)
    if not hasattr(value, "dtype") or jnp.issubdtype(array.dtype, jnp.integer):
        array = array.astype(dtype)  # Python numbers promote nothing.
    return _broadcast(name, array, shape, meaning)


def weight(
    name: str,
    value: Any,
    shape: tuple[int, ...],
    meaning: str,
    *,
    finite: bool = False,
    positive: bool = False,
) -> Array:
    """A non-negative number or array, broadcast to the shape."""
    array, numbers = _real(name, value), known(value)
    if numbers is not None:
        wanted = ("positive" if positive else "non-negative") + (" and finite" if finite else "")
        holds = (numbers > 0) if positive else (numbers >= 0)
        if finite:
            holds &= np.isfinite(numbers)
        if not np.all(holds):
            raise ValueError(f"{name} must be {wanted}, got {numbers[~holds].flat[0]}")
    return _broadcast(name, array, shape, meaning)


def check_constraints(constraints: Any) -> None:
    if not isinstance(constraints, Constraints):
        raise TypeError(
            f"constraints must be a jaxmpc.Constraints, got {type(constraints).__name__}"
        )
    kinds = dict(slack=Slack, terminal_slack=Slack, rate=Rate, multipliers=Multipliers)
    for name, kind in kinds.items():
        value = getattr(constraints, name)
        if value is not None and not isinstance(value, kind):
            raise TypeError(
                f"constraints.{name} must be a jaxmpc.{kind.__name__}, got {type(value).__name__}"
            )


def check_callable(name: str, fn: Any) -> None:
    if not callable(fn):
        raise TypeError(f"{name} must be a callable, got {type(fn).__name__}")


def call(name: str, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, with an error that names ``fn`` where it takes another number of arguments."""
    try:
        return fn(*args)
    except TypeError as error:
        try:
            signature = inspect.signature(fn)
            signature.bind(*args)
        except ValueError:  # it has no signature
            raise error from None
        except TypeError:
            wanted = "(x, u, t, params)" if len(args) == 4 else "(x, params)"
            raise TypeError(
                f"{name} must take the arguments {wanted}, got a function of {signature}"
            ) from error
        raise


def check_count(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a Python int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


_CHOICES = dict(
    hessian=("exact", "ilqr"),
    backward_hessian=("exact", "ilqr"),
    unconverged=("zero", "nan", "implicit"),
    riccati=get_args(RiccatiMethod),
    derivative=get_args(DerivativeRule),
    smoothed=get_args(Smoothed),
)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_options(options: Any) -> None:
    if not isinstance(options, Options):
        raise TypeError(f"options must be a jaxmpc.Options, got {type(options).__name__}")
    for name, choices in _CHOICES.items():
        check_choice(f"options.{name}", getattr(options, name), choices)
    check_count("options.record", options.record, least=0)
    checks: dict[str, tuple[str, Callable[[Any], bool]]] = dict(
        tolerance=("positive", lambda v: v > 0),
        max_iterations=("a non-negative integer", lambda v: v >= 0 and float(v).is_integer()),
        regularization=("non-negative and finite", lambda v: v >= 0 and np.isfinite(v)),
        line_search_decay=("between 0 and 1, both excluded", lambda v: 0 < v < 1),
        smoothing=("non-negative and finite", lambda v: v >= 0 and np.isfinite(v)),
    )
    if options.smoothed == "plan":
        checks["smoothing"] = ("positive and finite", lambda v: v > 0 and np.isfinite(v))
    for name, (expected, holds) in checks.items():
        value = getattr(options, name)
        if value is None and name in ("tolerance", "smoothing"):
            continue
        if not hasattr(value, "dtype") and not isinstance(value, (int, float)):
            raise TypeError(f"options.{name} must be a number, got {type(value).__name__}")
        if np.ndim(value) != 0:
            raise ValueError(f"options.{name} must be a scalar, got shape {list(np.shape(value))}")
        number = known(value)
        if number is not None and not holds(number):
            raise ValueError(f"options.{name} must be {expected}, got {value}")


def with_trust_region(options: Options, u_init: Array) -> Options:
    """The options with a trust region of shape [m], if there is one."""
    if options.trust_region is None:
        return options
    m = u_init.shape[1:]
    reach = weight("options.trust_region", options.trust_region, m, "[m]", positive=True)
    return dataclasses.replace(options, trust_region=reach.astype(u_init.dtype))
