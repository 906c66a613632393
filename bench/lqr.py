"""Batches of LQR problems beside HPIPM, a SIMD program in C++ and the reference implementation.

Problem: random, x⁺ = A x + B u + f with A orthogonal times 0.98, another stage by stage, and
positive definite costs; no terminal cost, no bounds. `forward` gives x and u; `forward + backward`
gives also the gradient of a random linear function of them in C, c, F, f and x_init.

Contenders:
  jaxmpc         `lqr_solve` under vmap and jit, arrays with the batch first
  C++ lanes      bench/peers/riccati_lanes.cpp: the same recursion, one problem per SIMD lane, in
                 the layout that suits it
  HPIPM          its unconstrained Riccati recursion, problem after problem, in its own layout;
                 float64 and one thread; x and u alone, no costates
  mpc.pytorch    `mpc.MPC` with one iteration, in a process of its own
Bringing a problem into a contender's layout is not timed. jaxmpc, C++ lanes and HPIPM take turns
within one process. One thread: each on the same single CPU.

Quality: NumPy in float64 rolls u out, computes the adjoints and takes max |∇_u J| over the largest
of the terms that cancel in it (worst of the batch); how far the returned x is from that rollout;
and how far the derivative along a random direction, by the gradient, is from that of NumPy's own
solution (by complex steps).
"""

import argparse
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import measure, peers, report
from bench.peers import LEFT_OUT, native
from jaxmpc import lqr_solve

# n, m, T, batch
SIZES = ((3, 3, 5, 32), (4, 1, 50, 128), (4, 1, 50, 1024), (8, 4, 50, 128), (12, 4, 100, 64))
QUICK_SIZES = ((2, 1, 5, 20),)  # what compiles in little time; no multiple of a SIMD width
DTYPES = ("float32", "float64")
FORWARD, BOTH = "forward", "forward + backward"
JAXMPC, LANES, HPIPM, REFERENCE = "jaxmpc", "C++ lanes", "HPIPM", "mpc.pytorch"
DATA = ("C", "c", "F", "f", "x_init")


def add_arguments(parser):
    report.add_common_arguments(parser)
    # One process a number of threads: JAX sizes its pools once.
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)


def run(args):
    if args.threads:
        measure.pin(args.threads)
        return _measure(args, report.Rows(args.output, "lqr", resume=True, missing=True))
    report.Rows(args.output, "lqr", args.resume)
    options = report.command(args).removeprefix(args.parser.prog).split()
    for threads in (1,) if args.quick else sorted({1, len(os.sched_getaffinity(0))}):
        here = ["--threads", str(threads), "--output", str(args.output.resolve())]
        command = [sys.executable, "-m", "bench", "lqr", *options, *here]
        one = {"JAX_PLATFORMS": "cpu"} if threads == 1 else {}
        subprocess.run(command, cwd=peers.ROOT, env=os.environ | one, check=True)
    rows = list(report.Rows(args.output, "lqr", resume=True, missing=True))
    versions = " ".join(sorted({f"{row['versions']}." for row in rows if "versions" in row}))
    notes = (
        "HPIPM is float64 in every comparison, C++ lanes have the type of what they are compared "
        "with; both ratios are within what took turns. A ratio above 1: slower than that."
    )
    text = [_table(rows), notes, f"`{report.command(args)}`  \n{rows[0]['device']}. {versions}"]
    report.save_text(args.output, "lqr", "\n\n".join(text))
    _plot(args.output / "lqr.png", rows)


# The problems.


def problem(n, m, T, batch, seed, dtype) -> dict[str, np.ndarray]:
    """The data of the LQR with the cotangent z_bar of z = (x, u), each [batch, T, …]."""
    rng = np.random.default_rng(seed)
    p = n + m
    A = 0.98 * np.linalg.qr(rng.normal(size=(batch, T, n, n)))[0]
    G = rng.normal(size=(batch, T, p, p))
    data = dict(
        C=G @ np.swapaxes(G, -1, -2) / p + 0.1 * np.eye(p),
        c=rng.normal(size=(batch, T, p)),
        F=np.concatenate([A, rng.normal(size=(batch, T, n, m))], -1),
        f=rng.normal(size=(batch, T, n)),
        x_init=rng.normal(size=(batch, n)),
        z_bar=rng.normal(size=(batch, T, p)),
    )
    return {name: a.astype(dtype) for name, a in data.items()}


def truth(C, c, F, f, x_init) -> np.ndarray:
    """z [batch, T, n+m] by a plain Riccati recursion; complex data are as good as real ones."""
    batch, T, n, _ = F.shape
    product = lambda A, v: np.einsum("bij,bj->bi", A, v)  # noqa: E731
    V, v = np.zeros((batch, n, n)), np.zeros((batch, n))
    policy = []
    for t in reversed(range(T)):
        F_T = np.swapaxes(F[:, t], 1, 2)
        Q = C[:, t] + F_T @ V @ F[:, t]
        q = c[:, t] + product(F_T, v + product(V, f[:, t]))
        Kk = -np.linalg.solve(Q[:, n:, n:], np.concatenate([Q[:, n:, :n], q[:, n:, None]], 2))
        K, k = Kk[..., :n], Kk[..., n]
        V = Q[:, :n, :n] + Q[:, :n, n:] @ K
        v = q[:, :n] + product(Q[:, :n, n:], k)
        policy.append((K, k))
    x, z = x_init, []
    for t, (K, k) in enumerate(reversed(policy)):
        z.append(np.concatenate([x, product(K, x) + k], 1))
        x = product(F[:, t], z[-1]) + f[:, t]
    return np.stack(z, 1)


# The quality.


def judged(given: dict, x, u) -> dict[str, float]:
    """The objective and the relative KKT residual of u, and how far x is from its rollout."""
    C, c, F, f, x_init = (np.asarray(given[name], np.float64) for name in DATA)
    x, u = np.asarray(x, np.float64), np.asarray(u, np.float64)
    batch, T, n, _ = F.shape
    state, z = x_init, []
    for t in range(T):
        z.append(np.concatenate([state, u[:, t]], 1))
        state = np.einsum("bij,bj->bi", F[:, t], z[-1]) + f[:, t]
    z = np.stack(z, 1)
    slope = np.einsum("btij,btj->bti", C, z) + c
    objective = 0.5 * np.sum((slope + c) * z, (1, 2))
    costate = np.zeros((batch, n))
    residual, terms = np.zeros(batch), np.zeros(batch)
    for t in reversed(range(T)):
        pull = np.einsum("bij,bi->bj", F[:, t], costate)
        here = slope[:, t] + pull
        costate = here[:, :n]
        residual = np.maximum(residual, abs(here[:, n:]).max(1))
        terms = np.maximum(terms, np.maximum(abs(slope[:, t, n:]), abs(pull[:, n:])).max(1))
    rolled = z[..., :n]
    return dict(
        objective_mean=float(objective.mean()),
        kkt_residual_worst=float(np.max(residual / terms)),
        kkt_residual_median=float(np.median(residual / terms)),
        rollout_error_worst=float(abs(x - rolled).max() / abs(rolled).max()),
    )


def gradient_error(given: dict, gradient: dict, seed: int) -> float:
    """The worst error of the derivatives along one random direction a problem, relative to the
    root of the sum of squares of the terms that it is the sum of."""
    rng = np.random.default_rng(seed)
    exact = {name: np.asarray(a, np.float64) for name, a in given.items()}
    direction = {name: rng.normal(size=exact[name].shape) for name in DATA}
    direction["C"] += np.swapaxes(direction["C"], -1, -2)
    step = 1e-30  # complex: nothing cancels
    moved = truth(*(exact[name] + 1j * step * direction[name] for name in DATA))
    slopes = np.sum(exact["z_bar"] * moved.imag, (1, 2)) / step
    terms = np.concatenate(
        [
            (np.asarray(gradient[name], np.float64) * direction[name]).reshape(len(slopes), -1)
            for name in DATA
        ],
        1,
    )
    return float(np.max(abs(terms.sum(1) - slopes) / np.sqrt(np.sum(terms**2, 1))))


# The contenders.


def _forward(data):
    def one(C, c, F, f, x_init):
        solution = lqr_solve(x_init, C, c, F, f)
        return solution.x[:-1], solution.u

    return jax.vmap(one)(*(data[name] for name in DATA))


def _both(data, z_bar):
    n = data["x_init"].shape[-1]
    z, pullback = jax.vjp(_forward, data)
    (gradient,) = pullback((z_bar[..., :n], z_bar[..., n:]))
    return z, gradient


def _measure(args, rows: report.Rows):
    sizes = QUICK_SIZES if args.quick else SIZES
    todo = [(size, dtype) for size in sizes for dtype in DTYPES]
    for size, dtype in tqdm(todo, desc=f"lqr, threads: {args.threads}", unit="size"):
        with jax.enable_x64(dtype == "float64"):
            _measure_size(args, rows, sizes, size, dtype)


def _measure_size(args, rows, sizes, size, dtype):
    setting = measure.setting()
    # Those of one turn met the same noise; HPIPM takes part in both and is float64 in both.
    key = dict(study="lqr", threads=setting["threads"], turn=dtype)
    key |= dict(zip(("n", "m", "T", "batch"), size, strict=True))
    given = problem(*size, args.seed, dtype)

    def name_of(contender, work):
        kind = "float64" if contender == HPIPM else dtype
        return key | dict(contender=contender, work=work, dtype=kind)

    def keep(contender, work, times=None, missing=None, plan=None, gradient=None, **more):
        row = name_of(contender, work) | setting | more
        if contender != JAXMPC:
            row["device"] = measure.cpu()
        if missing:
            return rows.add(row | dict(missing=missing))
        row |= dict(trace_s=None, compile_s=None) | more | measure.spread(times)
        row |= judged(given, *plan)
        if gradient is not None:
            row["gradient_error_worst"] = gradient_error(given, gradient, args.seed + 1)
        rows.add(row)

    for work in (FORWARD, BOTH):
        contenders = [JAXMPC, LANES]
        if work == FORWARD and key["threads"] == 1:
            contenders.append(HPIPM)
        # Those who take turns are measured together or not at all.
        if not all(rows.find(name_of(contender, work)) for contender in contenders):
            _in_turns(args, sizes, given, work, dtype, contenders, keep)
    if not all(rows.find(name_of(REFERENCE, work)) for work in (FORWARD, BOTH)):
        _reference(args, given, key["threads"], keep)


def _in_turns(args, sizes, given, work, dtype, contenders, keep):
    data = {name: jnp.asarray(given[name]) for name in DATA}
    arguments = (data,) if work == FORWARD else (data, jnp.asarray(given["z_bar"]))
    fn, compile_times = measure.compiled(_forward if work == FORWARD else _both, *arguments)
    calls, solvers, absent = {JAXMPC: lambda: fn(*arguments)}, {}, {}
    try:
        threads = len(os.sched_getaffinity(0))
        solvers[LANES] = native.Lanes(given, dtype, threads, tuple(size[:2] for size in sizes))
        one = solvers[LANES]
        calls[LANES] = one.solve if work == FORWARD else one.solve_and_differentiate
    except native.Absent as reason:
        absent[LANES] = str(reason)
    if HPIPM in contenders:
        try:
            if not args.peers:
                raise native.Absent(LEFT_OUT)
            solvers[HPIPM] = native.Hpipm(given)
            calls[HPIPM] = solvers[HPIPM].solve
        except native.Absent as reason:
            absent[HPIPM] = str(reason)

    times = measure.run_times(calls, repeats=args.repeats)
    result = fn(*arguments)
    plan, gradient = (result, None) if work == FORWARD else result
    keep(JAXMPC, work, times[JAXMPC], plan=plan, gradient=gradient, **compile_times)
    for contender, reason in absent.items():
        keep(contender, work, missing=reason)
    if LANES in solvers:
        gradient = None if work == FORWARD else solvers[LANES].gradient()
        about = f"{native.compiler('g++')}, {solvers[LANES].width} {dtype} lanes"
        plan = solvers[LANES].plan()
        keep(LANES, work, times[LANES], plan=plan, gradient=gradient, versions=about)
    if HPIPM in solvers:
        about = native.hpipm_version()
        keep(HPIPM, work, times[HPIPM], plan=solvers[HPIPM].plan(), versions=about)


def _reference(args, given, threads, keep):
    made = dict(missing=LEFT_OUT)
    if args.peers:
        options = dict(repeats=args.repeats, threads=threads)
        made = peers.attempt("reference_lqr.py", given | options, timeout_s=600)
    if "missing" in made:
        for work in (FORWARD, BOTH):
            keep(REFERENCE, work, missing=made["missing"])
        return
    n = given["x_init"].shape[-1]
    plan = made["z"][..., :n], made["z"][..., n:]
    about = dict(plan=plan, versions=str(made["versions"]))
    keep(REFERENCE, FORWARD, made["forward_s"], **about)
    keep(REFERENCE, BOTH, made["both_s"], gradient=made, **about)


# The table and the plot.

SIZE = ("n", "m", "T", "batch")


def _others(rows: list[dict]) -> dict:
    """Median times by contender, turn, size, threads and work."""
    return {_case(row): row["median_s"] for row in rows if "median_s" in row}


def _case(row, **changes):
    row = row | changes
    return tuple(row[name] for name in ("contender", "turn", *SIZE, "threads", "work"))


def _table(rows: list[dict]) -> str:
    header = ["n, m, T", "batch", "threads", "work", "type", "contender", "a problem", "min – max"]
    header += ["× HPIPM", "× C++ lanes", "compile", "KKT residual", "gradient error"]
    times = _others(rows)
    order = (JAXMPC, LANES, HPIPM, REFERENCE)
    rows = sorted(
        rows,
        key=lambda row: (
            *(row[name] for name in (*SIZE, "threads")),
            row["work"] != FORWARD,
            row["turn"],
            order.index(row["contender"]),
        ),
    )
    cells = []
    for row in rows:
        line = [f"{row['n']}, {row['m']}, {row['T']}", str(row["batch"]), str(row["threads"])]
        line += [row["work"], row["dtype"], row["contender"]]
        if "missing" in row:
            cells.append(line + [row["missing"]] + ["–"] * (len(header) - len(line) - 1))
            continue
        each = lambda name: report.seconds(row[name] / row["batch"])  # noqa: B023, E731
        line += [each("median_s"), f"{each('min_s')} – {each('max_s')}"]
        for other in (HPIPM, LANES):
            against = times.get(_case(row, contender=other))
            line.append(f"{row['median_s'] / against:.2g}" if against else "–")
        compile_s = row["compile_s"]
        line.append("–" if compile_s is None else report.seconds(compile_s + row["trace_s"]))
        line += [f"{row['kkt_residual_worst']:.1e}"]
        line += [f"{row['gradient_error_worst']:.1e}" if "gradient_error_worst" in row else "–"]
        cells.append(line)
    return report.markdown(header, cells, left=6)


def _plot(path, rows):
    """Microseconds a problem against what a problem costs: T (n+m)³, at one thread."""
    panels = {}
    for work in (FORWARD, BOTH):
        for dtype in DTYPES:
            panel = {}
            for contender in (JAXMPC, LANES, HPIPM, REFERENCE):
                wanted = dict(contender=contender, work=work, threads=1, turn=dtype)
                found = {  # of two batches the last
                    row["T"] * (row["n"] + row["m"]) ** 3: row["median_s"] / row["batch"]
                    for row in rows
                    if wanted.items() <= row.items() and "median_s" in row
                }
                if found:
                    panel[contender] = tuple(zip(*sorted(found.items()), strict=True))
            panels[f"{work}, {dtype}, one thread|T (n + m)³"] = panel
    report.plot(path, panels, "seconds a problem")
