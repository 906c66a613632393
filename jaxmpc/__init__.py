"""Differentiable model predictive control for JAX."""

from jaxmpc.ilqr import ilqr_box
from jaxmpc.lqr import lqr_solve
from jaxmpc.mpc import mpc_solve
from jaxmpc.types import LQRSolution, Options, Solution, Status

__all__ = [
    "LQRSolution",
    "Options",
    "Solution",
    "Status",
    "ilqr_box",
    "lqr_solve",
    "mpc_solve",
]
