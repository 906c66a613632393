"""Faults of one line, and the tests that have to notice them.

    python tests/faults.py             # every fault, one at a time, and which test caught it
    python tests/faults.py gradient    # those whose name or file says so

Each is applied to a copy of the checkout. The tests that should notice it run first; if they do
not, the whole quick suite gets its chance. ``make slow`` runs all of this.
"""

import argparse
import concurrent.futures
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    name: str
    file: str  # of the library
    right: str  # stands there exactly once
    wrong: str
    tests: str  # where it should be noticed first


GRADIENTS = "tests/gradients/test_unconstrained_gradients.py"
ROWS = "tests/gradients/test_constrained_gradients.py"
SECOND = "tests/gradients/test_second_derivatives.py"
FORWARD = "tests/gradients/test_forward_mode.py"
PLANS = "tests/solutions/test_unconstrained.py"
CONSTRAINED = "tests/solutions/test_constrained.py"
STATE_BOUNDS = "tests/solutions/test_state_bounds.py tests/gradients/test_constrained_gradients.py"
FIRST_STAGE = "tests/solutions/test_first_stage.py"
ISOLATION = "tests/isolation"
STATUSES = "tests/statuses"
LQR = "tests/public/test_lqr.py"
INTERIOR = "tests/machinery/test_interior.py"
INFEASIBLE = "tests/statuses/test_infeasible.py"

FAULTS = [
    # Derivatives from inside the bounds.
    Fault(
        "derivatives are those at the bound", "problem/inside.py",
        "return u + lax.stop_gradient(jnp.clip(u, low, high) - u)", "return u",
        "tests/solutions/test_clipped_controls.py",
    ),
    Fault(
        "between equal bounds the way in is out", "problem/inside.py",
        "jnp.where(up, lower + step(lower), lower - step(lower))",
        "jnp.where(up, lower - step(lower), lower + step(lower))",
        "tests/solutions/test_clipped_controls.py",
    ),
    # Isolation.
    Fault(
        "the plant is differentiated where its derivative is not finite", "derivative/isolation.py",
        "found = finite((at, slopes(lambda x, u: moving(x, u, t, theta), x, u)))",
        "found = finite(at)", ISOLATION,
    ),
    Fault(
        "the gains of an LQR problem that is not finite move", "lqr.py",
        "system, rhs = zeros_unless(sound, (system, rhs))",
        "C = system.C", ISOLATION,
    ),
    # The derivative.
    Fault(
        "a clamped control moves against its bound", "derivative/implicit.py",
        "return jnp.where(free, 0, bound - u)", "return jnp.where(free, 0, u - bound)", GRADIENTS,
    ),
    Fault(
        "a tangent forgets that clamped controls move", "derivative/implicit.py",
        "residual(system, clamped, rhs))", "rhs)", FORWARD,
    ),
    Fault(
        "a product at the default precision", "batch/lanes.py",
        "_PRECISION = lax.Precision.HIGHEST", "_PRECISION = None",
        "tests/transforms/test_precision.py",
    ),
    Fault(
        "the bounds are mistaken for each other", "derivative/implicit.py",
        "jnp.where(multiplier > 0, lower, jnp.where(multiplier < 0, upper, middle))",
        "jnp.where(multiplier > 0, upper, jnp.where(multiplier < 0, lower, middle))", GRADIENTS,
    ),
    Fault(
        "the objective moves with its bounds as the plan does", "derivative/implicit.py",
        "return cotangent, policy(bound_multiplier * cotangent), None, None",
        "return cotangent, policy(cotangent + bound_multiplier * 0), None, None", GRADIENTS,
    ),
    Fault(
        "∇²cost in place of the Hamiltonian's Hessian", "solver/linearization.py",
        "hessian=H if exact else expanded.C,", "hessian=expanded.C,", GRADIENTS,
    ),
    Fault(
        "the exact Hessian where the paper's is asked for", "solver/linearization.py",
        "hessian=H if exact else expanded.C,", "hessian=H,", GRADIENTS,
    ),
    Fault(
        "the mask of clamped controls is left out", "solver/propose.py",
        "jnp.where(certify, jnp.where(here.clamped, 0, -jnp.inf), lower - u),",
        "jnp.where(certify, -jnp.inf, lower - u),", GRADIENTS,
    ),
    Fault(
        "what a function closes over counts as a constant", "problem/trace.py",
        "core.ClosedJaxpr(closed.jaxpr, constants)",
        "core.ClosedJaxpr(closed.jaxpr, closed.consts)",
        "tests/transforms/test_transforms.py",
    ),
    Fault(
        "how the physics move the costates is left out",
        "derivative/lagrangian.py",
        "return problem.cost(x, u, t, theta) + lanes.vdot(costate, x_next) + paid, (x_next, g)",
        "return problem.cost(x, u, t, theta) + paid, (x_next, g)",
        GRADIENTS,
    ),
    Fault(
        "the objective forgets the initial state", "derivative/lagrangian.py",
        "+ lanes.vdot(costate[0], x_init - x[0])", "", GRADIENTS,
    ),
    Fault(
        "the gains do not know the rows' weights", "derivative/implicit.py",
        "C, C_final = penalised(C, C_final, ActiveRows(G, state.active, weights))", "pass", ROWS,
    ),
    Fault(
        "to an outer differentiation the matrices stand still", "derivative/tied.py",
        "value = value if moves else tie(value, *others)\n        return value, (value, others)",
        "return value, (value, others)", SECOND,
    ),
    # Isolation.
    Fault(
        "no point stands in where there is none", "derivative/isolation.py",
        "    return _borrow(solved, tree)", "    return tree", ISOLATION,
    ),
    Fault(
        "the cotangent of a failed problem goes through", "derivative/isolation.py",
        "jnp.where(self.used, a, self.blank)", "a + 0 * self.blank", ISOLATION,
    ),
    Fault(
        "the policy for failed problems is always zero", "derivative/implicit.py",
        'blank = jnp.nan if options.unconverged == "nan" else 0.0', "blank = 0.0", ISOLATION,
    ),
    # Rows and their prices.
    Fault(
        "a row's price is halved", "problem/prices.py",
        "(linear + 0.5 * quadratic * g) * g", "(linear + 0.25 * quadratic * g) * g", CONSTRAINED,
    ),
    Fault(
        "the slope of a row's price is halved", "problem/prices.py",
        "jnp.where(beyond, linear, 0) + quadratic * g, 0)",
        "jnp.where(beyond, linear, 0) + 0.5 * quadratic * g, 0)", ROWS,
    ),
    Fault(
        "a row's price does not bend", "problem/prices.py",
        "lambda quadratic, beyond: jnp.where(beyond, quadratic, 0), prices.quadratic",
        "lambda quadratic, beyond: jnp.where(beyond, 0 * quadratic, 0), prices.quadratic", ROWS,
    ),
    Fault(
        "an equality is taken for an inequality", "problem/constraints.py",
        "-np.inf if kind.equality else 0", "0", CONSTRAINED,
    ),
    Fault(
        "the multipliers of rate and state lose their sign", "problem/constraints.py",
        "_by_kind(problem, rows), jnp.subtract)", "_by_kind(problem, rows), jnp.add)", CONSTRAINED,
    ),
    Fault(
        "the rate may be as large downward as it likes", "problem/constraints.py",
        "sign=-1 if kind.below else 1", "sign=0 if kind.below else 1", CONSTRAINED,
    ),
    Fault(
        "the derivative between equal bounds goes to one of them", "problem/constraints.py",
        "upper = 0.5 * (upper + jnp.where(equal, lower, upper))", "", STATE_BOUNDS,
    ),
    Fault(
        "the first state has to keep to the bounds of the states", "problem/constraints.py",
        "upper.at[0].set(jnp.inf)", "upper", STATE_BOUNDS,
    ),
    Fault(
        "rows that no control moves have to be met", "problem/constraints.py",
        "first = jnp.where(unmoved, 0, rows.stage[0])", "first = rows.stage[0]", FIRST_STAGE,
    ),
    Fault(
        "rows that bend count as straight", "problem/expansions.py",
        "if multipliers.stage.shape[1]:", "if False:", ROWS,
    ),
    Fault(
        "the last rows that bend count as straight", "problem/expansions.py",
        "if multipliers.final.shape[0]:", "if False:", ROWS,
    ),
    Fault(
        "what the weights leave stays in the gradient", "riccati/constrained.py",
        "_MAX_CORRECTIONS = 100", "_MAX_CORRECTIONS = 1", ROWS,
    ),
    # Statuses.
    Fault(
        "a saddle is called a minimum", "solver/judgement.py",
        "converged = stationary & definite", "converged = stationary", STATUSES,
    ),
    Fault(
        "converged is claimed early",
        "solver/assessment.py",
        "tolerance = goal = 1e-10",
        "tolerance = goal = 1e-3",
        "tests/solutions",
    ),
    Fault(
        "a trip that stops counts as an iteration", "solver/box.py",
        "iterations=s.iterations + jnp.where(verdict.stop | forced, 0, 1),",
        "iterations=s.iterations + 1,", "tests/solutions tests/statuses",
    ),
    Fault(
        "a step is taken whatever the objective does",
        "solver/line_search.py",
        "enough = change <= _SUFFICIENT * jnp.minimum(predicted, 0)",
        "enough = change <= jnp.inf",
        "tests/solutions",
    ),
    Fault(
        "crossed bounds count as feasible", "solver/box.py",
        "jnp.where(wanted & feasible, RUNNING, CROSSED)", "jnp.where(wanted, RUNNING, CROSSED)",
        STATUSES,
    ),
    # The step.
    Fault(
        "a control on the wrong side of its bound is clamped", "solver/box_qp.py",
        "((d <= lower) & (gradient > 0))", "((d <= lower) & (gradient < 0))",
        "tests/machinery/test_box_qp.py",
    ),
    Fault(
        "the rollout of a step leaves the bounds", "solver/line_search.py",
        "u_new = jnp.clip(straight + lanes.matvec(K, x_new - x), lower, upper)",
        "u_new = straight + lanes.matvec(K, x_new - x)", PLANS,
    ),
    Fault(
        "a saddle is left where the curvature is positive", "solver/escape.py",
        "jnp.where(lanes.identity(m, bound.ndim), bound, 0) - Q, 0)",
        "jnp.where(lanes.identity(m, bound.ndim), bound, 0) + Q, 0)", STATUSES,
    ),
    Fault(
        "the costate is that of the stage before", "problem/expansions.py",
        "costate = c + lanes.matvec_t(F, costate)",
        "costate = c - lanes.matvec_t(F, costate)", PLANS,
    ),
    Fault(
        "the quadratic cost is doubled", "problem/matrices.py",
        "return lanes.dot(z, 0.5 * lanes.matvec(C, z) + c)",
        "return lanes.dot(z, lanes.matvec(C, z) + c)", "tests/solutions/test_formulation.py",
    ),
    # The step, with rows.
    Fault(
        "a distance from a row moves the wrong way", "solver/interior/barrier.py",
        "dw = dsigma - step.miss - move", "dw = dsigma - step.miss + move", INTERIOR,
    ),
    Fault(
        "the boundary is not seen by the distances", "solver/interior/barrier.py",
        "least(share(inequality, at.w, move.w), share(soft, at.sigma, move.sigma))",
        "least(share(inequality, at.nu, move.nu), share(soft, at.sigma, move.sigma))", INTERIOR,
    ),
    Fault(
        "upper and lower bounds of the controls are swapped", "solver/interior/barrier.py",
        "jnp.concatenate([jnp.isfinite(high), jnp.isfinite(low)], axis=1)",
        "jnp.concatenate([jnp.isfinite(low), jnp.isfinite(high)], axis=1)", INTERIOR,
    ),
    Fault(
        "one entry of the filter is enough to pass", "solver/interior/filter.py",
        "jnp.all(lower_theta | lower_phi, axis=0)", "jnp.any(lower_theta | lower_phi, axis=0)",
        INTERIOR,
    ),
    Fault(
        "the price of a soft row does not limit its multiplier", "solver/interior/active_set.py",
        "jnp.where(sides.soft, jnp.minimum(held, sides.linear), held)", "held", INTERIOR,
    ),
    Fault(
        "the gaps of the dynamics are left out of the slope", "solver/interior/newton.py",
        "lambda v, V, gap: v + lanes.matvec(V, gap), v, V, gap)",
        "lambda v, V, gap: v + 0 * lanes.matvec(V, gap), v, V, gap)", INTERIOR,
    ),
    Fault(
        "a clamped control goes to the far bound", "solver/interior/step.py",
        "jnp.where(at_low | (low == high), low, high)",
        "jnp.where(at_low | (low == high), high, low)", CONSTRAINED,
    ),
    Fault(
        "the barrier of a bound pushes to it", "solver/interior/step.py",
        "c = c.at[:, n:].add(upper - lower)", "c = c.at[:, n:].add(lower - upper)", CONSTRAINED,
    ),
    Fault(
        "a violation at rest is said to have stalled", "solver/interior/method.py",
        "infeasible = s.infeasible | (rests & s.second)",
        "infeasible = s.infeasible | (rests & ~s.second)", INFEASIBLE,
    ),
    # Linear-quadratic problems.
    Fault(
        "the affine term of the dynamics is lost on the way back", "riccati/sequential.py",
        "lambda v, V, f: v + lanes.matvec(V, f), v, V_next, f)",
        "lambda v, V, f: v + 0 * lanes.matvec(V, f), v, V_next, f)", LQR,
    ),
    Fault(
        "half of the derivative in F", "riccati/kkt.py",
        "F=_outer(point.costate[1:], wz) + _outer(w.costate[1:], z),",
        "F=_outer(point.costate[1:], wz),", LQR,
    ),
    Fault(
        "the parallel scan is never checked", "riccati/parallel.py",
        "return _replaced_by(stage_by_stage)(~holds, V, (C, F, C_final, free))",
        "return _replaced_by(stage_by_stage)(holds & ~holds, V, (C, F, C_final, free))",
        "tests/machinery/test_parallel.py",
    ),
    # Batches.
    Fault(
        "a lane's result goes to the problem before", "batch/turns.py",
        "rows.at[jnp.where(done, index, size)]", "rows.at[jnp.where(done, index - 1, size)]",
        "tests/machinery/test_turns.py",
    ),
    Fault(
        "a lane keeps the data of the problem before", "batch/turns.py",
        "data = take(jnp.minimum(index, size - 1))", "data = take(jnp.maximum(index - 1, 0))",
        "tests/machinery/test_turns.py",
    ),
    Fault(
        "nested batches are numbered from the inside", "batch/batchwise.py",
        "inner = [tuple(k + 1 for k in own) for own in axes]",
        "inner = [tuple(k for k in own) for own in axes]", "tests/machinery/test_batchwise.py",
    ),
    Fault(
        "a stretch of the batch is added up in the wrong order", "batch/trailing.py",
        "_SUMS = dict(reduce_sum=jnp.add, reduce_max=jnp.maximum,",
        "_SUMS = dict(reduce_sum=jnp.add, reduce_max=jnp.minimum,",
        "tests/machinery/test_trailing.py",
    ),
    # The other calls.
    Fault(
        "the rate of a closed loop counts from the first control", "warm_start.py",
        "rate = dataclasses.replace(rate, previous=self.previous)",
        "rate = dataclasses.replace(rate)",
        "tests/public/test_warm_start.py tests/public/test_closed_loop.py",
    ),
    Fault(
        "an unrolled step goes to the wrong bound",
        "unrolled.py",
        "target = jnp.where(free, u + d, jnp.where(d <= lower - u, lower, upper))",
        "target = jnp.where(free, u + d, jnp.where(d <= lower - u, upper, lower))",
        "tests/public/test_unrolled.py",
    ),
    Fault(
        "the certificate looks at the far bound", "certificate.py",
        "jnp.where(free, jnp.minimum(upper - at.u, at.u - lower), jnp.inf)",
        "jnp.where(free, jnp.maximum(upper - at.u, at.u - lower), jnp.inf)",
        "tests/public/test_certificate.py",
    ),
    Fault(
        "the certificate lets go of the active rows", "certificate.py",
        "(nu > lower) & (nu <= linear)", "(nu > lower) & (nu < lower)",
        "tests/public/test_certificate.py",
    ),
    Fault(
        "a wrong gradient is excused as rounding", "gradient_check.py",
        "_ROUNDINGS = 1e3", "_ROUNDINGS = 1e12", "tests/public/test_gradient_check.py",
    ),
]  # fmt: skip


def checkout(folder: Path) -> Path:
    """A copy of the checkout that shares its compiled programs."""
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv*", ".cache", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (copy / ".cache").symlink_to(ROOT / ".cache")
    return copy


def first_failure(copy: Path, *options: str) -> str | None:
    """The first test that fails in a checkout, if one does."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    failed = re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if run.returncode not in (0, 1) and not failed:
        raise RuntimeError(
            f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout[-2000:]}"
        )
    return failed[0] if failed else None


def caught_by(fault: Fault, everywhere: bool = True) -> str | None:
    """The test that notices a fault, among those named with it or, ``everywhere``, in the whole
    quick suite; None if they pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = checkout(Path(folder))
        path = copy / "jaxmpc" / fault.file
        text = path.read_text("utf-8")
        if text.count(fault.right) != 1:
            raise ValueError(f"{fault.file} must have exactly one {fault.right!r}")
        path.write_text(text.replace(fault.right, fault.wrong), "utf-8")
        found = first_failure(copy, *fault.tests.split())
        return found or (first_failure(copy) if everywhere else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("pattern", nargs="?", default="", help="in the name or file of a fault")
    parser.add_argument(
        "--named", action="store_true", help="run the tests that are named with a fault alone"
    )
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time")
    args = parser.parse_args()
    found_by = functools.partial(caught_by, everywhere=not args.named)
    chosen = [fault for fault in FAULTS if args.pattern in f"{fault.name} {fault.file}"]
    caught = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for fault, test in zip(chosen, pool.map(found_by, chosen), strict=True):
            caught += test is not None
            print(f"{fault.file}: {fault.name}\n    {test or 'NOT CAUGHT'}", flush=True)
    print(f"{caught} of {len(chosen)} faults are caught")


if __name__ == "__main__":
    main()
