"""The studies are users of the library: what they write may promote, as it may by default."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def promotion():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
