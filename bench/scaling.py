"""Time against the batch size and against the horizon.

`batch`: `mpc_solve` forward on the pendulum and the cartpole, T = 20, and `lqr_solve` with
(n, m, T) = (4, 1, 50), for batches of 1 to 16384, float32. Beside the time per problem stands the
time per problem and iteration: in a batch the slowest problem sets the number of trips, so the
two differ by more than a factor.

`horizon`: `lqr_solve` with (n, m) = (4, 1) for T of 16 to 4096, batches of 1 and 32, by each
method that `lqr_solve` has: the sequential recursion, and the one that is parallel in time.

Contenders: jaxmpc alone. The exponent is the slope of log time over log size, by least squares on
the upper half of the sizes: 1 is linear, 0 is constant. Quality: the worst KKT residual in
float64, for `lqr_solve` relative to the terms that cancel in it, with the largest distance of the
returned states from the rollout of the controls beside it in the .jsonl.
"""

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import lqr, measure, report
from jaxmpc import lqr_solve
from jaxmpc.systems import cartpole, pendulum

BATCHES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
HORIZONS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
METHODS = ("sequential", "parallel")
SYSTEMS = dict(pendulum=pendulum, cartpole=cartpole)
T = 20
FORWARD = "forward"


def add_arguments(parser):
    report.add_common_arguments(parser)


@measure.in_float32
def run(args):
    rows = report.Rows(args.output, "scaling", args.resume)
    cases = _cases(args.quick)
    for case in tqdm(cases, desc="scaling", unit="size"):
        key = dict(study="scaling", contender="jaxmpc", work=FORWARD, dtype="float32") | case
        key |= measure.setting()
        if rows.find(key):
            continue
        if case["problem"] == "lqr_solve":
            rows.add(key | _measure_lqr(args, **case))
        else:
            rows.add(key | _measure_mpc(args, **case))
    found = list(rows)
    setting = measure.setting()
    where = f"{setting['device']}, {setting['threads']} threads. {setting['versions']}."
    text = [_table(found), f"`{report.command(args)}`  \n{where}"]
    report.save_text(args.output, "scaling", "\n\n".join(text))
    _plot(args.output / "scaling.png", found)


def _cases(quick: bool) -> list[dict]:
    batches, horizons, systems = BATCHES, HORIZONS, SYSTEMS
    horizon_batches, small = (1, 32), dict(problem="lqr_solve", n=4, m=1)
    if quick:  # what compiles in little time
        batches, horizons, systems = (1, 4), (4, 8), dict(pendulum=pendulum)
        horizon_batches, small = (2,), dict(problem="lqr_solve", n=2, m=1)
    cases = [
        dict(against="batch", problem=name, method="sequential", n=s.N, m=s.M, T=T, batch=batch)
        for name, s in systems.items()
        for batch in batches
    ]
    cases += [
        dict(against="batch", method="sequential", T=50, batch=batch) | small for batch in batches
    ]
    cases += [
        dict(against="horizon", method=method, T=horizon, batch=batch) | small
        for method in METHODS
        for batch in horizon_batches
        for horizon in horizons
    ]
    return cases


def _measure_mpc(args, problem, batch, **_) -> dict:
    system = SYSTEMS[problem]
    x_init = system.sample_states(jax.random.key(args.seed), batch)
    params = system.default_params()

    def solve(params, x_init):
        return measure.plan(system, x_init, jnp.zeros((T, system.M)), params)

    program = jax.vmap(solve, (None, 0))
    row, solution = _timed(args, program, params, x_init)
    row |= measure.outcome(solution.status, solution.iterations)
    row["per_problem_and_iteration_s"] = row["per_problem_s"] / max(row["iterations_mean"], 1)
    return row | measure.judged(system, params, x_init, solution.u)


def _measure_lqr(args, n, m, T, batch, method, **_) -> dict:
    given = lqr.problem(n, m, T, batch, args.seed, "float32")

    def solve(C, c, F, f, x_init):
        solution = lqr_solve(x_init, C, c, F, f, method=method)
        return solution.x[:-1], solution.u

    data = [jnp.asarray(given[name]) for name in lqr.DATA]
    row, plan = _timed(args, jax.vmap(solve), *data)
    return row | lqr.judged(given, *plan)


def _timed(args, program, *data):
    executable, row = measure.compiled(program, *data)
    times = measure.run_times({"": lambda: executable(*data)}, repeats=args.repeats)[""]
    row |= measure.spread(times)
    return row | dict(per_problem_s=row["median_s"] / data[-1].shape[0]), executable(*data)


# The table and the plot.


def _lines(rows: list[dict]) -> dict[tuple, list[dict]]:
    """The rows line by line: by what is varied, and what is solved and how."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        name = row["problem"] if row["problem"] != "lqr_solve" else f"LQR {row['n']}, {row['m']}"
        if row["against"] == "horizon":
            name += f", {row['method']}, batch {row['batch']}"
        elif row["problem"] == "lqr_solve":
            name += f", T = {row['T']}"
        lines.setdefault((row["against"], name), []).append(row)
    return {key: sorted(line, key=lambda row: row[_size(row)]) for key, line in lines.items()}


def _size(row) -> str:
    return "batch" if row["against"] == "batch" else "T"


def exponent(line: list[dict]) -> float | None:
    """The slope of log time over log size on the upper half of the sizes."""
    points = [(row[_size(row)], row["median_s"]) for row in line]
    upper = np.log(points[len(points) // 2 :] if len(points) > 2 else points)
    return float(np.polyfit(*upper.T, 1)[0]) if len(upper) > 1 else None


def _table(rows: list[dict]) -> str:
    header = ["against", "problem", "size", "a call", "min – max", "a problem"]
    header += ["a problem and iteration", "iterations, mean / max", "converged", "KKT residual"]
    header += ["exponent"]
    cells = []
    for (against, name), line in _lines(rows).items():
        slope = exponent(line)
        for row in line:
            start = [against, name, str(row[_size(row)])]
            iterated = "per_problem_and_iteration_s" in row
            cells.append(
                [
                    *start,
                    report.seconds(row["median_s"]),
                    f"{report.seconds(row['min_s'])} – {report.seconds(row['max_s'])}",
                    report.seconds(row["per_problem_s"]),
                    report.seconds(row["per_problem_and_iteration_s"]) if iterated else "–",
                    f"{row['iterations_mean']:.1f} / {row['iterations_max']}" if iterated else "–",
                    f"{row['status'].get('CONVERGED', 0.0):.0%}" if iterated else "–",
                    f"{row['kkt_residual_worst']:.1e}",
                    f"{slope:.2f}" if slope is not None and row is line[-1] else "",
                ]
            )
    return report.markdown(header, cells, left=2)


def _plot(path, rows):
    panels: dict[str, dict] = {
        "Batch|problems": {},
        "Batch, per iteration|problems": {},
        "Horizon, LQR|T": {},
    }
    per_problem, per_iteration, horizon = panels.values()
    for (against, name), line in _lines(rows).items():
        label = f"{name} ({exponent(line):.2f})" if exponent(line) is not None else name
        sizes = [row[_size(row)] for row in line]
        panel = per_problem if against == "batch" else horizon
        panel[label] = (sizes, [row["per_problem_s"] for row in line])
        if "per_problem_and_iteration_s" in line[0]:
            per_iteration[name] = (sizes, [row["per_problem_and_iteration_s"] for row in line])
    report.plot(path, panels, "seconds a problem")
