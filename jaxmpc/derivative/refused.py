"""Solutions that have no gradient, and say so."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax

from jaxmpc.problem.problem import Problem


def refused(message: str) -> Callable:
    """``identity(value, *others)``: the value, a function of the others too, of which reverse mode
    is a TypeError with that message."""

    @jax.custom_vjp
    def identity(value: Any, *others: Any) -> Any:
        return value

    def backward(_: None, cotangent: Any) -> NoReturn:
        raise TypeError(message)

    identity.defvjp(lambda value, *others: (value, None), backward)
    return identity


def no_reverse(problem: Problem) -> str:
    """The message where functions of the problem have forward mode only."""
    names = " and ".join(problem.forward_only)
    return (
        f"there is a plan, but no gradient of it: {names} cannot be differentiated in reverse mode "
        "(a lax.while_loop inside?). Put lax.custom_root around the loop, or in its place a "
        "lax.fori_loop or lax.scan of a fixed number of trips; or jax.lax.stop_gradient the plan"
    )
