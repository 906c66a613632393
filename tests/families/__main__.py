"""``python -m tests.families [names or patterns] [--dtype float32] [--starts N]``.

One row a family. IPOPT's results are kept under ``--cache``; ``--ipopt`` shows them alone.
"""

import argparse
import collections

import jax
import numpy as np

from jaxmpc import Options, Status, ilqr_box, mpc_solve
from tests.families.families import named
from tests.families.measure import CACHE, measure, reference


def row(family, args, totals):
    ref = reference(family, args.cache, args.starts)
    theirs = ref["success"].astype(bool)
    mean, most = ref["iterations"].mean(), ref["iterations"].max()
    said = f"{family.name:22s} {theirs.sum():5d} {mean:6.0f} {most:4d}"
    if args.ipopt:
        failures = sorted(set(ref["status"][~theirs]))
        return said + f"  f {np.median(ref['objective']):.3g}  " + " ".join(failures)
    # Before ours runs: a family that raises counts as not solved.
    if not family.infeasible:
        totals["theirs"] += theirs.sum()
        totals["all"] += len(theirs)
    solver = {"mpc_solve": mpc_solve, "ilqr_box": ilqr_box}[args.solver]
    r = measure(family, ref, args.dtype, solver, Options(max_iterations=args.iterations))
    if family.infeasible:
        totals["infeasible"] += r.count(Status.INFEASIBLE)
        totals["contradictory"] += len(r.good)
    else:
        totals["both"] += r.both.sum()
        totals["good"] += r.good.sum()
    totals["false"] += r.false(args.allowed).sum()
    lower, higher = r.lower.sum(), r.higher.sum()
    totals["lower"] += lower
    totals["higher"] += higher
    worst = f"{r.violation[r.good].max():.0e}" if r.good.any() else "-"
    counts = {s.name: r.count(s) for s in Status if s != Status.CONVERGED}
    others = " ".join(f"{name[:7]} {count}" for name, count in counts.items() if count)
    return (
        f"{said} | {r.good.sum():4d} {r.both.sum():4d}"
        f"  {r.iterations.mean():5.0f} {r.iterations.max():4d}"
        f"  {lower:3d}/{r.both.sum() - lower - higher}/{higher:<3d} {worst:>6s}"
        f" {r.compiling:6.1f} {r.running:6.2f}"
        f"  {others}{'  (INFEASIBLE is right)' if family.infeasible else ''}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--starts", type=int, help="the first so many alone")
    parser.add_argument("--solver", choices=("mpc_solve", "ilqr_box"), default="mpc_solve")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--cache", default=CACHE)
    parser.add_argument("--ipopt", action="store_true", help="IPOPT alone")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", args.dtype == "float64")
    args.allowed = 1e-6 if args.dtype == "float64" else 1e-3

    print(f"{'':22s} IPOPT   mean  max | ours both   mean  max  low/=/high  worst   comp    run")
    totals = collections.Counter()
    for family in named(args.names):
        try:
            print(row(family, args, totals), flush=True)
        except Exception as error:
            text = " ".join(str(error).split())
            print(f"{family.name:22s} {type(error).__name__}: {text[:150]}", flush=True)
    if not args.ipopt:
        share = totals["both"] / max(totals["theirs"], 1)
        print(
            f"of {totals['theirs']} that IPOPT solves {totals['both']} converge ({share:.1%}), "
            f"of all {totals['all']} {totals['good']}; objective lower {totals['lower']}, higher "
            f"{totals['higher']}; false CONVERGED (above {args.allowed:.0e}) {totals['false']}; "
            f"INFEASIBLE {totals['infeasible']} of {totals['contradictory']} that are"
        )


if __name__ == "__main__":
    main()
