"""What the scripts here share: arrays in and out by .npz, seconds of a call, versions."""

import importlib.metadata
import os
import platform
import sys
import time

import numpy as np


def main(solve):
    """Write to the second .npz what ``solve`` makes of the first; the script's own main."""
    source, target = sys.argv[1:]
    with np.load(source) as arrays:
        given = {key: value if value.ndim else value.item() for key, value in arrays.items()}
    threads = int(given.get("threads", 0))
    if threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    np.savez(target, **solve(given))


def timed(call, repeats, budget_s=20.0):
    """What ``call`` returns, and the seconds of each repeat: fewer, but one, beyond the budget."""
    seconds = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < budget_s):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, seconds


def versions(*packages):
    found = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])
