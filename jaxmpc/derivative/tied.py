"""A value that was found in some other way, tied to what it depends on.

The solver finds a plan by iterating. What differentiates it knows the plan's derivative from the
conditions that it meets, and does not care how it was found.
"""

from collections.abc import Callable

import jax


def tied(pull: Callable, *, moves: bool) -> Callable:
    """``tie(value, *others)``: the value itself, which to differentiation depends on the others.

    Args:
      pull: (cotangent, value, *others) -> the cotangents of the others, None where there is none.
        Under ``vmap`` it may not close over traced values: what it needs is among the others.
      moves: whether the value has a derivative of its own to the differentiation outside of the one
        that the tie is for. Second derivatives depend on it. What the rule saves is the point at
        which ``pull`` is evaluated, so an outer differentiation has to see it move, once. A value
        that moves does so by itself. One that is a constant has to go through the tie in the rule
        as well: otherwise the outer differentiation sees it stand still.
    """

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
