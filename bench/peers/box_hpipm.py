"""Box-constrained linear-quadratic problems by HPIPM (box_hpipm.c), on one thread.

Reads an .npz with
    A [B, n, n], B [B, n, m], Q [B, n, n], R [B, m, m], x_init [B, n], T, limit, tolerances [k],
    repeats
and writes an .npz with, for each tolerance,
    seconds [k, repeats], u [k, B, T, m], status (0 is success) and iterations [k, B]; versions.
"""

import ctypes
import importlib.metadata
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from common import main, versions

FOLDER = pathlib.Path(sys.prefix) / "acados"  # made by `make peers`
INSTALL = FOLDER / "acados" / "install"


def library(directory):
    if not INSTALL.exists():
        sys.exit("absent (bench/peers/acados.txt has no package for this machine)")
    lib, made = INSTALL / "lib", pathlib.Path(directory, "box_hpipm.so")
    headers = [f"-I{INSTALL / 'include' / name}" for name in ("hpipm/include", "blasfeo/include")]
    source = pathlib.Path(__file__).with_suffix(".c")
    command = ["gcc", "-O3", "-march=native", "-shared", "-fPIC", *headers, source, "-o", made]
    subprocess.run([*command, f"-L{lib}", "-lhpipm", "-lblasfeo"], check=True)
    # The libraries do not say where they find each other; loaded ones are found.
    for name in ("libblasfeo.so", "libhpipm.so"):
        ctypes.CDLL(lib / name, ctypes.RTLD_GLOBAL)
    box = ctypes.CDLL(made)
    box.box_solve.restype = ctypes.c_double
    return box.box_solve


def solve(given):
    x_init, T = np.ascontiguousarray(given["x_init"]), int(given["T"])
    (batch, n), m = x_init.shape, given["B"].shape[2]
    columns = [np.swapaxes(given[name], 1, 2).copy() for name in ("A", "B", "Q", "R")]
    pointer = lambda array: array.ctypes.data_as(ctypes.c_void_p)  # noqa: E731
    made = dict(seconds=[], u=[], status=[], iterations=[])
    with tempfile.TemporaryDirectory() as directory:
        box_solve = library(directory)
        for tolerance in given["tolerances"]:
            u = np.empty((batch, T, m))
            status, iterations = np.empty((2, batch), np.int32)
            call = lambda: box_solve(  # noqa: E731
                n, m, T, batch, *map(pointer, columns), pointer(x_init),
                ctypes.c_double(given["limit"]), ctypes.c_double(tolerance),  # noqa: B023
                pointer(u), pointer(status), pointer(iterations),  # noqa: B023
            )  # fmt: skip
            call()
            made["seconds"].append([call() for _ in range(given["repeats"])])
            for name, array in (("u", u), ("status", status), ("iterations", iterations)):
                made[name].append(array)
    (own,) = importlib.metadata.distributions(name="comma-deps-acados", path=[str(FOLDER)])
    return made | dict(versions=f"{versions('numpy')}, {own.name} {own.version}")


if __name__ == "__main__":
    main(solve)
