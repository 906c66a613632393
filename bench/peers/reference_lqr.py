"""A batch of LQR problems and their gradients by ``mpc`` as published, without bounds.

Reads an .npz with
    C [B, T, p, p], c [B, T, p], F [B, T, n, p], f [B, T, n], x_init [B, n], z_bar [B, T, p],
    repeats, threads
and writes an .npz with z [B, T, p], the gradients C, c, F, f, x_init of Σ z_bar ∘ z, the seconds
of each repeat, forward_s and both_s, and versions.
"""

import numpy as np
import torch
from common import main, timed, versions
from mpc import mpc


def solve(given):
    torch.set_num_threads(given["threads"])
    batch, T, n, p = given["F"].shape
    # Time comes first there, and the last stage has no dynamics.
    steps = {name: np.swapaxes(given[name], 0, 1) for name in ("C", "c", "F", "f", "z_bar")}
    steps |= {name: steps[name][:-1] for name in ("F", "f")}
    tensors = {name: torch.tensor(np.ascontiguousarray(a)) for name, a in steps.items()}
    tensors["x_init"] = torch.tensor(given["x_init"])
    z_bar = tensors.pop("z_bar")
    controller = mpc.MPC(
        n_state=n,
        n_ctrl=p - n,
        T=T,
        n_batch=batch,
        lqr_iter=1,  # the problem is linear and quadratic: one step from 0 solves it
        exit_unconverged=False,
        detach_unconverged=False,
        verbose=-1,
    )

    def forward():
        cost = mpc.QuadCost(tensors["C"], tensors["c"])
        x, u, _ = controller(tensors["x_init"], cost, mpc.LinDx(tensors["F"], tensors["f"]))
        return torch.cat((x, u), 2)

    def both():
        for a in tensors.values():
            a.requires_grad_()
        return torch.autograd.grad((z_bar * forward()).sum(), list(tensors.values()))

    with torch.no_grad():
        forward()
        z, forward_s = timed(forward, given["repeats"])
    both()
    gradients, both_s = timed(both, given["repeats"])

    def as_given(a, name):
        if name == "x_init":
            return a
        a = np.swapaxes(a, 0, 1)
        padding = np.zeros_like(given[name][:, a.shape[1] :])  # no dynamics at the last stage
        return np.concatenate((a, padding), 1)

    made = {name: as_given(a.numpy(), name) for name, a in zip(tensors, gradients, strict=True)}
    made["z"] = as_given(z.numpy(), "c")
    return made | dict(forward_s=forward_s, both_s=both_s, versions=versions("mpc", "torch"))


if __name__ == "__main__":
    main(solve)
