"""Costs and dynamics that are given by their matrices.

Wherever ``mpc_solve`` takes a cost or a dynamics it takes these too. They are functions like any
others, but the solver need not differentiate them: their expansions are the matrices themselves.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jaxmpc import validation
from jaxmpc.batch import lanes
from jaxmpc.problem.problem import Theta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic:
    """The quadratic cost ½ zᵀ C_t z + c_tᵀ z of a stage, z = (x, u); or that of the end, z = x.

    Attributes:
      C: [T, n+m, n+m], or [n+m, n+m] for all stages; of the end [n, n]. Only its symmetric part
        counts.
      c: [T, n+m] or [n+m]; of the end [n]; 0 by default.

    Solutions are differentiable in both, as in whatever a cost closes over. Under ``jax.vmap``
    they may have the batch's axis or be shared.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine, Quadratic, mpc_solve
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> cost = Quadratic(jnp.eye(3))
      >>> x_init, u_init = jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> solution = mpc_solve(cost, dynamics, x_init, u_init, u_lower=-0.5, u_upper=0.5)
      >>> print(jnp.array_str(solution.u[:4, 0], precision=2))
      [-0.5  -0.1   0.08  0.1 ]
    """

    C: ArrayLike
    c: ArrayLike | None = None

    def __call__(self, x: Array, *rest: Any) -> Array:
        """As cost(x, u, t, params), or as terminal_cost(x, params)."""
        if len(rest) == 1:
            C, c, z = self.C, self.c, x
        else:
            u, t, _ = rest
            C, c = at_stage(self.C, 2, t), at_stage(self.c, 1, t)
            z = jnp.concatenate([x, u])
        value = 0.5 * lanes.vdot(z, lanes.product(jnp.asarray(C), z))
        return value if c is None else value + lanes.vdot(jnp.asarray(c), z)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Affine:
    """The affine dynamics x_{t+1} = F_t z + f_t, z = (x, u).

    Attributes:
      F: [T, n, n+m], or [n, n+m] for all stages: the matrices (A, B) side by side.
      f: [T, n] or [n]; 0 by default.

    Solutions are differentiable in both.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> print(dynamics(jnp.array([1.0, 2.0]), jnp.array([3.0]), 0, None))
      [2.  3.5]
    """

    F: ArrayLike
    f: ArrayLike | None = None

    def __call__(self, x: Array, u: Array, t: Any, params: Any) -> Array:
        x_next = lanes.product(jnp.asarray(at_stage(self.F, 2, t)), jnp.concatenate([x, u]))
        return x_next if self.f is None else x_next + jnp.asarray(at_stage(self.f, 1, t))


def at_stage(array, rank: int, t):
    """The entry of stage t, if there is one for each."""
    return array if array is None or jnp.ndim(array) == rank else jnp.asarray(array)[t]


def checked(name: str, given: Quadratic | Affine, n: int, m: int, T: int) -> Quadratic | Affine:
    """With all of its matrices, C symmetric. What all stages share is there once."""
    if isinstance(given, Affine):
        F = _shaped(f"{name}.F", given.F, (n, n + m), "n, n+m", T)
        f = jnp.zeros(n, F.dtype) if given.f is None else given.f
        return Affine(F, _shaped(f"{name}.f", f, (n,), "n", T))
    size, letter, stages = (n, "n", None) if name == "terminal_cost" else (n + m, "n+m", T)
    C = _shaped(f"{name}.C", given.C, (size, size), f"{letter}, {letter}", stages)
    c = jnp.zeros(size, C.dtype) if given.c is None else given.c
    c = _shaped(f"{name}.c", c, (size,), letter, stages)
    return Quadratic((C + jnp.swapaxes(C, -1, -2)) * 0.5, c)


def _shaped(name: str, value, shape: tuple[int, ...], letters: str, T: int | None) -> Array:
    array = validation.floating(name, value)
    full = shape if T is None else (T, *shape)
    if array.shape not in (shape, full):
        expected = f"[{letters}] = {list(shape)}"
        if T is not None:
            expected = f"[T, {letters}] = {list(full)} or {expected}"
        raise ValueError(f"{name} must have shape {expected}, got {list(array.shape)}")
    return array


# What the solver needs of them, along z [T, ...]. What all stages share is not repeated for each.


def _of(theta: Theta, name: str):
    """The matrices of a function; of a batch, on every lane."""
    given = theta.constants[name]
    if not theta.lanes:
        return given
    (width,) = theta.lanes
    batched = jax.tree.unflatten(jax.tree.structure(theta), theta.batched).constants[name]
    return jax.tree.map(lambda a, own: a if own else lanes.spread(a, width), given, batched)


def _shared(theta: Theta, array: Array, rank: int) -> bool:
    """Whether a matrix or vector is there once for all stages."""
    return array.ndim == rank + len(theta.lanes)


def _per_stage(theta: Theta, fn: Callable, given: Any, z: Array) -> Array:
    """``fn(C_t, c_t, z_t)`` at every stage."""
    pairs = ((given.C, 2), (given.c, 1))
    axes = (None if _shared(theta, array, rank) else 0 for array, rank in pairs)
    return jax.vmap(fn, (*axes, 0))(given.C, given.c, z)


def _at_all_stages(theta: Theta, array: Array, T: int) -> Array:
    return jnp.broadcast_to(array, (T, *array.shape)) if _shared(theta, array, 2) else array


def values(theta: Theta, name: str, z: Array) -> Array:
    """½ zᵀ C z + cᵀ z at every stage, [T]."""

    def value(C, c, z):
        return lanes.dot(z, 0.5 * lanes.matvec(C, z) + c)

    return _per_stage(theta, value, _of(theta, name), z)


def expand_quadratic(theta: Theta, name: str, z: Array) -> tuple[Array, Array]:
    """C z + c and C, at every stage."""
    given = _of(theta, name)
    gradient = _per_stage(theta, lambda C, c, z: lanes.matvec(C, z) + c, given, z)
    return gradient, _at_all_stages(theta, given.C, len(z))


def jacobians(theta: Theta, name: str, T: int) -> Array:
    """F at every stage."""
    return _at_all_stages(theta, _of(theta, name).F, T)


def transition(theta: Theta, name: str):
    """The dynamics as a function of (x, u, now), and what ``now`` is at each stage."""
    given = _of(theta, name)
    arrays = given.F, given.f
    shared = _shared(theta, given.F, 2), _shared(theta, given.f, 1)

    def step(x, u, now):
        F, f = (
            a if one else of_stage for a, one, of_stage in zip(arrays, shared, now, strict=True)
        )
        z = jnp.concatenate([x, u])
        return lanes.materialize(lambda F, z, f: lanes.matvec(F, z) + f, F, z, f)

    return step, tuple(None if one else a for a, one in zip(arrays, shared, strict=True))
