"""Away from a saddle, along negative curvature."""

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.pivots import definite_threshold
from jaxmpc.riccati.sequential import Factors
from jaxmpc.solver.assessment import Assessment
from jaxmpc.solver.iterate import Iterate
from jaxmpc.solver.line_search import Step

# The power 2¹⁰: what is left of an eigenvalue that is smaller by a percent is e⁻¹⁰.
_SQUARINGS = 10


def along_negative_curvature(
    data: Data, at: Iterate, here: Assessment, F: Array, H: Array, factors: Factors
) -> Step:
    """A step away from a saddle: at the last stage whose Q_uu is not positive definite, along a
    direction of negative curvature, with the later stages answering by their feedback."""
    T, _, *batch = at.u.shape
    n = at.x.shape[1]
    bad = ~(factors.curvature > definite_threshold(at.u.dtype))
    last = T - 1 - jnp.argmax(bad[::-1], axis=0)
    stage = jnp.arange(T).reshape((T,) + (1,) * len(batch))
    at_last, later = stage == last, stage > last  # [T]

    def pick(a):
        """a[last], of each problem."""
        there = at_last.reshape((T,) + (1,) * (a.ndim - at_last.ndim) + tuple(batch))
        return jnp.sum(jnp.where(there, a, 0), axis=0)

    B, V = pick(F[:, :, n:]), pick(factors.V[1:])
    Quu = pick(H[:, n:, n:]) + lanes.matmul_t(B, lanes.matmul(V, B))
    direction = negative_direction(Quu, jnp.any(at_last[:, None] & ~here.clamped, axis=0))
    lower, upper = pick(data.u_lower), pick(data.u_upper)
    # Without bounds, the length at which the curvature would have used up the objective.
    curvature = -lanes.dot(direction, lanes.matvec(Quu, direction))
    curvature = jnp.maximum(curvature, jnp.finfo(at.u.dtype).tiny)
    natural = jnp.sqrt(jnp.sum(jnp.abs(at.costs), axis=0) / curvature)
    natural = jnp.where(natural > 0, natural, jnp.maximum(1, jnp.abs(pick(at.u))))
    width = jnp.where(jnp.isfinite(upper - lower), upper - lower, natural)
    # The longest step that keeps every control within its width.
    length = jnp.min(jnp.where(direction == 0, jnp.inf, width / jnp.abs(direction)), axis=0)
    move = jnp.where(direction == 0, 0, length * direction)
    target = at.u + jnp.where(at_last[:, None], move, 0)
    K = jnp.where(later[:, None, None], factors.K, 0)
    zero = jnp.zeros(batch, at.u.dtype)
    return Step(target, jnp.zeros_like(target), K, zero, zero)


def negative_direction(Q, free):
    """A direction of negative curvature of Q on the free controls, where there is one.

    That of the smallest eigenvalue, by powers of c − Q with c above the largest, from a start with
    no symmetry. The matrix is small and squared in place: no LAPACK call.
    """
    m = free.shape[0]
    both = free[:, None] & free[None, :]
    bound = jnp.max(jnp.sum(jnp.where(both, jnp.abs(Q), 0), axis=1), axis=0)
    bound = jnp.where(bound > 0, bound, 1)
    tiny = jnp.finfo(Q.dtype).tiny
    power = jnp.where(both, jnp.where(lanes.identity(m, bound.ndim), bound, 0) - Q, 0)

    def square(_, power):
        power = power / jnp.maximum(jnp.max(jnp.abs(power), axis=(0, 1)), tiny)
        return lanes.matmul(power, power)

    power = lax.fori_loop(0, _SQUARINGS, square, power)
    start = jnp.cos(jnp.arange(m, dtype=Q.dtype)).reshape((m,) + (1,) * bound.ndim)
    direction = jnp.sum(power * start, axis=1)
    return direction / jnp.maximum(jnp.max(jnp.abs(direction), axis=0), tiny)
