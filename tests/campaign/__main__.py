"""``python -m tests.campaign [patterns of chunks]``: a row a chunk, resumable.

What was measured is kept under ``--cache``; remove that after a change of the solver.
"""

import argparse
import collections
import fnmatch
import time
from pathlib import Path

from jaxmpc import Status
from tests.campaign.measure import CACHE, chunks, measured, verdict
from tests.campaign.problems import KINDS


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=["*"], help="such as '*-float32-*'")
    parser.add_argument("--cache", default=CACHE, type=Path)
    args = parser.parse_args()
    print(f"{'':34s} converged  of well-posed  false moved  iterations    s  others")
    totals = collections.defaultdict(collections.Counter)
    for chunk in chunks():
        if not any(fnmatch.fnmatch(chunk.name, f"*{name}*") for name in args.names):
            continue
        began = time.perf_counter()
        z = measured(chunk, cache=args.cache)
        v = verdict(chunk, z)
        good = v.converged[0]
        others = [
            f"{KINDS[k]} {Status(int(s)).name}"
            for s, k in zip(z["status"][0][~good], z["kind"][~good], strict=True)
        ]
        others = ", ".join(f"{n} {what}" for what, n in collections.Counter(others).items())
        its = z["iterations"]
        row = dict(
            all=good.size, converged=good.sum(), well=v.well_posed[0].sum(),
            both=(good & v.well_posed[0]).sum(), false=v.false.sum(),
            moved=v.moved.sum(),
        )  # fmt: skip
        totals[chunk.dtype].update(row)
        print(
            f"{chunk.name:34s} {row['converged']:5d} {row['both']:6d} {row['well']:6d} "
            f"{row['false']:8d} {row['moved']:5d} "
            f"{its[0].mean():6.1f} {its.max():4d} {time.perf_counter() - began:6.1f}  {others}",
            flush=True,
        )
    for dtype, t in totals.items():
        print(
            f"{dtype}: {t['converged']} of {t['all']} converge, of {t['well']} well-posed "
            f"{t['both']} ({t['both'] / max(t['well'], 1):.2%}); at three scales {t['false']} "
            f"false, {t['moved']} that depend on the scale"
        )


if __name__ == "__main__":
    main()
