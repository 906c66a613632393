"""Plans of the pendulum and their gradients in (g, m, l), by ``mpc`` as published.

Reads an .npz with
    x_init [B, 3], u_init [T, B, 1], loss [T, B, 1], physics [3], dt, limit, q [4], p [4]
and writes an .npz with, for both exact ways of linearising the dynamics that ``mpc`` offers,
    <way>_u [T, B, 1] and <way>_gradient [B, 3], of Σ loss ∘ u,
where <way> is "auto_diff" or "analytic"; and versions.
"""

import sys

import numpy as np
import torch
from common import versions
from mpc import mpc

ITERATIONS = 200
EPS = 1e-9


class Pendulum(torch.nn.Module):
    """θ̇⁺ = θ̇ + dt (3g/(2l) sin θ + 3u/(m l²)), θ⁺ = θ + dt θ̇⁺, on (cos θ, sin θ, θ̇)."""

    def __init__(self, physics, dt):
        super().__init__()
        self.physics = physics  # [B, 3]: (g, m, l) of each problem
        self.dt = dt

    def _physics(self, x):
        """(g, m, l) for the rows of x, which are [B] or, a step after the other, [steps · B]."""
        return self.physics.repeat(len(x) // len(self.physics), 1).unbind(1)

    def forward(self, x, u):
        g, m, l = self._physics(x)
        cos, sin, rate = x.unbind(1)
        rate = rate + self.dt * (1.5 * g / l * sin + 3 * u[:, 0] / (m * l**2))
        angle = torch.atan2(sin, cos) + self.dt * rate
        return torch.stack((torch.cos(angle), torch.sin(angle), rate), 1)

    def grad_input(self, x, u):
        """∂forward/∂x [., 3, 3] and ∂forward/∂u [., 3, 1], by hand."""
        g, m, l = self._physics(x)
        new_cos, new_sin, _ = self(x, u).unbind(1)
        cos, sin, _ = x.unbind(1)
        zero = torch.zeros_like(sin)
        radius = cos**2 + sin**2
        rate_x = torch.stack((zero, self.dt * 1.5 * g / l, zero + 1), 1)
        angle_x = torch.stack((-sin / radius, cos / radius, zero), 1) + self.dt * rate_x
        rate_u = (zero + self.dt * 3 / (m * l**2))[:, None]
        angle_u = self.dt * rate_u

        def rows(angle, rate):
            return torch.stack((-new_sin[:, None] * angle, new_cos[:, None] * angle, rate), 1)

        return rows(angle_x, rate_x), rows(angle_u, rate_u)


def solve(given, grad_method):
    steps, batch, _ = given["u_init"].shape
    tensor = {name: torch.tensor(value) for name, value in given.items()}
    physics = tensor["physics"].repeat(batch, 1).requires_grad_()
    limit = float(given["limit"])
    controller = mpc.MPC(
        n_state=3,
        n_ctrl=1,
        T=steps,
        u_lower=-limit,
        u_upper=limit,
        u_init=tensor["u_init"],
        lqr_iter=ITERATIONS,
        grad_method=grad_method,
        eps=EPS,
        back_eps=EPS,
        n_batch=batch,
        exit_unconverged=False,
        detach_unconverged=False,  # a gradient of 0 would count against it
        backprop=True,
        verbose=-1,
    )
    cost = mpc.QuadCost(torch.diag(tensor["q"]), tensor["p"])
    _, u, _ = controller(tensor["x_init"], cost, Pendulum(physics, float(given["dt"])))
    (gradient,) = torch.autograd.grad((tensor["loss"] * u).sum(), physics)
    return u.detach().numpy(), gradient.numpy()


def main(source, target):
    with np.load(source) as arrays:
        given = dict(arrays)
    made = {"versions": versions("mpc", "torch", "numpy")}
    for method in (mpc.GradMethods.AUTO_DIFF, mpc.GradMethods.ANALYTIC):
        name = method.name.lower()
        made[f"{name}_u"], made[f"{name}_gradient"] = solve(given, method)
    np.savez(target, **made)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
