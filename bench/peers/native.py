"""The LQR solvers in C and C++ beside this file, compiled here and called within this process.

So they take turns with jaxmpc under one clock. Setting up (copying the problem into the layout of
the solver, reading the result) is no part of ``solve``.
"""

import ctypes
import functools
import importlib.metadata
import pathlib
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_double, c_int, c_void_p

import numpy as np

from bench import peers

HERE = pathlib.Path(__file__).parent
ACADOS = peers.ROOT / ".venv-peers" / "acados" / "acados" / "install"
FLAGS = ("-O3", "-march=native", "-fPIC")


class Absent(Exception):
    """Why a solver cannot run here."""


def compiler(name: str) -> str:
    """The first line of ``name --version``."""
    if shutil.which(name) is None:
        raise Absent(f"absent ({name} is not installed)")
    return subprocess.check_output([name, "--version"], text=True).splitlines()[0]


def _build(command: str, source: str, flags: list[str], link: list[str]) -> ctypes.CDLL:
    compiler(command)
    with tempfile.TemporaryDirectory() as directory:
        made, library = (pathlib.Path(directory, name) for name in ("solver.o", "solver.so"))
        # In two steps: linking with -ffast-math would flush denormals in the whole process.
        compiling = [command, *FLAGS, *flags, "-c", HERE / source, "-o", made]
        linking = [command, "-shared", made, "-o", library, *link]
        for step in (compiling, linking):
            process = subprocess.run(step, capture_output=True, text=True)
            if process.returncode:
                raise Absent(f"absent ({source} does not compile: {process.stderr[-300:]})")
        return ctypes.CDLL(str(library))


@functools.cache
def _lanes_library(sizes: tuple[tuple[int, int], ...]) -> ctypes.CDLL:
    names = " ".join(f"SIZE({n},{m})" for n, m in sizes)
    flags = ["-std=c++17", "-ffast-math", "-fopenmp", f"-DSIZES={names}"]
    library = _build("g++", "riccati_lanes.cpp", flags, ["-fopenmp"])
    library.lanes_create.restype = c_void_p
    library.lanes_create.argtypes = [c_int] * 5 + [c_void_p]
    for name in ("lanes_solve", "lanes_solve_and_differentiate"):
        getattr(library, name).argtypes = [c_void_p, c_int]
    library.lanes_read_plan.argtypes = [c_void_p] * 2
    library.lanes_read_gradient.argtypes = [c_void_p] * 6
    library.lanes_free.argtypes = [c_void_p]
    return library


@functools.cache
def _hpipm_library() -> ctypes.CDLL:
    if not (ACADOS / "lib" / "libhpipm.so").exists():
        raise Absent(peers.ABSENT)
    folders = ["include", "include/hpipm/include", "include/blasfeo/include"]
    flags = [f"-I{ACADOS / folder}" for folder in folders]
    lib = ACADOS / "lib"
    link = [f"-L{lib}", "-lhpipm", "-lblasfeo", f"-Wl,-rpath,{lib}"]
    # libhpipm does not say where its own dependency lies.
    ctypes.CDLL(str(lib / "libblasfeo.so"), mode=ctypes.RTLD_GLOBAL)
    library = _build("gcc", "hpipm_riccati.c", flags, link)
    library.hpipm_create.restype = c_void_p
    library.hpipm_create.argtypes = [c_int] * 4 + [POINTER(c_double)] * 5
    library.hpipm_solve.argtypes = [c_void_p]
    library.hpipm_read.argtypes = [c_void_p] + [POINTER(c_double)] * 2
    library.hpipm_free.argtypes = [c_void_p]
    return library


def hpipm_version() -> str:
    found = importlib.metadata.distributions(path=[str(ACADOS.parents[1])])
    return ", ".join(f"{one.name} {one.version}" for one in found)


def _contiguous(arrays: dict, names: str, dtype) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(arrays[name], dtype) for name in names.split()}


class Lanes:
    """``riccati_lanes.cpp`` on one batch; sizes: all (n, m) that the library is compiled for."""

    def __init__(self, problem: dict, dtype, threads: int, sizes: tuple[tuple[int, int], ...]):
        self._library = _lanes_library(tuple(sorted(set(sizes))))
        self._given = _contiguous(problem, "C c F f x_init z_bar", dtype)
        self._threads = threads
        self.dtype = np.dtype(dtype)
        batch, T, n, p = self._given["F"].shape
        pointers = (c_void_p * 6)(*(a.ctypes.data for a in self._given.values()))
        sizes = self.dtype.itemsize, n, p - n, T, batch
        self._solver = self._library.lanes_create(*sizes, pointers)
        if not self._solver:
            raise ValueError(f"not compiled for (n, m) = {(n, p - n)}")

    @property
    def width(self) -> int:
        """Problems side by side."""
        return self._library.lanes_width(self.dtype.itemsize)

    def solve(self):
        self._library.lanes_solve(self._solver, self._threads)

    def solve_and_differentiate(self):
        self._library.lanes_solve_and_differentiate(self._solver, self._threads)

    def plan(self) -> tuple[np.ndarray, np.ndarray]:
        """x [batch, T, n] and u [batch, T, m]."""
        z = np.empty_like(self._given["c"])
        self._library.lanes_read_plan(self._solver, z.ctypes.data)
        n = self._given["f"].shape[-1]
        return z[..., :n], z[..., n:]

    def gradient(self) -> dict[str, np.ndarray]:
        made = {name: np.empty_like(self._given[name]) for name in ("C", "c", "F", "f", "x_init")}
        pointers = (a.ctypes.data for a in made.values())
        self._library.lanes_read_gradient(self._solver, *pointers)
        return made

    def __del__(self):
        if getattr(self, "_solver", None):
            self._library.lanes_free(self._solver)


class Hpipm:
    """``hpipm_riccati.c`` on one batch, in float64 and on one thread."""

    def __init__(self, problem: dict):
        self._library = _hpipm_library()
        given = _contiguous(problem, "C c F f x_init", np.float64)
        batch, T, n, p = given["F"].shape
        self._x_init = given["x_init"]
        self._shape = batch, T, n, p - n
        pointers = (_pointer(a) for a in given.values())
        self._batch = self._library.hpipm_create(n, p - n, T, batch, *pointers)

    def solve(self):
        self._library.hpipm_solve(self._batch)

    def plan(self) -> tuple[np.ndarray, np.ndarray]:
        batch, T, n, m = self._shape
        x, u = np.empty((batch, T, n)), np.empty((batch, T, m))
        self._library.hpipm_read(self._batch, _pointer(x), _pointer(u))
        x[:, 0] = self._x_init
        return x, u

    def __del__(self):
        if getattr(self, "_batch", None):
            self._library.hpipm_free(self._batch)


def _pointer(a: np.ndarray):
    return a.ctypes.data_as(POINTER(c_double))
