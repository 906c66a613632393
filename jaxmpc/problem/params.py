"""Params that hold more than arrays: the activation function of a network, the name of a mode.

What is no array and no floating-point number is part of the program: the user's functions see it as
it is, and only the rest is an input of the solver, to ``vmap`` and to differentiation.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def _is_static(path: Any, leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "OSUmM":
        where = jax.tree_util.keystr(path)
        raise TypeError(
            f"params must hold arrays of numbers, got an array of dtype {leaf.dtype} at "
            f"params{where}"
        )
    return not hasattr(leaf, "dtype") and not isinstance(leaf, (float, complex))


def split(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """``params`` with None in place of what is static, and a function that puts that back."""
    static = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if _is_static(path, leaf) else None, params
    )
    if not jax.tree.leaves(static):
        return params, lambda numbers: numbers
    numbers = jax.tree_util.tree_map_with_path(
        lambda path, leaf: None if _is_static(path, leaf) else leaf, params
    )

    def whole(numbers: Any) -> Any:
        def is_none(a: Any) -> bool:
            return a is None

        return jax.tree.map(lambda a, b: b if a is None else a, numbers, static, is_leaf=is_none)

    return numbers, whole
