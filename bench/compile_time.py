"""How long JAX traces and compiles `mpc_solve`, forward and with its gradient.

Problem: each system of jaxmpc.systems at its default parameters and bounds, T = 20, float32; one
problem under jit, and 128 under vmap and jit. `forward` gives the solution; `forward + backward`
gives also the gradient of a random linear function of the controls in params and x_init.
`constraints` is a pendulum with two motors and every kind of constraint: inequalities,
some of them soft, and equalities, at each stage and at the end, and limits of rate and controls.

Contenders: jaxmpc alone. Every repeat starts without JAX's caches; medians. Seconds of the CPU
count all threads and no other process. The quality beside the times is that of the program that was
compiled: its solutions from random starts, with `constraints` as the solutions say it themselves.
"""

import importlib
import pkgutil
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import measure, report
from jaxmpc import Constraints, Rate, Slack, systems

NAME = "compile"
FORWARD, BOTH = "forward", "forward + backward"
BATCH = 128
T = 20


def add_arguments(parser):
    report.add_common_arguments(parser)
    parser.set_defaults(repeats=3)
    which = "(all; with --quick the pendulum)"
    parser.add_argument("--systems", nargs="+", choices=list(all_systems()), help=which)


class EveryConstraint:
    """What a module of jaxmpc.systems has, and constraints of every kind."""

    N, M = 2, 2
    U_LOWER, U_UPPER = np.array([-4.0, -3.0]), np.array([4.0, 3.0])

    @staticmethod
    def default_params():
        return dict(gravity=3.0, goal=0.2, share=0.5, load=0.3, fastest=0.7, speed=0.01)

    @staticmethod
    def sample_states(key, num):
        return jnp.array([1.0, 0.0]) + jax.random.uniform(key, (num, 2), minval=-0.1, maxval=0.1)

    @staticmethod
    def dynamics(x, u, t, params):
        rate = x[1] + 0.1 * (params["gravity"] * jnp.sin(x[0]) + u[0] + u[1] * jnp.cos(x[0]))
        return jnp.stack([x[0] + 0.1 * rate, rate])

    @staticmethod
    def cost(x, u, t, params):
        far = jnp.sqrt(1 + 4 * (x[0] - params["goal"]) ** 2)
        return far + 0.1 * x[1] ** 2 + 0.02 * u[0] ** 2 + 0.05 * u[1] ** 2

    @staticmethod
    def constraints():
        return Constraints(
            inequality=lambda x, u, t, params: jnp.stack(
                [x[1] - params["fastest"], -x[1] - params["fastest"]]
            ),
            slack=Slack(linear=jnp.array([0.6, jnp.inf]), quadratic=jnp.array([0.5, 0.0])),
            equality=lambda x, u, t, params: jnp.stack(
                [u[1] - params["share"] * u[0] + jnp.sin(x[0]) - params["load"]]
            ),
            terminal_inequality=lambda x, params: jnp.stack([x[1] ** 2 - params["speed"]]),
            terminal_slack=Slack(linear=0.1, quadratic=0.2),
            terminal_equality=lambda x, params: jnp.stack([x[0] - params["goal"]]),
            rate=Rate(
                previous=jnp.array([-0.5, 0.3]), limit=jnp.array([1.5, jnp.inf]), weight=0.02
            ),
        )


def all_systems() -> dict:
    """The modules of jaxmpc.systems that define one: bounds, parameters, cost and dynamics; and
    the problem with constraints."""
    names = [module.name for module in pkgutil.iter_modules(systems.__path__)]
    modules = {name: importlib.import_module(f"jaxmpc.systems.{name}") for name in names}
    found = {name: module for name, module in modules.items() if hasattr(module, "default_params")}
    return found | dict(constraints=EveryConstraint)


@measure.in_float32
def run(args):
    rows = report.Rows(args.output, NAME, args.resume)
    found = all_systems()
    cases = [
        (name, batch, work)
        for name in args.systems or found
        for batch in (1, BATCH)
        for work in (FORWARD, BOTH)
    ]
    if args.quick:
        cases = [(name, 1, BOTH) for name in args.systems or ["pendulum"]]
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

    constrained = system is EveryConstraint
    more = dict(constraints=system.constraints()) if constrained else {}

    def forward(params, x_init):
        return measure.plan(system, x_init, jnp.zeros((T, system.M)), params, **more)

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
        before = time.process_time()
        executable, times = measure.compiled(program, *given)
        compiling.append(times | dict(ready_cpu_s=time.process_time() - before))
    result = executable(*given)
    solution = result if work == FORWARD else result[1]
    u = solution.u[None] if batch == 1 else solution.u
    times = measure.run_times({"run": lambda: executable(*given)}, repeats=args.repeats)["run"]
    totals = [each["trace_s"] + each["compile_s"] for each in compiling]
    row = dict(dtype=str(u.dtype), n=x_init.shape[-1], m=system.M, T=T)
    row |= {name: float(np.median([each[name] for each in compiling])) for name in compiling[0]}
    row |= dict(ready_min_s=min(totals), ready_max_s=max(totals), compile_repeats=args.repeats)
    row |= measure.spread(times) | measure.outcome(solution.status, solution.iterations)
    if not constrained:
        return row | measure.judged(system, params, x_init, u)
    return row | dict(  # the judge of the others knows nothing of constraints
        objective_mean=float(jnp.mean(solution.objective)),
        kkt_residual_worst=float(jnp.max(solution.kkt_residual)),
        kkt_residual_median=float(jnp.median(solution.kkt_residual)),
        violation_worst=float(jnp.max(solution.violation)),
    )


def _table(rows: list[dict]) -> str:
    header = ["system", "batch", "work", "trace", "compile", "both, min – max", "both, CPU"]
    header += ["then a run"]
    header += ["converged", "KKT residual"]
    cells = [
        [
            row["system"],
            str(row["batch"]),
            row["work"],
            *(report.seconds(row[name]) for name in ("trace_s", "compile_s")),
            f"{report.seconds(row['ready_min_s'])} – {report.seconds(row['ready_max_s'])}",
            # Rows of earlier versions do not have it.
            report.seconds(row["ready_cpu_s"]) if "ready_cpu_s" in row else "–",
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
