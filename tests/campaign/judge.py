"""What is true of a plan, in extended precision (NumPy's long double, 64 bits of mantissa on x86)
and by derivatives written by hand: no code of the library."""

import dataclasses

import numpy as np

WIDE = np.longdouble


def _times(M, v):
    return np.einsum("bij,bj->bi", M, v)


def _pull(M, v):
    return np.einsum("bij,bi->bj", M, v)


@dataclasses.dataclass(frozen=True)
class Facts:
    residual: np.ndarray  # [N], the largest of ∇_u J on the controls that no bound holds
    size: np.ndarray  # of the terms that cancel in it, and in the costates before
    rounding: np.ndarray  # by how much one rounding of u and x_init changes it


def gradient(batch, u, x_init, scale):
    """∇_u J [N, T, m], and the largest of the terms [N]."""
    p = {name: a.astype(WIDE) for name, a in batch.p.items()}
    s, T = scale * p["scale"][:, None], u.shape[1]
    x = [x_init]
    for t in range(T):
        bent = np.tanh(_times(p["V"], x[t]) + _times(p["Y"], u[:, t]))
        x.append(_times(p["A"], x[t]) + _times(p["B"], u[:, t]) + _times(p["W"], bent))
    wave = -p["a"] * np.sin(_times(p["w"], x[T]) + p["phi"])
    costate = s * (p["stop"][:, None] * _times(p["Q"], x[T] - p["g"]) + _pull(p["w"], wave))
    of_costate = abs(costate)
    slopes, size = [None] * T, np.zeros(len(u), WIDE)
    for t in reversed(range(T)):
        bent = np.tanh(_times(p["V"], x[t]) + _times(p["Y"], u[:, t]))
        steep = p["W"] * (1 - bent**2)[:, None]
        A = p["A"] + np.einsum("bij,bjk->bik", steep, p["V"])
        B = p["B"] + np.einsum("bij,bjk->bik", steep, p["Y"])
        phase = _times(p["w"], x[t]) + _times(p["v"], u[:, t]) + p["phi"]
        wave = -p["a"] * np.sin(phase)
        bends = p["R"] - np.einsum("bji,bj,bjk->bik", p["v"], p["a"] * np.cos(phase), p["v"])
        c_u = s * (_times(p["R"], u[:, t]) + p["r"] + _pull(p["v"], wave))
        c_x = s * (_times(p["Q"], x[t] - p["g"]) + _pull(p["w"], wave))
        slopes[t] = c_u + _pull(B, costate)
        price = s * _times(abs(bends), abs(u[:, t]))
        terms = np.maximum(abs(c_u), price) + _pull(abs(B), of_costate)
        size = np.maximum(size, terms.max(1))
        of_costate = abs(c_x) + _pull(abs(A), abs(costate))
        costate = c_x + _pull(A, costate)
    return np.stack(slopes, 1), size


def facts(batch, u, scale):
    """Of plans u [N, T, m] of the batch's dtype, for costs that are multiplied by ``scale``."""
    eps = np.finfo(batch.x_init.dtype).eps
    exact, x_init = u.astype(WIDE), batch.x_init.astype(WIDE)
    scale = WIDE(batch.x_init.dtype.type(scale))
    slope, size = gradient(batch, exact, x_init, scale)
    low, high = batch.lower, batch.upper
    held = (low == high) | ((u <= low) & (slope > 0)) | ((u >= high) & (slope < 0))
    rng, rounding = np.random.default_rng(0), np.zeros(len(u), WIDE)
    for _ in range(3):
        signs = [1 + eps / 2 * rng.choice([-1, 1], a.shape) for a in (u, x_init)]
        moved, _ = gradient(batch, exact * signs[0], x_init * signs[1], scale)
        moved = np.where(held, 0, abs(moved - slope))
        rounding = np.maximum(rounding, moved.max((1, 2)))
    return Facts(np.where(held, 0, abs(slope)).max((1, 2)), size, rounding)
