"""Random problems of every kind, all of one form, so that a program serves them all.

x⁺ = A x + B u + κ W tanh(V x + Y u)
cost ½ (x − g)ᵀ Q (x − g) + ½ uᵀ R u + rᵀ u + Σ_j a_j cos(w_j x + v_j u + φ_j), without u at the end
"""

import dataclasses
import functools
import zlib

import jax.numpy as jnp
import numpy as np

# Kinds in turn, problem by problem.
KINDS = ("stable", "unstable", "mild", "strong", "nonconvex", "scaled", "at rest")


@dataclasses.dataclass(frozen=True)
class Batch:
    """N problems of one shape, as arrays [N, ...] of the dtype they are solved in."""

    p: dict
    x_init: np.ndarray
    u_init: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    unit: np.ndarray  # [N, m], of the controls
    kind: np.ndarray  # [N], the index in KINDS


def dynamics(x, u, t, p):
    return p["A"] @ x + p["B"] @ u + p["W"] @ jnp.tanh(p["V"] @ x + p["Y"] @ u)


def cost(x, u, t, p):
    away = x - p["g"]
    price = 0.5 * away @ p["Q"] @ away + 0.5 * u @ p["R"] @ u + p["r"] @ u
    return p["scale"] * (price + p["a"] @ jnp.cos(p["w"] @ x + p["v"] @ u + p["phi"]))


def terminal_cost(x, p):
    away = x - p["g"]
    wave = p["a"] @ jnp.cos(p["w"] @ x + p["phi"])
    return p["scale"] * (0.5 * p["stop"] * away @ p["Q"] @ away + wave)


def _one(rng, kind, n, m, T, digits):
    """One problem in float64, for a dtype of so many ``digits``."""
    few = digits < 10
    A = rng.normal(size=(n, n)) / np.sqrt(n)
    radius = max(np.abs(np.linalg.eigvals(A)).max(), 1e-3)
    growth = 0.0  # decades along the horizon
    if kind == "unstable":
        growth = rng.uniform(0, 2 if few else 5)
    low, high = (0.3, 0.8) if kind == "strong" else (0.5, 1.0)
    stretch = rng.uniform(low, high) if growth == 0 else min(10 ** (growth / T), 3.0)
    A *= stretch / radius
    B = rng.normal(size=(n, m))
    root = rng.normal(size=(n, n))
    Q = root @ root.T / n + 0.01 * np.eye(n)
    root = rng.normal(size=(m, m))
    R = 10 ** rng.uniform(-3, 0.5) * (root @ root.T / m + 0.1 * np.eye(m))
    h = n + 1
    bend, gain, wave = {"mild": (0.2, 0.5, 0.05), "strong": (0.8, 1.0, 0.0)}.get(kind, (0, 1, 0))
    if kind == "nonconvex":
        wave = rng.uniform(0.2, 2.0)
    p = dict(
        A=A, B=B, W=bend * rng.normal(size=(n, h)) / np.sqrt(h), V=gain * rng.normal(size=(h, n)),
        Y=gain * rng.normal(size=(h, m)), g=rng.normal(size=n), Q=Q, R=R,
        r=0.1 * rng.normal(size=m), a=wave * rng.normal(size=h), w=1.5 * rng.normal(size=(h, n)),
        v=1.5 * rng.normal(size=(h, m)), phi=rng.uniform(0, 6, h),
        stop=10 ** rng.uniform(0, 2), scale=1.0,
    )  # fmt: skip
    x_init = rng.normal(size=n)
    if kind == "at rest":  # or as near to it as chance has it
        p["g"], p["r"] = np.zeros(n), np.zeros(m)
        # The costs are of the size of its square, and stay in range.
        x_init = x_init * rng.choice([0.0, 10 ** rng.uniform(-5 if few else -12, 0)])
        if rng.random() < 0.5:  # away from the origin: (I − A) g = 0 for an A with such a g
            goal = rng.normal(size=n)
            p["A"] = A + np.outer(goal - A @ goal, goal) / (goal @ goal)
            p["g"], x_init = goal, goal + x_init
    u_init = rng.choice([0.0, 1.0]) * rng.normal(size=(T, m))
    half = 10 ** rng.uniform(-1, 1, size=(T, m))
    centre = 0.3 * half * rng.normal(size=(T, m))
    lower, upper = centre - half, centre + half
    sides = rng.choice(4) if rng.random() < 0.6 else 4  # each its own; none; a control; one side
    if sides in (1, 4):
        lower, upper = np.full((T, m), -np.inf), np.full((T, m), np.inf)
    elif sides == 2:
        lower[:, 0], upper[:, 0] = -np.inf, np.inf
    elif sides == 3:
        upper = np.full((T, m), np.inf)
    unit = np.ones(m)
    if kind == "scaled":
        far = 2 if few else 4
        of_x, of_u = 10 ** rng.uniform(-far, far, n), 10 ** rng.uniform(-far, far, m)
        p = p | dict(
            A=of_x[:, None] * p["A"] / of_x, B=of_x[:, None] * B / of_u, W=of_x[:, None] * p["W"],
            V=p["V"] / of_x, Y=p["Y"] / of_u, g=of_x * p["g"], Q=Q / of_x[:, None] / of_x,
            R=R / of_u[:, None] / of_u, r=p["r"] / of_u, w=p["w"] / of_x, v=p["v"] / of_u,
            scale=10 ** rng.uniform(-far, far),
        )  # fmt: skip
        x_init, u_init, lower, upper = of_x * x_init, of_u * u_init, of_u * lower, of_u * upper
        unit = of_u
    return p, x_init, u_init, lower, upper, unit


@functools.cache
def batch(n, m, T, dtype, N, seed):
    digits = np.finfo(dtype).precision
    rng = np.random.default_rng([seed, n, m, T, zlib.crc32(dtype.encode())])
    kinds = np.arange(N) % len(KINDS)
    each = [_one(rng, KINDS[k], n, m, T, digits) for k in kinds]
    p, *rest = zip(*each, strict=True)
    p = {name: np.array([one[name] for one in p], dtype) for name in p[0]}
    return Batch(p, *(np.array(a, dtype) for a in rest), kinds)
