"""How fast are box-constrained linear-quadratic problems? Random systems, from small to large.

    minimise  Σ ½ x_tᵀ Q x_t + ½ u_tᵀ R u_t,   x_{t+1} = A x_t + B u_t,   |u| ≤ limit

Every problem of a batch has matrices of its own: A normal, scaled to a spectral radius within
[0.9, 1.02], so that some are stable and some are not; B normal; Q and R positive definite;
x_0 normal times 30. n = 8, m = 4, T = 40, batch 64, limits 1 and 10, float64, at residuals
1e-3, 1e-5 and 1e-7; and then, at residual 1e-5 and limit 1, one of batch, T and (n, m) changes
at a time. Forward, and forward with the gradient of mean(u²) in Q and R. Contenders:

- jaxmpc.mpc_solve, with cost and dynamics that read their matrices from params;
- the same with the matrices themselves, as `Quadratic` and `Affine`;
- mpc.pytorch, the paper's own implementation (`mpc` 0.0.6), by its `QuadCost` and `LinDx`;
- HPIPM (interior point, in C), the whole batch one after the other on one thread, without setting
  up: forward alone;
- CasADi with IPOPT, a check of the objective at one size.

Quality is judged on the controls that come back, by autodiff of the rolled-out objective: the
residual is max |clip(u − ∇J, −limit, limit) − u| over the batch. Each contender gets the loosest
tolerance 1e-j of its own with which it is within the residual asked for, or the tightest that was
tried, and then has no ratio. Every search starts at u = 0. jaxmpc is measured before and after the
others. A point that took more than --budget seconds is the last of its sweep.
"""

import functools
import itertools
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import measure, peers, report
from jaxmpc import Affine, Options, Quadratic, mpc_solve

BASE = dict(n=8, m=4, T=40, batch=64)
LIMITS = (1.0, 10.0)
TARGETS = (1e-3, 1e-5, 1e-7)
SWEEP_TARGET = 1e-5
SWEEPS = dict(
    batch=[dict(batch=size) for size in (1, 4, 16, 64, 256, 1024)],
    T=[dict(T=steps) for steps in (10, 20, 40, 80, 160, 320)],
    size=[dict(n=n, m=n // 2) for n in (4, 8, 16, 32, 64)],
)
RADIUS = 0.9, 1.02
SCALE = 30.0
WORKS = FORWARD, GRADIENT = "forward", "forward + gradient"
JAXMPC, MATRICES = "jaxmpc", "jaxmpc, matrices"
REFERENCE, HPIPM, CASADI = "mpc.pytorch", "HPIPM", "CasADi + IPOPT"
TOLERANCES = 10.0 ** -np.arange(1.0, 13.0)


def add_arguments(parser):
    report.add_common_arguments(parser)
    parser.add_argument(
        "--sweeps", nargs="*", default=list(SWEEPS), choices=list(SWEEPS), help="(%(default)s)"
    )
    parser.add_argument("--budget", type=float, default=120.0, help="seconds a point (%(default)s)")


def run(args):
    rows = report.Rows(args.output, "box_lq", args.resume)
    with jax.enable_x64(True):
        measure_all(args, rows)
    places = {f"{row['device']}, {row['threads']} threads" for row in rows}
    text = "\n\n".join([table(rows), report.notes(rows, report.command(args), places)])
    report.save_text(args.output, "box_lq", text)
    report.plot(args.output / "box_lq.png", panels(rows))


def measure_all(args, rows):
    base = dict(n=4, m=2, T=10, batch=4) if args.quick else BASE
    points = [
        ("", limit, base, TARGETS, limit == LIMITS[0])
        for limit in (LIMITS[:1] if args.quick else LIMITS)
    ]
    for sweep in [] if args.quick else args.sweeps:
        points += [
            (sweep, LIMITS[0], base | change, [SWEEP_TARGET], False) for change in SWEEPS[sweep]
        ]
    stopped: dict[tuple, str] = {}  # by sweep and contender, why it goes no further
    for sweep, limit, sizes, targets, check in tqdm(points, "box_lq"):
        case = Case(args, rows, sweep, limit, sizes, stopped)
        others = [case.reference, case.hpipm, *([case.casadi] if check else [])]
        case.compare(targets, others)


def problem(seed, n, m):
    """A, B, Q, R and x_0 of one random problem."""
    rng = np.random.default_rng(seed)
    positive = lambda k: (lambda g: g @ g.T / k + 0.1 * np.eye(k))(rng.normal(size=(k, k)))  # noqa: E731
    A = rng.normal(size=(n, n))
    A *= rng.uniform(*RADIUS) / np.abs(np.linalg.eigvals(A)).max()
    return A, rng.normal(size=(n, m)), positive(n), positive(m), SCALE * rng.normal(size=n)


def cost(x, u, t, params):
    del t
    _, _, Q, R = params
    return 0.5 * (x @ Q @ x + u @ R @ u)


def dynamics(x, u, t, params):
    del t
    A, B, _, _ = params
    return A @ x + B @ u


class Case:
    """One size and limit: what is measured, and the rows it gives."""

    def __init__(self, args, rows, sweep, limit, sizes, stopped):
        self.args, self.rows, self.sweep, self.limit = args, rows, sweep, limit
        self.stopped = stopped
        self.n, self.m, self.T, self.batch = (sizes[name] for name in ("n", "m", "T", "batch"))
        # Problem i of a batch is the same whatever the size of the batch.
        drawn = [problem([args.seed, self.n, self.m, i], self.n, self.m) for i in range(self.batch)]
        *params, x_init = map(np.array, zip(*drawn, strict=True))
        self.params, self.x_init = tuple(map(jnp.asarray, params)), jnp.asarray(x_init)
        self.key = dict(study="box_lq", system="random linear", dtype="float64", limit=limit)
        self.key |= sizes | dict(seed=args.seed, sweep=sweep)

    def compare(self, targets, others):
        """jaxmpc, the others, and jaxmpc again; rows that are there already stay as they are."""
        made, works = [], WORKS[1:] if self.args.quick else WORKS
        for contender, work in itertools.product((JAXMPC, MATRICES), works):
            key = self.key | measure.setting() | dict(contender=contender)
            if all(self.rows.find(key | dict(work=work, target=goal)) for goal in targets):
                continue
            if self.is_stopped(key | dict(work=work), [work], targets):
                continue
            start = time.perf_counter()
            call, compiling = measure.compiled(
                functools.partial(gradient if work == GRADIENT else solve, contender),
                self.params, self.x_init, jnp.zeros((self.T, self.m)), self.limit,
                Options(tolerance=1.0),
            )  # fmt: skip
            for target in targets:
                chosen, found = self.choose(call, target)
                row = key | dict(work=work, target=target) | compiling | found
                made.append((chosen, row, self.times(chosen)))
            self.clock(contender, time.perf_counter() - start)
        for other in others:
            other(targets)
        for chosen, row, times in made:
            self.rows.add(row | measure.spread(times + self.times(chosen)))

    def times(self, call):
        repeats = -(-self.args.repeats // 2)
        return measure.run_times(dict(it=call), repeats=repeats)["it"]

    @functools.cached_property
    def judged(self):
        bounds = -self.limit, self.limit
        return measure.judge(cost, dynamics, self.params, self.x_init, *bounds, params_axis=0)

    def choose(self, call, target):
        """jaxmpc with the loosest tolerance that is within the target, and what comes of it."""
        for tolerance in TOLERANCES:
            given = self.params, self.x_init, jnp.zeros((self.T, self.m)), self.limit
            chosen = functools.partial(call, *given, Options(tolerance=tolerance))
            solution = chosen()[1]
            found = self.judged(solution.u)
            if found["kkt_residual_worst"] <= target:
                break
        found |= measure.outcome(solution.status, solution.iterations)
        return chosen, found | dict(
            tolerance=float(tolerance),
            clamped_share=float(1.0 - jnp.mean(solution.free)),
            clamped_problems=float(jnp.mean(jnp.any(~solution.free, (1, 2)))),
        )

    # What goes no further in a sweep.

    def clock(self, contender, seconds):
        if self.sweep and seconds > self.args.budget:
            reason = f"stopped: the size before took {seconds:.0f} s"
            self.stopped[self.sweep, contender] = reason

    def is_stopped(self, key, works, targets):
        reason = self.stopped.get((self.sweep, key["contender"]))
        for work in works if reason else []:
            for target in targets:
                self.rows.add(key | dict(work=work, target=target, missing=reason))
        return reason is not None

    # The others.

    def peer(self, name, script, targets, works, tolerances):
        """Rows of a peer: its controls at all tolerances first, then its times at those chosen."""
        key = self.key | dict(
            contender=name, device=measure.cpu(), threads=len(os.sched_getaffinity(0))
        )
        wanted = [key | dict(work=work, target=goal) for work in works for goal in targets]
        if all(map(self.rows.find, wanted)) or self.is_stopped(key, works, targets):
            return
        params = dict(zip("ABQR", self.params, strict=True))
        given = params | dict(x_init=self.x_init, T=self.T, limit=self.limit)
        attempt = functools.partial(peers.attempt, script, timeout_s=5 * self.args.budget)
        start = time.perf_counter()
        if not self.args.peers:
            first = dict(missing=peers.LEFT_OUT)
        else:
            first = attempt(given | dict(tolerances=tolerances, repeats=1))
        if "missing" in first:
            if "stopped" in first["missing"]:
                self.clock(name, time.perf_counter() - start)
            for row in wanted:
                self.rows.add(row | dict(missing=first["missing"]))
            return
        plain = "u" in first  # forward alone
        controls = first["u"] if plain else first["forward_u"]
        residuals = [self.judged(u)["kkt_residual_worst"] for u in controls]
        places = [
            next(
                (i for i, residual in enumerate(residuals) if residual <= goal), len(residuals) - 1
            )
            for goal in targets
        ]
        chosen = sorted(set(places))
        again = given | dict(tolerances=[tolerances[i] for i in chosen], repeats=self.args.repeats)
        made = attempt(again)
        self.clock(name, time.perf_counter() - start)
        for work in works:
            prefix = "" if plain else "gradient_" if work == GRADIENT else "forward_"
            for target, place in zip(targets, places, strict=True):
                row = key | dict(work=work, target=target, tolerance=float(tolerances[place]))
                if "missing" in made:
                    self.rows.add(row | dict(missing=made["missing"]))
                    continue
                at = chosen.index(place)
                iterations, status = made[f"{prefix}iterations"][at], None
                if "status" in made:
                    share = float(np.mean(made["status"][at] == 0))
                    status = dict(CONVERGED=share, other=1.0 - share)
                self.rows.add(
                    row
                    | dict(versions=str(made["versions"]), trace_s=0.0, compile_s=0.0)
                    | dict(status=status, iterations_mean=float(np.mean(iterations)))
                    | dict(iterations_max=int(np.max(iterations)))
                    | measure.spread(made[f"{prefix}seconds"][at])
                    | self.judged(made[f"{prefix}u"][at])
                )

    def reference(self, targets):
        if self.batch == 1:
            key = self.key | dict(contender=REFERENCE, device=measure.cpu())
            for work in WORKS:
                self.rows.add(
                    key
                    | dict(threads=len(os.sched_getaffinity(0)), work=work, target=targets[0])
                    | dict(missing="refuses a batch of 1")
                )
            return
        tolerances = [1e-3, 1e-6, 1e-9] if not self.sweep else [1e-4, 1e-7]
        self.peer(REFERENCE, "reference_box_lq.py", targets, WORKS, tolerances)

    def hpipm(self, targets):
        self.peer(HPIPM, "box_hpipm.py", targets, [FORWARD], TOLERANCES[2:])

    def casadi(self, targets):
        self.peer(CASADI, "casadi_box_lq.py", targets[-1:], [FORWARD], [1e-12])


def _functions(contender, params):
    if contender == JAXMPC:
        return cost, dynamics
    A, B, Q, R = params
    weights = jax.scipy.linalg.block_diag(Q, R)
    return Quadratic(weights), Affine(jnp.concatenate([A, B], axis=1))


def solve(contender, params, x_init, u_init, limit, options):
    def plan(params, x_init):
        functions = _functions(contender, params)
        bounds = dict(u_lower=-limit, u_upper=limit)
        return mpc_solve(*functions, x_init, u_init, params, options=options, **bounds)

    solution = jax.vmap(plan)(params, x_init)
    return jnp.mean(solution.u**2), solution


def gradient(contender, params, x_init, u_init, limit, options):
    def loss(weights):
        return solve(contender, (*params[:2], *weights), x_init, u_init, limit, options)

    return jax.grad(loss, has_aux=True)(params[2:])


# What a reader sees.

GROUP = ("sweep", "limit", "n", "m", "T", "batch", "target", "work")


def table(rows) -> str:
    header = [
        *("sweep", "limit", "n", "m", "T", "batch", "residual asked", "work", "contender"),
        *(*report.TIMES, "clamped"),
        *("tolerance", "KKT residual, worst", "objective, mean", "times jaxmpc's"),
    ]
    order = {name: place for place, name in enumerate((JAXMPC, MATRICES, REFERENCE, HPIPM, CASADI))}
    sweeps = ["", *SWEEPS]
    rank = lambda row: (  # noqa: E731
        sweeps.index(row["sweep"]), row["limit"], row["n"], row["T"], row["batch"],
        -row["target"], WORKS.index(row["work"]), order[row["contender"]],
    )  # fmt: skip
    cells, ours = [], {}
    for row in sorted(rows, key=rank):
        group = tuple(row[name] for name in GROUP)
        line = [row["sweep"] or "–", *(f"{row[name]:g}" for name in GROUP[1:-1])]
        line += [row["work"], row["contender"]]
        if "missing" in row:
            cells.append(line + [row["missing"]] + ["–"] * (len(header) - len(line) - 1))
            continue
        ratio = "–"
        if row["contender"] == JAXMPC:
            ours[group] = row
        elif group in ours and all(good(item) for item in (row, ours[group])):
            ratio = f"{row['median_s'] / ours[group]['median_s']:.3g} ×"
        clamped = row.get("clamped_share")
        cells.append(
            [
                *line,
                *report.times(row),
                "–" if clamped is None else f"{clamped:.0%}",
                f"{row['tolerance']:.0e}",
                report.number(row["kkt_residual_worst"]),
                report.number(row["objective_mean"], ".8g"),
                ratio,
            ]
        )
    return report.markdown(header, cells, left=9)


def good(row) -> bool:
    """Whether the row is within the residual that was asked for."""
    return row["kkt_residual_worst"] is not None and row["kkt_residual_worst"] <= row["target"]


def panels(rows) -> dict:
    """Time against what a sweep changes; where there is none, against the residual reached."""
    axes = dict(batch="batch", T="T", size="n")
    made: dict[str, dict] = {}
    for row in rows:
        if "missing" in row or row["contender"] == CASADI or row["limit"] != LIMITS[0]:
            continue
        sweep = row["sweep"]
        x = row[axes[sweep]] if sweep else row["kkt_residual_worst"]
        name = axes[sweep] if sweep else "worst KKT residual"
        title = f"over {name}|{name}"
        label = row["contender"] + (" + gradient" if row["work"] == GRADIENT else "")
        if x:
            made.setdefault(title, {}).setdefault(label, []).append((x, row["median_s"]))
    return {
        title: {label: tuple(zip(*sorted(points), strict=True)) for label, points in panel.items()}
        for title, panel in made.items()
    }
