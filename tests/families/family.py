"""What a family of constrained problems is, and the same family for JAX, CasADi and NumPy.

Every function of a family takes one of the namespaces ``JAX``, ``CASADI`` and ``NUMPY`` first and
returns a number or a Python list of numbers: each side stacks for itself.
"""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import casadi as ca
import jax.numpy as jnp
import numpy as np

from jaxmpc import Constraints, Rate, Slack

NAMES = ("sin", "cos", "tan", "sqrt", "exp", "tanh")


def _namespace(module, where, affine):
    functions = {name: getattr(module, name) for name in NAMES}
    return SimpleNamespace(**functions, where=where, affine=affine)


def _entries(A, b, z):
    """The entries of A z + b, for matrices of numbers."""
    return [
        b + sum(float(a) * z for a, z in zip(row, z, strict=True))
        for row, b in zip(A, b, strict=True)
    ]


def _products(A, b, z):
    z = jnp.stack(z)
    return list(jnp.asarray(A, z.dtype) @ z + jnp.asarray(b, z.dtype))


JAX = _namespace(jnp, jnp.where, _products)
NUMPY = _namespace(np, np.where, _entries)
# The condition is one on the stage, which CasADi's side knows: a row that is not there is None.
CASADI = _namespace(ca, lambda condition, a, b: a if condition else b, _entries)


@dataclasses.dataclass(frozen=True)
class Rows:
    """``fn``: (lib, x, u, t, p) -> list, ≤ 0 or, with ``equality``, = 0.

    ``on``: "stage" is 0 … T−1, "state" is 1 … T (u is None: x alone, which no control moves at
    0), "terminal" is T. A finite ``linear`` makes the rows soft; the prices broadcast to the rows.
    """

    fn: Callable
    on: str = "state"
    equality: bool = False
    linear: object = np.inf
    quadratic: object = 0.0


@dataclasses.dataclass(frozen=True)
class Family:
    """``sample``: (rng, N) -> x_init [N, n], u_init [N, T, m], params [N, k]."""

    name: str
    n: int
    m: int
    T: int
    dynamics: Callable  # (lib, x, u, t, p) -> list
    cost: Callable  # (lib, x, u, t, p) -> scalar
    sample: Callable
    terminal_cost: Callable | None = None  # (lib, x, p) -> scalar
    u_lower: object = None
    u_upper: object = None
    x_lower: object = None  # [n], of stages 1 … T
    x_upper: object = None
    rows: tuple = ()
    previous: object = None  # u_{-1}: with it comes a rate
    rate_limit: object = None
    rate_weight: object = None
    infeasible: bool = False  # by construction: INFEASIBLE is the right answer
    num_starts: int = 32

    def starts(self, N=None, seed=0):
        N = self.num_starts if N is None else N
        x, u, p = self.sample(np.random.default_rng(seed), N)
        u = np.broadcast_to(np.asarray(u, float), (N, self.T, self.m))
        p = np.asarray(p, float).reshape(N, -1)
        return np.asarray(x, float).reshape(N, self.n), np.array(u), p

    def bounds(self, of):
        """Lower and upper bounds of "u" or "x", ±inf where there are none."""
        size = self.m if of == "u" else self.n
        pair = getattr(self, of + "_lower"), getattr(self, of + "_upper")
        return [
            np.broadcast_to(np.asarray(sign * np.inf if b is None else b, float), (size,))
            for sign, b in zip((-1, 1), pair, strict=True)
        ]


# For the library.


def for_jax(family):
    """Arguments of ``mpc_solve``: those by position that come first, and those by name."""

    def stack(entries, x):
        return jnp.stack([jnp.asarray(entry, x.dtype) for entry in entries])

    def stage(t, x):  # the functions calculate with it
        return jnp.asarray(t, x.dtype)

    def gathered(equality, terminal):
        """The function of ``Constraints``, and the prices of its rows."""
        mine = [
            r
            for r in family.rows
            if r.equality == equality and r.on != ("stage" if terminal else "terminal")
        ]
        if not mine:
            return None, None
        idle = 0.0 if equality else -1.0

        def rows(x, u, t, p):
            found, t = [], stage(t, x)
            for r in mine:
                if r.on == "stage":
                    found += r.fn(JAX, x, u, t, p)
                else:
                    found += [jnp.where(t > 0, g, idle) for g in r.fn(JAX, x, None, t, p)]
            return stack(found, x)

        def final(x, p):
            return stack([g for r in mine for g in r.fn(JAX, x, None, family.T, p)], x)

        slack = None
        if any(np.isfinite(r.linear).any() for r in mine):
            sizes = [row_count(family, r) for r in mine]
            linear, quadratic = (
                np.concatenate([np.broadcast_to(w, (k,)) for w, k in zip(ws, sizes, strict=True)])
                for ws in ([r.linear for r in mine], [r.quadratic for r in mine])
            )
            slack = Slack(linear, quadratic)
        return (final if terminal else rows), slack

    inequality, slack = gathered(False, False)
    terminal_inequality, terminal_slack = gathered(False, True)
    rate = None
    if family.previous is not None:
        rate = Rate(np.asarray(family.previous, float), family.rate_limit, family.rate_weight)
    constraints = Constraints(
        inequality=inequality,
        equality=gathered(True, False)[0],
        terminal_inequality=terminal_inequality,
        terminal_equality=gathered(True, True)[0],
        slack=slack,
        terminal_slack=terminal_slack,
        rate=rate,
        x_lower=family.x_lower,
        x_upper=family.x_upper,
    )
    cost = (
        lambda x, u, t, p: jnp.asarray(family.cost(JAX, x, u, stage(t, x), p), x.dtype),
        lambda x, u, t, p: stack(family.dynamics(JAX, x, u, stage(t, x), p), x),
    )
    lower, upper = family.bounds("u")
    named = {"constraints": constraints, "u_lower": lower, "u_upper": upper}
    if family.terminal_cost is not None:
        named["terminal_cost"] = lambda x, p: jnp.asarray(family.terminal_cost(JAX, x, p), x.dtype)
    return cost, named


def row_count(family, rows):
    x, u, p = family.starts(1)
    return len(rows.fn(NUMPY, x[0], u[0, 0], family.T if rows.on == "terminal" else 1, p[0]))


# In NumPy, by itself: what a plan costs and by how much it misses the constraints.


def rollout(family, x_init, u, p):
    """[N, T+1, n], in float64."""
    x, p = [np.asarray(x_init, float).T], np.asarray(p, float).T
    u = np.asarray(u, float)
    with np.errstate(all="ignore"):
        for t in range(family.T):
            new = family.dynamics(NUMPY, x[-1], u[:, t].T, t, p)
            x.append(np.stack([np.broadcast_to(a, x[0].shape[1:]) for a in new]))
    return np.stack(x).transpose(2, 0, 1)


def _places(family, x, u, p):
    """Arguments of rows by ``on``: the coordinate first, then [N, stages]."""
    x, u, p = x.transpose(2, 0, 1), u.transpose(2, 0, 1), p.T[:, :, None]
    stages, T = np.arange(family.T), family.T
    return {
        "stage": (x[:, :, :-1], u, stages, p),
        "state": (x[:, :, 1:], None, stages + 1, p),
        "terminal": (x[:, :, -1:], None, np.array([T]), p),
    }


def _values(rows, place):
    x, u, t, p = place
    found = rows.fn(NUMPY, x, u, t, p)
    return np.stack([np.broadcast_to(np.asarray(g), x.shape[1:]) for g in found])


def row_values(family, x, u, p):
    """Those of each of ``family.rows``: [rows, N, stages]."""
    places = _places(family, x, u, p)
    with np.errstate(all="ignore"):
        return [_values(r, places[r.on]) for r in family.rows]


def objective(family, x, u, p):
    """[N]: with the prices of slack and rate."""
    places = _places(family, x, u, p)
    with np.errstate(all="ignore"):
        J = np.broadcast_to(family.cost(NUMPY, *places["stage"]), u.shape[:2]).sum(1)
        if family.terminal_cost is not None:
            J = J + family.terminal_cost(NUMPY, x[:, -1].T, p.T)
        for r in family.rows:
            if not r.equality and np.isfinite(r.linear).any():
                s = np.maximum(_values(r, places[r.on]), 0).transpose(1, 2, 0)
                linear, quadratic = np.broadcast_arrays(r.linear, r.quadratic, s[0, 0])[:2]
                soft = np.isfinite(linear)
                price = np.where(soft, linear, 0) * s + 0.5 * quadratic * s**2
                J = J + (soft * price).sum((1, 2))
        if family.rate_weight is not None:
            d = np.diff(u, axis=1, prepend=np.broadcast_to(family.previous, (len(u), 1, family.m)))
            J = J + 0.5 * (np.asarray(family.rate_weight) * d**2).sum((1, 2))
    return J


def violations(family, x, u, p):
    """The largest of each plan, [N], over max(1, Σ_i |∂g/∂z_i| |z_i|): relative to a row's size.

    The derivatives are complex steps.
    """
    places, worst = _places(family, x, u, p), np.zeros(len(x))

    def take(miss, axes):
        nonlocal worst
        worst = np.maximum(worst, np.where(np.isnan(miss), np.inf, miss).max(axes))

    with np.errstate(all="ignore"):
        for r in family.rows:
            a, b, t, q = place = places[r.on]
            g = _values(r, place)
            size = np.ones(g.shape)
            step = 1e-30j
            for z, count in ((a, family.n), (b, family.m)):
                for i in range(count if z is not None else 0):
                    moved = np.array(z, complex)
                    moved[i] += step
                    at = (moved, b, t, q) if z is a else (a, moved, t, q)
                    size[:] += np.abs(_values(r, at).imag / 1e-30 * z[i])
            miss = np.abs(g) if r.equality else np.maximum(g, 0)
            hard = np.broadcast_to(np.isinf(r.linear) | r.equality, (len(g),))
            if hard.any():
                take((miss / size)[hard], (0, 2))
    for z, name in ((u, "u"), (x[:, 1:], "x")):
        lower, upper = family.bounds(name)
        with np.errstate(all="ignore"):
            miss = np.maximum(np.maximum(lower - z, z - upper), 0) / np.maximum(1, np.abs(z))
        take(miss, (1, 2))
    if family.rate_limit is not None:
        d = np.diff(u, axis=1, prepend=np.broadcast_to(family.previous, (len(u), 1, family.m)))
        miss = np.maximum(np.abs(d) - family.rate_limit, 0) / np.maximum(1, np.abs(u))
        take(miss, (1, 2))
    return worst
