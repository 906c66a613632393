"""Learning where every plan is clamped: smoothed gradients beside what others do.

Problem: a room is heated to 20 °C, 0 ≤ u ≤ 1, T = 10, float32; 8 starts. A learner that knows
neither how fast the room loses heat nor how cold it is outside sees an expert's controls and lowers
E ‖u − û‖² by Adam. Each of 32 random guesses is so cold that every control of every plan is
clamped: the exact gradient is zero. The expert's controls are mostly free.

Contenders, of as many solves as they ask for:
  exact            mpc_solve
  gradient         mpc_solve with Options(smoothing=ρ), ρ from 1 down by 10⁴
  plan             … and smoothed="plan", τ from 1 down by 10⁴; a step counts as two solves
  unrolled         ilqr_unrolled, 10 iterations
  randomised       of the smoothed loss E_ε L(θ + σ ε), σ from 0.3 down by 10²: antithetic
                   differences along 4 normal directions, 8 solves a step
  soft bounds      no bounds but a price ½ w (max(u − 1, 0)² + max(−u, 0)²), w from 0.1 up by
                   10⁴

Quality: a guess is found where the heat that the room loses at 20 °C, which is what controls tell
of the two constants, ends within 1 % of the expert's; the loss is that of the exact plan for soft
bounds and plans with a barrier too, median over the guesses.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

from bench import measure, report
from jaxmpc import Options, ilqr_unrolled, mpc_solve

T, WARM = 10, 20.0
STARTS, GUESSES, STEPS = 8, 32, 400
TRUE = (0.05, 5.0)  # the share of its excess heat that the room loses in a stage; °C outside
DRAWS, SIGMA = 4, 0.3
POINTS = 40  # of a curve
SOLVES = {
    "exact": 1, "gradient": 1, "plan": 2, "unrolled": 1, "randomised": 2 * DRAWS, "soft bounds": 1
}  # fmt: skip


def add_arguments(parser):
    report.add_common_arguments(parser)


def constants(theta):
    return jnp.exp(theta[..., 0]), 10 * theta[..., 1]


def dynamics(x, u, t, theta):
    rate, outside = constants(theta)
    return x + rate * (outside - x) + 2 * u


def cost(x, u, t, theta):
    return (x[0] - WARM) ** 2 + 0.1 * u[0] ** 2


def terminal_cost(x, theta):
    return (x[0] - WARM) ** 2


def plan(theta, x_init, options=Options(), solve=mpc_solve, bounds=(0.0, 1.0), cost=cost, **more):
    return solve(
        cost, dynamics, x_init, jnp.full((T, 1), 0.5), theta, terminal_cost=terminal_cost,
        u_lower=bounds[0], u_upper=bounds[1], options=options, **more,
    )  # fmt: skip


def softly(theta, x_init, weight):
    def priced(x, u, t, theta):
        beyond = jnp.maximum(u[0] - 1, 0) ** 2 + jnp.maximum(-u[0], 0) ** 2
        return cost(x, u, t, theta) + 0.5 * weight * beyond

    return plan(theta, x_init, bounds=(None, None), cost=priced)


def solution_of(contender, theta, x_init, progress):
    """Of one problem, ``progress`` from 0 to 1 through the training."""
    falling = 10.0 ** (-4 * progress)
    if contender == "unrolled":
        return plan(theta, x_init, solve=ilqr_unrolled, num_iterations=10)
    if contender == "soft bounds":
        return softly(theta, x_init, 0.1 / falling)
    if contender in ("gradient", "plan"):
        return plan(theta, x_init, Options(smoothing=falling, smoothed=contender))
    return plan(theta, x_init)


def trained(contender, guess, expert, x_init, steps, key):
    """The curve of what is learned [steps, 2], the exact loss, and the share that is clamped."""

    def loss(theta, progress):
        one = functools.partial(solution_of, contender)
        u = jax.vmap(one, (None, 0, None))(theta, x_init, progress).u
        return jnp.mean(jnp.sum((u - expert) ** 2, (1, 2)))

    def randomised(theta, progress, key):
        sigma = SIGMA * 10.0 ** (-2 * progress)
        noise = jax.random.normal(key, (DRAWS, *theta.shape))
        at = jax.vmap(loss, (0, None))
        ahead, behind = (at(theta + side * sigma * noise, progress) for side in (1, -1))
        return jnp.mean((ahead - behind)[:, None] / (2 * sigma) * noise, 0)

    optimizer = optax.adam(0.05)

    def step(carry, k):
        theta, state = carry
        progress = k / steps
        if contender == "randomised":
            slope = randomised(theta, progress, jax.random.fold_in(key, k))
        else:
            slope = jax.grad(loss)(theta, progress)
        change, state = optimizer.update(slope, state)
        return (optax.apply_updates(theta, change), state), theta

    start = guess, optimizer.init(guess)
    (theta, _), path = lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    kept = jnp.concatenate([path[:: max(1, steps // POINTS)], theta[None]])

    def judged(theta):
        solutions = jax.vmap(plan, (None, 0))(theta, x_init)
        clamped = jnp.mean(~solutions.free)
        return jnp.mean(jnp.sum((solutions.u - expert) ** 2, (1, 2))), clamped

    return kept, *lax.map(judged, kept)


def starts_and_guesses(seed, num):
    rng = np.random.default_rng(seed)
    x_init = rng.uniform(18.5, 20.5, (STARTS, 1))
    guess = np.stack([np.log(rng.uniform(0.15, 0.3, num)), rng.uniform(-2.5, -0.5, num)], 1)
    return jnp.asarray(x_init, jnp.float32), jnp.asarray(guess, jnp.float32)


@measure.in_float32
def run(args):
    rows = report.Rows(args.output, "smoothing", args.resume)
    num, steps = (2, 4) if args.quick else (GUESSES, STEPS)
    x_init, guess = starts_and_guesses(args.seed, num)
    truth = jnp.array([np.log(TRUE[0]), TRUE[1] / 10], jnp.float32)
    expert = jax.jit(jax.vmap(plan, (None, 0)))(truth, x_init)
    setting = measure.setting()
    key = dict(study="smoothing", guesses=num, steps=steps, seed=args.seed) | setting
    for contender in tqdm(SOLVES, desc="smoothing", unit="contender"):
        if rows.find(key | dict(contender=contender)):
            continue
        one = functools.partial(trained, contender)
        many = jax.jit(jax.vmap(one, (0, None, None, None, 0)), static_argnums=3)
        keys = jax.random.split(jax.random.key(args.seed), num)
        theta, loss, clamped = many(guess, expert.u, x_init, steps, keys)
        rate, outside = constants(theta)
        error = np.abs(rate * (WARM - outside) / (TRUE[0] * (WARM - TRUE[1])) - 1)
        solves = SOLVES[contender] * np.linspace(0, steps, loss.shape[1])
        rows.add(
            key
            | dict(
                contender=contender,
                found=float(np.mean(error[:, -1] < 0.01)),
                error_median=float(np.median(error[:, -1])),
                clamped_first=float(np.min(clamped[:, 0])),
                clamped_last=float(np.mean(clamped[:, -1])),
                solves=solves.tolist(),
                loss=np.median(loss, axis=0).astype(float).tolist(),
                expert_free=float(np.mean(expert.free)),
            )
        )
    found = list(rows)
    where = f"{setting['device']}, {setting['threads']} threads. {setting['versions']}."
    text = [_table(found), f"`{report.command(args)}`  \n{where}"]
    report.save_text(args.output, "smoothing", "\n\n".join(text))
    curves = {
        row["contender"]: (np.maximum(row["solves"][1:], 1), np.maximum(row["loss"][1:], 1e-12))
        for row in found
    }
    report.plot(
        args.output / "smoothing.png",
        {"where all is clamped|solves of each start": curves},
        "imitation loss, median",
    )


def _table(rows):
    header = ["contender", "found", "error, median", "loss at last", "solves of each start"]
    header += ["clamped at first, least", "clamped at last"]
    lines = [
        [
            row["contender"],
            f"{row['found']:.0%}",
            report.number(row["error_median"]),
            report.number(row["loss"][-1]),
            f"{row['solves'][-1]:.0f}",
            f"{row['clamped_first']:.0%}",
            f"{row['clamped_last']:.0%}",
        ]
        for row in rows
    ]
    return report.markdown(header, lines)
