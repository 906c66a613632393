"""The box-constrained quadratic program of one stage.

    minimise over d   ½ dᵀ Q d + qᵀ d   subject to   lower ≤ d ≤ upper

by projected Newton (Tassa, Mansard and Todorov 2014, section IV), in closed form for one control.
"""

import jax.numpy as jnp
from jax import lax

from jaxmpc import entrywise
from jaxmpc.lqr import masked_inverse

_ARMIJO = 0.1
_MAX_BACKTRACKS = 20


def box_qp(Q, q, lower, upper, scale):
    """Solve one box QP with Q [m,m] positive definite and 0 within the bounds.

    Returns the minimiser d [m], and Quu_inv [m,m], the inverse of Q on the free controls (0 on the
    clamped), and free [m]: False where d is at a bound that −(Qd + q) points out of, or where the
    bounds are equal. A clamped entry of d equals its bound exactly.

    All arguments are arrays, or all are object arrays of scalars (``entrywise``).
    """
    m = q.shape[0]
    if m == 1:
        return _box_qp_1(Q, q, lower, upper, scale)
    if entrywise.is_entrywise(q):
        Q, q, lower, upper, scale = map(entrywise.join, (Q, q, lower, upper, scale))
        return tuple(entrywise.split(a, 0) for a in _projected_newton(Q, q, lower, upper, scale))
    return _projected_newton(Q, q, lower, upper, scale)


def _box_qp_1(Q, q, lower, upper, scale):
    fixed = entrywise.elementwise(jnp.equal, lower, upper)
    newton = -q / Q[0]
    low = entrywise.elementwise(jnp.less, newton, lower) | fixed
    high = entrywise.elementwise(jnp.greater, newton, upper)
    free = ~(low | high)
    d = entrywise.where(low, lower, entrywise.where(high, upper, newton))
    inverse, _ = masked_inverse(Q, free, scale)
    return d, inverse, free


def clamped(gradient, d, lower, upper):
    """Where d is at a bound that −gradient points out of, or the bounds are equal."""
    return (lower == upper) | ((d <= lower) & (gradient > 0)) | ((d >= upper) & (gradient < 0))


def _projected_newton(Q, q, lower, upper, scale):
    m = q.shape[0]

    def objective(d):
        return d @ (0.5 * (Q @ d) + q)

    def newton_step(d):
        gradient = Q @ d + q
        free = ~clamped(gradient, d, lower, upper)
        inverse, _ = masked_inverse(Q, free, scale)
        # The minimiser over the free entries with the clamped ones held where they are.
        target = jnp.where(free, d - inverse @ gradient, d)
        return target, inverse, free, gradient

    def search(d, target, gradient):
        value = objective(d)

        def project(step):
            # The bound itself where the full step reaches it: d + (bound - d) may miss by an ulp.
            return jnp.clip(jnp.where(step == 1, target, d + step * (target - d)), lower, upper)

        def fails(step):
            trial = project(step)
            decrease = gradient @ (d - trial)
            return ~(value - objective(trial) >= _ARMIJO * decrease)

        def cond(carry):
            step, tries = carry
            return (tries < _MAX_BACKTRACKS) & fails(step)

        one = jnp.ones((), q.dtype)
        step, _ = lax.while_loop(cond, lambda c: (c[0] * 0.5, c[1] + 1), (one, 0))
        return project(step)

    def cond(carry):
        *_, done, iteration = carry
        return ~done & (iteration < 10 * m)

    def body(carry):
        d, *_, iteration = carry
        target, inverse, free, gradient = newton_step(d)
        inside = jnp.all((target >= lower) & (target <= upper))
        trial = jnp.where(inside, target, search(d, target, gradient))
        # A full step inside the box is the minimiser of its free set; it is that of the box when
        # the free set of the new point is the same.
        same = jnp.all(clamped(Q @ trial + q, trial, lower, upper) == ~free)
        done = (inside & same) | jnp.all(trial == d)
        return trial, inverse, free, done, iteration + 1

    start = jnp.clip(jnp.zeros_like(q), lower, upper)
    init = (start, jnp.zeros_like(Q), jnp.zeros(m, bool), jnp.array(False), 0)
    d, inverse, free, _, _ = lax.while_loop(cond, body, init)
    return d, inverse, free
