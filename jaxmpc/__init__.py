"""Differentiable model predictive control for JAX."""

from importlib import metadata

from jaxmpc.certificate import Certificate, certify
from jaxmpc.closed_loop import receding_horizon
from jaxmpc.gradient_check import GradientReport, check_gradients
from jaxmpc.ilqr import ilqr_box
from jaxmpc.lqr import lqr_solve
from jaxmpc.mpc import mpc_solve
from jaxmpc.problem.matrices import Affine, Quadratic
from jaxmpc.record import plot_record
from jaxmpc.summary import summarize
from jaxmpc.types import (
    Action,
    Constraints,
    Episode,
    LQRSolution,
    Multipliers,
    Options,
    Rate,
    Record,
    Slack,
    Smoothing,
    Solution,
    Status,
    Violations,
)
from jaxmpc.unrolled import ilqr_unrolled
from jaxmpc.warm_start import WarmStart, shift

__all__ = [
    "Action",
    "Affine",
    "Certificate",
    "Constraints",
    "Episode",
    "GradientReport",
    "LQRSolution",
    "Multipliers",
    "Options",
    "Quadratic",
    "Rate",
    "Record",
    "Slack",
    "Smoothing",
    "Solution",
    "Status",
    "Violations",
    "WarmStart",
    "certify",
    "check_gradients",
    "ilqr_box",
    "ilqr_unrolled",
    "lqr_solve",
    "mpc_solve",
    "plot_record",
    "receding_horizon",
    "shift",
    "summarize",
]

try:
    __version__ = metadata.version("jaxmpc")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"
