"""Gradients of the library's plans in every input, beside those of the dense KKT system."""

import dataclasses
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmpc import Rate, Slack, certify, mpc_solve
from tests.families.dense import Dense
from tests.families.family import for_jax

FIELDS = ("x", "u", "objective", "multipliers")


class Compared(NamedTuple):
    """Of one start."""

    status: int
    errors: dict  # (output, input) -> relative
    condition: float  # of the equilibrated KKT matrix
    certificate: object
    size: float  # of the controls


def inputs(family):
    """Every number that shapes a plan, beside x_init and params."""
    _, named = for_jax(family)
    constraints = named["constraints"]
    given = {of: np.tile(named[of], (family.T, 1)) for of in ("u_lower", "u_upper")}
    for of in ("x_lower", "x_upper"):
        if getattr(family, of) is not None:
            given[of] = np.broadcast_to(np.asarray(getattr(family, of), float), (family.n,))
    if constraints.slack is not None:
        given |= {of: np.asarray(getattr(constraints.slack, of)) for of in ("linear", "quadratic")}
    if constraints.rate is not None:
        for of in ("previous", "limit", "weight"):
            value = getattr(constraints.rate, of)
            if value is not None:
                given[of] = np.broadcast_to(np.asarray(value, float), (family.m,))
    return given


def with_inputs(family, given):
    """Arguments of ``mpc_solve`` by name."""
    _, named = for_jax(family)
    parts = {of: given[of] for of in ("x_lower", "x_upper") if of in given}
    if "linear" in given:
        parts["slack"] = Slack(given["linear"], given["quadratic"])
    if "previous" in given:
        parts["rate"] = Rate(given["previous"], given.get("limit"), given.get("weight"))
    constraints = dataclasses.replace(named["constraints"], **parts)
    bounds = {of: given[of] for of in ("u_lower", "u_upper")}
    return {**named, **bounds, "constraints": constraints}


def compared(family, starts):
    """``Compared`` of the first so many, for a random loss of each output."""
    functions, _ = for_jax(family)
    x_init, u_init, params = (a[:starts] for a in family.starts())
    given = inputs(family)

    def solve(at, u):
        z = mpc_solve(*functions, at["x_init"], u, at["params"], **with_inputs(family, at))
        rows = {name: a for name, a in vars(z.multipliers).items() if a is not None}
        return {"x": z.x[1:], "u": z.u, "objective": z.objective, "multipliers": rows}, z

    def one(x, u, p, weights):
        at = {"x_init": x, "params": p} | jax.tree.map(jnp.asarray, given)
        out, pull, z = jax.vjp(lambda at: solve(at, u), at, has_aux=True)

        def cotangent(weights, out):  # every column by its own size
            size = jnp.abs(out) if out.ndim < 2 else jnp.max(jnp.abs(out), axis=0, keepdims=True)
            return weights / jnp.where(size > 0, size, 1)

        bar = jax.tree.map(cotangent, weights, out)
        zero = jax.tree.map(jnp.zeros_like, bar)
        each = [zero | {name: bar[name]} for name in FIELDS]
        slopes = jax.vmap(lambda bar: pull(bar)[0])(jax.tree.map(lambda *a: jnp.stack(a), *each))
        certificate = certify(*functions, x, z, p, **with_inputs(family, at))
        return z, bar, slopes, certificate

    first = {"x_init": x_init[0], "params": params[0]} | given
    shapes, _ = jax.eval_shape(solve, first, u_init[0])
    rng = np.random.default_rng(7)
    weights = jax.tree.map(lambda a: rng.normal(size=(starts, *a.shape)), shapes)
    found = jax.jit(jax.vmap(one))(x_init, u_init, params, weights)
    found, dense = jax.tree.map(np.asarray, found), Dense(family)
    return [
        _compare(dense, {"x_init": x_init[i], "params": params[i]} | given,
                 *jax.tree.map(lambda a, i=i: a[i], found))
        for i in range(starts)
    ]  # fmt: skip


def _compare(dense, given, z, bar, slopes, certificate):
    none = {of: np.zeros(0) for of in ("linear", "quadratic")}
    system = dense.at(z, none | given)
    rows = np.array([r.sign * bar["multipliers"][r.kind][r.place] for r in dense.rows])
    sizes = {of: _size(value) for of, value in given.items()}
    errors = {}
    for k, name in enumerate(FIELDS):
        if name == "multipliers" and system.redundant.any():
            continue  # no more than their sum is given
        on = SimpleNamespace(**{of: float(of == name) for of in FIELDS})
        want = system.gradient(
            on.x * bar["x"], on.u * bar["u"], on.objective * bar["objective"], on.multipliers * rows
        )
        # An input that hardly matters counts by those that do.
        most = max(np.max(np.abs(a), initial=0) * sizes[of] for of, a in want.items())
        for of, a in want.items():
            scale = max(np.max(np.abs(a), initial=0), 1e-6 * most / sizes[of])
            off = np.max(np.abs(slopes[of][k] - a), initial=0)
            errors[name, of] = off / (scale or 1.0)
    size = max(np.max(np.abs(z.u)), 1e-300)
    return Compared(int(z.status), errors, system.solve.condition, certificate, size)


def _size(value):
    return max(np.max(np.abs(np.where(np.isfinite(value), value, 0)), initial=0), 1e-3)
