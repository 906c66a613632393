"""A run of ``bench.paper.trials`` that learns nothing, for processes to import and to kill."""

import os
import signal

import jax.numpy as jnp

from bench.paper.trials import Run


def counting(folder):
    """Six epochs of x ← 2 x + 1; before the fourth its process dies if there is a file `kill`."""

    def advance(x, epoch):
        if epoch == 3 and (folder / "kill").exists():
            (folder / "kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        with (folder / "begun").open("a") as file:
            file.write(f"{epoch}\n")
        x = 2 * x + 1
        return x, {"x": x[None]}

    return Run("counting", {"seeds": [0]}, 6, 1, lambda: jnp.zeros(1), advance)
