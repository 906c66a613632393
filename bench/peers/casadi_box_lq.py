"""Box-constrained linear-quadratic problems by CasADi and IPOPT, one after the other.

Reads an .npz with
    A [B, n, n], B [B, n, m], Q [B, n, n], R [B, m, m], x_init [B, n], T, limit, tolerances [k],
    repeats
and writes an .npz with, for each tolerance,
    seconds [k, repeats], u [k, B, T, m], status (0 is success) and iterations [k, B]; versions.
"""

import casadi as ca
import numpy as np
from common import main, timed, versions


def solve(given):
    T, limit = int(given["T"]), float(given["limit"])
    names = ("A", "B", "Q", "R", "x_init")
    (batch, n), m = given["x_init"].shape, given["B"].shape[2]
    A, B, Q, R = (
        ca.SX.sym("A", n, n),
        ca.SX.sym("B", n, m),
        ca.SX.sym("Q", n, n),
        ca.SX.sym("R", m, m),
    )
    start, states, controls = ca.SX.sym("x0", n), ca.SX.sym("X", n, T - 1), ca.SX.sym("U", m, T)
    total, gaps, x = 0, [], start
    for t in range(T):
        u = controls[:, t]
        total += 0.5 * (ca.bilin(Q, x, x) + ca.bilin(R, u, u))
        if t < T - 1:
            gaps.append(states[:, t] - A @ x - B @ u)
            x = states[:, t]
    parameters = ca.vertcat(*map(ca.vec, (A, B, Q, R, start)))
    variables = ca.vertcat(ca.vec(states), ca.vec(controls))
    problem = dict(x=variables, f=total, g=ca.vertcat(*gaps), p=parameters)
    upper = np.r_[np.full(n * (T - 1), np.inf), np.full(m * T, limit)]
    values = [
        np.concatenate([given[name][number].ravel("F") for name in names])
        for number in range(batch)
    ]
    made = dict(seconds=[], u=[], status=[], iterations=[])
    for tolerance in given["tolerances"]:
        quiet = {"ipopt.print_level": 0, "ipopt.sb": "yes", "print_time": False}
        quality = {"ipopt.tol": float(tolerance), "ipopt.bound_relax_factor": 0.0}
        solver = ca.nlpsol("solver", "ipopt", problem, quiet | quality)

        def all_problems():
            found = []
            for value in values:
                point = solver(x0=0, p=value, lbx=-upper, ubx=upper, lbg=0, ubg=0)["x"]  # noqa: B023
                stats = solver.stats()  # noqa: B023
                u = point.full()[n * (T - 1) :].reshape(T, m)
                found.append((u, not stats["success"], stats["iter_count"]))
            return found

        found, seconds = timed(all_problems, given["repeats"])
        u, status, iterations = map(np.array, zip(*found, strict=True))
        for name, value in dict(u=u, status=status, iterations=iterations, seconds=seconds).items():
            made[name].append(value)
    return made | dict(versions=versions("casadi"))


if __name__ == "__main__":
    main(solve)
