"""The box-constrained quadratic program of one stage.

    minimise over d   ½ dᵀ Q d + qᵀ d   subject to   lower ≤ d ≤ upper

by projected Newton (Tassa, Mansard and Todorov 2014, section IV), in closed form for one control.
"""

import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.riccati.pivots import masked_inverse

_ARMIJO = 0.1  # as in the source
_MAX_BACKTRACKS = 20
_MAX_STEPS = (
    10  # a control: each can change sides several times; beyond, it is rounding that cycles
)


def box_qp(
    Q: Array, q: Array, lower: Array, upper: Array, scale: Array
) -> tuple[Array, Array, Array]:
    """Solve one box QP with Q [m,m] positive definite and 0 within the bounds; or one per lane.

    Returns the minimiser d [m], and Quu_inv [m,m], the inverse of Q on the free controls (0 on the
    clamped), and free [m]: False where d is at a bound that −(Qd + q) points out of, or where the
    bounds are equal. A clamped entry of d equals its bound exactly.
    """
    if q.shape[0] == 1:
        return _box_qp_1(Q, q, lower, upper, scale)
    return _projected_newton(Q, q, lower, upper, scale)


def _box_qp_1(Q, q, lower, upper, scale):
    newton = -q / Q[0]
    low = (newton < lower) | (lower == upper)
    high = newton > upper
    free = ~(low | high)
    d = jnp.where(low, lower, jnp.where(high, upper, newton))
    inverse, _ = masked_inverse(Q, free, scale)
    return d, inverse, free


def clamped(gradient: Array, d: Array, lower: Array, upper: Array) -> Array:
    """Where d is at a bound that −gradient points out of, or the bounds are equal."""
    return (lower == upper) | ((d <= lower) & (gradient > 0)) | ((d >= upper) & (gradient < 0))


def _projected_newton(Q, q, lower, upper, scale):
    m = q.shape[0]

    def objective(d):
        return lanes.dot(d, 0.5 * lanes.matvec(Q, d) + q)

    def newton_step(d):
        gradient = lanes.matvec(Q, d) + q
        free = ~clamped(gradient, d, lower, upper)
        inverse, _ = masked_inverse(Q, free, scale)
        # The minimiser over the free entries with the clamped ones held where they are.
        target = jnp.where(free, d - lanes.matvec(inverse, gradient), d)
        return target, inverse, free, gradient

    def search(d, target, gradient, wanted):
        value = objective(d)

        def project(step):
            # The bound itself where the full step reaches it: d + (bound - d) may miss by an ulp.
            return jnp.clip(jnp.where(step == 1, target, d + step * (target - d)), lower, upper)

        def fails(step):
            trial = project(step)
            decrease = lanes.dot(gradient, d - trial)
            return ~(value - objective(trial) >= _ARMIJO * decrease)

        def cond(carry):
            _, tries, failed = carry
            return (tries < _MAX_BACKTRACKS) & jnp.any(failed)

        def body(carry):
            step, tries, failed = carry
            step = jnp.where(failed, step * 0.5, step)
            return step, tries + 1, failed & fails(step)

        one = jnp.ones(q.shape[1:], q.dtype)
        step, *_ = lax.while_loop(cond, body, (one, 0, wanted & fails(one)))
        return project(step)

    def cond(carry):
        *_, done, iteration = carry
        return ~jnp.all(done) & (iteration < _MAX_STEPS * m)

    def body(carry):
        *before, done, iteration = carry
        d = before[0]
        target, inverse, free, gradient = newton_step(d)
        inside = jnp.all((target >= lower) & (target <= upper), axis=0)
        trial = jnp.where(inside, target, search(d, target, gradient, ~inside & ~done))
        # A full step inside the box is the minimiser of its free set; it is that of the box when
        # the free set of the new point is the same.
        same = jnp.all(clamped(lanes.matvec(Q, trial) + q, trial, lower, upper) == ~free, axis=0)
        ended = (inside & same) | jnp.all((trial == d) | jnp.isnan(trial), axis=0)
        after = trial, inverse, free
        kept = lanes.select(done, tuple(before), after)
        return *kept, done | ended, iteration + 1

    start = jnp.clip(jnp.zeros_like(q), lower, upper)
    no = jnp.zeros(q.shape[1:], bool)
    init = (start, jnp.zeros_like(Q), jnp.zeros(q.shape, bool), no, 0)
    d, inverse, free, _, _ = lax.while_loop(cond, body, init)
    return d, inverse, free
