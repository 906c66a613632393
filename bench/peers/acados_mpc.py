"""Pendulum and cartpole by acados (SQP with HPIPM), one problem after the other, on one thread.

Reads an .npz with
    system, x_init [B, n], u_init [T, m], physics, q, p, dt, limit, tolerance, hessian, repeats
and writes an .npz with
    build_s, seconds [repeats], all_seconds [repeats], u [B, T, m], status [B] (0 is success),
    iterations [B], versions.
The seconds are those that acados says it spent inside its C code; all_seconds are measured around
the calls and hold the glue in Python too.
"""

import contextlib
import ctypes
import importlib.metadata
import os
import pathlib
import sys
import tempfile
import time

import casadi as ca
import numpy as np
from casadi_systems import SYSTEMS
from common import main, versions

FOLDER = pathlib.Path(sys.prefix) / "acados"  # made by `make peers`
# Its own CasADi is for another Python: after those of the environment.
sys.path.append(str(FOLDER))
INSTALL = FOLDER / "acados" / "install"
os.environ.update(ACADOS_SOURCE_DIR=str(INSTALL), TERA_PATH=str(INSTALL / "bin" / "t_renderer"))
os.environ["ACADOS_PYTHON_INTERFACE_PATH"] = str(FOLDER / "acados" / "acados_template")


def load():
    """What of acados' interface a script needs; ends it where acados is not installed."""
    if not INSTALL.exists():
        sys.exit("absent (bench/peers/acados.txt has no package for this machine)")
    # The libraries do not say where they find each other; loaded ones are found.
    for name in ("blasfeo", "qpOASES_e", "hpipm", "acados"):
        ctypes.CDLL(INSTALL / "lib" / f"lib{name}.so", ctypes.RTLD_GLOBAL)
    from acados.acados_template import AcadosModel, AcadosOcp, AcadosOcpSolver

    return AcadosModel, AcadosOcp, AcadosOcpSolver


def build(given):
    AcadosModel, AcadosOcp, AcadosOcpSolver = load()
    n, T = given["x_init"].shape[1], len(given["u_init"])
    model = AcadosModel()
    model.name = given["system"]
    model.x, model.u = ca.SX.sym("x", n), ca.SX.sym("u", 1)
    model.disc_dyn_expr = SYSTEMS[given["system"]](model.x, model.u, given["physics"], given["dt"])
    ocp = AcadosOcp()
    ocp.model = model
    ocp.dims.N = T
    # ½ τᵀ diag(q) τ + pᵀ τ as least squares, at every stage but the last state.
    ocp.cost.cost_type, ocp.cost.cost_type_e = "LINEAR_LS", "LINEAR_LS"
    ocp.cost.W, ocp.cost.yref = np.diag(given["q"]), -given["p"] / given["q"]
    ocp.cost.Vx, ocp.cost.Vu = np.eye(n + 1, n), np.eye(n + 1)[:, n:]
    ocp.cost.W_e, ocp.cost.Vx_e, ocp.cost.yref_e = np.zeros((n, n)), np.eye(n), np.zeros(n)
    ocp.constraints.x0 = given["x_init"][0]
    ocp.constraints.idxbu = np.array([0])
    ocp.constraints.lbu, ocp.constraints.ubu = np.array([[-given["limit"]], [given["limit"]]])
    options = ocp.solver_options
    options.tf = float(T)  # a stage is one step: the cost is a sum, not an integral
    options.integrator_type = "DISCRETE"
    options.nlp_solver_type = "SQP"
    options.qp_solver = "FULL_CONDENSING_HPIPM"  # the fastest of its ways here
    options.nlp_solver_max_iter = 200
    for part in ("stat", "eq", "ineq", "comp"):
        setattr(options, f"nlp_solver_tol_{part}", given["tolerance"])
    hessian, _, globalization = given["hessian"].partition("+")
    options.hessian_approx = hessian
    if hessian == "EXACT":
        options.regularize_method = "CONVEXIFY"
    if globalization:
        options.globalization = "MERIT_BACKTRACKING"
    return AcadosOcpSolver(ocp, json_file="ocp.json", verbose=False)


def solve(given):
    x_init, u_init = given["x_init"], given["u_init"]
    (batch, n), T = x_init.shape, len(u_init)
    x, u = ca.SX.sym("x", n), ca.SX.sym("u")
    step = ca.Function(
        "step", [x, u], [SYSTEMS[given["system"]](x, u, given["physics"], given["dt"])]
    )
    roll = step.mapaccum(T)
    first = [np.c_[x0, roll(x0, u_init.T).full()].T for x0 in x_init]

    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        start = time.perf_counter()
        solver = build(given)
        build_s = time.perf_counter() - start

        def all_problems():
            seconds, status, iterations, made = 0.0, [], [], np.empty((batch, T, 1))
            for number in range(batch):
                solver.reset()
                solver.set(0, "lbx", x_init[number])
                solver.set(0, "ubx", x_init[number])
                for t in range(T + 1):
                    solver.set(t, "x", first[number][t])
                status.append(solver.solve())
                seconds += float(solver.get_stats("time_tot"))
                iterations.append(int(solver.get_stats("sqp_iter")))
                made[number] = [solver.get(t, "u") for t in range(T)]
            return seconds, status, iterations, made

        all_problems()
        inside, around = [], []
        for _ in range(given["repeats"]):
            start = time.perf_counter()
            seconds, status, iterations, u = all_problems()
            around.append(time.perf_counter() - start)
            inside.append(seconds)
    (own,) = importlib.metadata.distributions(name="comma-deps-acados", path=[str(FOLDER)])
    return dict(
        build_s=build_s,
        seconds=inside,
        all_seconds=around,
        u=u,
        status=status,
        iterations=iterations,
        versions=f"{versions('casadi')}, {own.name} {own.version}",
    )


if __name__ == "__main__":
    main(solve)
