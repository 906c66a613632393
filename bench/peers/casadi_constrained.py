"""The problems of ``constrained_problems`` by CasADi and IPOPT (multiple shooting), one after the
other.

Reads an .npz with
    problem (its name), x_init [seeds, B, n], tolerance, repeats, threads
and writes an .npz with
    build_s, seconds [seeds, repeats], u [seeds, B, T, m], solved [seeds, B], iterations [seeds, B],
    versions.
"""

import time
import types

import casadi as ca
import numpy as np
from common import main, timed, versions
from constrained_problems import NUMPY, PROBLEMS

SYMBOLS = types.SimpleNamespace(
    sin=ca.sin,
    cos=ca.cos,
    tan=ca.tan,
    stack=lambda entries: ca.vertcat(*entries),
    product=lambda matrix, x: ca.mtimes(ca.DM(matrix), x),
)


def first_states(problem, x_init):
    """The states [T + 1, n] of the controls where the search starts."""
    states = [x_init]
    for u in problem.u_init():
        states.append(problem.dynamics(NUMPY, states[-1], u))
    return np.array(states)


def nlp(problem):
    """The problem for nlpsol, in (x_1 … x_T, u_0 … u_{T−1}), and the bounds of all of it."""
    n, m, T = problem.n, problem.m, problem.T
    start, states, controls = ca.SX.sym("x0", n), ca.SX.sym("X", n, T), ca.SX.sym("U", m, T)
    Q, R, Q_end = map(ca.DM, problem.weights)
    x_ref, u_ref = ca.DM(problem.x_ref), ca.DM(problem.u_ref)
    square = lambda weight, error: 0.5 * ca.dot(weight * error, error)  # noqa: E731
    total, gaps, rows, before = 0, [], [], start
    for t in range(T):
        u = controls[:, t]
        total += square(Q, before - x_ref) + square(R, u - u_ref)
        gaps.append(states[:, t] - problem.dynamics(SYMBOLS, before, u))
        if problem.rows and t:  # no control moves the first state
            rows.append(problem.rows(SYMBOLS, before))
        before = states[:, t]
    total += square(Q_end, before - x_ref)
    gaps, rows = ca.vertcat(*gaps), ca.vertcat(*rows)
    given = dict(
        x=ca.vertcat(ca.vec(states), ca.vec(controls)), f=total, g=ca.vertcat(gaps, rows), p=start
    )
    far = np.full(n, np.inf)
    lower = -far if problem.x_lower is None else problem.x_lower
    upper = far if problem.x_upper is None else problem.x_upper
    bounds = dict(
        lbx=np.r_[np.tile(lower, T), np.tile(problem.u_lower, T)],
        ubx=np.r_[np.tile(upper, T), np.tile(problem.u_upper, T)],
        lbg=np.r_[np.zeros(n * T), np.full(rows.numel(), -np.inf)],
        ubg=0,
    )
    return given, bounds


def solve(given):
    problem = PROBLEMS[given["problem"]]
    begin = time.perf_counter()
    program, bounds = nlp(problem)
    quiet = {"ipopt.print_level": 0, "ipopt.sb": "yes", "print_time": False}
    quality = {"ipopt.tol": given["tolerance"], "ipopt.bound_relax_factor": 0.0}
    solver = ca.nlpsol("solver", "ipopt", program, quiet | quality)
    build_s = time.perf_counter() - begin

    def all_problems(x_init, guesses):
        made, solved, iterations = [], [], []
        for x0, guess in zip(x_init, guesses, strict=True):
            found = solver(x0=guess, p=x0, **bounds)
            made.append(found["x"].full()[problem.n * problem.T :].reshape(problem.T, problem.m))
            solved.append(solver.stats()["success"])
            iterations.append(solver.stats()["iter_count"])
        return np.array(made), solved, iterations

    results = []
    for x_init in given["x_init"]:
        guesses = [
            np.r_[first_states(problem, x0)[1:].ravel(), problem.u_init().ravel()] for x0 in x_init
        ]
        found, seconds = timed(lambda: all_problems(x_init, guesses), given["repeats"])  # noqa: B023
        # Fewer repeats where they take long: the others are left empty.
        seconds += [np.nan] * (given["repeats"] - len(seconds))
        results.append([*found, seconds])
    u, solved, iterations, seconds = map(np.array, zip(*results, strict=True))
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
