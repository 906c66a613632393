"""Pendulum and cartpole by CasADi and IPOPT (multiple shooting), one problem after the other.

Reads an .npz with
    system, x_init [B, n], u_init [T, m], physics, q, p, dt, limit, tolerance, repeats
and writes an .npz with
    build_s, seconds [repeats], u [B, T, m], solved [B], iterations [B], versions.
"""

import time

import casadi as ca
import numpy as np
from casadi_systems import SYSTEMS
from common import main, timed, versions


def solve(given):
    x_init, q, p, physics = given["x_init"], given["q"], given["p"], given["physics"]
    n, T = x_init.shape[1], len(given["u_init"])
    x, u = ca.SX.sym("x", n), ca.SX.sym("u")
    begin = time.perf_counter()
    tau = ca.vertcat(x, u)
    step = ca.Function("step", [x, u], [SYSTEMS[given["system"]](x, u, physics, given["dt"])])
    cost = ca.Function("cost", [x, u], [0.5 * ca.dot(q * tau, tau) + ca.dot(p, tau)])

    start, states, controls = ca.SX.sym("x0", n), ca.SX.sym("X", n, T), ca.SX.sym("U", 1, T)
    total, gaps, before = 0, [], start
    for t in range(T):
        total += cost(before, controls[t])
        gaps.append(states[:, t] - step(before, controls[t]))
        before = states[:, t]
    problem = dict(
        x=ca.vertcat(ca.vec(states), ca.vec(controls)), f=total, g=ca.vertcat(*gaps), p=start
    )
    quiet = {"ipopt.print_level": 0, "ipopt.sb": "yes", "print_time": False}
    quality = {"ipopt.tol": given["tolerance"], "ipopt.bound_relax_factor": 0.0}
    solver = ca.nlpsol("solver", "ipopt", problem, quiet | quality)
    build_s = time.perf_counter() - begin
    upper = np.r_[np.full(n * T, np.inf), np.full(T, given["limit"])]
    roll = step.mapaccum(T)
    first = [np.r_[roll(x0, given["u_init"].T).full().ravel("F"), np.zeros(T)] for x0 in x_init]

    def all_problems():
        made, solved, iterations = [], [], []
        for x0, guess in zip(x_init, first, strict=True):
            found = solver(x0=guess, p=x0, lbx=-upper, ubx=upper, lbg=0, ubg=0)
            made.append(found["x"].full()[n * T :])
            solved.append(solver.stats()["success"])
            iterations.append(solver.stats()["iter_count"])
        return np.array(made), solved, iterations

    all_problems()
    (u, solved, iterations), seconds = timed(all_problems, given["repeats"])
    return dict(
        build_s=build_s,
        seconds=seconds,
        u=u,
        solved=solved,
        iterations=iterations,
        versions=versions("casadi"),
    )


if __name__ == "__main__":
    main(solve)
