"""How the library fares at a family, beside IPOPT: the numbers of one row."""

import dataclasses
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmpc import Options, Status, mpc_solve
from tests.families.family import for_jax, objective, rollout, violations
from tests.families.ipopt import solved

CACHE = Path(__file__).parents[2] / ".cache" / "families"
SAME = 1e-4  # objectives that differ by less, relatively, are those of one minimum


@dataclasses.dataclass(frozen=True)
class Measured:
    """All arrays are [N], one entry a start."""

    theirs: np.ndarray  # bool: IPOPT solves it
    status: np.ndarray
    iterations: np.ndarray
    violation: np.ndarray  # relative, of the plan rolled out in NumPy
    off: np.ndarray  # the objective, relative to IPOPT's
    compiling: float  # seconds
    running: float

    @property
    def good(self):
        return self.status == Status.CONVERGED

    @property
    def both(self):
        return self.good & self.theirs

    @property
    def lower(self):
        return self.both & (self.off < -SAME)

    @property
    def higher(self):
        return self.both & (self.off > SAME)

    def false(self, allowed):
        """CONVERGED is said of them, and they violate by more than is allowed."""
        return self.good & ~(self.violation <= allowed)

    def count(self, status):
        return int((self.status == status).sum())


def ours(family, starts, solver, dtype, options):
    """The solution as NumPy arrays, and the seconds of compiling and of running."""
    functions, named_arguments = for_jax(family)

    def solve(x, u, p):
        return solver(*functions, x, u, p, options=options, **named_arguments)

    named_arguments = {
        name: jnp.asarray(a, dtype) if name.startswith("u_") else a
        for name, a in named_arguments.items()
    }
    arguments = [jnp.asarray(a, dtype) for a in starts]
    began = time.perf_counter()
    compiled = jax.jit(jax.vmap(solve)).lower(*arguments).compile()
    built = time.perf_counter()
    z = jax.block_until_ready(compiled(*arguments))
    ran = time.perf_counter()
    return jax.tree.map(np.asarray, z), built - began, ran - built


def reference(family, cache, N=None):
    """IPOPT's results of the first N starts, of all by default."""
    return {name: a[:N] for name, a in solved(family, cache).items() if a.ndim}


def measure(family, theirs, dtype="float64", solver=mpc_solve, options=Options()):
    """``theirs``: the reference, of as many starts as are to be measured."""
    N = len(theirs["success"])
    starts = [a[:N] for a in family.starts()]
    z, compiling, running = ours(family, starts, solver, dtype, options)
    x_init, _, p = starts
    x = rollout(family, x_init, z.u, p)
    u = z.u.astype(float)
    J = objective(family, x, u, p)
    size = np.maximum(np.abs(J), np.abs(theirs["objective"])) + 1e-12
    with np.errstate(all="ignore"):
        off = (J - theirs["objective"]) / size
    return Measured(
        theirs["success"].astype(bool), z.status, z.iterations, violations(family, x, u, p), off,
        compiling, running,
    )  # fmt: skip
