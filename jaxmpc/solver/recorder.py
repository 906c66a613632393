"""What a search did, written down trip by trip where that was asked for (``Options.record``)."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxmpc.types import Record


class Recorder(NamedTuple):
    entries: Record  # [N, ...]
    next: Array  # where the next entry goes


def recorder(length: int, one: Array) -> Recorder | None:
    """One without entries, if its length is not 0; ``one``: a float a problem."""
    if not length:
        return None
    nothing = jnp.full((length, *one.shape), jnp.nan, one.dtype)
    number = jnp.zeros(nothing.shape, jnp.int32)
    entries = Record(nothing, nothing, nothing, nothing, nothing, nothing, number, number)
    return Recorder(entries, jnp.zeros(one.shape, jnp.int32))


def written(record: Recorder | None, entry: Record, running: Array) -> Recorder | None:
    """With the entry of a trip, of the problems that are running."""
    if record is None:
        return None
    slots = jnp.arange(len(record.entries.action), dtype=jnp.int32)
    here = (slots.reshape((-1,) + (1,) * running.ndim) == record.next) & running

    def put(all_of: Array, one: Array) -> Array:
        return jnp.where(here, one.astype(all_of.dtype), all_of)

    pairs = zip(vars(record.entries).items(), vars(entry).values(), strict=True)
    entries = Record(**{name: put(all_of, one) for (name, all_of), one in pairs})
    return Recorder(entries, record.next + jnp.where(running, 1, 0))
