"""Solutions that have no gradient, and say so."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax.custom_derivatives import SymbolicZero

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


def undifferentiable(message: str) -> Callable:
    """The identity, of which a derivative in any mode is a TypeError with that message."""

    @jax.custom_jvp
    def identity(value: Any) -> Any:
        return value

    def rule(primals: Any, tangents: Any) -> Any:
        if any(type(a) is not SymbolicZero for a in jax.tree.leaves(tangents)):
            raise TypeError(message)
        return identity(*primals), jax.tree.map(SymbolicZero.from_primal_value, primals[0])

    identity.defjvp(rule, symbolic_zeros=True)
    return identity


SMOOTHED_TWICE = (
    'the gradient that Options(smoothing=…, smoothed="gradient") gives is that of no function, and '
    'has no derivative: for second derivatives take smoothed="plan", or no smoothing'
)


def no_reverse(problem: Problem) -> str:
    """The message where functions of the problem have forward mode only."""
    names = " and ".join(problem.forward_only)
    return (
        f"there is a plan, but no gradient of it: {names} cannot be differentiated in reverse mode "
        "(a lax.while_loop inside?). Put lax.custom_root around the loop, or in its place a "
        "lax.fori_loop or lax.scan of a fixed number of trips; or jax.lax.stop_gradient the plan"
    )
