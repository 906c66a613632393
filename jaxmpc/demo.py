"""Two things to do with a differentiable MPC solver: control, and learning. Run by `make demo`.

1. Control: swing up Gymnasium's Pendulum-v1 and balance it. At every step of the environment a
   plan is computed from the current state and its first torque is applied.
2. Learning: find the constants of a pendulum from an expert's plans for it, by gradient descent
   through the solver. The cost and the torques of the plans are known, the motion is not.
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxmpc import Solution, Status, mpc_solve
from jaxmpc.systems import pendulum

try:
    import gymnasium
    import matplotlib
    import optax
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator
    from tqdm import tqdm, trange
except ModuleNotFoundError as error:
    raise SystemExit(
        f'The demo needs {error.name}, which is not installed: pip install "jaxmpc[demo]"'
    ) from None

SWING_UP_HORIZON = 60  # steps, 3 s: long enough for a plan to hold all the swings that are needed
IMITATION_HORIZON = 20  # steps, as in the paper
# The paper's pendulum, and its guess at it to learn from.
TRUE_PHYSICS = pendulum.Physics(g=10.0, m=1.0, l=1.0)
FIRST_GUESS = pendulum.Physics(g=15.0, m=3.0, l=0.5)
LEARNING_RATE = 0.15
LEARNING_STEPS = 300
EXPERT_PLANS = 128
ANIMATED_STEPS = 120  # the swing-up and some balancing, in which nothing moves any more


# 1. Control


class Episode(NamedTuple):
    """N steps of closed loop. The plan made at step k starts in the state of that step, so
    `plans.x[:, 0]` are the states that were visited and `plans.u[:, 0]` the torques applied."""

    plans: Solution  # every array has a leading axis [N]
    rewards: np.ndarray  # [N]
    final_angle: float  # rad, after the last step
    dt: float  # s
    max_torque: float  # N·m


def swing_up_cost(x: Array, u: Array, t: Array, params: Any) -> Array:
    """The negative reward of Pendulum-v1, θ² + 0.1 θ̇² + 0.001 u², made smooth.

    θ² has a kink where the pendulum hangs. In its place stands the squared distance of the tip from
    where it should be, scaled to be equal to θ² both upright and hanging. That distance is
    2 (1 − cos θ), but written as a sum of squares it keeps its digits near the goal.
    """
    del t, params
    cos, sin, rate = x
    distance_squared = (cos - 1.0) ** 2 + sin**2
    return (math.pi / 2) ** 2 * distance_squared + 0.1 * rate**2 + 0.001 * u[0] ** 2


def swing_up(num_steps: int) -> Episode:
    """Drives Pendulum-v1 with MPC, from hanging straight down at rest."""
    env = gymnasium.make("Pendulum-v1", max_episode_steps=num_steps)
    env.reset()
    plant: Any = env.unwrapped
    plant.state = np.array([np.pi, 0.0])
    # The model is the environment's own step, but for one thing: the environment clips the rate at
    # ±8 rad/s. A swing-up stays below that, so the model can do without.
    physics = pendulum.Physics(plant.g, plant.m, plant.l)
    params = pendulum.default_params()._replace(physics=physics)

    @jax.jit
    def plan_from(x: Array, u_init: Array) -> Solution:
        return mpc_solve(
            swing_up_cost,
            pendulum.dynamics,
            x,
            u_init,
            params,
            u_lower=-plant.max_torque,
            u_upper=plant.max_torque,
        )

    x = pendulum.state(*plant.state)
    u_init = jnp.zeros((SWING_UP_HORIZON, 1))
    plans, rewards = [], []
    for _ in trange(num_steps, desc="swing-up", unit="step"):
        plan = plan_from(x, u_init)
        # What is observed, (cos θ, sin θ, θ̇), is the state of the model.
        x, reward, *_ = env.step(np.asarray(plan.u[0]))
        plans.append(plan)
        rewards.append(reward)
        # The next problem is this one, one step later: start from the rest of the plan.
        u_init = jnp.concatenate([plan.u[1:], plan.u[-1:]])
    env.close()

    return Episode(
        plans=jax.tree.map(lambda *leaves: np.stack(leaves), *plans),
        rewards=np.array(rewards),
        final_angle=float(pendulum.angle(x)),
        dt=plant.dt,
        max_torque=plant.max_torque,
    )


# 2. Learning


class Learning(NamedTuple):
    """What was learned in K steps, and how."""

    losses: np.ndarray  # [K]
    converged: np.ndarray  # [K] share of the solves
    ratios: np.ndarray  # [K, 2] learned g/l and m l²
    true_ratios: np.ndarray  # [2]


def identifiable(physics: pendulum.Physics) -> Array:
    """g/l and m l²: the three constants enter the dynamics through these two only, so torques can
    reveal no more. Twice the length, a quarter of the mass and twice the gravity move the same."""
    g, m, l = physics
    return jnp.array([g / l, m * l**2])


def paper_plans(x_init: Array, u_init: Array, physics: pendulum.Physics) -> Solution:
    """The paper's pendulum problem, solved for a batch of initial states."""
    params = pendulum.default_params()._replace(physics=physics)

    def solve(x_init: Array, u_init: Array) -> Solution:
        return mpc_solve(
            pendulum.cost,
            pendulum.dynamics,
            x_init,
            u_init,
            params,
            u_lower=pendulum.U_LOWER,
            u_upper=pendulum.U_UPPER,
        )

    return jax.vmap(solve)(x_init, u_init)


def learn(seed: int) -> Learning:
    """Learns (g, m, l) from an expert's torques, by gradient descent on the imitation loss."""
    x_init = pendulum.sample_states(jax.random.key(seed), EXPERT_PLANS)
    u_zero = jnp.zeros((EXPERT_PLANS, IMITATION_HORIZON, 1))
    expert_u = jax.jit(paper_plans)(x_init, u_zero, TRUE_PHYSICS).u

    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, LEARNING_STEPS))

    def imitation_loss(log_physics: Array, u_init: Array) -> tuple[Array, Solution]:
        plans = paper_plans(x_init, u_init, pendulum.Physics(*jnp.exp(log_physics)))
        return jnp.mean((plans.u - expert_u) ** 2), plans

    @jax.jit
    def step(log_physics, optimizer_state, u_init):
        (loss, plans), gradient = jax.value_and_grad(imitation_loss, has_aux=True)(
            log_physics, u_init
        )
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        log_physics = optax.apply_updates(log_physics, updates)
        # A problem that does not converge gives no gradient, so watch how many there are.
        converged = jnp.mean(plans.status == Status.CONVERGED)
        ratios = identifiable(pendulum.Physics(*jnp.exp(log_physics)))
        return log_physics, optimizer_state, plans.u, (loss, converged, ratios)

    # The constants are positive and of different sizes: steps in their logarithms keep the one and
    # take care of the other.
    log_physics = jnp.log(jnp.array(FIRST_GUESS))
    optimizer_state = optimizer.init(log_physics)
    u = u_zero
    history = []
    progress = trange(LEARNING_STEPS, desc="learning", unit="step")
    for _ in progress:
        # The constants have moved a little since the last step, and the plans with them: start
        # every solve from the last plan.
        log_physics, optimizer_state, u, record = step(log_physics, optimizer_state, u)
        history.append(record)
        loss, converged, _ = record
        progress.set_postfix(loss=f"{loss:.1e}", converged=f"{converged:.0%}")

    losses, converged, ratios = map(np.stack, zip(*history, strict=True))
    return Learning(losses, converged, ratios, np.asarray(identifiable(TRUE_PHYSICS)))


# Figure and animation

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#e07b00", "#2e8b57", "#8a8a8a"
STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def planned_angles(episode: Episode) -> np.ndarray:
    """[N, T+1] angles of every plan, in degrees and without jumps at ±180°."""
    angles = np.unwrap(pendulum.angle(episode.plans.x), axis=1)
    visited = np.unwrap(angles[:, 0])
    return np.degrees(angles + (visited - angles[:, 0])[:, None])


def draw_torque_bounds(axes, max_torque: float) -> None:
    for bound in (-max_torque, max_torque):
        axes.axhline(bound, color=GREY, linestyle="--", linewidth=1)
    axes.set(ylabel="torque (N·m)", ylim=(-1.25 * max_torque, 1.25 * max_torque))


def save_figure(episode: Episode, learning: Learning, path: Path) -> None:
    """The closed loop on the left, the learning on the right."""
    with matplotlib.rc_context(STYLE):
        figure: Any = Figure(figsize=(10, 5.5), layout="constrained")
        left, right = figure.subfigures(1, 2, wspace=0.04)
        draw_episode(left.subplots(3, 1, sharex=True), episode)
        draw_learning(right.subplots(2, 1, sharex=True), learning)
        figure.savefig(path, dpi=150)


def draw_episode(axes, episode: Episode) -> None:
    angle_axes, rate_axes, torque_axes = axes
    time = episode.dt * np.arange(len(episode.rewards))
    angles = planned_angles(episode)[:, 0]
    upright = 360 * round(angles[-1] / 360)

    angle_axes.axhline(upright, color=GREY, linestyle="--", linewidth=1, label="upright")
    angle_axes.plot(time, angles, color=BLUE)
    angle_axes.legend(loc="best")
    angle_axes.set(ylabel="angle (°)", title="Pendulum-v1 under MPC")
    angle_axes.yaxis.set_major_locator(MultipleLocator(90))

    rate_axes.plot(time, episode.plans.x[:, 0, 2], color=BLUE)
    rate_axes.set(ylabel="rate (rad/s)")

    draw_torque_bounds(torque_axes, episode.max_torque)
    torque_axes.step(time, episode.plans.u[:, 0, 0], where="post", color=ORANGE)
    torque_axes.set(xlabel="time (s)", xlim=(0, time[-1]))


def draw_learning(axes, learning: Learning) -> None:
    loss_axes, ratio_axes = axes
    loss_axes.semilogy(learning.losses, color=BLUE)
    loss_axes.set(ylabel="imitation loss (N²·m²)", title="Learning the pendulum from torques")

    relative = learning.ratios / learning.true_ratios
    ratio_axes.axhline(1, color=GREY, linestyle="--", linewidth=1, label="truth")
    ratio_axes.semilogy(relative[:, 0], color=ORANGE, label="g/l")
    ratio_axes.semilogy(relative[:, 1], color=GREEN, label="m l²")
    ratio_axes.legend(loc="upper right")
    ratio_axes.set_yticks(ticks := [0.2, 0.5, 1, 2, 5], map(str, ticks))
    ratio_axes.minorticks_off()
    ratio_axes.set(xlabel="step", ylabel="learned / true", xlim=(0, len(relative)))


def save_animation(episode: Episode, stride: int, path: Path) -> None:
    """The pendulum in real time beside what is planned at each moment, every stride-th step."""
    frames = range(0, min(ANIMATED_STEPS, len(episode.rewards)), stride)
    with matplotlib.rc_context(STYLE), tqdm(frames, desc="animation", unit="frame") as progress:
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        draw = prepare_frame(figure, episode, frames.stop)
        # Without init_func, matplotlib would draw the first frame once more to begin with.
        animation = FuncAnimation(figure, draw, frames, init_func=lambda: None)
        writer = PillowWriter(fps=round(1 / (episode.dt * stride)))
        animation.save(path, writer, dpi=90, progress_callback=lambda *_: progress.update())


def prepare_frame(figure: Figure, episode: Episode, num_steps: int):
    """Sets up everything that stands still and returns the function that draws step k."""
    axes = figure.subplot_mosaic(
        [["pendulum", "angle"], ["pendulum", "torque"]], width_ratios=[1, 1.2]
    )
    angles = planned_angles(episode)
    torques = episode.plans.u[:, :, 0]
    horizon = torques.shape[1]
    time = episode.dt * np.arange(num_steps + horizon)

    axes["pendulum"].set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
    axes["pendulum"].axis("off")
    (rod,) = axes["pendulum"].plot([], [], color=BLUE, linewidth=9, solid_capstyle="round")
    (arc,) = axes["pendulum"].plot([], [], color=ORANGE, linewidth=3, markevery=[-1])
    axes["pendulum"].plot(0, 0, "o", color="black", markersize=5)
    clock = axes["pendulum"].text(-1.1, 1.05, "")

    planned: Any = dict(alpha=0.5, linestyle=":", label="planned")
    (past_angle,) = axes["angle"].plot([], [], color=BLUE, label="so far")
    (next_angle,) = axes["angle"].plot([], [], color=BLUE, **planned)
    axes["angle"].legend(loc="lower right")
    axes["angle"].set(ylabel="angle (°)", ylim=(angles.min() - 20, angles.max() + 20))
    axes["angle"].yaxis.set_major_locator(MultipleLocator(180))
    draw_torque_bounds(axes["torque"], episode.max_torque)
    (past_torque,) = axes["torque"].step([], [], where="post", color=ORANGE)
    (next_torque,) = axes["torque"].step([], [], where="post", color=ORANGE, **planned)
    axes["torque"].set(xlabel="time (s)")
    for name in ("angle", "torque"):
        axes[name].set_xlim(0, time[-1])

    def draw(k: int) -> None:
        # The environment counts angles and torques counterclockwise, from upright.
        theta = math.radians(angles[k, 0])
        rod.set_data([0, -math.sin(theta)], [0, math.cos(theta)])
        sweep = 0.75 * math.pi * float(torques[k, 0]) / episode.max_torque
        along = np.linspace(0, sweep, 30)
        arc.set_data(-0.35 * np.sin(along), 0.35 * np.cos(along))
        arc.set_marker((3, 0, round(math.degrees(sweep) + math.copysign(90, sweep))))
        arc.set_markersize(min(11.0, 30 * abs(sweep)))
        clock.set_text(f"{time[k]:.1f} s")

        past, future = slice(k + 1), slice(k, k + horizon)
        past_angle.set_data(time[past], angles[past, 0])
        next_angle.set_data(time[future], angles[k, :-1])
        past_torque.set_data(time[past], torques[past, 0])
        next_torque.set_data(time[future], torques[k])

    return draw


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmpc.demo", description="Control and learning by differentiable MPC."
    )
    parser.add_argument("--output", type=Path, default=Path("demo_output"), help="folder for files")
    parser.add_argument("--seed", type=int, default=0, help="of the states to learn from")
    parser.add_argument("--quick", action="store_true", help="a shorter episode, fewer frames")
    arguments = parser.parse_args()
    num_steps, stride = (80, 5) if arguments.quick else (200, 1)

    episode = swing_up(num_steps)
    learning = learn(arguments.seed)
    report(episode, learning)

    arguments.output.mkdir(parents=True, exist_ok=True)
    figure_path = arguments.output / "demo.png"
    animation_path = arguments.output / "swing_up.gif"
    save_figure(episode, learning, figure_path)
    save_animation(episode, stride, animation_path)
    print(f"Wrote {figure_path} and {animation_path}")


def report(episode: Episode, learning: Learning) -> None:
    converged = np.mean(episode.plans.status == Status.CONVERGED)
    print(f"Pendulum-v1 swung up from hanging, {len(episode.rewards)} steps:")
    print(f"  return                 {episode.rewards.sum():8.1f}")
    print(f"  final angle            {abs(math.degrees(episode.final_angle)):8.3f}° from upright")
    print(f"  converged              {converged:8.1%} of the plans")
    print(f"Pendulum learned from the torques of {EXPERT_PLANS} plans:   learned      true")
    names = "g/l   (1/s²)", "m l²  (kg m²)"
    for name, learned, true in zip(names, learning.ratios[-1], learning.true_ratios, strict=True):
        print(f"  {name:45} {learned:8.4f}  {true:8.4f}")
    print(f"  converged              {np.mean(learning.converged):8.1%} of the plans")


if __name__ == "__main__":
    main()
