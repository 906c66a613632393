"""The studies are users of the library: what they write may promote, as it may by default."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def promotion():
    import jax  # after the settings of all tests, if only tests of studies are asked for

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
