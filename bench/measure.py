"""What every study measures: compile time apart from run time, medians with their spread, and in
the same row how good the result is, so that a fast wrong answer cannot win."""

import functools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import report
from jaxmpc import Status, mpc_solve


def pin(threads: int) -> None:
    """Keep this process on so many CPUs; before JAX's first computation, which sizes its pools."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def cpu() -> str:
    """The kind of this machine's processor, where every peer runs."""
    return f"cpu {platform.processor() or platform.machine()}"


def setting() -> dict[str, Any]:
    """Where and with what this process measures."""
    device = jax.devices()[0]
    return dict(
        device=cpu() if device.platform == "cpu" else device.device_kind,
        threads=len(os.sched_getaffinity(0)),
        versions=report.versions("jaxmpc", "jax", "jaxlib", "numpy"),
    )


def compiled(fn: Callable, *args) -> tuple[Callable, dict[str, float]]:
    """``fn`` compiled for ``args``, and how long that took."""
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    middle = time.perf_counter()
    executable = lowered.compile()
    end = time.perf_counter()
    return executable, dict(trace_s=middle - start, compile_s=end - middle)


def run_times(
    contenders: dict[str, Callable[[], Any]], *, repeats: int = 7, at_least_s: float = 0.05
) -> dict[str, list[float]]:
    """Seconds a call of each contender, taken in turn so that all meet the same noise.

    A call that is short is repeated until ``at_least_s`` have passed, and the mean counts.
    """
    numbers = {}
    for name, call in contenders.items():
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        once = time.perf_counter() - start
        numbers[name] = max(1, int(np.ceil(at_least_s / max(once, 1e-7))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(numbers[name]):
                result = call()
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - start) / numbers[name])
    return times


def spread(times: list[float]) -> dict[str, Any]:
    """The median of the times, with their minimum and maximum."""
    return dict(
        median_s=float(np.median(times)),
        min_s=float(np.min(times)),
        max_s=float(np.max(times)),
        repeats=len(times),
    )


def outcome(status, iterations) -> dict[str, Any]:
    """The share of each status in a batch (by name), and the iterations."""
    names, counts = np.unique(np.asarray(status).ravel(), return_counts=True)
    iterations = np.asarray(iterations)
    return dict(
        status={
            Status(int(s)).name: float(c / counts.sum()) for s, c in zip(names, counts, strict=True)
        },
        iterations_mean=float(iterations.mean()),
        iterations_max=int(iterations.max()),
    )


def in_float32(study: Callable) -> Callable:
    """``study``, whatever JAX's default precision is."""

    @functools.wraps(study)
    def run(args):
        with jax.enable_x64(False):
            return study(args)

    return run


def plan(system, x_init, u_init, params, solve: Callable = mpc_solve, **options):
    """``solve`` for one problem of a module of jaxmpc.systems, within its bounds."""
    return solve(
        system.cost,
        system.dynamics,
        x_init,
        u_init,
        params,
        u_lower=system.U_LOWER,
        u_upper=system.U_UPPER,
        **options,
    )


def judge(
    cost, dynamics, params, x_init, lower, upper, terminal_cost=None, params_axis=None
) -> Callable[[Any], dict[str, float]]:
    """A function of controls u [batch, T, m] that judges them: see ``judged``."""

    def objective(u, x_init, params):
        def step(x, data):
            u, t = data
            return dynamics(x, u, t, params), cost(x, u, t, params)

        x_final, costs = jax.lax.scan(step, x_init, (u, jnp.arange(u.shape[0])))
        final = 0.0 if terminal_cost is None else terminal_cost(x_final, params)
        return jnp.sum(costs) + final

    def one(u, x_init, params, lower, upper):
        value, slope = jax.value_and_grad(objective)(u, x_init, params)
        return value, jnp.max(jnp.abs(jnp.clip(u - slope, lower, upper) - u))

    evaluate = jax.jit(jax.vmap(one, in_axes=(0, 0, params_axis, None, None)))

    def verdict(u):
        with jax.enable_x64(True):
            arguments = jax.tree.map(
                lambda a: jnp.asarray(a, jnp.float64), (u, x_init, params, lower, upper)
            )
            values, residual = evaluate(*arguments)
            return dict(
                objective_mean=float(jnp.mean(values)),
                kkt_residual_worst=float(jnp.max(residual)),
                kkt_residual_median=float(jnp.median(residual)),
            )

    return verdict


def judged(system, params, x_init, u) -> dict[str, float]:
    """The objective and the KKT residual of a system's controls u [batch, T, m], whoever made them.

    In float64, by plain autodiff of the rolled-out objective: shares no code with any solver.
    ``judge`` does the same for many u and compiles once; its ``params_axis=0`` is for problems
    with parameters of their own.
    """
    bounds = (jnp.broadcast_to(b, u.shape[1:]) for b in (system.U_LOWER, system.U_UPPER))
    return judge(system.cost, system.dynamics, params, x_init, *bounds)(u)
