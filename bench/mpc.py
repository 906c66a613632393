"""How fast are plans and their gradients? The pendulum and the cartpole of Amos et al. 2018.

T = 20, the paper's physics, costs and bounds, from random starts that are the same for all;
forward, and forward with the gradient of mean(u²) in the physics and the cost. Contenders:

- jaxmpc, with its default options unless the table says otherwise.
- mpc.pytorch, the paper's own implementation (`mpc` 0.0.6), in float32, with the settings of the
  paper's published experiments and `GradMethods.AUTO_DIFF`, at most 500 iterations.
- acados, SQP with HPIPM in C, in float64, one problem after the other on one thread, by the fastest
  of its ways that solves every problem: full condensing; on the pendulum the Gauss-Newton Hessian
  and full steps, on the cartpole the exact Hessian, convexified, and a line search. Its seconds are
  those that it counts inside its C code. jaxmpc beside it has one thread too, and the loosest
  tolerance 1e-j with which the residual is within 1e-6.
- CasADi with IPOPT, one problem after the other: a check of the objectives.

Quality is judged on the controls that come back, whoever made them: in float64, by autodiff of the
rolled-out objective; the residual is max |clip(u − ∇J, bounds) − u| over the batch. A ratio is
given only where jaxmpc's residual is no larger than the other's, or both are within
1e-4 in float32, 1e-6 in float64.
Every problem of a batch starts at u = 0. jaxmpc is measured before and after the others, and the
repeats of both count. Compilation is apart.

"closed loop, a step" is a single problem as a controller solves it again and again: 200 steps from
the first of the starts, each from the plan before, shifted; the median over the steps.
"""

import functools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import measure, peers, report
from jaxmpc import Options
from jaxmpc.systems import cartpole, pendulum

T = 20
SYSTEMS = dict(pendulum=pendulum, cartpole=cartpole)
PUBLISHED = dict(
    pendulum=dict(eps=1e-3, decay=0.2, tries=5), cartpole=dict(eps=1e-4, decay=0.5, tries=2)
)
ACADOS = dict(pendulum="GAUSS_NEWTON", cartpole="EXACT+merit")
BATCHES = [1, 32, 128, 1024, 4096]
WORKS = FORWARD, GRADIENT, STEP = "forward", "forward + gradient", "closed loop, a step"
STEPS = 200
TARGET = 1e-6  # residual beside acados
SAME = dict(float32=1e-4, float64=TARGET)  # residuals that count as the same quality

JAXMPC, REFERENCE, ACADOS_NAME, CASADI = "jaxmpc", "mpc.pytorch", "acados", "CasADi + IPOPT"


def add_arguments(parser):
    report.add_common_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="(%(default)s)")
    parser.add_argument(
        "--reference-up-to",
        type=int,
        default=1024,
        metavar="BATCH",
        help="largest batch for mpc.pytorch, which takes minutes there (%(default)s)",
    )
    parser.add_argument("--threads", type=int, default=0, help="=1: the part beside acados alone")


def run(args):
    if args.threads:  # a process of its own, since the pools of JAX are sized once
        measure.pin(args.threads)
        rows = report.Rows(args.output, "mpc", resume=True, missing=True)
        return one_thread(args, rows)
    rows = report.Rows(args.output, "mpc", args.resume)
    all_threads(args, rows)
    in_one_thread(args)
    rows = report.Rows(args.output, "mpc", resume=True, missing=True)
    places = {row["device"] for row in rows}
    text = "\n\n".join([table(rows), report.notes(rows, report.command(args), places)])
    report.save_text(args.output, "mpc", text)
    report.plot(args.output / "mpc.png", panels(rows))


def in_one_thread(args):
    """``run`` with --threads 1 in another process, which adds to the same rows."""
    options = ["--threads", 1, "--seed", args.seed, "--repeats", args.repeats]
    options += ["--output", args.output.resolve(), "--batches", *args.batches]
    options += [] if args.peers else ["--no-peers"]
    options += ["--quick"] if args.quick else []
    command = [sys.executable, "-m", "bench", "mpc", *map(str, options)]
    subprocess.run(command, cwd=peers.ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)


def all_threads(args, rows):
    cases = [
        (name, dtype, batch)
        for name in SYSTEMS
        for dtype in ("float32", "float64")
        for batch in args.batches
    ]
    if args.quick:  # the other work is measured on one thread
        cases = [("pendulum", "float32", 4)]
    for name, dtype, batch in tqdm(cases, "mpc, all threads"):
        with jax.enable_x64(dtype == "float64"):
            case = Case(args, rows, name, dtype, batch)
            others = []
            if dtype == "float32":
                others.append(case.reference)
            if dtype == "float64" and batch <= 32:
                others.append(case.casadi)
            works = [GRADIENT] if args.quick else [FORWARD, GRADIENT]
            case.compare(works, Options(), "default", others)
            if batch == 1 and dtype == "float32":
                case.closed_loop()


def one_thread(args, rows):
    cases = [(name, batch) for name in SYSTEMS for batch in args.batches]
    cases = [("pendulum", 4)] if args.quick else cases
    for name, batch in tqdm(cases, "mpc, one thread"):
        with jax.enable_x64(True):
            case = Case(args, rows, name, "float64", batch)
            stopping = f"residual ≤ {TARGET:g}"
            case.compare([FORWARD], None, stopping, [case.acados])


class Case:
    """One system at one batch size and dtype: what is measured, and the rows it gives."""

    def __init__(self, args, rows, name, dtype, batch):
        self.args, self.rows, self.name, self.batch = args, rows, name, batch
        self.system = SYSTEMS[name]
        self.params = self.system.default_params(dtype)
        with jax.enable_x64(True):  # the same starts in either dtype
            states = self.system.sample_states(jax.random.key(args.seed), max(*BATCHES, batch))
        self.x_init = jnp.asarray(np.asarray(states)[:batch], dtype)
        self.u_init = jnp.zeros((T, self.system.M), dtype)
        self.key = dict(
            study="mpc",
            dtype=dtype,
            system=name,
            n=self.system.N,
            m=self.system.M,
            T=T,
            batch=batch,
            seed=args.seed,
            threads=len(os.sched_getaffinity(0)),
        )

    def compare(self, works, options, stopping, others):
        """jaxmpc, the others, and jaxmpc again; rows that are there already stay as they are."""
        setting = measure.setting()
        key = self.key | setting | dict(contender=JAXMPC, stopping=stopping)
        todo = [work for work in works if not self.rows.find(key | dict(work=work))]
        made = {}
        for work in todo:
            call, compiling, found = self.jaxmpc(work, options)
            made[work] = [call, key | dict(work=work) | compiling | found, self.times(call)]
        for other in others:
            other(works)
        for call, row, times in made.values():
            self.rows.add(row | measure.spread(times + self.times(call)))

    def closed_loop(self):
        """The row of a single problem, solved at every step of a closed loop from a warm start."""
        system, key = self.system, self.key | measure.setting()
        key |= dict(contender=JAXMPC, stopping="default", work=STEP)
        if self.rows.find(key):
            return

        def solve(x_init, u_init):
            return measure.plan(system, x_init, u_init, self.params)

        @jax.jit
        def move(x, u):
            return system.dynamics(x, u[0], 0, self.params), jnp.concatenate([u[1:], u[-1:]])

        x, u = self.x_init[0], self.u_init
        call, compiling = measure.compiled(solve, x, u)
        u, seconds, states, solutions = call(x, u).u, [], [], []
        for _ in range(STEPS):
            x, u = jax.block_until_ready(move(x, u))
            start = time.perf_counter()
            solution = jax.block_until_ready(call(x, u))
            seconds.append(time.perf_counter() - start)
            states.append(x)
            solutions.append(solution)
            u = solution.u
        plans = jax.tree.map(lambda *leaves: jnp.stack(leaves), *solutions)
        judged = measure.judged(system, self.params, jnp.stack(states), plans.u)
        found = measure.outcome(plans.status, plans.iterations) | judged | dict(tolerance=None)
        self.rows.add(key | compiling | found | measure.spread(seconds))

    def times(self, call):
        repeats = -(-self.args.repeats // 2)
        return measure.run_times(dict(it=call), repeats=repeats)["it"]

    @functools.cached_property
    def judged(self):
        bounds = self.system.U_LOWER, self.system.U_UPPER
        functions = self.system.cost, self.system.dynamics
        return measure.judge(*functions, self.params, self.x_init, *bounds)

    def jaxmpc(self, work, options):
        """The call to be timed, what compiling it took, and what came of it."""

        def solve(params, x_init, options):
            def plan(x_init):
                return measure.plan(self.system, x_init, self.u_init, params, options=options)

            solution = jax.vmap(plan)(x_init)
            return jnp.mean(solution.u**2), solution

        function = jax.grad(solve, has_aux=True) if work == GRADIENT else solve
        tolerances = [options] if options else [Options(tolerance=10.0**-j) for j in range(3, 12)]
        call, compiling = measure.compiled(function, self.params, self.x_init, tolerances[0])
        for chosen in tolerances:
            solution = call(self.params, self.x_init, chosen)[1]
            found = self.judged(solution.u)
            if options or found["kkt_residual_worst"] <= TARGET:
                break
        found |= measure.outcome(solution.status, solution.iterations)
        found |= dict(tolerance=chosen.tolerance)
        return lambda: call(self.params, self.x_init, chosen), compiling, found

    def peer(self, script, given, key, works):
        """What the script gives, unless all its rows are there or its row says why not."""
        key = self.key | dict(device=measure.cpu()) | key
        if all(self.rows.find(key | dict(work=work)) for work in works):
            return None, key
        if not self.args.peers:
            made = dict(missing=peers.LEFT_OUT)
        else:
            given = given | dict(
                system=self.name,
                x_init=self.x_init,
                u_init=self.u_init,
                T=T,
                physics=np.array(self.params.physics),
                q=self.params.cost.q,
                p=self.params.cost.p,
                dt=self.system.DT,
                limit=self.system.U_UPPER,
                repeats=self.args.repeats,
                threads=self.key["threads"],
            )
            made = peers.attempt(script, given)
        if "missing" in made:
            for work in works:
                self.rows.add(key | dict(work=work, missing=made["missing"]))
            return None, key
        return made, key | dict(versions=str(made["versions"]))

    def reference(self, works):
        key = dict(contender=REFERENCE, stopping="as published")
        if self.batch == 1 or self.batch > self.args.reference_up_to:
            reason = "refuses a batch of 1" if self.batch == 1 else "left out (takes minutes)"
            for work in works:
                missing = dict(work=work, missing=reason)
                self.rows.add(self.key | dict(device=measure.cpu()) | key | missing)
            return
        made, key = self.peer("reference_mpc.py", PUBLISHED[self.name], key, works)
        for work in works if made else []:
            name = "gradient" if work == GRADIENT else "forward"
            iterations = int(made[f"{name}_iterations"])
            self.rows.add(
                key
                | dict(work=work, status=None, trace_s=0.0, compile_s=0.0)
                | dict(iterations_mean=iterations, iterations_max=iterations)
                | measure.spread(made[f"{name}_seconds"])
                | self.judged(made[f"{name}_u"])
            )

    def acados(self, works):
        for tolerance in (1e-6, 1e-10):
            given = dict(tolerance=tolerance, hessian=ACADOS[self.name])
            key = dict(contender=ACADOS_NAME, stopping=f"its tolerance {tolerance:g}")
            made, key = self.peer("acados_mpc.py", given, key, works)
            if made:
                self.rows.add(key | self.one_by_one(made, made["status"] == 0))

    def casadi(self, works):
        given = dict(tolerance=1e-9)
        key = dict(contender=CASADI, stopping="its tolerance 1e-09")
        made, key = self.peer("casadi_mpc.py", given, key, [FORWARD])
        if made:
            self.rows.add(key | self.one_by_one(made, made["solved"]))

    def one_by_one(self, made, solved):
        share = float(np.mean(solved))
        return (
            dict(work=FORWARD, trace_s=0.0, compile_s=float(made["build_s"]))
            | dict(status={"CONVERGED": share, "not": 1.0 - share})
            | dict(iterations_mean=float(made["iterations"].mean()))
            | dict(iterations_max=int(made["iterations"].max()))
            | measure.spread(made["seconds"])
            | self.judged(made["u"])
        )


# What a reader sees.

GROUP = ("system", "dtype", "work", "batch", "threads")


def same_quality(ours: dict, theirs: dict) -> bool:
    """Whether a ratio of times is fair to the other, which a slower, better jaxmpc is."""
    our, their = (row["kkt_residual_worst"] for row in (ours, theirs))
    return our is not None and (their is None or our <= max(their, SAME[ours["dtype"]]))


def table(rows) -> str:
    header = [
        *("system", "dtype", "work", "batch", "threads", "contender", "stops at"),
        *report.TIMES,
        *("KKT residual, worst", "objective, mean", "times jaxmpc's"),
    ]
    order = {name: place for place, name in enumerate((JAXMPC, REFERENCE, ACADOS_NAME, CASADI))}
    systems = list(SYSTEMS)
    ranked = sorted(
        rows,
        key=lambda row: (
            systems.index(row["system"]), row["threads"] == 1, row["dtype"],
            WORKS.index(row["work"]), row["batch"], order[row["contender"]],
        ),
    )  # fmt: skip
    cells, ours = [], {}
    for row in ranked:
        group = tuple(row[name] for name in GROUP)
        line = [*map(str, group), row["contender"], row["stopping"]]
        if "missing" in row:
            cells.append(line + [row["missing"]] + ["–"] * (len(header) - 8))
            continue
        ratio = "–"
        if row["contender"] == JAXMPC:
            ours[group] = row
            if row["tolerance"]:
                line[-1] += f", tolerance {row['tolerance']:.0e}"
        elif group in ours and same_quality(ours[group], row):
            ratio = f"{row['median_s'] / ours[group]['median_s']:.3g} ×"
        cells.append(
            [
                *line,
                *report.times(row),
                report.number(row["kkt_residual_worst"]),
                report.number(row["objective_mean"], ".6f"),
                ratio,
            ]
        )
    return report.markdown(header, cells, left=7)


def panels(rows) -> dict:
    made: dict[str, dict] = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        if "missing" in row or row["work"] == STEP:
            continue
        threads = ", one thread" if row["threads"] == 1 else ""
        title = f"{row['system']}, {row['work']}, {row['dtype']}{threads}|batch"
        label = row["contender"]
        if label == ACADOS_NAME:
            label += row["stopping"].removeprefix("its tolerance")
        xs, ys = made.setdefault(title, {}).setdefault(label, ([], []))
        xs.append(row["batch"])
        ys.append(row["median_s"])
    return made
