"""How right are the gradients? jaxmpc and mpc.pytorch against the implicit function theorem.

The pendulum of Amos et al. 2018 (T = 20, |u| ≤ 2, (g, m, l) = (10, 1, 1)), in float64, from
random angles within ±π and rates within ±1 rad/s. The loss is a random linear function of the
controls, another one for each start; its gradient in (g, m, l) is compared.

The truth is dense and shares nothing with the solvers: the rolled-out objective J(u, θ) is
differentiated as it stands, and where ∇_u J = 0 on the free controls, du = −(∇²_uu J)⁻¹ ∇²_uθ J dθ
on them. The row "central differences" checks it, on plans that are solved again by Newton's method;
starts where a control changes from clamped to free within the step are left out there.

All gradients are taken at one plan, jaxmpc's: mpc.pytorch starts there and may move. Of its ways
to linearise the dynamics, AUTO_DIFF leaves the Jacobian's dependence on (g, m, l) out of the
gradient; ANALYTIC has it, from Jacobians that are written by hand. Both, as the "ilqr" Hessian,
leave out the curvature of the dynamics.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from bench import measure, peers, report
from jaxmpc import Options, Status
from jaxmpc.systems import pendulum, quadratic

T = 20
QUICK_STARTS = 8
PHYSICS = np.array([10.0, 1.0, 1.0])  # g, m, l
CONTROL_WEIGHTS = (1e-3, 0.1)
MARGIN = 1e-6  # of a multiplier above 0 and of a free control inside its bounds
STEP = 1e-6  # of central differences, relative
RESIDUAL = 1e-10  # of a plan that is solved again

DIFFERENCES = "central differences"
EXACT = "jaxmpc"
ILQR = 'jaxmpc, `backward_hessian="ilqr"`'
REFERENCE = {
    "auto_diff": "mpc.pytorch, `GradMethods.AUTO_DIFF`",
    "analytic": "mpc.pytorch, `GradMethods.ANALYTIC`",
}


def add_arguments(parser):
    parser.add_argument(
        "--starts", type=int, default=64, help="random starts, 2 or more (%(default)s)"
    )
    report.add_basic_arguments(
        parser, f"{QUICK_STARTS} starts at most, in half a minute", "of starts and losses"
    )


def run(args):
    if args.starts < 2:
        raise SystemExit("--starts must be 2 or more: mpc.pytorch refuses a batch of 1")
    starts = min(args.starts, QUICK_STARTS) if args.quick else args.starts
    with jax.enable_x64(True):
        rows, notes, peer_versions = compare(starts, args.seed)
    versions = report.versions("jaxmpc", "jax", "jaxlib", "numpy")
    if peer_versions:
        versions += f"; mpc.pytorch with {peer_versions}"
    text = "\n\n".join([_table(rows), "\n".join(notes), f"`{report.command(args)}`  \n{versions}."])
    kept = report.Rows(args.output, "gradients")
    for row in rows:
        kept.add(row)
    report.save_text(args.output, "gradients", text)


def compare(starts: int, seed: int) -> tuple[list[dict], list[str], str]:
    """The rows of the table, the notes below it, and the versions of the peer ("" if absent)."""
    rng = np.random.default_rng(seed)
    x_init = pendulum.state(rng.uniform(-np.pi, np.pi, starts), rng.uniform(-1.0, 1.0, starts))
    loss = rng.normal(size=(starts, T, 1))
    rows, notes, peer_versions = [], [], ""
    for control_weight in CONTROL_WEIGHTS:
        problem = x_init, loss, control_weight
        exact, solution = _by_jaxmpc(PHYSICS, *problem, Options())
        ilqr, _ = _by_jaxmpc(PHYSICS, *problem, Options(backward_hessian="ilqr"))
        reference = _by_reference(solution.u, *problem)

        truth, free, margin = _truth(solution.u, PHYSICS, *problem)
        differences, residual = _differences(solution.u, free, PHYSICS, *problem)
        converged = np.asarray(solution.status == Status.CONVERGED)
        degenerate = converged & np.asarray(margin < MARGIN)
        # The last control moves no state that costs anything: it is 0 whatever the parameters.
        idle = converged & ~degenerate & ~np.asarray(free[:, :-1].any((1, 2)))
        used = converged & ~degenerate & ~idle
        notes.append(
            f"- Control weight {control_weight:g}: {converged.sum()} of {starts} starts converged; "
            f"{degenerate.sum()} of these are left out for a control at the edge of being clamped, "
            f"{idle.sum()} because every control that acts is clamped."
        )
        if reference:
            distance = max(np.abs(reference[f"{way}_u"] - solution.u).max() for way in REFERENCE)
            notes[-1] += f" mpc.pytorch ends at most {distance:.1g} N·m from jaxmpc's plans."
            peer_versions = str(reference["versions"])

        gradients = {DIFFERENCES: differences, EXACT: exact, ILQR: ilqr}
        for way, method in REFERENCE.items():
            gradients[method] = reference[f"{way}_gradient"] if reference else None
        for method, gradient in gradients.items():
            row = dict(study="gradients", control_weight=control_weight, method=method)
            counted = used & np.asarray(residual < RESIDUAL) if method == DIFFERENCES else used
            if gradient is None:
                row["missing"] = peers.ABSENT
            elif not counted.any():
                row["missing"] = "no start left"
            else:
                row |= _summary(np.asarray(gradient)[counted], np.asarray(truth)[counted])
            rows.append(row)
    return rows, notes, peer_versions


def _summary(gradient: np.ndarray, truth: np.ndarray) -> dict:
    size = np.linalg.norm(truth, axis=1)
    error = np.linalg.norm(gradient - truth, axis=1) / size
    sizes = size * np.linalg.norm(gradient, axis=1)
    cosine = np.sum(gradient * truth, axis=1) / np.maximum(sizes, np.finfo(float).tiny)
    return dict(
        median_error=float(np.median(error)),
        percentile_95_error=float(np.percentile(error, 95)),
        worst_error=float(np.max(error)),
        smallest_cosine=float(np.min(cosine)),
        wrong_way=float(np.mean(cosine < 0)),
        starts=len(error),
    )


def _table(rows: list[dict]) -> str:
    header = [
        "control weight",
        "method",
        "median relative error",
        "95th percentile",
        "worst",
        "smallest cosine",
        "wrong way",
        "starts",
    ]
    cells = []
    for row in rows:
        line = [f"{row['control_weight']:g}", row["method"]]
        if "missing" in row:
            line += [row["missing"]] + ["–"] * (len(header) - 3)
        else:
            line += [f"{row[f'{name}_error']:.2g}" for name in ("median", "percentile_95", "worst")]
            line += [f"{row['smallest_cosine']:.3f}", f"{row['wrong_way']:.0%}", str(row["starts"])]
        cells.append(line)
    return report.markdown(header, cells, left=2)


# The methods.


def _params(physics: Array, control_weight) -> pendulum.Params:
    cost = quadratic.goal_cost([1.0, 0.0, 0.0], [1.0, 1.0, 0.1], control_weight, m=1)
    return pendulum.Params(pendulum.Physics(*physics), cost)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0, None, None))
@functools.partial(jax.grad, has_aux=True)
def _by_jaxmpc(physics, x_init, loss, control_weight, options):
    params = _params(physics, control_weight)
    solution = measure.plan(pendulum, x_init, jnp.zeros((T, 1)), params, options=options)
    return jnp.vdot(loss, solution.u), solution


def _by_reference(u, x_init, loss, control_weight) -> dict:
    """Gradients and plans [starts, T, 1] of mpc.pytorch, or nothing where it is not installed."""
    if not peers.present():
        return {}
    cost = _params(PHYSICS, control_weight).cost
    problem = dict(
        x_init=x_init,
        u_init=np.swapaxes(u, 0, 1),
        loss=np.swapaxes(loss, 0, 1),
        physics=PHYSICS,
        dt=pendulum.DT,
        limit=pendulum.U_UPPER,
        q=cost.q,
        p=cost.p,
    )
    made = peers.run("reference_gradients.py", problem)
    return {key: np.swapaxes(a, 0, 1) if key.endswith("_u") else a for key, a in made.items()}


# The truth.


def _objective(u, physics, x_init, control_weight):
    params = _params(physics, control_weight)

    def step(x, u_t):
        return pendulum.dynamics(x, u_t, 0, params), pendulum.cost(x, u_t, 0, params)

    return jnp.sum(jax.lax.scan(step, x_init, u)[1])


def _newton_matrix(u, free, *problem):
    """∇²_uu J on the free controls and the identity on the others, [T, T]."""
    hessian = jax.hessian(_objective)(u, *problem).reshape(u.size, u.size)
    free = free.ravel()
    return jnp.where(jnp.outer(free, free), hessian, jnp.eye(u.size))


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, 0, 0, None))
def _truth(u, physics, x_init, loss, control_weight):
    """The gradient in the physics, the free controls, and how far they are from changing."""
    slope = jax.grad(_objective)
    multiplier = slope(u, physics, x_init, control_weight)
    at_lower = (u <= pendulum.U_LOWER) & (multiplier > 0)
    at_upper = (u >= pendulum.U_UPPER) & (multiplier < 0)
    free = ~(at_lower | at_upper)
    room = jnp.minimum(u - pendulum.U_LOWER, pendulum.U_UPPER - u)
    margin = jnp.min(jnp.where(free, room, jnp.abs(multiplier)))

    matrix = _newton_matrix(u, free, physics, x_init, control_weight)
    adjoint = jnp.linalg.solve(matrix, jnp.where(free, loss, 0.0).ravel()).reshape(u.shape)

    def pairing(physics):
        return jnp.vdot(adjoint, slope(u, physics, x_init, control_weight))

    return -jax.grad(pairing)(jnp.asarray(physics)), free, margin


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, None, 0, 0, None))
def _differences(u, free, physics, x_init, loss, control_weight):
    """The gradient by central differences of plans that are solved again, and the largest
    violation of their first-order conditions: not small where a control changed from clamped to
    free or back."""
    slope = jax.grad(_objective)
    steps = STEP * physics

    def solve_again(physics):
        problem = physics, x_init, control_weight

        def newton(_, u):
            right = jnp.where(free, slope(u, *problem), 0.0).ravel()
            return u - jnp.linalg.solve(_newton_matrix(u, free, *problem), right).reshape(u.shape)

        again = jax.lax.fori_loop(0, 4, newton, u)
        projected = jnp.clip(again - slope(again, *problem), pendulum.U_LOWER, pendulum.U_UPPER)
        return jnp.vdot(loss, again), jnp.max(jnp.abs(projected - again))

    shifts = jnp.diag(steps)
    moved = jax.vmap(lambda shift: solve_again(physics + shift))
    values, residuals = moved(jnp.concatenate([shifts, -shifts]))
    return (values[:3] - values[3:]) / (2.0 * steps), jnp.max(residuals)
