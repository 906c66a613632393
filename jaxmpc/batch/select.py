"""A choice between two trees."""

import jax
import jax.numpy as jnp


def select(condition, a, b):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)
