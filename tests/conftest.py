import os

# The tests run in a process per core. XLA's pool of threads has been seen to hang, too.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)  # for what concerns sharding


@pytest.fixture(scope="module")
def compile_quickly():
    """For tests far from the solver's core: most of their time goes into compiling."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
