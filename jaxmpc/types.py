"""What the solvers take and return: options, statuses and solutions."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax import Array
from jax.typing import ArrayLike

DerivativeRule = Literal["vjp", "jvp"]
RiccatiMethod = Literal["auto", "sequential", "parallel"]
Smoothed = Literal["gradient", "plan"]

# The user's functions, of (x [n], u [m], t, params); those of the end, of (x [n], params). Params
# are whatever pytree the user passes, and t is an int32 scalar. ``Quadratic`` is a Cost and a
# TerminalCost as well, and ``Affine`` is a Dynamics.
Cost = Callable[[Array, Array, Any, Any], Array]  # -> scalar
TerminalCost = Callable[[Array, Any], Array]  # -> scalar
Dynamics = Callable[[Array, Array, Any, Any], Array]  # -> the next state, [n]
Constraint = Callable[[Array, Array, Any, Any], Array]  # -> one entry for each row
TerminalConstraint = Callable[[Array, Any], Array]


class Status(enum.IntEnum):
    """How one problem ended. In a batch, ``solution.status`` holds one per problem.

    * ``CONVERGED``: ∇_u J on the controls that no bound holds is at most tolerance times the size
      of the terms that cancel in it, or as small as rounding lets anyone see; and the curvature on
      the free controls is positive: a strict local minimum. The terms are |∇_u cost|, or
      |∇²_u cost| |u| where that is more, and |B|ᵀ (|∇_x cost| + |A|ᵀ |λ|), A and B the Jacobians of
      the dynamics and λ the costates, the largest along the plan: the cost may have any unit. What
      rounding changes in ∇_u J is sampled (see ``Solution.kkt_residual``), and counts while it
      leaves half of the tolerance's digits; where steps change the objective by rounding only, both
      are of controls that answer by the step's feedback, through which an unstable plant does not
      amplify it. Where all of that vanishes, at rest, a residual counts
      for nothing whose square, over ∇²_u cost, is below the square of rounding in the objective.
      With ``Constraints`` nothing depends on units: each row holds to
      tolerance · Σ_j |G_ij| |z_j|, its own size, with G its Jacobian and |z_j| the largest that
      this state or control gets along the plan; and ∇_u of the Lagrangian is, of each control, at
      most tolerance times the largest of the terms that cancel in it (cost, rows, dynamics), or,
      where these are nearly 0, times a thousandth of what moving it by its size had to gain. The
      costates are those of the last step, which answer by feedback: what an unstable plant makes
      of rounding does not count.
    * ``MAX_ITERATIONS``: ``Options.max_iterations`` ran out first.
    * ``STALLED``: no step lowers the objective, or with ``Constraints`` none leads on, yet the
      residual is above the tolerance.
    * ``NONFINITE``: the cost, the dynamics or one of their derivatives is NaN or infinite where the
      search begins, on the rollout of ``u_init`` and where all states are x_init.
    * ``INDEFINITE``: the first-order conditions hold, but the curvature on the free controls is
      not positive: a saddle or a degenerate minimum, where the implicit gradient does not exist.
    * ``INFEASIBLE``: u_lower > u_upper (or one of them is NaN) somewhere; or no small change of the
      controls lessens the violation of the constraints. Where the search finds no way on, it
      minimises that alone: the sum of squares of the hard rows' violations, each relative to its
      row's size. If that comes to rest above the tolerance, the search begins once more, with the
      states held at x_init; if that finds no plan either, the less violating one of the two is
      returned and ``Solution.violation`` says by how much: no proof that there is none elsewhere.
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    STALLED = 2
    NONFINITE = 3
    INDEFINITE = 4
    INFEASIBLE = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of ``ilqr_box`` and ``mpc_solve``; every one has a default that is meant to stay.

    The first six are pytree leaves: changing them does not recompile. The others change the
    program.

    Attributes:
      tolerance: bound on the scaled KKT residual (see ``Status.CONVERGED``), dimensionless.
        ``None`` takes 1e-10 in float64. In narrower types it takes 64 eps (float32: 7.6e-6), and
        goes on while steps still lower the residual, down to 4 eps: the last digits cost an
        iteration or two, and gradients need them.
      max_iterations: bound on the number of iterations.
      regularization: the first multiple of the stage's curvature that is added to Q_uu. It grows
        by itself when steps fail and falls when they succeed. With constraints it is for the steps
        on the way: those that finish, where Q_uu is positive definite, go without.
      line_search_decay: the ratio, in (0, 1), of successive step lengths (γ in Algorithm 2). With
        constraints the first is the longest that leaves rows and bounds inside of their boundary.
      trust_region: how far each control may move in one iteration, a number or [m]; None: as far
        as the objective falls. For models that are right only near the current plan, such as a
        learned network's. Where the search ends is not changed by it, but which local minimum it
        finds may be. With constraints the steps that finish, once the active rows are known, and
        the first, which moves controls off their bounds, do not heed it.
      smoothing: lets what a bound or a row holds answer in the gradient of ``mpc_solve``, which
        where all controls are clamped is zero otherwise; None: it is exact. See ``smoothed``.
      hessian: "exact" takes second-order steps, with the Hessian of the Hamiltonian wherever it
        leaves Q_uu positive definite, and as much of it as does elsewhere; "ilqr" takes the
        paper's, with ∇²cost, as long as that is positive definite and the objective changes by
        more than rounding; the exact one stands in. With constraints
        "exact" has the rows in it, and where it is not positive definite ∇²cost stands in, made
        so; if steps get short, the exact one, made so. "ilqr" always takes ∇²cost, made convex.
      backward_hessian: the Hessian in the backward pass of ``mpc_solve``: "exact" (the gradients
        are the derivatives of the solution), or "ilqr", the paper's H^n, which is ∇²cost and
        right for affine dynamics only.
      unconverged: the gradient of a problem that did not converge: "zero" (the default: one bad
        problem must not poison a training step, so log the share that converged), "nan", or
        "implicit" (as if it had converged; zero where the point is not finite or not feasible).
      riccati: how the linear system of the backward pass of ``mpc_solve`` is solved: "sequential"
        (stage by stage), "parallel" (O(log T) steps, for long horizons on wide hardware) or
        "auto", which is sequential at present. See ``method`` of ``lqr_solve``.
      record: how many iterations to record, a Python int; 0, the default, costs nothing. See
        ``Record``; ``summarize`` lists it, and ``plot_record`` draws it.
      derivative: the rule that ``mpc_solve`` gives its solution: "vjp", a ``jax.custom_vjp``, for
        reverse mode alone; or "jvp", for forward mode too (``jax.jvp``, ``jacfwd``, ``linearize``,
        ``hessian``), where a tangent is one linear solve with the stored factors: the whole
        ∂(x, u)/∂x_init takes n of them, and in reverse mode one for every entry of x and u. JAX
        has no function with both rules; reverse mode of "jvp" is its transpose.
      smoothed: what ``smoothing`` smooths, by a barrier −τ log(distance) that stands for every
        bound and inequality. "gradient": the plan stays exact, and its gradient is about that of
        the plan with the barrier. τ is ``smoothing`` times the largest gain that a bound or row
        withholds (λ²/h, with its multiplier λ and the curvature h that it sees; or λ times the
        whole range, if that is less), so ``smoothing`` has no unit, and is about the share of the
        free answer that is left to what is held hardest: 0.1 is much, 0 none. It costs two Riccati
        recursions. Second derivatives are a TypeError; the gradient of the objective, which needs
        no smoothing, stays exact. "plan": the plan itself is that of τ = ``smoothing``, in the
        units of the objective, strictly inside of all bounds and inequalities, and has its exact
        derivatives, to any order: ``check_gradients`` verifies them. The search for it begins at
        the exact plan, and takes a few iterations more. In either, equalities and equal bounds
        hold. Lower ``smoothing`` while training, which does not recompile. It does not help where
        plans jump between local minima, nor where what should move is when a plan switches.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine, Options, Quadratic, Status, mpc_solve
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> cost = Quadratic(jnp.eye(3))
      >>> x_init, u_init = jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> options = Options(max_iterations=20)
      >>> solution = mpc_solve(
      ...     cost, dynamics, x_init, u_init, u_lower=-0.5, u_upper=0.5, options=options
      ... )
      >>> Status(int(solution.status)).name
      'CONVERGED'
    """

    tolerance: ArrayLike | None = None
    max_iterations: ArrayLike = 200
    regularization: ArrayLike = 0.0
    line_search_decay: ArrayLike = 0.5
    trust_region: ArrayLike | None = None
    smoothing: ArrayLike | None = None
    hessian: Literal["exact", "ilqr"] = dataclasses.field(
        default="exact", metadata=dict(static=True)
    )
    backward_hessian: Literal["exact", "ilqr"] = dataclasses.field(
        default="exact", metadata=dict(static=True)
    )
    unconverged: Literal["zero", "nan", "implicit"] = dataclasses.field(
        default="zero", metadata=dict(static=True)
    )
    riccati: RiccatiMethod = dataclasses.field(default="auto", metadata=dict(static=True))
    record: int = dataclasses.field(default=0, metadata=dict(static=True))
    derivative: DerivativeRule = dataclasses.field(default="vjp", metadata=dict(static=True))
    smoothed: Smoothed = dataclasses.field(default="gradient", metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slack:
    """Makes inequalities soft: each may be violated by a slack s = max(g, 0), which is paid for.

        price   linear · s + ½ quadratic · s²

    Attributes:
      linear: ≥ 0. Up to a multiplier of this size the constraint holds exactly. inf makes it hard.
      quadratic: ≥ 0 and finite.

    Both broadcast to [T, p] (terminal: [q]), so hard and soft rows can stand in one function.
    Solutions are differentiable in both.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine, Constraints, Quadratic, Slack, mpc_solve
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> cost = Quadratic(jnp.eye(3))
      >>> x_init, u_init = jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> def too_fast(x, u, t, params):  # backwards at more than 0.2
      ...     return -0.2 - x[1:]
      >>> constraints = Constraints(inequality=too_fast, slack=Slack(linear=0.3))
      >>> solution = mpc_solve(cost, dynamics, x_init, u_init, constraints=constraints)
      >>> print(jnp.array_str(solution.x[1:, 1], precision=2))  # one step is too fast, and paid for
      [-0.2  -0.23 -0.2  -0.16 -0.16]
    """

    linear: ArrayLike = 0.0
    quadratic: ArrayLike = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rate:
    """Bounds and prices the change of the controls, d_t = u_t − u_{t−1}.

        price   ½ Σ_t Σ_i weight_i d_ti²      subject to   |d_t| ≤ limit

    Attributes:
      previous: [m], u_{−1}, the control that was applied before the plan.
      limit: ≥ 0, broadcasts to [T, m]; inf is legal; None for no limit.
      weight: ≥ 0, broadcasts to [T, m]; None for no price.

    Solutions are differentiable in all three.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Constraints, Rate
      >>> constraints = Constraints(rate=Rate(previous=jnp.zeros(1), limit=0.2))
      >>> constraints.rate.limit  # no control is further than this from the one before
      0.2
    """

    previous: ArrayLike
    limit: ArrayLike | None = None
    weight: ArrayLike | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByConstraint:
    """One number a row of the constraints; None for those that the problem does not have."""

    inequality: Array | None = None  # [T, p]
    equality: Array | None = None  # [T, r]
    terminal_inequality: Array | None = None  # [q]
    terminal_equality: Array | None = None  # [s]
    rate: Array | None = None  # [T, m]
    state: Array | None = None  # [T+1, n], of x_lower and x_upper


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Multipliers(ByConstraint):
    """The derivatives of the optimal objective in the constraints' right-hand sides, negated.

    None for those that the problem does not have. Those of inequalities are ≥ 0, and 0 where
    inactive. Those between two bounds are signed: that of the rate is positive where u_t − u_{t−1}
    is at its upper limit, that of the state where x_t is at x_upper, and negative at the lower one.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Violations(ByConstraint):
    """By how much a plan violates each of its constraints: max(g, 0), or |h| of an equality.

    None for those that the problem does not have. Of rate and state it is the distance from the
    limits. Soft constraints count too: theirs is the slack that is paid for.
    """


def _function() -> Any:
    return dataclasses.field(default=None, metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Constraints:
    """What a plan has to satisfy beside the bounds of its controls; every part is optional.

    Attributes:
      inequality: (x [n], u [m], t, params) -> [p], ≤ 0 at every stage t < T.
      equality: (x, u, t, params) -> [r], = 0 at every stage.
      terminal_inequality: (x_T, params) -> [q], ≤ 0.
      terminal_equality: (x_T, params) -> [s], = 0.
      slack: a ``Slack``, which makes ``inequality`` soft; None: it is hard.
      terminal_slack: the same for ``terminal_inequality``.
      rate: a ``Rate``.
      x_lower, x_upper: bounds of the states x_1 … x_T, broadcast to [T+1, n]; those of x_0 = x_init
        do not count. ±inf and equal bounds are legal; None: there are none, and no rows either.
        Solutions are differentiable in them (between equal ones, half goes to each).
      multipliers: where the search starts: those of a solution nearby, as u_init is its plan. It
        starts at 0 by default, and where an entry is None.
      x_size, u_size: how large the states and the controls get, in their units, ≥ 0, broadcast to
        [n] and [m]. The search measures them by that, and a row by Σ_j |G_ij| size_j. 0 or None: it
        finds out by itself, from the plans that it comes by, bounds and curvature. Give them where
        it takes long or fails for that: where nothing prices controls that no u_lower and u_upper
        bound, say. The solution, and so its gradient, does not depend on them.

    The functions are differentiated twice, as cost and dynamics are, and may close over traced
    values.

    inequality and equality also see the first stage, and what they say there of x_init alone is not
    the plan's to meet. A hard row that does not depend on u_0 at all (its derivative in u_0 is
    exactly 0) is left out there: of search, status, multipliers, violation and gradient.
    ``Solution.initial_violation`` says by how much x_init breaks such rows. Soft ones keep their
    price.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine, Constraints, Quadratic, mpc_solve
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> cost = Quadratic(jnp.eye(3))
      >>> x_init, u_init = jnp.array([1.0, 0.0]), jnp.zeros((5, 1))
      >>> def too_fast(x, u, t, params):  # backwards at more than 0.2
      ...     return -0.2 - x[1:]
      >>> constraints = Constraints(inequality=too_fast)
      >>> solution = mpc_solve(cost, dynamics, x_init, u_init, constraints=constraints)
      >>> print(jnp.array_str(solution.x[1:, 1], precision=2))
      [-0.2  -0.2  -0.2  -0.16 -0.16]
      >>> print(jnp.array_str(solution.multipliers.inequality[:, 0], precision=2))
      [0.   0.2  0.54 0.   0.  ]

      The same as a bound of the states:

      >>> bounds = Constraints(x_lower=jnp.array([-jnp.inf, -0.2]))
      >>> solution = mpc_solve(cost, dynamics, x_init, u_init, constraints=bounds)
      >>> print(jnp.array_str(solution.x[1:, 1], precision=2))
      [-0.2  -0.2  -0.2  -0.16 -0.16]
      >>> print(jnp.array_str(solution.multipliers.state[:, 1], precision=2))
      [ 0.   -0.2  -0.54  0.    0.    0.  ]
    """

    inequality: Constraint | None = _function()
    equality: Constraint | None = _function()
    terminal_inequality: TerminalConstraint | None = _function()
    terminal_equality: TerminalConstraint | None = _function()
    slack: Slack | None = None
    terminal_slack: Slack | None = None
    rate: Rate | None = None
    multipliers: Multipliers | None = None
    x_lower: ArrayLike | None = None
    x_upper: ArrayLike | None = None
    x_size: ArrayLike | None = None
    u_size: ArrayLike | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LQRSolution:
    """What ``lqr_solve`` returns: the plan u_t = K_t x_t + k_t, its states and its costates, and
    whether that is a minimum."""

    x: Array  # [T+1, n]
    u: Array  # [T, m]
    costate: Array  # [T+1, n]; costate[t] = ∂(cost-to-go)/∂x_t
    K: Array  # [T, m, n]; rows of pinned controls are 0
    k: Array  # [T, m]
    status: Array  # a ``Status``, as int32: CONVERGED, INDEFINITE or NONFINITE


class Action(enum.IntEnum):
    """What one iteration of a search was for: see ``Record``."""

    STOP = 0  # the last evaluation, without a step
    NEWTON = 1  # a step with the exact Hessian
    CONVEX = 2  # one with ∇²cost, for the exact Hessian is not convex at every stage
    ESCAPE = 3  # away from a saddle, along negative curvature
    BACK = 4  # the last step was for the worse: back to where it led from
    # With constraints.
    MEASURE = 5  # of the problem's sizes
    BARRIER = 6  # a step of the interior-point method
    RESTORE = 7  # one that lessens the violation alone
    FINISH = 8  # one of Newton's method on the active set


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What a search did: the first ``Options.record`` iterations, of the point that each began with
    and the step that it took. Behind the last one the floats are NaN.

    Attributes:
      objective: [N], without the price of slack.
      residual: [N], the KKT residual, as ``Solution.kkt_residual``.
      violation: [N], of hard constraints and, on the way, of the dynamics: the largest.
      step: [N], the share of the step that was taken; 0: none was good enough.
      regularization: [N], the multiple of the curvature that was added to Q_uu.
      barrier: [N], τ; 0 without constraints.
      active: [N] int32, clamped controls and active constraints.
      action: [N] int32, an ``Action`` each.
    """

    objective: Array
    residual: Array
    violation: Array
    step: Array
    regularization: Array
    barrier: Array
    active: Array
    action: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Smoothing:
    """How a solution was smoothed: see ``Options.smoothing``."""

    value: Array
    smoothed: Smoothed = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What ``ilqr_box`` and ``mpc_solve`` return. Every field describes the returned point itself.

    Attributes:
      x: [T+1, n], the rollout of u from x_init.
      u: [T, m], the plan; a clamped control equals its bound exactly.
      costate: [T+1, n]; costate[t] = ∂(cost-to-go)/∂x_t, so costate[0] = ∂objective/∂x_init.
      K: [T, m, n], the feedback gains of the local optimum, du_t = K_t dx_t, without
        regularization; rows of clamped controls are 0.
      free: [T, m] bool, the controls that are not clamped: a control is clamped where it is at a
        bound that the descent direction −∇_u J points out of, and where its bounds are equal.
      objective: the total cost.
      kkt_residual: max |clip(u − ∇_u J, u_lower, u_upper) − u|, the projected gradient; or, where
        that is more, the size of rounding in it: what one rounding of every state, control and
        costate does to ∇_u J on the free controls, by way of the whole trajectory. On unstable
        plants that is far above the digits of the dtype, however good the plan.
      iterations: the number of accepted and rejected steps that were tried. With ``Constraints``
        the measurement at the start counts, and so does every step of a restoration and a finish;
        the lengths of one step do not.
      status: a ``Status``, as int32.
      multipliers: of the ``Constraints``; None where there are none.
      violation: the largest violation of a hard constraint, max(g, 0) or |h|; 0 if there is none.
      violations: that of every constraint, hard or soft, at every stage: a ``Violations``, or None
        where there are none. A constant to differentiation.
      initial_violation: the largest violation, at the first stage, of the hard constraints that say
        something of x_init alone. No plan can lessen it, and it counts for nothing else: see
        ``Constraints``.
      record: of the iterations, a ``Record``, with ``Options.record``; else None. A constant to
        differentiation.
      smoothing: with ``Options.smoothing``, a ``Smoothing``; else None. With a barrier in the plan,
        all but the objective, which is the cost of the plan without it, are of the problem with the
        barrier: costate, K and kkt_residual, and the multipliers, those of inequalities included.
        No control is clamped, but between equal bounds.

    With ``Constraints``, the objective includes the prices of slack and rate, and kkt_residual is
    that of the Lagrangian or the distance from feasibility and complementarity, whichever is
    larger, both in their own units. K is the feedback that holds the active constraints by large
    weights on their squares, and with a ``Rate`` it has m further columns, for the change of the
    control before.
    """

    x: Array
    u: Array
    costate: Array
    K: Array
    free: Array
    objective: Array
    kkt_residual: Array
    iterations: Array
    status: Array
    multipliers: Any = None  # Multipliers
    violation: Any = None  # Array
    violations: Any = None  # Violations
    initial_violation: Any = None  # Array
    record: Any = None  # Record
    smoothing: Any = None  # Smoothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Episode:
    """What ``receding_horizon`` returns: the plant's trajectory, and how each solve ended."""

    x: Array  # [N+1, n], the states of the plant
    u: Array  # [N, m], the controls that were applied
    costs: Array  # [N], the stage costs of what happened
    # [N], a ``Status`` each: that of the solve, or NONFINITE where that CONVERGED, but the plant's
    # next state or the stage cost is not finite.
    status: Array
    iterations: Array  # [N]
    kkt_residual: Array  # [N]
