"""The same problems in other units: of states, controls, rows and cost, all in the parameters."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxmpc import Rate, mpc_solve
from tests.families.family import Rows, for_jax, row_count


@dataclasses.dataclass(frozen=True)
class Units:
    """How often the new unit goes into the old one; ``far``: the weight and the distance of a row
    that is never near active, weight · x[0] ≤ distance."""

    x: np.ndarray  # [n]
    u: np.ndarray  # [m]
    rows: np.ndarray  # one a row of the functions
    cost: float = 1.0
    far: tuple = (0.0, 1.0)  # no control moves this one

    def with_unit(self, of, i, factor):
        new = np.array(getattr(self, of))
        new[i] = factor
        return dataclasses.replace(self, **{of: new})

    def flat(self):
        return np.concatenate([self.x, self.u, self.rows, [self.cost], self.far])


def own_units(family):
    rows = sum(row_count(family, r) for r in family.rows)
    return Units(np.ones(family.n), np.ones(family.m), np.ones(rows))


def changes(family):
    """Of every unit by itself: kind -> name -> ``Units``."""
    own = own_units(family)
    found = {"rows": {}, "states": {}, "controls": {}, "cost": {}, "far rows": {}}
    for kind, of, factors in (
        ("rows", "rows", (1e-6, 1e-3, 1e3, 1e6)),
        ("states", "x", (1e-4, 1e-2, 1e2, 1e4)),
        ("controls", "u", (1e-4, 1e-2, 1e2, 1e4)),
    ):
        for i in range(len(getattr(own, of))):
            for factor in factors:
                found[kind][f"{of}[{i}] x {factor:.0e}"] = own.with_unit(of, i, factor)
    for factor in (1e-6, 1e-3, 1e3, 1e6):
        found["cost"][f"cost x {factor:.0e}"] = dataclasses.replace(own, cost=factor)
    for distance in (1e3, 1e6):
        away = distance * max(1, np.max(np.abs(family.starts()[0][:, 0])))
        found["far rows"][f"at {distance:.0e}"] = dataclasses.replace(own, far=(1.0, away))
    return found


def in_units(family, far):
    """The family whose parameters end with ``Units.flat``; ``far``: it has that row as well."""
    n, m, k = family.n, family.m, family.starts(1)[2].shape[1]
    rows = sum(row_count(family, r) for r in family.rows)
    at_u, at_rows, at_cost = k + n, k + n + m, k + n + m + rows
    assert not any(np.isfinite(r.linear).any() for r in family.rows), "prices have units, too"

    def old(x, u, p):
        back = [x[i] / p[k + i] for i in range(n)]
        return back, None if u is None else [u[i] / p[at_u + i] for i in range(m)]

    def dynamics(lib, x, u, t, p):
        return [p[k + i] * a for i, a in enumerate(family.dynamics(lib, *old(x, u, p), t, p))]

    def cost(lib, x, u, t, p):
        return p[at_cost] * family.cost(lib, *old(x, u, p), t, p)

    def terminal_cost(lib, x, p):
        return p[at_cost] * family.terminal_cost(lib, old(x, None, p)[0], p)

    def in_new(r, first):
        def fn(lib, x, u, t, p):
            values = r.fn(lib, *old(x, u, p), t, p)
            return [p[at_rows + first + i] * g for i, g in enumerate(values)]

        return dataclasses.replace(r, fn=fn)

    renewed, first = [], 0
    for r in family.rows:
        renewed.append(in_new(r, first))
        first += row_count(family, r)
    if far:
        renewed.append(
            Rows(lambda lib, x, u, t, p: [p[at_cost + 1] * x[0] / p[k] - p[at_cost + 2]])
        )
    ones = own_units(family).flat()

    def sample(rng, N):
        x, u, p = family.sample(rng, N)
        p = np.asarray(p, float).reshape(N, -1)
        return x, u, np.append(p, np.tile(ones, (N, 1)), 1)

    return dataclasses.replace(
        family, dynamics=dynamics, cost=cost, sample=sample, rows=tuple(renewed),
        terminal_cost=None if family.terminal_cost is None else terminal_cost,
    )  # fmt: skip


def solver(family, far=True):
    """(x [n], u [T, m], p) -> solution, in the units that p ends with."""
    new = in_units(family, far)
    n, m, k = family.n, family.m, family.starts(1)[2].shape[1]
    functions, named = for_jax(new)

    def solve(x, u, p):
        per_x, per_u, cost = p[k : k + n], p[k + n : k + n + m], p[-3]
        constraints = named["constraints"]
        given = {
            of: per_x * jnp.asarray(getattr(constraints, of), x.dtype)
            for of in ("x_lower", "x_upper")
            if getattr(constraints, of) is not None
        }
        if constraints.rate is not None:
            previous, limit, weight = (
                None if a is None else jnp.asarray(a, x.dtype) * unit
                for a, unit in zip(
                    (family.previous, family.rate_limit, family.rate_weight),
                    (per_u, per_u, cost / per_u**2),
                    strict=True,
                )
            )
            given["rate"] = Rate(previous, limit, weight)
        bounds = {of: per_u * jnp.asarray(named[of], x.dtype) for of in ("u_lower", "u_upper")}
        more = {**named, **bounds, "constraints": dataclasses.replace(constraints, **given)}
        return mpc_solve(*functions, x, u, p, **more)

    return solve
