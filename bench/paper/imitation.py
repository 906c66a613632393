"""Imitation of an MPC expert on the pendulum and the cartpole: sections 5.3 and 5.4 of the paper.

The expert solves min Σ_{t<T} ½ τ_tᵀ diag(q) τ_t + pᵀ τ_t, τ = (x, u), subject to its dynamics and
bounds. A learner sees its trajectories and is judged by the imitation loss, here that of the
controls alone, E_x ‖u_{0:T}(x; θ) − u_{0:T}(x; θ̂)‖². Methods:

    nn           an LSTM from the state to the controls; minimises the imitation loss
    sysid        the expert's cost, unknown physics; minimises the error of the next state
    mpc.dx       the expert's cost, unknown physics; minimises the imitation loss
    mpc.cost     the expert's physics, unknown cost; minimises the imitation loss
    mpc.cost.dx  both unknown; minimises the imitation loss

A cost that is learned has q = sigmoid(logit) and p = √q ∘ p̂, from zeros; logit and p̂ take turns of
10 epochs, p̂ first. This is the text's ‖w_g ∘ (τ − τ_g)‖² in other variables: w_g² = q/2 and
w_g² ∘ τ_g = −p/2, but for a constant.

Where this goes its own way: every trial has expert trajectories of its own, and the minibatches of
an epoch have the same size, the largest that is at most 32 (the published code: one data set for
all trials; as many minibatches, the last one smaller).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from bench.paper import lstm
from bench.paper.trials import Run
from jaxmpc import Options, Solution, Status, mpc_solve
from jaxmpc.systems import cartpole, pendulum
from jaxmpc.systems.quadratic import QuadraticCost

METHODS = ("nn", "sysid", "mpc.dx", "mpc.cost", "mpc.cost.dx")
LEARNS_PHYSICS = ("sysid", "mpc.dx", "mpc.cost.dx")
LEARNS_COST = ("mpc.cost", "mpc.cost.dx")

T = 20
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 100, 10, 10
MINIBATCH = 32
RESTART = 50  # epochs between cold starts of the solver
TURN = 10  # epochs in which one half of the cost is learned
HIDDEN = 256

Learned = dict[str, Any]


def published_damping(x: Array, u: Array, t: Any, params: pendulum.Params) -> Array:
    """The damped pendulum of the published code, where the damping multiplies the angle."""
    physics = params.physics
    g, m, l, damping, wind = physics
    theta = pendulum.angle(x)
    rate = x[2] + pendulum.DT * (
        1.5 * g / l * jnp.sin(theta + wind) + 3.0 * u[0] / (m * l * l) - damping * theta
    )
    return pendulum.state(theta + pendulum.DT * rate, rate)


class Domain(NamedTuple):
    """An expert, and what its learner knows."""

    system: Any  # the module: bounds, sizes, cost, and the learner's dynamics
    expert_dynamics: Any
    expert_params: Any  # () -> its parameters
    guess: tuple[float, ...]  # where learning the physics begins
    spread: tuple[float, ...]  # ± around it, uniform


def _damped(dynamics) -> Domain:
    params = pendulum.default_damped_params
    return Domain(pendulum, dynamics, params, (5.0, 1.0, 1.0), (1.5, 0.5, 0.5))


DOMAINS = {
    "pendulum": Domain(
        pendulum, pendulum.dynamics, pendulum.default_params, (15.0, 3.0, 0.5), (0.0,) * 3
    ),
    "cartpole": Domain(
        cartpole, cartpole.dynamics, cartpole.default_params, (9.8, 3.0, 0.1, 1.0), (0.0,) * 4
    ),
    "damped pendulum": _damped(pendulum.damped_dynamics),
    "damped pendulum as published": _damped(published_damping),
}


class Setting(NamedTuple):
    """What is compiled: the same for all trials."""

    domain: str
    method: str
    num_train: int
    hessian: str = "exact"  # of the backward pass
    hidden: int = HIDDEN


class Trials(NamedTuple):
    """What the trials differ in, one a row: their random numbers, and the expert's trajectories."""

    key: Array  # [trials]
    x: Array  # [trials, trajectories, T+1, n]
    u: Array  # [trials, trajectories, T, m]


class State(NamedTuple):
    """Of the trials, before an epoch."""

    learned: Learned
    optimizer: optax.OptState
    plans: Array  # [trials, num_train, T, m] of the last epoch, to start the solver from
    held_out_plans: Array  # the same for validation and test


@functools.partial(jax.jit, static_argnums=0)
def sample_trials(name: str, seeds: Array) -> tuple[Trials, Array]:
    """The expert's trajectories, by the paper's distribution of initial states; all converged?"""
    own = DOMAINS[name]
    key = jax.vmap(jax.random.key)(seeds)
    num = NUM_TRAIN + NUM_VALIDATION + NUM_TEST
    x_init = jax.vmap(lambda key: own.system.sample_states(key, num))(key)

    def solve(x_init):
        return _solve(own, own.expert_dynamics, own.expert_params(), x_init, _no_plan(own))

    solution = jax.vmap(jax.vmap(solve))(x_init)
    return Trials(key, solution.x, solution.u), jnp.all(solution.status == Status.CONVERGED)


def _no_plan(own: Domain) -> Array:
    return jnp.zeros((T, own.system.M))


def _solve(own: Domain, dynamics, params, x_init, u_init, options=Options()) -> Solution:
    bounds = dict(u_lower=own.system.U_LOWER, u_upper=own.system.U_UPPER)
    return mpc_solve(own.system.cost, dynamics, x_init, u_init, params, options=options, **bounds)


def _init(setting: Setting, key: Array) -> Learned:
    own, start = DOMAINS[setting.domain], jax.random.fold_in(key, 0)
    n, m = own.system.N, own.system.M
    if setting.method == "nn":
        return lstm.init(start, n, m, setting.hidden)
    learned: Learned = {}
    if setting.method in LEARNS_PHYSICS:
        shift = jax.random.uniform(start, (len(own.guess),), minval=-1.0)
        learned["physics"] = jnp.array(own.guess) + jnp.array(own.spread) * shift
    if setting.method in LEARNS_COST:
        learned |= dict(logit=jnp.zeros(n + m), p_hat=jnp.zeros(n + m))
    return learned


def _params(own: Domain, learned: Learned):
    """Of the learner's MPC problem: what it knows and what it has learned."""
    params = own.system.default_params()
    if "physics" in learned:
        params = params._replace(physics=own.system.Physics(*learned["physics"]))
    if "logit" in learned:
        q = jax.nn.sigmoid(learned["logit"])
        params = params._replace(cost=QuadraticCost(q, jnp.sqrt(q) * learned["p_hat"]))
    return params


def _predict(setting: Setting, learned: Learned, x_init: Array, plans: Array):
    """Controls [batch, T, m] for states [batch, n], plans to start from the next time, and whether
    each problem converged [batch]."""
    if setting.method == "nn":
        return lstm.controls(learned, x_init, T), plans, jnp.ones(len(x_init), bool)
    own = DOMAINS[setting.domain]
    params, options = _params(own, learned), Options(backward_hessian=setting.hessian)
    solve = functools.partial(_solve, own, own.system.dynamics, params, options=options)
    solution = jax.vmap(solve)(x_init, plans)
    return solution.u, lax.stop_gradient(solution.u), solution.status == Status.CONVERGED


def _imitation(u: Array, expert: Array) -> Array:
    return jnp.mean(jnp.sum((u - expert) ** 2, (-2, -1)))


def _transition(setting: Setting, learned: Learned, x: Array, u: Array) -> Array:
    """E ‖x_{t+1} − f(x_t, u_t)‖² over the expert's transitions; NaN for a learner without f."""
    if setting.method == "nn":
        return jnp.full((), jnp.nan)
    own = DOMAINS[setting.domain]
    params = _params(own, learned)
    step = jax.vmap(jax.vmap(lambda x, u: own.system.dynamics(x, u, 0, params)))
    return jnp.mean(jnp.sum((x[:, 1:] - step(x[:, :-1], u)) ** 2, -1))


def _optimizer(method: str) -> optax.GradientTransformation:
    if method == "nn":
        return optax.adam(1e-4)
    return optax.rmsprop(1e-2, decay=0.5, eps=1e-8, eps_in_sqrt=False)


def _epoch(setting: Setting, trial: Trials, state: State, number: Array):
    """One epoch of one trial."""
    num = setting.num_train
    minibatches = -(-num // MINIBATCH)
    cold = number % RESTART == 0
    plans, held_out_plans = (
        jnp.where(cold, 0.0, old) for old in (state.plans, state.held_out_plans)
    )
    order = jax.random.permutation(jax.random.fold_in(trial.key, number + 1), num)

    def losses(learned, x, u, plans):
        predicted, plans, converged = _predict(setting, learned, x[:, 0], plans)
        imitation = _imitation(predicted, u)
        transition = _transition(setting, learned, x, u)
        minimised = transition if setting.method == "sysid" else imitation
        return minimised, (imitation, transition, plans, jnp.mean(converged))

    def update(carry, index):
        learned, optimizer, plans = carry
        given = trial.x[index], trial.u[index], plans[index]
        gradient, (*seen, new, converged) = jax.grad(losses, has_aux=True)(learned, *given)
        if "logit" in learned:  # take turns
            p_now = (number // TURN) % 2 == 0
            gradient = gradient | dict(
                p_hat=jnp.where(p_now, gradient["p_hat"], 0.0),
                logit=jnp.where(p_now, 0.0, gradient["logit"]),
            )
        step, optimizer = _optimizer(setting.method).update(gradient, optimizer)
        learned = optax.apply_updates(learned, step)
        return (learned, optimizer, plans.at[index].set(new)), (*seen, converged)

    (learned, optimizer, plans), (train, train_transition, converged) = lax.scan(
        update,
        (state.learned, state.optimizer, plans),
        order.reshape(minibatches, num // minibatches),
    )
    held_out = slice(NUM_TRAIN, None)
    x, u = trial.x[held_out], trial.u[held_out]
    predicted, held_out_plans, held_out_converged = _predict(
        setting, learned, x[:, 0], held_out_plans
    )
    validation, test = slice(NUM_VALIDATION), slice(NUM_VALIDATION, None)
    curves = dict(
        train=jnp.mean(train),
        validation=_imitation(predicted[validation], u[validation]),
        test=_imitation(predicted[test], u[test]),
        train_transition=jnp.mean(train_transition),
        test_transition=_transition(setting, learned, x[test], u[test]),
        converged=jnp.mean(converged),
        held_out_converged=jnp.mean(held_out_converged),
    )
    if setting.method != "nn":
        curves |= learned
    return State(learned, optimizer, plans, held_out_plans), curves


def _start(setting: Setting, trial: Trials) -> State:
    learned = _init(setting, trial.key)
    no_plan = _no_plan(DOMAINS[setting.domain])
    plans = (jnp.broadcast_to(no_plan, (num, *no_plan.shape))
             for num in (setting.num_train, NUM_VALIDATION + NUM_TEST))  # fmt: skip
    return State(learned, _optimizer(setting.method).init(learned), *plans)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(setting: Setting, chunk: int, trials: Trials, state: State, epoch: Array):
    # The solver works on all trials at once; a network's trials come one after the other.
    one_epoch = functools.partial(_epoch, setting)

    def epochs(state, number):
        if setting.method == "nn":
            return lax.map(lambda both: one_epoch(*both, number), (trials, state))
        return jax.vmap(one_epoch, (0, 0, None))(trials, state, number)

    return lax.scan(epochs, state, epoch + jnp.arange(chunk))


def run(setting: Setting, seeds: list[int], num_epochs: int, chunk: int) -> Run:
    """A run of ``trials``: a trial for each seed, all with the same setting."""

    @functools.cache
    def trials() -> Trials:
        made, converged = sample_trials(setting.domain, jnp.array(seeds))
        if not converged:
            raise RuntimeError(f"an expert's problem did not converge ({setting.domain})")
        return made

    words = [setting.domain, setting.method, str(setting.num_train)]
    words += [setting.hessian] if setting.hessian != "exact" else []
    return Run(
        name="-".join(words).replace(" ", "_"),
        settings=setting._asdict() | dict(seeds=seeds),
        num_epochs=num_epochs,
        chunk=chunk,
        start=lambda: jax.vmap(functools.partial(_start, setting))(trials()),
        advance=lambda state, epoch: _advance(setting, chunk, trials(), state, epoch),
        weight=setting.num_train * (5.0 if setting.method == "nn" else 1.0) + 20.0,
    )
