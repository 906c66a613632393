"""A chunk of the campaign: the problems of one shape, dtype and set of options, solved with their
costs as they are, and divided and multiplied by 2^20, and judged."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmpc import Options, Status, mpc_solve
from tests.campaign.judge import facts
from tests.campaign.problems import batch, cost, dynamics, terminal_cost

CACHE = Path(__file__).parents[2] / ".cache" / "campaign"
SCALES = (1.0, 2.0**-20, 2.0**20)  # exact, and so has to be all that follows
SHAPES = [  # n, m, T
    (2, 1, 1), (3, 3, 2), (1, 1, 10), (3, 2, 6), (4, 1, 20), (2, 2, 60), (4, 2, 40), (6, 3, 30),
    (3, 1, 150), (5, 2, 100),
]  # fmt: skip
VARIANTS = {
    "default": Options(max_iterations=2000),  # few need as many, and they do end well
    "ilqr": Options(hessian="ilqr", max_iterations=2000),
    "decay": Options(line_search_decay=0.2, regularization=1e-3, max_iterations=2000),
    "trust": Options(trust_region=0.5, max_iterations=2000),  # in units of the controls
    "loose": Options(tolerance=1e-4, max_iterations=2000),
    "tight": Options(tolerance=1e-12, max_iterations=2000),
}


@dataclasses.dataclass(frozen=True)
class Chunk:
    n: int
    m: int
    T: int
    dtype: str
    variant: str
    N: int = 250
    seed: int = 0

    @property
    def name(self):
        shape = f"{self.n}-{self.m}-{self.T}"
        return f"{shape}-{self.dtype}-{self.variant}-{self.N}-{self.seed}"


def chunks():
    """10,000 problems: of every shape and dtype half with the default options."""
    others = list(VARIANTS)[1:]
    for i, shape in enumerate(SHAPES):
        for k, dtype in enumerate(("float64", "float32")):
            other = others[(2 * i + k) % len(others)]
            if other == "tight" and dtype == "float32":  # beyond its digits
                other = "ilqr"
            yield Chunk(*shape, dtype, "default")
            yield Chunk(*shape, dtype, other)


@functools.cache
def program(n, m, T, dtype, variant):
    options = VARIANTS[variant]

    def solve(p, x_init, u_init, lower, upper, unit, scale):
        reach = options.trust_region
        own = options if reach is None else dataclasses.replace(options, trust_region=reach * unit)

        def plan(x_init, g):
            solution = mpc_solve(
                cost, dynamics, x_init, u_init, p | dict(g=g, scale=scale * p["scale"]),
                terminal_cost=terminal_cost, u_lower=lower, u_upper=upper, options=own,
            )  # fmt: skip
            return solution.u, solution

        u, pull, solution = jax.vjp(plan, x_init, p["g"], has_aux=True)
        signs = jnp.asarray(np.random.default_rng(0).choice([-1, 1], u.shape), u.dtype)
        return dict(
            u=u, status=solution.status, iterations=solution.iterations,
            claimed=solution.kkt_residual, gradient=jnp.concatenate(pull(signs)),
        )  # fmt: skip

    return jax.jit(jax.vmap(solve, (0, 0, 0, 0, 0, 0, None)))


def measured(chunk, scales=SCALES, cache=CACHE):
    """[scales, N] of everything, kept under ``cache``."""
    path = cache and cache / f"{chunk.name}.npz"
    if path and path.exists():
        with np.load(path) as kept:
            return dict(kept)
    shape = chunk.n, chunk.m, chunk.T, chunk.dtype
    b = batch(*shape, chunk.N, chunk.seed)
    run = program(*shape, chunk.variant)
    out = []
    for scale in scales:
        with jax.enable_x64(chunk.dtype == "float64"):
            arguments = b.p, b.x_init, b.u_init, b.lower, b.upper, b.unit
            z = run(*jax.tree.map(jnp.asarray, arguments), jnp.asarray(scale, chunk.dtype))
            z = jax.tree.map(np.asarray, z)
        true = facts(b, z["u"], scale)
        out.append(z | {k: v.astype(float) for k, v in vars(true).items()})
    found = {name: np.stack([z[name] for z in out]) for name in out[0]} | dict(kind=b.kind)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **found)
    return found


def tolerance(chunk):
    if VARIANTS[chunk.variant].tolerance is not None:
        return VARIANTS[chunk.variant].tolerance
    return 1e-10 if chunk.dtype == "float64" else 64 * np.finfo(np.float32).eps


@dataclasses.dataclass(frozen=True)
class Verdict:
    """bool [scales, N], or [N] where it compares the scales."""

    converged: np.ndarray
    well_posed: np.ndarray
    false: np.ndarray  # CONVERGED, which extended precision does not confirm
    moved: np.ndarray  # another status, plan or gradient for another scale, bit by bit


def verdict(chunk, z):
    tol = tolerance(chunk)
    converged = z["status"] == Status.CONVERGED
    allowed = np.maximum(np.maximum(tol * z["size"], z["rounding"]), z["claimed"])
    # What is left of the digits of the gradient if u and x_init are rounded.
    well_posed = z["rounding"] <= tol**0.5 * z["size"]
    same = [(z[name] == z[name][0]) for name in ("u", "status", "iterations", "gradient")]
    same = [a.reshape(*z["status"].shape, -1).all((0, 2)) for a in same]
    moved = ~np.all(same, 0) & well_posed.all(0)
    return Verdict(converged, well_posed, converged & ~(z["residual"] <= 10 * allowed), moved)
