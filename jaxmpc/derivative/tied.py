"""A value that was found in some other way, tied to what it depends on.

The solver finds a plan by iterating. What differentiates it knows the plan's derivative from the
conditions that it meets, and does not care how it was found.
"""

from collections.abc import Callable

import jax
from jax.custom_derivatives import SymbolicZero

from jaxmpc.types import DerivativeRule


def tied(pull: Callable, push: Callable, *, rule: DerivativeRule, moves: bool) -> Callable:
    """``tie(value, *others)``: the value itself, which to differentiation depends on the others.

    Args:
      pull: (cotangent, value, *others) -> the cotangents of the others, None where there is none.
        Under ``vmap`` it may not close over traced values: what it needs is among the others.
      push: (tangents of the others, value, *others) -> the tangent of the value, in a way that JAX
        can transpose; likewise.
      rule: "vjp" to differentiate by ``pull``, in reverse mode, "jvp" by ``push``, in both. JAX has
        no function with both rules.
      moves: whether the value has a derivative of its own to the differentiation outside of the one
        that the tie is for. Second derivatives depend on it. What the rule saves is the point at
        which it is evaluated, so an outer differentiation has to see it move, once. A value
        that moves does so by itself. One that is a constant has to go through the tie in the rule
        as well: otherwise the outer differentiation sees it stand still.
    """
    return _by_push(push, moves) if rule == "jvp" else _by_pull(pull, moves)


def _by_pull(pull: Callable, moves: bool) -> Callable:
    @jax.custom_vjp
    def tie(value, *others):
        return value

    def forward(value, *others):
        value = value if moves else tie(value, *others)
        return value, (value, others)

    def backward(saved, cotangent):
        value, others = saved
        return None, *pull(cotangent, value, *others)

    tie.defvjp(forward, backward)
    return tie


def _by_push(push: Callable, moves: bool) -> Callable:
    @jax.custom_jvp
    def tie(value, *others):
        return value

    def differential(primals, tangents):
        value, *others = primals
        value = value if moves else tie(value, *others)
        return value, push(tangents[1:], value, *others)

    tie.defjvp(differential, symbolic_zeros=True)
    return tie


def along(fn: Callable, primals: tuple, tangents: tuple):
    """The derivative of ``fn(*primals)`` along tangents, with nothing computed for those that are
    symbolic zeros; and where they all are, zeros."""
    leaves, tree = jax.tree.flatten(primals)
    dots = jax.tree.leaves(tangents)
    moving = [type(dot) is not SymbolicZero for dot in dots]

    def of_moving(*own):
        own = iter(own)
        full = [next(own) if move else leaf for leaf, move in zip(leaves, moving, strict=True)]
        return fn(*jax.tree.unflatten(tree, full))

    def those(a):
        return [leaf for leaf, move in zip(a, moving, strict=True) if move]

    return jax.jvp(of_moving, those(leaves), those(dots))[1]


def materialized(tangents):
    """Arrays of zeros for those that are symbolic."""

    def one(dot):
        return jax.numpy.zeros(dot.shape, dot.dtype) if type(dot) is SymbolicZero else dot

    return jax.tree.map(one, tangents, is_leaf=lambda dot: type(dot) is SymbolicZero)
