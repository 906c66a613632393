"""Pendulum and cartpole by ``mpc`` as published, in float32: plans, and gradients of mean(u²).

Reads an .npz with
    system, x_init [B, n], physics, q [n+m], p [n+m], dt, limit, T, eps, decay, tries, repeats
and writes an .npz with, for <work> "forward" and "gradient",
    <work>_seconds [repeats], <work>_u [B, T, m], <work>_iterations; and versions.
"""

import numpy as np
import torch
from common import main, timed, versions
from mpc import mpc

ITERATIONS = 500


class Pendulum(torch.nn.Module):
    """θ̇⁺ = θ̇ + dt (3g/(2l) sin θ + 3u/(m l²)), θ⁺ = θ + dt θ̇⁺, on (cos θ, sin θ, θ̇)."""

    def __init__(self, physics, dt):
        super().__init__()
        self.physics, self.dt = physics, dt

    def forward(self, x, u):
        g, m, l = self.physics.unbind()
        cos, sin, rate = x.unbind(1)
        rate = rate + self.dt * (1.5 * g / l * sin + 3 * u[:, 0] / (m * l**2))
        angle = torch.atan2(sin, cos) + self.dt * rate
        return torch.stack((torch.cos(angle), torch.sin(angle), rate), 1)


class Cartpole(torch.nn.Module):
    """Explicit Euler on (y, ẏ, cos θ, sin θ, θ̇), θ = 0 upright."""

    def __init__(self, physics, dt):
        super().__init__()
        self.physics, self.dt = physics, dt

    def forward(self, x, u):
        g, m_c, m_p, l = self.physics.unbind()
        y, y_dot, cos, sin, rate = x.unbind(1)
        share = m_p / (m_c + m_p)
        a = u[:, 0] / (m_c + m_p) + share * l * rate**2 * sin
        rate_dot = (g * sin - a * cos) / (l * (4 / 3 - share * cos**2))
        y_ddot = a - share * l * rate_dot * cos
        angle = torch.atan2(sin, cos) + self.dt * rate
        columns = (
            y + self.dt * y_dot,
            y_dot + self.dt * y_ddot,
            torch.cos(angle),
            torch.sin(angle),
            rate + self.dt * rate_dot,
        )
        return torch.stack(columns, 1)


class Counted(mpc.MPC):
    """``mpc.MPC`` that counts its iterations."""

    steps = 0

    def solve_lqr_subproblem(self, *args, no_op_forward=False, **kwargs):
        self.steps += not no_op_forward
        return super().solve_lqr_subproblem(*args, no_op_forward=no_op_forward, **kwargs)


def solve(given):
    dynamics = {"pendulum": Pendulum, "cartpole": Cartpole}[given["system"]]
    physics, q, p, x_init = (
        torch.tensor(given[name], dtype=torch.float32) for name in ("physics", "q", "p", "x_init")
    )

    def plan(x_init, iterations=ITERATIONS):
        controller = Counted(
            n_state=x_init.shape[1],
            n_ctrl=1,
            T=given["T"],
            u_lower=-float(given["limit"]),
            u_upper=float(given["limit"]),
            lqr_iter=iterations,
            grad_method=mpc.GradMethods.AUTO_DIFF,
            eps=given["eps"],
            linesearch_decay=given["decay"],
            max_linesearch_iter=given["tries"],
            n_batch=len(x_init),
            exit_unconverged=False,
            detach_unconverged=False,
            backprop=True,
            verbose=-1,
        )
        cost = mpc.QuadCost(torch.diag(q), p)
        _, u, _ = controller(x_init, cost, dynamics(physics, given["dt"]))
        return u, controller.steps

    def plan_and_gradient():
        u, steps = plan(x_init)
        torch.autograd.grad(torch.mean(u**2), (physics, q, p))
        return u, steps

    made = {"versions": versions("mpc", "torch", "numpy")}
    for work, call in (("forward", lambda: plan(x_init)), ("gradient", plan_and_gradient)):
        for parameter in (physics, q, p):
            parameter.requires_grad_(work == "gradient")
        plan(x_init[:2], 2)  # warms up what is made on first use
        (u, steps), made[f"{work}_seconds"] = timed(call, given["repeats"])
        made[f"{work}_u"] = np.swapaxes(u.detach().numpy(), 0, 1)
        made[f"{work}_iterations"] = steps
    return made


if __name__ == "__main__":
    main(solve)
