"""How good are controls of a constrained problem? NumPy alone, so that no contender judges itself.

It takes nothing but u: rolls it out, differentiates by complex steps, which are exact to rounding,
and finds the multipliers that suit u best, so that those of the contenders need no translation:

    minimise over μ ≥ 0   ‖∇J + Gᵀμ‖² + ‖s ∘ μ‖²

with the gradients ∇J and G of the objective and of all inequalities (rows, bounds of states and of
controls) in u, and their slacks s. No threshold says which inequality is active.
"""

import numpy as np
import scipy.optimize

from bench.peers.constrained_problems import NUMPY

STEP = 1e-30  # of the complex steps: nothing is subtracted, so nothing cancels
NEAR = 0.1  # slacks beyond this have no multiplier: it would be tiny, and the fit slow


def judge(problem, x_init, u) -> dict[str, np.ndarray]:
    """For each u [B, T, m] its objective, its KKT residual and its largest violation."""
    made = [_judge_one(problem, *pair) for pair in zip(x_init, u, strict=True)]
    names = "objective", "kkt_residual", "violation"
    return dict(zip(names, np.array(made).reshape(-1, 3).T, strict=True))


def _judge_one(problem, x_init, u):
    x_init, u = np.asarray(x_init, float), np.asarray(u, float)
    x = rollout(problem, x_init, u)
    if not np.all(np.isfinite(x)):
        return np.inf, np.inf, np.inf
    moves = sensitivities(problem, x, u)
    value, slope = objective(problem, x, u, moves)
    g, G = inequalities(problem, x, u, moves)
    violation = max(0.0, float(np.max(g)))
    slack = np.maximum(-g, 0.0)
    near = slack < NEAR
    slack, G = slack[near], G[near]
    mu = np.zeros(len(slack))
    if len(slack):  # without unknowns, nnls writes beyond its arrays
        fit = np.vstack([G.T, np.diag(slack)])
        mu, _ = scipy.optimize.nnls(fit, np.r_[-slope, mu], maxiter=100 * len(mu))
    stationarity = np.max(np.abs(slope + G.T @ mu))
    complementarity = np.max(slack * mu, initial=0.0)
    return value, max(stationarity, complementarity, violation), violation


def rollout(problem, x_init, u):
    """The states [T + 1, n]."""
    x = [x_init]
    for each in u:
        x.append(problem.dynamics(NUMPY, x[-1], each))
    return np.array(x)


def jacobians(function, z):
    """The derivatives [N, outputs, inputs] of a function of arrays [inputs, …] at z [N, inputs]."""
    moved = z.T[:, :, None] + 1j * STEP * np.eye(z.shape[1])[:, None, :]
    return np.moveaxis(function(moved).imag / STEP, 1, 0)


def sensitivities(problem, x, u):
    """∂x_t/∂u [T + 1, n, T m], u with all its entries in one axis."""
    n, (T, m) = problem.n, u.shape
    step = lambda z: problem.dynamics(NUMPY, z[:n], z[n:])  # noqa: E731
    F = jacobians(step, np.hstack([x[:-1], u]))
    moves = np.zeros((T + 1, n, T * m))
    for t in range(T):
        moves[t + 1] = F[t, :, :n] @ moves[t]
        moves[t + 1, :, t * m : (t + 1) * m] += F[t, :, n:]
    return moves


def objective(problem, x, u, moves):
    """The objective and its gradient in u [T m]."""
    Q, R, Q_end = map(np.array, problem.weights)
    far, push = x - np.array(problem.x_ref), u - np.array(problem.u_ref)
    weights = np.vstack([np.tile(Q, (len(u), 1)), Q_end])
    value = 0.5 * (np.sum(weights * far**2) + np.sum(R * push**2))
    return value, np.einsum("ti,tij->j", weights * far, moves) + (R * push).ravel()


def inequalities(problem, x, u, moves):
    """All inequalities, ≤ 0, that a control has a part in, and their gradients in u."""
    g, G = [], []
    if problem.rows is not None:
        stages = x[1:-1]  # the first state is given, and the end has no rows
        g.append(np.moveaxis(problem.rows(NUMPY, stages.T), 0, 1).ravel())
        slopes = jacobians(lambda z: problem.rows(NUMPY, z), stages)
        G.append((slopes @ moves[1:-1]).reshape(-1, u.size))
    if problem.x_lower is not None:
        slopes = moves[1:].reshape(-1, u.size)
        g += [(x[1:] - problem.x_upper).ravel(), (problem.x_lower - x[1:]).ravel()]
        G += [slopes, -slopes]
    g += [(u - problem.u_upper).ravel(), (problem.u_lower - u).ravel()]
    G += [np.eye(u.size), -np.eye(u.size)]
    return np.concatenate(g), np.vstack(G)
