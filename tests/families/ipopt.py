"""IPOPT's answer to a family: multiple shooting by CasADi, exact Hessian, its default options."""

import hashlib
from pathlib import Path

import casadi as ca
import numpy as np

from tests.families.family import CASADI, objective, rollout, row_values

OPTIONS = {"tol": 1e-8, "max_iter": 500, "print_level": 0, "sb": "yes"}


def build(family):
    """``solve(x_init, u_init, p)`` -> a dict; the program is built once."""
    n, m, T = family.n, family.m, family.T
    k = family.starts(1)[2].shape[1]
    X, U, P = ca.SX.sym("X", n, T), ca.SX.sym("U", m, T), ca.SX.sym("P", n + k)
    p = P[n:]
    states = [P[:n]] + [X[:, t] for t in range(T)]
    J, g, upper, lower, slacks = 0, [], [], [], []

    def constrain(row, low, high):
        if ca.SX(row).is_constant():  # a mask's other branch, or rows that no variable moves
            return
        g.append(row), lower.append(low), upper.append(high)

    for t in range(T):
        new = ca.vertcat(*family.dynamics(CASADI, states[t], U[:, t], t, p))
        for i in range(n):
            constrain(new[i] - X[i, t], 0.0, 0.0)
        J += family.cost(CASADI, states[t], U[:, t], t, p)
    if family.terminal_cost is not None:
        J += family.terminal_cost(CASADI, states[T], p)
    stages = {"stage": range(T), "state": range(1, T + 1), "terminal": [T]}
    for r in family.rows:
        for t in stages[r.on]:
            values = r.fn(CASADI, states[t], U[:, t] if r.on == "stage" else None, t, p)
            linear, quadratic = (np.broadcast_to(w, len(values)) for w in (r.linear, r.quadratic))
            for i, row in enumerate(values):
                if r.equality:
                    constrain(row, 0.0, 0.0)
                elif np.isinf(linear[i]):
                    constrain(row, -np.inf, 0.0)
                elif not ca.SX(row).is_constant():
                    s = ca.SX.sym("s")
                    slacks.append((s, row))
                    J += linear[i] * s + 0.5 * quadratic[i] * s**2
                    constrain(row - s, -np.inf, 0.0)
    if family.previous is not None:
        change = U - ca.horzcat(ca.DM(np.asarray(family.previous, float)), U[:, :-1])
        if family.rate_limit is not None:
            limit = np.broadcast_to(family.rate_limit, (T, m))
            for t in range(T):
                for i in range(m):
                    if np.isfinite(limit[t, i]):
                        constrain(change[i, t], -limit[t, i], limit[t, i])
        if family.rate_weight is not None:
            weight = np.broadcast_to(family.rate_weight, (T, m)).T
            J += 0.5 * ca.sum1(ca.vec(ca.DM(weight) * change**2))

    S = ca.vertcat(*[s for s, _ in slacks])
    z = ca.vertcat(ca.vec(X), ca.vec(U), S)
    nlp = {"x": z, "f": J, "g": ca.vertcat(*g), "p": P}
    quiet = {"print_time": False, "ipopt": OPTIONS, "show_eval_warnings": False}
    solver = ca.nlpsol("ipopt", "ipopt", nlp, quiet)
    starts = ca.Function(
        "s", [ca.vec(X), ca.vec(U), P], [ca.vertcat(*[ca.SX(r) for _, r in slacks])]
    )
    (ul, uu), (xl, xu) = family.bounds("u"), family.bounds("x")
    lbx = np.concatenate([np.tile(xl, T), np.tile(ul, T), np.zeros(len(slacks))])
    ubx = np.concatenate([np.tile(xu, T), np.tile(uu, T), np.full(len(slacks), np.inf)])

    def solve(x_init, u_init, params):
        u_init = np.clip(u_init, ul, uu)
        x = rollout(family, x_init[None], u_init[None], params[None])[0, 1:]
        if not np.isfinite(x).all():
            x = np.tile(x_init, (T, 1))
        at = np.concatenate([x_init, params])
        s = np.maximum(np.asarray(starts(x.ravel(), u_init.ravel(), at)).ravel(), 0)
        found = solver(
            x0=np.concatenate([x.ravel(), u_init.ravel(), s]), p=at,
            lbx=lbx, ubx=ubx, lbg=np.array(lower), ubg=np.array(upper),
        )  # fmt: skip
        stats, z = solver.stats(), np.asarray(found["x"]).ravel()
        return {
            "success": stats["success"],
            "status": stats["return_status"],
            "iterations": stats["iter_count"],
            "objective": float(found["f"]),
            "x": np.concatenate([x_init[None], z[: n * T].reshape(T, n)]),
            "u": z[n * T : n * T + m * T].reshape(T, m),
        }

    return solve


def fingerprint(family, x_init, u_init, p):
    """Changes with the definition: values of all its functions near the guesses, in NumPy."""
    rng = np.random.default_rng(1)
    parts = [x_init, u_init, p, *family.bounds("u"), *family.bounds("x")]
    for rate in (family.previous, family.rate_limit, family.rate_weight):
        parts.append(np.asarray([] if rate is None else rate, float))
    for spread in (0.0, 0.1):
        u = u_init + spread * (1 + np.abs(u_init)) * rng.normal(size=u_init.shape)
        x = rollout(family, x_init, u, p)
        parts += [x, objective(family, x, u, p), *row_values(family, x, u, p)]
    for r in family.rows:
        parts += [np.ravel(r.linear), np.ravel(r.quadratic)]
    digest = hashlib.sha256(repr(OPTIONS).encode())
    with np.errstate(over="ignore"):
        for part in parts:
            digest.update(np.asarray(part, np.float32).tobytes())
    return digest.hexdigest()[:16]


def solved(family, directory, N=None):
    """IPOPT's results for all starts, from the cache where the definition is still the same."""
    starts = family.starts(N)
    mark, path = fingerprint(family, *starts), Path(directory) / f"{family.name}.npz"
    if path.exists():
        with np.load(path) as stored:
            if str(stored["mark"]) == mark:
                return {name: stored[name] for name in stored.files}
    solve = build(family)
    results = [solve(*start) for start in zip(*starts, strict=True)]
    found = {name: np.array([r[name] for r in results]) for name in results[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, mark=mark, **found)
    return found
