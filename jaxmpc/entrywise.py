"""A scan over small matrices, written once and run in the form that suits their size.

Under ``vmap`` a recursion on 3x3 matrices is slow as batched matrix products: each is a call on
tiny operands. Written on the matrix entries as separate scalars, ``vmap`` turns every entry into
one vector over the batch, and XLA fuses the whole stage into a few loops over it. NumPy arrays of
dtype object, with traced scalars as elements, give both forms the same code: ``A @ B``, ``A.T`` and
``A + B`` mean the same on them as on JAX arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# The most entries in a stage's [n+m, n+m] matrix that are worth it. The fused stage, and with it
# the time to compile, grows with their number; more than these were not measured.
MAX_ENTRIES = 36


def is_entrywise(a) -> bool:
    return isinstance(a, np.ndarray) and a.dtype == object


def split(a: Array, axis: int) -> np.ndarray | Array:
    """The axes of ``a`` from ``axis`` on, as an object array of its slices."""
    shape = a.shape[axis:]
    if not shape:
        return a
    entries = np.empty(shape, object)
    lead = (slice(None),) * axis
    for index in np.ndindex(*shape):
        entries[index] = a[lead + index]
    return entries


def join(a) -> Array:
    """The inverse of ``split``."""
    if not is_entrywise(a):
        return a
    flat = jnp.stack(list(a.ravel()), axis=-1)
    return flat.reshape(flat.shape[:-1] + a.shape)


def elementwise(fn, *args):
    """``fn`` on broadcast arguments, in either form; those that are no object array are scalars.

    For what NumPy's operators do not do on traced scalars: comparisons, minima, ``jnp.where``.
    """
    shapes = [a.shape for a in args if is_entrywise(a)]
    if not shapes:
        return fn(*args)
    out = np.empty(np.broadcast_shapes(*shapes), object)
    args = tuple(np.broadcast_to(a, out.shape) if is_entrywise(a) else a for a in args)
    for i in np.ndindex(*out.shape):
        out[i] = fn(*(a[i] if is_entrywise(a) else a for a in args))
    return out


def where(condition, a, b):
    return elementwise(jnp.where, condition, a, b)


def diag(a):
    """``jnp.diag``: the diagonal of a matrix, or the diagonal matrix of a vector."""
    return np.diag(a) if is_entrywise(a) else jnp.diag(a)


def min(a):
    return functools.reduce(jnp.minimum, a) if is_entrywise(a) else jnp.min(a)


def scan(body, init, xs, *, entrywise: bool, reverse: bool = False):
    """``lax.scan`` whose ``body`` sees, if ``entrywise``, object arrays in place of arrays."""
    if not entrywise:
        return lax.scan(body, init, xs, reverse=reverse)

    def pack(tree):  # Object arrays are no pytrees: their entries, as lists, are.
        return jax.tree.map(lambda a: list(a.ravel()) if is_entrywise(a) else a, tree)

    def unpack(packed, like):
        def one(a, entries):
            if not is_entrywise(a):
                return entries
            out = np.empty(a.size, object)
            for i, entry in enumerate(entries):  # `out[:] = entries` would convert them
                out[i] = entry
            return out.reshape(a.shape)

        return jax.tree.map(one, like, packed)

    init = jax.tree.map(lambda a: split(a, 0), init)
    xs = jax.tree.map(lambda a: split(a, 1), xs)
    ys_like = None

    def packed_body(carry, x):
        nonlocal ys_like
        carry, y = body(unpack(carry, init), unpack(x, xs))
        ys_like = y
        return pack(carry), pack(y)

    carry, ys = lax.scan(packed_body, pack(init), pack(xs), reverse=reverse)
    return jax.tree.map(join, unpack(carry, init)), jax.tree.map(join, unpack(ys, ys_like))
