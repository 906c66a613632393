"""What holds for every test: numbers in float64, several devices, no implicit promotion, and
programs that compile fast.

Compiling is nearly all of the time of the suite. Here the programs are compiled with few
optimizations, and kept in ``.cache/jax`` for the next run; with ``--optimized`` they are compiled
as those of users are.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".cache" / "jax"


def pytest_addoption(parser):
    parser.addoption(
        "--optimized", action="store_true", help="compile the programs with all optimizations"
    )


def pytest_configure(config):
    # The tests run in a process per core. XLA's pool of threads has been seen to hang, too.
    flags = ["--xla_cpu_multi_thread_eigen=false"]
    # In the environment, for the processes that tests start.
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if not config.getoption("optimized"):
        # By trial, what the gradient of a plan takes to compile: 5.7 s, then 4.4, then 1.6.
        settings["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        flags.append("--xla_cpu_parallel_codegen_split_count=1")
        # What is left of optimizing, and takes a seventh of the time.
        loops = ("while-loop-invariant-code-motion", "simplify-while-loops")
        flags.append(f"--xla_disable_hlo_passes={','.join(loops)}")
        if version("jaxlib").startswith("0.10."):  # later ones do not know it
            flags.append("--xla_cpu_use_fusion_emitters=false")
    given = os.environ.get("XLA_FLAGS", "").split()  # a worker of xdist has them from its parent
    settings["XLA_FLAGS"] = " ".join([*given, *(flag for flag in flags if flag not in given)])
    os.environ.update(settings)

    # Tracing makes many objects that live on; looking for garbage less often saves a tenth.
    gc.set_threshold(200_000, 20, 100)

    import jax  # which reads the environment

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 8)  # for what concerns sharding
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The tests of a file run in one process, for they share compiled programs; and so do those
    of files that name a common group."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish(session):
    """Of a process of several: it finds the group of a test in its id, if it does at all."""
    if getattr(session.config.option, "loadgroup", False):
        apart = [item.nodeid for item in session.items if "@" not in item.nodeid]
        assert not apart, f"pytest-xdist does not keep groups of tests together: {apart[0]}"


@pytest.fixture
def quick_compilation():
    """Few optimizations with ``--optimized``, too: for what would take long for no other reason."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
