"""The problems of ``constrained_problems`` by acados (SQP with HPIPM), one after the other.

Reads an .npz with
    problem (its name), x_init [seeds, B, n], tolerance, condensing, hessian, repeats, threads
and writes an .npz with
    build_s, seconds [seeds, repeats], u [seeds, B, T, m], solved [seeds, B], iterations [seeds, B],
    versions.
``hessian`` is such as "EXACT CONVEXIFY+merit": the Hessian, how it is made convex, and whether
there is a line search. The seconds are those that acados says it spent inside its C code.
"""

import contextlib
import importlib.metadata
import tempfile
import time

import casadi as ca
import numpy as np
from acados_mpc import FOLDER, load
from casadi_constrained import SYMBOLS, first_states
from common import main, versions
from constrained_problems import PROBLEMS


def build(given):
    AcadosModel, AcadosOcp, AcadosOcpSolver = load()
    problem = PROBLEMS[given["problem"]]
    n, m, T = problem.n, problem.m, problem.T
    model = AcadosModel()
    model.name = "constrained"
    model.x, model.u = ca.SX.sym("x", n), ca.SX.sym("u", m)
    model.disc_dyn_expr = problem.dynamics(SYMBOLS, model.x, model.u)
    ocp = AcadosOcp()
    ocp.model = model
    ocp.dims.N = T
    Q, R, Q_end = map(np.array, problem.weights)
    ocp.cost.cost_type, ocp.cost.cost_type_e = "LINEAR_LS", "LINEAR_LS"
    ocp.cost.W, ocp.cost.yref = np.diag(np.r_[Q, R]), np.r_[problem.x_ref, problem.u_ref]
    ocp.cost.Vx, ocp.cost.Vu = np.eye(n + m, n), np.eye(n + m)[:, n:]
    ocp.cost.W_e, ocp.cost.Vx_e, ocp.cost.yref_e = (
        np.diag(Q_end),
        np.eye(n),
        np.array(problem.x_ref),
    )
    limits = ocp.constraints
    limits.x0 = given["x_init"][0, 0]
    limits.idxbu = np.arange(m)
    limits.lbu, limits.ubu = np.array(problem.u_lower), np.array(problem.u_upper)
    if problem.x_lower is not None:
        limits.idxbx = limits.idxbx_e = np.arange(n)
        limits.lbx = limits.lbx_e = np.array(problem.x_lower)
        limits.ubx = limits.ubx_e = np.array(problem.x_upper)
    if problem.rows is not None:
        model.con_h_expr = problem.rows(SYMBOLS, model.x)
        rows = model.con_h_expr.numel()
        limits.lh, limits.uh = np.full(rows, -1e6), np.zeros(rows)  # -1e6: there is none
    options = ocp.solver_options
    options.tf = float(T)  # a stage is one step: the cost is a sum, not an integral
    options.integrator_type = "DISCRETE"
    options.nlp_solver_type = "SQP"
    options.qp_solver = f"{given['condensing']}_CONDENSING_HPIPM"
    options.nlp_solver_max_iter = 200
    for part in ("stat", "eq", "ineq", "comp"):
        setattr(options, f"nlp_solver_tol_{part}", given["tolerance"])
    way, _, globalization = given["hessian"].partition("+")
    hessian, _, regularization = way.partition(" ")
    options.hessian_approx = hessian
    if regularization:
        options.regularize_method = regularization
    if globalization:
        options.globalization = "MERIT_BACKTRACKING"
    return AcadosOcpSolver(ocp, json_file="ocp.json", verbose=False)


def solve(given):
    problem = PROBLEMS[given["problem"]]
    T, u_init = problem.T, problem.u_init()
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        start = time.perf_counter()
        solver = build(given)
        build_s = time.perf_counter() - start

        def all_problems(x_init, guesses):
            seconds, solved, iterations, made = 0.0, [], [], []
            for x0, guess in zip(x_init, guesses, strict=True):
                solver.reset()
                solver.set(0, "lbx", x0)
                solver.set(0, "ubx", x0)
                for t in range(T + 1):
                    solver.set(t, "x", guess[t])
                    if t < T:
                        solver.set(t, "u", u_init[t])
                solved.append(solver.solve() == 0)
                seconds += float(solver.get_stats("time_tot"))
                iterations.append(int(solver.get_stats("sqp_iter")))
                made.append([solver.get(t, "u") for t in range(T)])
            return seconds, solved, iterations, made

        results = []
        for x_init in given["x_init"]:
            guesses = [first_states(problem, x0) for x0 in x_init]
            all_problems(x_init, guesses)
            runs = [all_problems(x_init, guesses) for _ in range(given["repeats"])]
            results.append([*runs[-1][1:], [run[0] for run in runs]])
    solved, iterations, u, seconds = map(np.array, zip(*results, strict=True))
    (own,) = importlib.metadata.distributions(name="comma-deps-acados", path=[str(FOLDER)])
    return dict(
        build_s=build_s,
        seconds=seconds,
        u=u,
        solved=solved,
        iterations=iterations,
        versions=f"{versions('casadi')}, {own.name} {own.version}",
    )


if __name__ == "__main__":
    main(solve)
