"""How fast are plans with constraints on states? Four problems, from random starts.

- drone: a double integrator in space, n = 6, m = 3, T = 50, among three spheres
- bicycle: n = 4, m = 2, T = 35, past one disc in the middle of its way
- quadrotor: in a vertical plane, n = 6, m = 2, T = 40, every state within bounds
- linear: four masses between springs, n = 8, m = 4, T = 40, every state within bounds

Each has a quadratic cost and bounds of its controls (bench/peers/constrained_problems.py, the one
definition that all contenders and the judge read). All on one thread, all from the same guess,
constant controls; acados and IPOPT get its rollout as their states. Contenders:

- jaxmpc in float64, at tolerance 1e-6 and at its default, and in float32 at its default; forward,
  and forward with the gradient of mean(u²) in x_init;
- acados, SQP with HPIPM in C and the exact Hessian, one problem after the other, by the fastest of
  its ways that solves the most; its seconds are those that it counts inside its C code;
- CasADi with IPOPT (multiple shooting), one problem after the other.

Quality is judged on the controls that come back, by NumPy alone (bench/kkt_judge.py): rolled out,
with the multipliers that suit them best. "Good" are those whose residual, violation included, is
within 1e-4 in float64, 1e-3 in float32. Their objectives are held against the best good one of the
same problem in float64: what is above it by more than digits is another local minimum. Of larger
batches the first 64 are judged.

Times are medians over several seeds, the ratios those to jaxmpc in float64, forward (in a quick run
with the gradient), at 1e-6 where the other's tolerance is 1e-6, else at the default. jaxmpc is
measured before and after the others. Compilation is apart.
"""

import functools
import os
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import kkt_judge, measure, peers, report
from bench.peers.constrained_problems import PROBLEMS, Problem
from jaxmpc import Constraints, Options, mpc_solve

NAME = "constrained"
BATCHES = [1, 64, 1024]
JUDGED = 64  # of a batch: the judge is dense
LONG = 2.0  # seconds of a call that is timed once before the others, and once after them
GOOD = dict(float32=1e-3, float64=1e-4)
WORKS = FORWARD, GRADIENT = "forward", "forward + gradient"
JAXMPC, ACADOS, IPOPT = "jaxmpc", "acados", "CasADi + IPOPT"
LOOSE, DEFAULT = "1e-06", "default"
PEER_TOLERANCES = (1e-6, 1e-8)
# Of full or partial condensing, Gauss-Newton or the exact Hessian with four ways to make it convex,
# and with or without a line search: the fastest of those that solve the most of 16 problems. On the
# drone, the bicycle and the linear system, Gauss-Newton is within a tenth of it.
WAYS = dict(
    drone=dict(condensing="PARTIAL", hessian="EXACT CONVEXIFY"),
    bicycle=dict(condensing="FULL", hessian="EXACT PROJECT"),
    quadrotor=dict(condensing="PARTIAL", hessian="EXACT CONVEXIFY"),
    linear=dict(condensing="PARTIAL", hessian="EXACT CONVEXIFY"),
)
JAX = types.SimpleNamespace(
    sin=jnp.sin,
    cos=jnp.cos,
    tan=jnp.tan,
    stack=jnp.stack,
    product=lambda matrix, x: jnp.asarray(matrix, x.dtype) @ x,
)


def add_arguments(parser):
    report.add_common_arguments(parser)
    which = "(all; with --quick the bicycle)"
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), help=which)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="(%(default)s)")
    parser.add_argument(
        "--peers-up-to",
        type=int,
        default=64,
        metavar="BATCH",
        help="largest batch for the others, which take one problem after the other (%(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="=1: measure in this process")


def run(args):
    if args.threads:  # a process of its own, since the pools of JAX are sized once
        measure.pin(args.threads)
        return measure_all(args, report.Rows(args.output, NAME, resume=True, missing=True))
    report.Rows(args.output, NAME, args.resume)
    options = report.command(args).removeprefix(args.parser.prog).split()
    here = ["--threads", "1", "--output", str(args.output.resolve())]
    command = [sys.executable, "-m", "bench", NAME, *options, *here]
    subprocess.run(command, cwd=peers.ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True)
    rows = list(report.Rows(args.output, NAME, resume=True, missing=True))
    places = {f"{row['device']}, one thread" for row in rows}
    text = "\n\n".join([table(rows), report.notes(rows, report.command(args), places)])
    report.save_text(args.output, NAME, text)
    report.plot(args.output / f"{NAME}.png", panels(rows))


def measure_all(args, rows):
    names, batches, seeds = args.problems or list(PROBLEMS), args.batches, args.seeds
    if args.quick:
        names, batches, seeds = args.problems or ["bicycle"], [2], 1
    cases = [(name, batch) for name in names for batch in batches]
    for name, batch in tqdm(cases, NAME):
        Case(args, rows, name, batch, range(args.seed, args.seed + seeds)).compare()


class Case:
    """One problem at one batch size, from several seeds: what is measured, and its rows."""

    def __init__(self, args, rows, name, batch, seeds):
        self.args, self.rows, self.name, self.batch, self.seeds = args, rows, name, batch, seeds
        self.problem = PROBLEMS[name]
        self.x_init = {seed: self.problem.x_init(seed, batch) for seed in seeds}
        sizes = {key: getattr(self.problem, key) for key in "nmT"}
        self.key = dict(study=NAME, system=name, batch=batch) | sizes
        self.key |= dict(threads=len(os.sched_getaffinity(0)))

    def compare(self):
        """jaxmpc, the others, and jaxmpc again; rows that are there already stay as they are."""
        works = [(dtype, work) for dtype in ("float64", "float32") for work in WORKS]
        if self.args.quick:
            works = [("float64", GRADIENT)]
        made = [ready for dtype, work in works for ready in self.jaxmpc(dtype, work)]
        times = [self.times(call) for call, _ in made]
        for tolerance in PEER_TOLERANCES:
            ways = dict(tolerance=tolerance) | WAYS[self.name]
            self.peer(ACADOS, "acados_constrained.py", ways)
            self.peer(IPOPT, "casadi_constrained.py", dict(tolerance=tolerance))
        for (call, row), before in zip(made, times, strict=True):
            self.rows.add(row | measure.spread(before + self.times(call)))

    def times(self, call):
        start = time.perf_counter()
        jax.block_until_ready(call())
        once = time.perf_counter() - start
        if once > LONG:
            return [once]
        repeats = -(-self.args.repeats // 2)
        return measure.run_times(dict(it=call), repeats=repeats)["it"]

    def jaxmpc(self, dtype, work):
        """What is to be timed, a call and the rest of its row, a tolerance and a seed each."""
        key = self.key | measure.setting() | dict(contender=JAXMPC, dtype=dtype, work=work)
        # The loose one is for the comparison alone.
        beside = dtype == "float64" and self.batch <= self.args.peers_up_to
        stopping = [LOOSE, DEFAULT] if beside else [DEFAULT]
        wanted = [
            (stop, seed)
            for stop in stopping
            for seed in self.seeds
            if not self.rows.find(key | dict(stopping=stop, seed=seed))
        ]
        if not wanted:
            return []
        with jax.enable_x64(dtype == "float64"):
            starts = {seed: jnp.asarray(x_init, dtype) for seed, x_init in self.x_init.items()}
            options = {DEFAULT: Options()}
            if dtype == "float64":  # the default as a number: one program for both
                options = {LOOSE: Options(tolerance=1e-6), DEFAULT: Options(tolerance=1e-10)}
            # As arrays, which are of the same dtype when the program is called.
            options = {stop: jax.tree.map(jnp.asarray, each) for stop, each in options.items()}
            function = functools.partial(gradient if work == GRADIENT else solve, self.problem)
            first = starts[self.seeds[0]], options[stopping[0]]
            program, compiling = measure.compiled(function, *first)
            ready = []
            for stop, seed in wanted:
                call = functools.partial(program, starts[seed], options[stop])
                solution = call()[1]
                row = key | dict(stopping=stop, seed=seed) | compiling
                row |= measure.outcome(solution.status, solution.iterations)
                ready.append((call, row | self.judged(seed, solution.u, dtype)))
        return ready

    def judged(self, seed, u, dtype="float64"):
        x_init, u = self.x_init[seed][:JUDGED], np.asarray(u, np.float64)[:JUDGED]
        found = kkt_judge.judge(self.problem, x_init, u)
        good = found["kkt_residual"] <= GOOD[dtype]
        values = found["objective"]
        return dict(
            good_share=float(np.mean(good)),
            kkt_residual_worst=float(np.max(found["kkt_residual"])),
            kkt_residual_median=float(np.median(found["kkt_residual"])),
            violation_worst=float(np.max(found["violation"])),
            objective_mean=float(np.mean(values)),
            objectives=[
                float(f"{value:.11g}") if right else None
                for value, right in zip(values, good, strict=True)
            ],
        )

    def peer(self, contender, script, given):
        """A row for each seed, or one that says why there are none."""
        if self.batch > self.args.peers_up_to:
            return
        stopping = f"{given['tolerance']:.0e}"
        key = self.key | dict(device=measure.cpu(), contender=contender, dtype="float64")
        key |= dict(work=FORWARD, stopping=stopping)
        if all(self.rows.find(key | dict(seed=seed)) for seed in self.seeds):
            return
        if not self.args.peers:
            made = dict(missing=peers.LEFT_OUT)
        else:
            given |= dict(problem=self.name, x_init=np.stack(list(self.x_init.values())))
            given |= dict(repeats=self.args.repeats, threads=self.key["threads"])
            made = peers.attempt(script, given)
        for place, seed in enumerate(self.seeds):
            row = key | dict(seed=seed)
            if "missing" in made:
                self.rows.add(row | dict(missing=str(made["missing"])))
                continue
            share, iterations = float(made["solved"][place].mean()), made["iterations"][place]
            seconds = made["seconds"][place]
            row |= dict(versions=str(made["versions"]), trace_s=0.0)
            row |= dict(compile_s=float(made["build_s"]))
            row |= dict(status={"CONVERGED": share, "not": 1.0 - share})
            row |= dict(iterations_mean=float(iterations.mean()))
            row |= dict(iterations_max=int(iterations.max()))
            row |= measure.spread([value for value in seconds.tolist() if np.isfinite(value)])
            self.rows.add(row | self.judged(seed, made["u"][place]))


# jaxmpc's side of a problem.


def constraints_of(problem: Problem) -> Constraints:
    if problem.x_lower is not None:
        # Of the states at 1 ≤ t ≤ T.
        return Constraints(x_lower=np.array(problem.x_lower), x_upper=np.array(problem.x_upper))
    rows = problem.rows
    assert rows is not None
    return Constraints(inequality=lambda x, u, t, params: rows(JAX, x))


def solve(problem: Problem, x_init, options):
    """The plans from x_init [B, n], and what the gradient is taken of."""
    dtype = x_init.dtype
    Q, R, Q_end = (jnp.asarray(weight, dtype) for weight in problem.weights)
    x_ref, u_ref = jnp.asarray(problem.x_ref, dtype), jnp.asarray(problem.u_ref, dtype)

    def cost(x, u, t, params):
        return 0.5 * (jnp.sum(Q * (x - x_ref) ** 2) + jnp.sum(R * (u - u_ref) ** 2))

    def terminal_cost(x, params):
        return 0.5 * jnp.sum(Q_end * (x - x_ref) ** 2)

    def dynamics(x, u, t, params):
        return problem.dynamics(JAX, x, u)

    def plan(x_init):
        return mpc_solve(
            cost,
            dynamics,
            x_init,
            jnp.asarray(problem.u_init(), dtype),
            terminal_cost=terminal_cost,
            u_lower=jnp.asarray(problem.u_lower, dtype),
            u_upper=jnp.asarray(problem.u_upper, dtype),
            constraints=constraints_of(problem),
            options=options,
        )

    plans = jax.vmap(plan)(x_init)
    return jnp.mean(plans.u**2), plans


def gradient(problem: Problem, x_init, options):
    return jax.grad(functools.partial(solve, problem), has_aux=True)(x_init, options=options)


# What a reader sees.

GROUP = ("system", "batch", "contender", "dtype", "work", "stopping")


def groups(rows) -> dict[tuple, list[dict]]:
    """The rows that differ in the seed alone, in the order of the table."""
    names, contenders = list(PROBLEMS), (JAXMPC, ACADOS, IPOPT)
    made: dict[tuple, list[dict]] = {}
    for row in sorted(
        rows,
        key=lambda row: (
            names.index(row["system"]), row["batch"], contenders.index(row["contender"]),
            row["dtype"] == "float32", WORKS.index(row["work"]), row["stopping"],
        ),
    ):  # fmt: skip
        made.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    return made


def best_objectives(rows) -> dict[tuple, np.ndarray]:
    """Of each problem the best good objective in float64, by system, batch and seed."""
    best: dict[tuple, np.ndarray] = {}
    for row in rows:
        if row["dtype"] == "float64" and "missing" not in row:
            place = row["system"], row["batch"], row["seed"]
            values = np.array(row["objectives"], float)  # None becomes NaN, which fmin passes over
            best[place] = np.fmin(best.get(place, values), values)
    return best


def above(group, best) -> str:
    """How far the good objectives lie above the best, relatively: the mean, and the worst."""
    shares = [
        np.array(row["objectives"], float) / best[row["system"], row["batch"], row["seed"]] - 1
        for row in group
    ]
    found = np.concatenate(shares)
    found = found[np.isfinite(found)]
    return f"{np.mean(found):.1e} / {np.max(found):.1e}" if len(found) else "–"


def worst(group, name):
    """The largest of a measure, None where one is not finite."""
    values = [row[name] for row in group]
    return None if None in values else max(values)


def median(group) -> float:
    return float(np.median([row["median_s"] for row in group]))


def table(rows) -> str:
    header = [
        *("system", "batch", "contender", "dtype", "work", "tolerance"),
        *report.TIMES,
        *("good", "KKT residual, median / worst", "violation, worst"),
        *("objective above the best, mean / worst", "times jaxmpc's"),
    ]
    best = best_objectives(rows)
    cells: list[list[str]] = []
    ours: dict[tuple, float] = {}
    for key, group in groups(rows).items():
        system, batch, contender, dtype, _, stopping = key
        line = list(map(str, key))
        if "missing" in group[0]:
            cells.append(line + [group[0]["missing"]] + ["–"] * (len(header) - len(line) - 1))
            continue
        if (contender, dtype) == (JAXMPC, "float64"):  # forward comes first, if it is there
            ours.setdefault((system, batch, stopping), median(group))
        same = LOOSE if stopping == LOOSE else DEFAULT
        reference = ours.get((system, batch, same))
        mean = lambda name, group=group: float(np.mean([row[name] for row in group]))  # noqa: E731
        together = dict(
            median_s=median(group),
            min_s=min(row["min_s"] for row in group),
            max_s=worst(group, "max_s"),
            trace_s=group[0]["trace_s"],
            compile_s=group[0]["compile_s"],
            iterations_mean=mean("iterations_mean"),
            iterations_max=worst(group, "iterations_max"),
            status=dict(
                CONVERGED=float(np.mean([row["status"].get("CONVERGED", 0.0) for row in group]))
            ),
        )
        residuals = [row["kkt_residual_median"] for row in group]
        middle = None if None in residuals else float(np.median(residuals))
        largest = report.number(worst(group, "kkt_residual_worst"))
        cells.append(
            [
                *line,
                *report.times(together),
                f"{mean('good_share'):.1%}",
                f"{report.number(middle)} / {largest}",
                report.number(worst(group, "violation_worst")),
                above(group, best),
                f"{median(group) / reference:.3g} ×" if reference else "–",
            ]
        )
    return report.markdown(header, cells, left=6)


def panels(rows) -> dict:
    made: dict[str, dict] = {}
    for key, group in groups(rows).items():
        system, batch, contender, dtype, work, stopping = key
        if "missing" in group[0]:
            continue
        label = f"{contender} {stopping}" + (", float32" if dtype == "float32" else "")
        label += " + gradient" if work == GRADIENT else ""
        xs, ys = made.setdefault(f"{system}|batch", {}).setdefault(label, ([], []))
        xs.append(batch)
        ys.append(median(group))
    return made
