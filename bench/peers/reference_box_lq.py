"""Box-constrained linear-quadratic problems by ``mpc`` as published, and gradients of mean(u²).

Reads an .npz with
    A [B, n, n], B [B, n, m], Q [B, n, n], R [B, m, m], x_init [B, n], T, limit, tolerances [k],
    repeats
and writes an .npz with, for each tolerance and for <work> "forward" and "gradient",
    <work>_seconds [k, repeats], <work>_u [k, B, T, m], <work>_iterations [k]; and versions.
"""

import numpy as np
import torch
from common import main, timed, versions
from mpc import mpc
from reference_mpc import Counted


def solve(given):
    T, tensors = int(given["T"]), ("A", "B", "Q", "R", "x_init")
    A, B, Q, R, x_init = (torch.tensor(given[name]) for name in tensors)
    (batch, n), m = x_init.shape, B.shape[2]
    F = torch.cat((A, B), 2).expand(T - 1, batch, n, n + m)
    c = torch.zeros(T, batch, n + m, dtype=F.dtype)

    def plan(tolerance, size=batch, iterations=500):
        controller = Counted(
            n_state=n,
            n_ctrl=m,
            T=T,
            u_lower=-float(given["limit"]),
            u_upper=float(given["limit"]),
            lqr_iter=iterations,
            eps=float(tolerance),
            n_batch=size,
            exit_unconverged=False,
            detach_unconverged=False,
            backprop=True,
            verbose=-1,
        )
        C = torch.zeros(batch, n + m, n + m, dtype=F.dtype)
        C[:, :n, :n], C[:, n:, n:] = Q, R
        C = C.expand(T, batch, n + m, n + m)
        cost = mpc.QuadCost(C[:, :size], c[:, :size])
        _, u, _ = controller(x_init[:size], cost, mpc.LinDx(F[:, :size]))
        return u, controller.steps

    def plan_and_gradient(tolerance):
        u, steps = plan(tolerance)
        torch.autograd.grad(torch.mean(u**2), (Q, R))
        return u, steps

    made = {"versions": versions("mpc", "torch", "numpy")}
    for work, call in (("forward", plan), ("gradient", plan_and_gradient)):
        for parameter in (Q, R):
            parameter.requires_grad_(work == "gradient")
        plan(1e-2, 2, 2)  # warms up what is made on first use
        found = []
        for tolerance in given["tolerances"]:
            (u, steps), seconds = timed(lambda: call(tolerance), given["repeats"])  # noqa: B023
            found.append((np.swapaxes(u.detach().numpy(), 0, 1), steps, seconds))
        u, steps, seconds = zip(*found, strict=True)
        shortest = min(map(len, seconds))
        made[f"{work}_u"], made[f"{work}_iterations"] = u, steps
        made[f"{work}_seconds"] = [values[:shortest] for values in seconds]
    return made


if __name__ == "__main__":
    main(solve)
