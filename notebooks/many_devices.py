"""Learning a pendulum from an expert's torques, on as many devices as there are.

    python notebooks/many_devices.py                  every device of this machine
    python notebooks/many_devices.py --devices 8      the CPU, as if it were 8 devices
    python notebooks/many_devices.py --processes 2    two processes of 4 such devices each

Nothing in the training step knows of devices. The batch is spread over them where it is made, and
the rest follows: every device solves its own problems, and the gradient is averaged over all.

Several processes are how a cluster runs it: every machine starts this same script, and
`jax.distributed.initialize` brings them together. Here the script starts the processes itself.
"""

import argparse
import socket
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmpc import Status, mpc_solve
from jaxmpc.systems import pendulum

HORIZON = 10
TRUE_PHYSICS = pendulum.Physics(g=10.0, m=1.0, l=1.0)
FIRST_GUESS = pendulum.Physics(g=15.0, m=3.0, l=0.5)


def plans(log_physics, x_init):
    """A plan from each initial state, by a pendulum of these constants."""
    params = pendulum.default_params()._replace(physics=pendulum.Physics(*jnp.exp(log_physics)))

    def plan(x):
        u_init = jnp.zeros((HORIZON, 1))
        return mpc_solve(
            pendulum.cost, pendulum.dynamics, x, u_init, params, u_lower=-2.0, u_upper=2.0
        )

    return jax.vmap(plan)(x_init)


def imitation_loss(log_physics, x_init, expert_u):
    solution = plans(log_physics, x_init)
    # A problem that does not converge gives no gradient, so watch how many there are.
    converged = jnp.mean(solution.status == Status.CONVERGED)
    return jnp.mean((solution.u - expert_u) ** 2), converged


def train(batch_size: int, epochs: int) -> None:
    # One axis over all devices of all processes. The compiler lays out whatever is computed.
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("batch"))
    everywhere = NamedSharding(mesh, PartitionSpec())

    # Every process makes (or loads) its own share of the batch only.
    share = batch_size // jax.process_count()
    mine = slice(share * jax.process_index(), share * (jax.process_index() + 1))
    states = np.asarray(pendulum.sample_states(jax.random.key(0), batch_size))[mine]
    x_init = jax.make_array_from_process_local_data(spread, states)
    expert_u = jax.jit(plans, out_shardings=spread)(jnp.log(jnp.array(TRUE_PHYSICS)), x_init).u

    optimizer = optax.adam(optax.cosine_decay_schedule(0.15, epochs))

    # What is learned is on every device, and every process can read it.
    @partial(jax.jit, out_shardings=everywhere)
    def start():
        log_physics = jnp.log(jnp.array(FIRST_GUESS))
        return log_physics, optimizer.init(log_physics)

    @partial(jax.jit, out_shardings=everywhere)
    def step(log_physics, optimizer_state, x_init, expert_u):
        (loss, converged), gradient = jax.value_and_grad(imitation_loss, has_aux=True)(
            log_physics, x_init, expert_u
        )
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return optax.apply_updates(log_physics, updates), optimizer_state, loss, converged

    log_physics, optimizer_state = start()
    say(f"{batch_size} problems on {jax.device_count()} devices, {jax.process_count()} processes")
    for epoch in range(epochs):
        log_physics, optimizer_state, loss, converged = step(
            log_physics, optimizer_state, x_init, expert_u
        )
        g, m, l = np.exp(log_physics)
        # The three constants enter the motion through these two only.
        say(
            f"epoch {epoch:3}  loss {loss:.3e}  converged {converged:6.1%}  "
            f"g/l {g / l:.12g}  m l² {m * l**2:.12g}"
        )


def say(text: str) -> None:
    """Once, not once per process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def start_processes(num: int, arguments: list[str]) -> None:
    """This script once more, ``num`` times; on a cluster the scheduler does that."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, *arguments, "--address", address]
    running = [subprocess.Popen([*command, "--process", str(i)]) for i in range(num)]
    try:
        codes = [process.wait() for process in running]  # of all, whichever fails first
    finally:
        for process in running:
            process.kill()
    if any(codes):
        raise SystemExit("a process failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, help="pretend that the CPU is this many, in all")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32, help="problems, over all devices")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    num = arguments.processes
    if num > 1 and arguments.process is None:
        return start_processes(num, sys.argv[1:])
    devices = arguments.devices or (8 if num > 1 else None)
    if devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices // num)
    if num > 1:
        # On a cluster with Slurm, MPI or Kubernetes: without arguments.
        jax.distributed.initialize(arguments.address, num, arguments.process)
    train(arguments.batch, arguments.epochs)


if __name__ == "__main__":
    main()
