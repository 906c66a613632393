import os

# The tests run in a process per core. XLA's pool of threads has been seen to hang, too.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)  # for what concerns sharding
