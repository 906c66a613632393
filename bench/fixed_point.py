"""Fixed-point against unrolled differentiation as iterations grow: Fig. 2 of Amos et al. 2018.

Problem: the paper's pendulum at its parameters and bounds, T = 20, 32 random starts, float32; the
gradient of a random linear function of the controls in all parameters and in x_init.

Contenders, each asked for k iterations:
  fixed point    `mpc_solve` with a tolerance that cannot be met, max_iterations k (one program
                 for all k) and unconverged="implicit"
  unrolled       `ilqr_unrolled` with num_iterations k
The solver of the first cannot be made to go on once no step lowers the residual any more, so the
iterations that it did stand beside k; the second does all k, whether they help or not.

Measured: `forward`; `forward + backward`, one program; `backward` alone: the pullback that
`jax.vjp` returns from the forward program, as a program of its own. Memory is what XLA plans for:
the temporaries of each program, and for `backward` also the residuals that it is given.

Quality: the KKT residual in float64 (worst), and the distance of the gradient in x_init from that
of the converged solution in float64, relative, median over the starts where it is not zero.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import measure, report
from jaxmpc import Options, Status, ilqr_unrolled, mpc_solve
from jaxmpc.systems import pendulum

T = 20
BATCH = 32
ITERATIONS = (1, 2, 4, 8, 16, 32, 64, 128)
FIXED, UNROLLED = "fixed point", "unrolled"
FORWARD, BOTH, BACKWARD = "forward", "forward + backward", "backward"


def add_arguments(parser):
    report.add_common_arguments(parser)


@measure.in_float32
def run(args):
    rows = report.Rows(args.output, "fixed_point", args.resume)
    batch, ks = BATCH, (4,) if args.quick else ITERATIONS
    setting = measure.setting()
    key = dict(study="fixed_point", dtype="float32", n=pendulum.N, m=pendulum.M, T=T, batch=batch)
    key |= setting
    reference = None
    works = (FORWARD, BACKWARD) if args.quick else (FORWARD, BOTH, BACKWARD)
    todo = [(contender, k) for k in ks for contender in (FIXED, UNROLLED)]
    for contender, k in tqdm(todo, desc="fixed_point", unit="program"):
        name = key | dict(contender=contender, k=k)
        if all(rows.find(name | dict(work=work)) for work in works):
            continue
        if reference is None:
            reference = _converged(batch, args.seed)
        for row in _measure(contender, k, batch, works, args, reference):
            rows.add(name | row)
    found = list(rows)
    where = f"{setting['device']}, {setting['threads']} threads. {setting['versions']}."
    text = [_table(found), _claims(found), f"`{report.command(args)}`  \n{where}"]
    report.save_text(args.output, "fixed_point", "\n\n".join(text))
    _plot(args.output / "fixed_point.png", found)


def _problem(batch, seed):
    """params, x_init [batch, 3] and the loss's weights [batch, T, 1], in JAX's default float."""
    rng = np.random.default_rng(seed)
    theta, rate = rng.uniform(-np.pi / 2, np.pi / 2, batch), rng.uniform(-1.0, 1.0, batch)
    x_init = pendulum.state(*(jnp.asarray(a, float) for a in (theta, rate)))
    return pendulum.default_params(), x_init, jnp.asarray(rng.normal(size=(batch, T, 1)), float)


def _fixed_point(params, x_init, k):
    options = Options(tolerance=1e-30, max_iterations=k, unconverged="implicit")
    return _batched(mpc_solve, params, x_init, options=options)


def _batched(solve, params, x_init, **options):
    def one(x_init):
        return measure.plan(
            pendulum, x_init, jnp.zeros((T, pendulum.M)), params, solve=solve, **options
        )

    return jax.vmap(one)(x_init)


def _gradient(solve):
    """Of the loss in (params, x_init); and the solutions."""

    def loss(params, x_init, weights, *k):
        solution = solve(params, x_init, *k)
        return jnp.vdot(weights, solution.u), solution

    return jax.grad(loss, (0, 1), has_aux=True)


def _converged(batch, seed) -> np.ndarray:
    """The gradient in x_init at the converged solutions in float64; NaN where there is none."""
    with jax.enable_x64(True):
        solve = functools.partial(_batched, mpc_solve)
        gradient, solution = jax.jit(_gradient(solve))(*_problem(batch, seed))
        converged = np.asarray(solution.status == Status.CONVERGED)
        return np.where(converged[:, None], np.asarray(gradient[1]), np.nan)


@functools.lru_cache(maxsize=2)
def _programs(num_iterations: int | None, works: tuple, batch: int, seed: int) -> tuple:
    """The programs and their compile times by work, and the forward that keeps its residuals.

    All but the backward take k. num_iterations: None for the fixed point.
    """

    def solve(params, x_init, k):
        if num_iterations is None:
            return _fixed_point(params, x_init, k)
        return _batched(ilqr_unrolled, params, x_init, num_iterations=num_iterations)

    def keeping(params, x_init, k):
        """The controls, and the pullback with the residuals that it needs."""
        return jax.vjp(lambda *inputs: solve(*inputs, k).u, params, x_init)

    params, x_init, weights = _problem(batch, seed)
    k = jnp.int32(1)
    keep, _ = measure.compiled(keeping, params, x_init, k)
    pullback = keep(params, x_init, k)[1]
    given = {
        FORWARD: (solve, params, x_init, k),
        BOTH: (_gradient(solve), params, x_init, weights, k),
        BACKWARD: (lambda pull, weights: pull(weights), pullback, weights),
    }
    return {work: measure.compiled(*given[work]) for work in works}, keep


def _measure(contender, k, batch, works, args, reference) -> list[dict]:
    params, x_init, weights = _problem(batch, args.seed)
    programs, keep = _programs(None if contender == FIXED else k, works, batch, args.seed)
    k = jnp.int32(k)
    _, pullback = keep(params, x_init, k)
    inputs = {
        FORWARD: (params, x_init, k),
        BOTH: (params, x_init, weights, k),
        BACKWARD: (pullback, weights),
    }
    calls = {work: functools.partial(programs[work][0], *inputs[work]) for work in works}
    times = measure.run_times(calls, repeats=args.repeats)

    solution = calls[FORWARD]()
    quality = measure.outcome(solution.status, solution.iterations)
    quality |= measure.judged(pendulum, params, x_init, solution.u)
    more = {work: {} for work in works}
    more[BACKWARD] = dict(
        gradient_error_median=_error(calls[BACKWARD]()[1], reference),
        residual_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(pullback)),
    )
    if BOTH in works:
        more[BOTH] = dict(gradient_error_median=_error(calls[BOTH]()[0][1], reference))
    return [
        dict(work=work)
        | compiling
        | measure.spread(times[work])
        | dict(temporary_bytes=program.memory_analysis().temp_size_in_bytes)
        | more[work]
        | quality
        for work, (program, compiling) in programs.items()
    ]


def _error(gradient, reference) -> float:
    size = np.linalg.norm(reference, axis=1)
    counted = size > 1e-6 * np.nanmax(size)  # neither NaN nor clamped throughout
    if not counted.any():
        return float("nan")
    error = np.linalg.norm(np.asarray(gradient, float) - reference, axis=1)
    return float(np.median(error[counted] / size[counted]))


# The table and the plot.


def _by_k(rows: list[dict], contender: str) -> dict[int, dict[str, dict]]:
    """The rows of one contender: [k][work]."""
    found: dict[int, dict[str, dict]] = {}
    for row in rows:
        if row["contender"] == contender:
            found.setdefault(row["k"], {})[row["work"]] = row
    return dict(sorted(found.items()))


def _bytes(row: dict) -> int:
    return row["temporary_bytes"] + row.get("residual_bytes", 0)


def _table(rows: list[dict]) -> str:
    header = ["method", "k", "iterations, mean / max", "forward", "forward + backward"]
    header += ["difference", "backward alone", "memory of both", "memory of backward"]
    header += ["converged", "KKT residual", "gradient error"]
    cells = []
    for contender in (FIXED, UNROLLED):
        for k, works in _by_k(rows, contender).items():
            forward, backward, both = works[FORWARD], works[BACKWARD], works.get(BOTH)
            error = backward["gradient_error_median"]  # None: the plans are clamped throughout
            line = [contender, str(k)]
            line += [f"{forward['iterations_mean']:.1f} / {forward['iterations_max']}"]
            line += [report.seconds(forward["median_s"])]
            if both:
                difference = max(both["median_s"] - forward["median_s"], 0.0)
                line += [report.seconds(both["median_s"]), report.seconds(difference)]
            else:
                line += ["–", "–"]
            line += [report.seconds(backward["median_s"])]
            line += [f"{_bytes(row) / 1e6:.3g} MB" if row else "–" for row in (both, backward)]
            line += [f"{forward['status'].get('CONVERGED', 0.0):.0%}"]
            line += [f"{forward['kkt_residual_worst']:.1e}"]
            line += ["–" if error is None else f"{error:.1e}"]
            cells.append(line)
    return report.markdown(header, cells)


def _claims(rows: list[dict]) -> str:
    """What the numbers say about the fixed-point backward: in words, whichever way it comes out."""
    works = _by_k(rows, FIXED)
    first, last = works[min(works)], works[max(works)]
    # The last trip of the loop evaluates the point that is returned.
    trip = last[FORWARD]["median_s"] / (last[FORWARD]["iterations_max"] + 1)
    times = [w[BACKWARD]["median_s"] for w in works.values()]
    return "\n".join(
        [
            f"- A backward alone at the largest k takes {last[BACKWARD]['median_s'] / trip:.2f} of "
            "the time of one forward iteration (that of the whole forward by the iterations of the "
            "slowest problem and the evaluation at the end).",
            "- Over all k the time of a backward varies by a factor of "
            f"{max(times) / min(times):.2f}; its memory is {_bytes(first[BACKWARD])} B at the "
            f"smallest k and {_bytes(last[BACKWARD])} B at the largest.",
        ]
    )


def _plot(path, rows):
    panels: dict[str, dict] = {
        "Forward, seconds|k": {},
        "Backward alone, seconds|k": {},
        "Memory of the backward, bytes|k": {},
    }
    forward, backward, memory = panels.values()
    for contender in (FIXED, UNROLLED):
        works = _by_k(rows, contender)
        ks = list(works)
        forward[contender] = (ks, [w[FORWARD]["median_s"] for w in works.values()])
        backward[contender] = (ks, [w[BACKWARD]["median_s"] for w in works.values()])
        memory[contender] = (ks, [_bytes(w[BACKWARD]) for w in works.values()])
    report.plot(path, panels, "")
