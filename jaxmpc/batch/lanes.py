"""Small-matrix algebra on whole batches: the batch, where there is one, is the last axis.

Stored this way every matrix entry is a contiguous vector over the batch, one lane a problem, and a
product of small matrices is a few multiplications of long vectors, where a batched matrix product
would be a loop over tiny ones. The same code serves a single problem: arrays without the last axis.

Conditions that differ between problems, and anything else with one value a problem, have the shape
of the batch alone, and NumPy's broadcasting aligns them with every array.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.typing import ArrayLike

_CACHE = 40 * 1024  # bytes: of the first caches of today's CPUs, 32 to 48 KiB
# Sums of up to this many terms are written out; for larger matrices a matrix product pays.
MAX_TERMS = 16
# Of every product of the library: by default GPUs and TPUs multiply float32 with the digits of
# bfloat16 or TF32.
_PRECISION = lax.Precision.HIGHEST

_P = ParamSpec("_P")
_R = TypeVar("_R")


def any_rank(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """``fn`` where NumPy's broadcasting between ranks is allowed, whatever the user allows."""

    @functools.wraps(fn)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.numpy_rank_promotion("allow"):
            return fn(*args, **kwargs)

    return call


def materialize(fn, *args):
    """``fn(*args)``; on the CPU every result computed once and stored.

    XLA fuses a product of small matrices into each of its users and computes it anew for each of
    their entries: two products in a row of 12x12 matrices take three times as long. On the
    CPU its optimization barriers do not prevent this; a call that is not inlined does.
    """

    @jax.jit
    def call(*args):
        # The attribute is for this call alone, not for those inside of it.
        with set_xla_metadata(inlineable=None):
            return fn(*args)

    def stored(*args):
        with set_xla_metadata(inlineable="false"):
            return call(*args)

    return lax.platform_dependent(*args, cpu=stored, default=fn)


def product(*factors: Array) -> Array:
    """``a @ b @ …``, of arrays without a batch on the last axis."""
    return functools.reduce(functools.partial(jnp.matmul, precision=_PRECISION), factors)


def vdot(a: ArrayLike, b: ArrayLike) -> Array:
    """The sum of a b over all entries, likewise."""
    return jnp.vdot(a, b, precision=_PRECISION)


def _einsum(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, precision=_PRECISION)


def matmul(A: Array, B: Array) -> Array:
    """A B, for A [i, k, ...] and B [k, j, ...]."""
    if B.shape[0] > MAX_TERMS:
        return _einsum("ik...,kj...->ij...", A, B)
    return sum_of(A[:, k, None] * B[k] for k in range(B.shape[0]))


def matmul_t(A: Array, B: Array) -> Array:
    """Aᵀ B, for A [k, i, ...] and B [k, j, ...]."""
    if B.shape[0] > MAX_TERMS:
        return _einsum("ki...,kj...->ij...", A, B)
    return sum_of(A[k, :, None] * B[k] for k in range(B.shape[0]))


def matvec(A: Array, x: Array) -> Array:
    """A x, for A [i, k, ...] and x [k, ...]."""
    if x.shape[0] > MAX_TERMS:
        return _einsum("ik...,k...->i...", A, x)
    return sum_of(A[:, k] * x[k] for k in range(x.shape[0]))


def matvec_t(A: Array, x: Array) -> Array:
    """Aᵀ x, for A [k, i, ...] and x [k, ...]."""
    if x.shape[0] > MAX_TERMS:
        return _einsum("ki...,k...->i...", A, x)
    return sum_of(A[k] * x[k] for k in range(x.shape[0]))


def dot(a: Array, b: Array) -> Array:
    """aᵀ b, for vectors [k, ...]."""
    return jnp.sum(a * b, axis=0)


def sum_of(terms) -> Array:
    total, *rest = terms
    for term in rest:
        total = total + term
    return total


def select(condition: Array | bool, a, b):
    """The tree a where the condition holds, b elsewhere; one condition a problem."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def eps(a) -> float:
    """The unit of rounding of an array, or of a dtype."""
    return float(jnp.finfo(getattr(a, "dtype", a)).eps)


def is_wide(dtype) -> bool:
    """Whether a dtype has the digits of float64."""
    return eps(dtype) < 1e-12


def every(a: Array, axes: int = 1) -> Array:
    """Whether all are true along the first ``axes`` axes."""
    for axis in range(axes - 1, 0, -1):
        if 0 < a.shape[axis] <= MAX_TERMS:
            # Written out, for a reduction goes through one lane after the other.
            each = (lax.index_in_dim(a, i, axis, False) for i in range(a.shape[axis]))
            a = functools.reduce(jnp.logical_and, each)
        else:
            a = jnp.all(a, axis=axis)
    return jnp.all(a, axis=0)


def transpose(A: Array) -> Array:
    return jnp.swapaxes(A, 0, 1)


def diagonal(A: Array) -> Array:
    """The diagonal [k, ...] of a matrix [k, k, ...]."""
    return jnp.stack([A[k, k] for k in range(A.shape[0])])


def diagonal_matrix(a: Array) -> Array:
    """The matrix [k, k, ...] with the diagonal a [k, ...]."""
    return jnp.where(identity(a.shape[0], a.ndim - 1), a[:, None], 0)


def identity(size: int, batch_axes: int) -> Array:
    """The identity matrix as booleans that broadcast over the batch."""
    return jnp.eye(size, dtype=bool).reshape((size, size) + (1,) * batch_axes)


def last(fn, sizes):
    """``fn`` on lanes as the second argument of ``batchwise``, where the batch comes first.

    ``sizes(*args)`` are the (n, m) of a problem. A large batch goes through in blocks.
    """

    def many(size, batched, *args):
        leaves, treedef = jax.tree.flatten(args)
        flags = jax.tree.leaves(batched)
        one = [
            jax.ShapeDtypeStruct(leaf.shape[flag:], leaf.dtype)
            for leaf, flag in zip(leaves, flags, strict=True)
        ]
        n, m = sizes(*jax.tree.unflatten(treedef, one))

        def in_blocks(most, *leaves):
            num_blocks = max(1, -(-size // most))
            num = -(-size // num_blocks)

            def block(own):
                own = iter(own)
                full = [
                    jnp.moveaxis(next(own), 0, -1) if flag else spread(leaf, num)
                    for leaf, flag in zip(leaves, flags, strict=True)
                ]
                out = fn(*jax.tree.unflatten(treedef, full))
                return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), out)

            def deal(a):  # The last block may end with copies of the last problem.
                missing = num_blocks * num - size
                if missing:
                    a = jnp.concatenate([a, jnp.broadcast_to(a[-1:], (missing, *a.shape[1:]))])
                return a.reshape(num_blocks, num, *a.shape[1:])

            own = [leaf for leaf, flag in zip(leaves, flags, strict=True) if flag]
            if num_blocks == 1:
                return block(own)
            out = lax.map(block, [deal(a) for a in own])
            return jax.tree.map(lambda a: a.reshape(num_blocks * num, *a.shape[2:])[:size], out)

        bytes_each = (n + m) ** 2 * max(leaf.dtype.itemsize for leaf in one)
        return of_width(in_blocks, size, bytes_each, *leaves)

    return many


def of_width(fn: Callable, size: int, bytes_each: int, *args):
    """``fn(width, *args)``, with how many of ``size`` problems to work on at once: on the CPU what
    its caches hold, elsewhere all of them."""
    most = width(bytes_each)
    if size <= most:
        return fn(size, *args)
    some, everyone = functools.partial(fn, most), functools.partial(fn, size)
    return lax.platform_dependent(*args, cpu=some, default=everyone)


def width(bytes_each: int) -> int:
    """How many problems have a matrix each in the first cache: a power of two from 16 to 128."""
    return min(128, max(16, 1 << max(1, _CACHE // bytes_each).bit_length() - 1))


def spread(a: Array, size: int) -> Array:
    """What a batch shares, for each of its lanes."""
    return jnp.broadcast_to(a[..., None], (*a.shape, size))
