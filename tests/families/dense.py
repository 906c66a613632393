"""The derivatives of a plan of a family by its dense KKT system: functions and their derivatives
are CasADi's, the system is solved in NumPy, in equilibrated units with residuals of extended
precision. Of the library it sees a plan, its multipliers and which controls are clamped.

    L = J + λᵀ(dynamics − x⁺) + ν g + μ (u − bound)

With y = (x, u, λ, ν, μ) of the rows that hold, M = ∂²L/∂y² and N = ∂²L/∂y∂d, d all inputs, the
derivative is dy = −M⁻¹ N dd; rows with slack have their price in J.
"""

import dataclasses

import casadi as ca
import numpy as np
import scipy.linalg

from tests.families.family import CASADI

KINDS = ("inequality", "rate", "state", "equality", "terminal_inequality", "terminal_equality")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the problem, in the library's order of each kind."""

    kind: str
    place: tuple  # in the array of the kind's multipliers
    g: object  # an expression; None: the library has a row there that says nothing
    sign: float = 1.0  # of its multiplier there
    equality: bool = False
    prices: tuple = (np.inf, 0.0)  # linear and quadratic
    price: int | None = None  # at the stages: the place in the prices of the inequality's slack


class Dense:
    """The program is built once; ``inputs`` are named as in ``gradients``."""

    def __init__(self, family):
        self.family = f = family
        n, m, T = f.n, f.m, f.T
        k = f.starts(1)[2].shape[1]
        X, U = ca.SX.sym("X", n, T), ca.SX.sym("U", m, T)
        self.inputs = {"x_init": ca.SX.sym("x_init", n), "params": ca.SX.sym("p", k)}
        for name, size in (("x_lower", n), ("x_upper", n)):
            if getattr(f, name) is not None:
                self.inputs[name] = ca.SX.sym(name, size)
        if f.previous is not None:
            self.inputs["previous"] = ca.SX.sym("previous", m)
            for name in ("limit", "weight"):
                if getattr(f, f"rate_{name}") is not None:
                    self.inputs[name] = ca.SX.sym(name, m)
        p = self.inputs["params"]
        states = [self.inputs["x_init"]] + [X[:, t] for t in range(T)]
        J, defects = 0, []
        for t in range(T):
            new = ca.vertcat(*f.dynamics(CASADI, states[t], U[:, t], t, p))
            defects.append(new - X[:, t])
            J += f.cost(CASADI, states[t], U[:, t], t, p)
        if f.terminal_cost is not None:
            J += f.terminal_cost(CASADI, states[T], p)
        changes = []
        if f.previous is not None:
            changes = [U[:, t] - (U[:, t - 1] if t else self.inputs["previous"]) for t in range(T)]
            if "weight" in self.inputs:
                J += 0.5 * sum(ca.dot(self.inputs["weight"], d**2) for d in changes)
        z = ca.vertcat(ca.vec(X), ca.vec(U))
        self.rows = [r for r in self._rows(states, U, p, changes) if r.g is not None]
        self.rows = [r for r in self.rows if ca.depends_on(ca.SX(r.g), z)]
        g = ca.vertcat(*[r.g for r in self.rows]) if self.rows else ca.SX(0, 1)
        c = ca.vertcat(*defects)
        costate, nu = ca.SX.sym("costate", n * T), ca.SX.sym("nu", len(self.rows))
        d = ca.vertcat(*self.inputs.values())
        L = J + ca.dot(costate, c) + ca.dot(nu, g)
        slope = ca.gradient(L, z)
        everything = [
            J, g, c, slope, ca.gradient(L, d), ca.jacobian(slope, z), ca.jacobian(slope, d),
            ca.jacobian(c, z), ca.jacobian(c, d), ca.jacobian(g, z), ca.jacobian(g, d),
        ]  # fmt: skip
        self.evaluate = ca.Function("dense", [z, costate, nu, d], everything)

    def _rows(self, states, U, p, changes):
        f, T = self.family, self.family.T
        first = dict.fromkeys(KINDS, 0)
        for r in f.rows:
            of_stages = {"stage": range(T), "state": range(1, T), "terminal": ()}[r.on]
            for kind, stages in (("", of_stages), ("terminal_", [] if r.on == "stage" else [T])):
                kind += "equality" if r.equality else "inequality"
                count = 0
                for t in stages:
                    u = U[:, t] if r.on == "stage" else None
                    values = r.fn(CASADI, states[t], u, t, p)
                    count = len(values)
                    prices = zip(
                        *(np.broadcast_to(w, count) for w in (r.linear, r.quadratic)), strict=True
                    )
                    for i, (value, own) in enumerate(zip(values, prices, strict=True)):
                        place = first[kind] + i
                        soft = place if np.isfinite(own[0]) and t < T else None
                        at = (t, place) if t < T else (place,)
                        yield Row(kind, at, value, 1.0, r.equality, own, soft)
                first[kind] += count
        for name, sign in (("x_upper", 1.0), ("x_lower", -1.0)):
            if name in self.inputs:
                finite = np.isfinite(getattr(f, name))
                for t in range(1, T + 1):
                    for i in np.flatnonzero(finite):
                        g = sign * (states[t][i] - self.inputs[name][i])
                        yield Row("state", (t, i), g, sign)
        if "limit" in self.inputs:
            for sign in (1.0, -1.0):
                for t in range(T):
                    for i in range(f.m):
                        g = sign * changes[t][i] - self.inputs["limit"][i]
                        yield Row("rate", (t, i), g, sign)

    def at(self, plan, given):
        """The KKT system where ``plan`` is; ``given``: the inputs' values, with u_lower, u_upper
        and the prices linear and quadratic."""
        return System(self, plan, given)


class System:
    def __init__(self, dense, plan, given):
        self.dense, self.given = dense, given
        f = dense.family
        self.values = np.concatenate([np.ravel(given[name]) for name in dense.inputs])
        self.clamped = ~np.asarray(plan.free).ravel()
        signed = [r.sign * getattr(plan.multipliers, r.kind)[r.place] for r in dense.rows]
        nu = np.array(signed, float)
        linear, quadratic = (
            np.array([r.prices[k] if r.price is None else given[w][r.price] for r in dense.rows])
            for k, w in enumerate(("linear", "quadratic"))
        )
        soft = np.isfinite(linear)
        equality = np.array([r.equality for r in dense.rows], bool)
        self.beyond = soft & (nu >= linear) & (nu > 0)
        self.active = equality | ((nu > 0) & ~self.beyond)
        self.linear = np.where(self.beyond, linear, 0)
        self.quadratic = np.where(self.beyond, quadratic, 0)
        z = np.concatenate([plan.x[1:].ravel(), plan.u.ravel()]).astype(float)
        y = z, np.asarray(plan.costate[1:], float).ravel(), np.where(self.active, nu, 0)
        self.y = y
        of_z = self._evaluated()[3].ravel()[f.n * f.T :]
        self.mu = np.where(self.clamped, -of_z, 0)
        u, (low, high) = z[f.n * f.T :], (given[w].ravel() for w in ("u_lower", "u_upper"))
        self.at_high = self.clamped & (self.mu > 0)
        # Of rows that depend on others, one of each lot is left out: the plan is the same.
        self.redundant = self._redundant()
        self.active &= ~self.redundant
        self.y = *self.y[:2], np.where(self.active, self.y[2], 0)
        self.bound = np.where(self.at_high, high, low)
        self.bound = np.where(self.clamped, self.bound, u)
        self._solve_for()

    def _redundant(self):
        redundant = np.zeros(len(self.active), bool)
        if not self.active.any():
            return redundant
        found = self._evaluated()
        G = found[9][self.active]
        E = np.eye(len(self.y[0]))[self.dense.family.n * self.dense.family.T :][self.clamped]
        held = np.linalg.qr(np.concatenate([found[7], E]).T)[0]
        left = G - (G @ held) @ held.T
        left /= np.linalg.norm(G, axis=1, keepdims=True)
        _, R, order = scipy.linalg.qr(left.T, pivoting=True, mode="economic")
        rank = np.sum(np.abs(np.diag(R)) > 1e-8)
        redundant[np.flatnonzero(self.active)[order[rank:]]] = True
        return redundant

    def _evaluated(self):
        z, costate, nu = self.y
        g = np.asarray(self.dense.evaluate(z, costate, nu, self.values)[1]).ravel()
        slope = np.where(self.beyond, self.linear + self.quadratic * g, nu)
        found = self.dense.evaluate(z, costate, slope, self.values)
        return [np.asarray(a.full() if isinstance(a, ca.DM) else a) for a in found]

    def _solve_for(self, steps=3):
        """M and N where Newton's method ends, in a few steps from the plan."""
        f, held = self.dense.family, np.flatnonzero(self.clamped)
        first, self.moved = np.concatenate([self.y[0]]), 0.0
        for step in range(steps + 1):
            J, g, c, of_z, of_d, H, Hd, A, Ad, G, Gd = self._evaluated()
            g, c, of_z = g.ravel(), c.ravel(), of_z.ravel()
            E = np.zeros((len(held), len(of_z)))
            E[np.arange(len(held)), f.n * f.T + held] = 1
            Gb = self.quadratic[:, None] * G
            K = np.concatenate([A, G[self.active], E])
            M = np.block([[H + G.T @ Gb, K.T], [K, np.zeros((len(K), len(K)))]])
            u = self.y[0][f.n * f.T :]
            rest = np.concatenate([of_z, c, g[self.active], (u - self.bound)[self.clamped]])
            rest[: len(of_z)] += E.T @ self.mu[self.clamped]
            self.solve = refined(M)
            if step == steps:
                break
            change = -self.solve(rest)
            z, costate, nu = (np.array(a) for a in self.y)
            z += change[: len(z)]
            costate += change[len(z) : len(z) + len(c)]
            rows = len(z) + len(c)
            nu[self.active] += change[rows : rows + self.active.sum()]
            self.mu[self.clamped] += change[rows + self.active.sum() :]
            self.y = z, costate, nu
        self.moved = np.max(np.abs(self.y[0] - first))
        self.parts = J.item(), g, of_d.ravel(), Hd + G.T @ (self.quadratic[:, None] * Gd), Ad, G, Gd
        self.K = K

    def outputs(self):
        """x, u, objective and the multipliers by kind, where Newton's method ended."""
        f = self.dense.family
        z, _, nu = self.y
        J, g = self.parts[:2]
        paid = (self.linear + 0.5 * self.quadratic * g) * g
        of_rows = np.where(self.beyond, self.linear + self.quadratic * g, nu)
        return {
            "x": z[: f.n * f.T].reshape(f.T, f.n),
            "u": z[f.n * f.T :].reshape(f.T, f.m),
            "objective": J + np.sum(np.where(self.beyond, paid, 0)),
            "multipliers": of_rows,
        }

    def gradient(self, of_x, of_u, of_J, of_rows):
        """That of Σ of_x x + Σ of_u u + of_J J + Σ of_rows ν in every input; x of the stages
        1 … T, and the multipliers of ``Dense.rows``."""
        f = self.dense.family
        _, g, of_d, Hd, Ad, G, Gd = self.parts
        size, rows = len(self.y[0]), self.active
        price = np.where(self.beyond, of_rows, 0)
        bar = np.zeros(self.solve.size)
        bar[:size] = np.concatenate([of_x.ravel(), of_u.ravel()]) + G.T @ (self.quadratic * price)
        first = size + f.n * f.T
        bar[first : first + rows.sum()] = of_rows[rows]
        w = -self.solve(bar)
        wz, w_costate, w_rows = w[:size], w[size:first], w[first : first + rows.sum()]
        w_held = w[first + rows.sum() :]
        total = of_J * of_d + wz @ Hd + w_costate @ Ad + w_rows @ Gd[rows]
        total = total + (self.quadratic * price) @ Gd
        grads, begin = {}, 0
        for name, symbol in self.dense.inputs.items():
            grads[name] = total[begin : begin + symbol.numel()]
            begin += symbol.numel()
        # The bounds, and the prices of the rows with slack.
        to_bound = np.zeros(f.T * f.m)
        to_bound[self.clamped] = -w_held - of_J * self.mu[self.clamped]
        at_high = self.at_high
        for name, mine in (("u_lower", self.clamped & ~at_high), ("u_upper", at_high)):
            grads[name] = np.where(mine, to_bound, 0).reshape(f.T, f.m)
        along = G @ wz
        of_linear = np.where(self.beyond, along + price + of_J * g, 0)
        of_quadratic = np.where(self.beyond, g * (along + price + of_J * 0.5 * g), 0)
        if np.isfinite(np.ravel(self.given["linear"])).any():
            for name, mine in (("linear", of_linear), ("quadratic", of_quadratic)):
                grads[name] = np.zeros(len(self.given[name]))
                for row, value in zip(self.dense.rows, mine, strict=True):
                    if row.price is not None:
                        grads[name][row.price] += value
        return grads


class refined:
    """A⁻¹ of a symmetric A, by LU in equilibrated units, refined with extended residuals."""

    def __init__(self, A):
        scale = np.ones(len(A))
        with np.errstate(divide="ignore"):
            for _ in range(20):
                most = np.max(np.abs(A * scale[:, None] * scale), axis=1)
                scale /= np.sqrt(np.where(most > 0, most, 1))
        self.size, self.scale = len(A), scale
        A = A * scale[:, None] * scale
        self.A, self.long = A, A.astype(np.longdouble)
        self.lu = scipy.linalg.lu_factor(A, check_finite=False)
        inverse, _ = scipy.linalg.lapack.dgecon(self.lu[0], np.linalg.norm(A, 1))
        self.condition = 1 / max(inverse, 1e-300)

    def __call__(self, b):
        b = np.asarray(b, np.longdouble) * self.scale
        y = np.zeros(self.size, np.longdouble)
        for _ in range(5):
            y += scipy.linalg.lu_solve(self.lu, np.asarray(b - self.long @ y, float))
        return np.asarray(y * self.scale, float)
