"""In which mode a function of the user can be differentiated.

The solver needs derivatives up to the second, and takes them where it can in forward mode over
reverse, which for a cost is n + m times cheaper than forward over forward. Gradients of a plan need
reverse mode. A ``lax.while_loop`` (a simulator's contact solver, say) has forward mode alone.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxmpc.batch.unchecked import jaxpr_of

# What may lack a derivative. A ``custom_jvp`` hides whatever it was written for.
_DOUBTFUL = ("while", "custom_vjp", "pure_callback", "io_callback", "ffi_call")
_ERRORS = TypeError, ValueError, NotImplementedError


class Hoisted(NamedTuple):
    """A function of the user with everything that it closes over as an argument."""

    call: Callable  # (constants, *point, params) -> out
    constants: Any
    out: Any  # its shape and dtype
    jaxpr: core.Jaxpr | None  # None if it is given by matrices


def has_reverse(name: str, function: Hoisted, params: Any, point: tuple[Any, ...]) -> bool:
    """Whether a function has reverse mode in state and control.

    Raises:
      TypeError: it does not even have forward mode.
    """
    if function.jaxpr is None or not any(
        primitive.startswith(_DOUBTFUL) for primitive in _primitives(function.jaxpr)
    ):
        return True
    which = tuple(range(min(2, len(point))))  # without the stage

    def at(*point: Any) -> Any:
        return function.call(function.constants, *point, params)

    def has(derivative: Callable) -> None:
        jaxpr_of(derivative(at, which), *point)

    try:
        has(lambda f, which: jax.jacfwd(jax.jacfwd(f, which), which))
    except _ERRORS as error:
        raise TypeError(
            f"{name} must have derivatives in forward mode, twice ({_first_line(error)}): "
            "inside it use lax.custom_root or jax.custom_jvp, not jax.custom_vjp"
        ) from error
    try:
        has(lambda f, which: jax.jacfwd(jax.jacrev(f, which), which))
    except _ERRORS:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _primitives(jaxpr: core.Jaxpr) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != "custom_jvp_call":
            for inner in core.jaxprs_in_params(eqn.params):
                yield from _primitives(inner)
