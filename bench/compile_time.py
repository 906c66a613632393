"""How long JAX traces and compiles `mpc_solve`, forward and with its gradient.

Problem: each system of jaxmpc.systems at its default parameters and bounds, T = 20, float32; one
problem under jit, and 128 under vmap and jit. `forward` gives the solution; `forward + backward`
gives also the gradient of a random linear function of the controls in params and x_init.

Contenders: jaxmpc alone. Every repeat starts without JAX's caches; medians. The quality beside
the times is that of the program that was compiled: its solutions from random starts.
"""

import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import measure, report
from jaxmpc import systems

NAME = "compile"
FORWARD, BOTH = "forward", "forward + backward"
BATCH = 128
T = 20


def add_arguments(parser):
    report.add_common_arguments(parser)
    parser.set_defaults(repeats=3)


def all_systems() -> dict:
    """The modules of jaxmpc.systems that define one: bounds, parameters, cost and dynamics."""
    names = [module.name for module in pkgutil.iter_modules(systems.__path__)]
    modules = {name: importlib.import_module(f"jaxmpc.systems.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "default_params")}


@measure.in_float32
def run(args):
    rows = report.Rows(args.output, NAME, args.resume)
    found = all_systems()
    cases = [
        (name, batch, work) for name in found for batch in (1, BATCH) for work in (FORWARD, BOTH)
    ]
    if args.quick:
        cases = [("pendulum", 1, BOTH)]
    for name, batch, work in tqdm(cases, desc=NAME, unit="program"):
        key = dict(study=NAME, contender="jaxmpc", system=name, batch=batch, work=work)
        key |= measure.setting()
        if not rows.find(key):
            rows.add(key | _measure(found[name], batch, work, args))
    versions = measure.setting()["versions"]
    text = [
        _table(list(rows)),
        f"`{report.command(args)}`  \n{rows.rows[0]['device']}. {versions}.",
    ]
    report.save_text(args.output, NAME, "\n\n".join(text))
    _plot(args.output / f"{NAME}.png", list(rows))


def _measure(system, batch, work, args) -> dict:
    x_init = system.sample_states(jax.random.key(args.seed), batch)
    loss = jax.random.normal(jax.random.key(args.seed + 1), (T, system.M))
    params = system.default_params()

    def forward(params, x_init):
        return measure.plan(system, x_init, jnp.zeros((T, system.M)), params)

    def value(params, x_init):
        solution = forward(params, x_init)
        return jnp.vdot(loss, solution.u), solution

    one = forward if work == FORWARD else jax.grad(value, (0, 1), has_aux=True)
    program = one if batch == 1 else jax.vmap(one, (None, 0))
    given = params, x_init[0] if batch == 1 else x_init
    compiling = []
    for _ in range(args.repeats):
        jax.clear_caches()
        # What JAX itself compiles once a process, such as the making of constants, is not counted.
        jax.block_until_ready(jnp.zeros(3) + 1)
        executable, times = measure.compiled(program, *given)
        compiling.append(times)
    result = executable(*given)
    solution = result if work == FORWARD else result[1]
    u = solution.u[None] if batch == 1 else solution.u
    times = measure.run_times({"run": lambda: executable(*given)}, repeats=args.repeats)["run"]
    totals = [each["trace_s"] + each["compile_s"] for each in compiling]
    row = dict(dtype=str(u.dtype), n=x_init.shape[-1], m=system.M, T=T)
    row |= {name: float(np.median([each[name] for each in compiling])) for name in compiling[0]}
    row |= dict(ready_min_s=min(totals), ready_max_s=max(totals), compile_repeats=args.repeats)
    row |= measure.spread(times) | measure.outcome(solution.status, solution.iterations)
    return row | measure.judged(system, params, x_init, u)


def _table(rows: list[dict]) -> str:
    header = ["system", "batch", "work", "trace", "compile", "both, min – max", "then a run"]
    header += ["converged", "KKT residual"]
    cells = [
        [
            row["system"],
            str(row["batch"]),
            row["work"],
            *(report.seconds(row[name]) for name in ("trace_s", "compile_s")),
            f"{report.seconds(row['ready_min_s'])} – {report.seconds(row['ready_max_s'])}",
            report.seconds(row["median_s"]),
            f"{row['status'].get('CONVERGED', 0.0):.0%}",
            f"{row['kkt_residual_worst']:.1e}",
        ]
        for row in rows
    ]
    return report.markdown(header, cells, left=3)


def _plot(path, rows):
    """Bars: where the time goes, program by program."""
    plt = report.pyplot()
    labels = [f"{row['system']} × {row['batch']}\n{row['work']}" for row in rows]
    figure, axis = plt.subplots(figsize=(6, 1 + 0.4 * len(rows)), layout="constrained")
    trace, compile_s = (np.array([row[name] for row in rows]) for name in ("trace_s", "compile_s"))
    axis.barh(labels, trace, label="trace")
    axis.barh(labels, compile_s, left=trace, label="compile")
    axis.invert_yaxis()
    axis.set(xlabel="seconds")
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
