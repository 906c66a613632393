"""Where the next solve of a closed loop starts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.problem.constraints import KINDS
from jaxmpc.types import Constraints, Multipliers, Solution, Status


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WarmStart:
    """What ``shift`` makes of a solution: where the next solve, one stage later, starts.

    Attributes:
      u_init: [T, m].
      x_guess: [T+1, n], or None for the rollout of u_init.
      previous: [m], the control that was applied: ``Rate.previous`` of the next plan.
      multipliers: of the ``Constraints``, or None where there are none.
    """

    u_init: Array
    x_guess: Array | None
    previous: Array
    multipliers: Multipliers | None

    def constraints(self, constraints: Constraints | None) -> Constraints | None:
        """``constraints`` as the next plan has them: with these multipliers, and in a ``Rate`` the
        control before."""
        if constraints is None:
            return None
        rate = constraints.rate
        if rate is not None:
            rate = dataclasses.replace(rate, previous=self.previous)
        return dataclasses.replace(constraints, multipliers=self.multipliers, rate=rate)


def shift(solution: Solution) -> WarmStart:
    """Where the next solve starts, once the first control of a plan has been applied.

    Plan, states and multipliers move up by one stage, and the last one of each is repeated. The
    multipliers of a plan that did not CONVERGE are replaced by 0. It is what ``receding_horizon``
    does from step to step, for a loop of one's own: around a simulator, say, that is no JAX
    function. Of a batch of solutions, take ``jax.vmap(shift)``.

    Args:
      solution: of ``mpc_solve`` or ``ilqr_box``, with shapes as in ``Solution``.

    Returns:
      A ``WarmStart``. ``previous`` is the plan's first control, with its derivative; the rest is a
      constant to differentiation, since where a solve starts does not move what it finds.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jaxmpc import Affine, Constraints, Quadratic, Rate, mpc_solve, shift
      >>> dynamics = Affine(jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5]]))  # a cart
      >>> cost = Quadratic(jnp.eye(3))
      >>> constraints = Constraints(rate=Rate(previous=jnp.zeros(1), limit=0.2))
      >>> @jax.jit
      ... def plan(x, u_init, constraints):
      ...     return mpc_solve(cost, dynamics, x, u_init, constraints=constraints)
      >>> x = jnp.array([1.0, 0.0])
      >>> solution = plan(x, jnp.zeros((8, 1)), constraints)
      >>> for _ in range(20):
      ...     x = dynamics(x, solution.u[0], 0, None)  # or any simulator
      ...     start = shift(solution)
      ...     solution = plan(x, start.u_init, start.constraints(constraints))
      >>> bool(jnp.all(jnp.abs(x) < 0.05))  # the cart rests at 0
      True
    """
    u, x, multipliers = lax.stop_gradient((solution.u, solution.x, solution.multipliers))
    if multipliers is not None:
        usable = solution.status == Status.CONVERGED
        multipliers = jax.tree.map(lambda a: jnp.where(usable, a, 0), _later(multipliers))
    return WarmStart(_shifted(u), _shifted(x), solution.u[0], multipliers)


def _shifted(a: Array) -> Array:
    """By one stage, the last repeated."""
    return jnp.concatenate([a[1:], a[-1:]])


def _later(multipliers: Multipliers) -> Multipliers:
    stage = {kind.name: getattr(multipliers, kind.name) for kind in KINDS if not kind.final}
    shifted = {name: _shifted(a) for name, a in stage.items() if a is not None}
    return dataclasses.replace(multipliers, **shifted)
