"""The Riccati recursion and the rollout of all stages at once: O(log T) steps in place of O(T).

A stretch of the horizon is summed up by the least cost of going from its first state x to the
state y that follows it, in terms of a costate λ:

    max over λ   ½ xᵀ J x − ½ λᵀ C λ − λᵀ (y − A x).

Two neighbouring stretches combine into one of the same form, and combining is associative: a
parallel scan gives the cost-to-go of every stage. Given those, the gains of all stages are
independent of each other, and the rollout is a scan over affine maps.

The scan adds up in another order than the recursion and can lose digits that it keeps. So a Newton
step on the whole recursion follows, and then a check: what does not satisfy the recursion as well
as the rounding of one stage allows is computed again, one stage after the other.

Source: Särkkä and García-Fernández 2023, IEEE TAC 68(2) (arXiv:2104.03186). What is different here:
the cost of a state counts as part of the stage that leads to it, the mask of pinned controls, the
Newton step (Kleinman's: a Lyapunov recursion with the gains fixed) and the check.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap

from jaxmpc.batch import lanes
from jaxmpc.riccati import sequential
from jaxmpc.riccati.pivots import masked_inverse
from jaxmpc.riccati.point import Point, Rhs
from jaxmpc.riccati.sequential import Factors, no_multipliers, quadratic_form, riccati_stage

# What the recursion may miss by, in units of rounding of the terms it sums up. On random systems
# (n = 8, costs over ten decades, half of them unstable) sound results missed by 3 in the median
# and by up to 164; a scan that lost its digits misses by thousands.
_ROUNDING = 256


def factorize(C: Array, F: Array, C_final: Array, free: Array) -> Factors:
    """The same as ``riccati.factorize``, in O(log T) steps; differentiable to any order."""
    V = _cost_to_go(C, F, C_final, free)
    factors, _ = _each_stage(riccati_stage, C, F, free, V[1:])
    return factors._replace(V=V)


def substitute(factors: Factors, F: Array, rhs: Rhs) -> tuple[Point, Array]:
    """The same as ``riccati.substitute``, in O(log T) steps; differentiable to any order."""
    K, Quu_inv, V, _ = factors
    n = rhs.x_init.shape[0]
    B, c_x, c_u = F[:, :, n:], rhs.c[:, :n], rhs.c[:, n:]
    closed = _closed_loop(F, K)
    V_f = _apply(V[1:], rhs.f)
    pull = c_x + _apply(_transpose(K), c_u) + _apply(_transpose(closed), V_f)
    v = _recursion_back(_apply, closed, _append(pull, rhs.c_final))
    k = -_apply(Quu_inv, c_u + _apply(_transpose(B), v[1:] + V_f))
    x = _recursion(_apply, closed, jnp.concatenate([rhs.x_init[None], _apply(B, k) + rhs.f]))
    return Point(x, _apply(K, x[:-1]) + k, _apply(V, x) + v, no_multipliers(rhs)), k


@jax.custom_jvp
def _cost_to_go(C: Array, F: Array, C_final: Array, free: Array) -> Array:
    """The V [T+1, n, n] of the Riccati recursion."""
    V = _associative_riccati(C, F, C_final, free)
    # Newton's step: the next V's error only enters by the closed loop, in first order.
    factors, _ = _each_stage(riccati_stage, C, F, free, V[1:])
    closed = _closed_loop(F, factors.K)
    gap = _append(factors.V - V[:-1], jnp.zeros_like(C_final))
    V += _scan_back(_congruence, closed, gap)

    factors, size = _each_stage(riccati_stage, C, F, free, V[1:])
    size = jnp.sqrt(size[:, : C_final.shape[0]])
    gap = jnp.abs(factors.V - V[:-1])
    holds = jnp.all(gap <= _tolerance(V.dtype) * size[:, :, None] * size[:, None, :])

    def stage_by_stage(C, F, C_final, free):
        return sequential.factorize(C, F, C_final, free).V

    return _replaced_by(stage_by_stage)(~holds, V, (C, F, C_final, free))


@_cost_to_go.defjvp
def _cost_to_go_jvp(primals, tangents):
    """V moves as the cost of the closed loop does, for the gains are optimal."""
    C, F, C_final, free = primals
    C_dot, F_dot, C_final_dot, _ = tangents
    n = C_final.shape[0]
    V = _cost_to_go(*primals)
    K = _each_stage(riccati_stage, C, F, free, V[1:])[0].K
    eye = jnp.broadcast_to(jnp.eye(n, dtype=V.dtype), (K.shape[0], n, n))
    to_z = jnp.concatenate([eye, K], axis=1)
    closed = lanes.product(F, to_z)
    bend = lanes.product(_transpose(to_z), lanes.product(C_dot, to_z))
    turn = lanes.product(V[1:], lanes.product(F_dot, to_z))
    bend += 2 * lanes.product(_transpose(closed), turn)
    moved = _append(_symmetric(bend), _symmetric(C_final_dot))
    return V, _recursion_back(_congruence, closed, moved)


@lanes.any_rank
def _associative_riccati(C, F, C_final, free):
    """V by the scan alone."""
    n = C_final.shape[0]
    P = _append(C[:, :n, :n], C_final)
    (A, reach, J), size = _each_stage(_element, C, F, free, P[:-1], P[1:])
    # States in units in which they cost alike: the elimination compares them.
    size = jnp.max(size[:, :n], axis=0)
    unit = lax.rsqrt(jnp.where(size > 0, size, 1))
    two = unit[:, None] * unit[None, :]
    elements = A * (unit[None, :] / unit[:, None]), reach / two, J * two
    J = lax.associative_scan(jax.vmap(_combine), elements, reverse=True)[2]
    return P.at[:-1].add(J / two)


def _element(C, F, free, P, P_next):
    """(A, C, J) of one stage with its control eliminated; ``reach`` is that C.

    The cost P_next of the state that follows counts here, and P in the stage before. That makes
    the control's block C_uu + BᵀP_next B, which is definite for many a C_uu that is not, and keeps
    B (…)⁻¹ Bᵀ small where controls are cheap.
    """
    n = P.shape[0]
    Q, size = quadratic_form(C, F, P_next)
    inverse, _ = masked_inverse(Q[n:, n:], free, size[n:])
    A, B, Qxu = F[:, :n], F[:, n:], Q[:n, n:]
    BR, QxuR = lanes.matmul(B, inverse), lanes.matmul(Qxu, inverse)
    A -= lanes.matmul(BR, lanes.transpose(Qxu))
    J = Q[:n, :n] - P - lanes.matmul(QxuR, lanes.transpose(Qxu))
    return (A, lanes.matmul(BR, lanes.transpose(B)), J), size


def _combine(later, earlier):
    """Two neighbouring stretches as one, by eliminating the state between them."""
    (A2, C2, J2), (A1, C1, J1) = later, earlier
    n = A1.shape[0]
    eye = jnp.eye(n, dtype=A1.dtype)
    solved = _solve(eye + lanes.product(C1, J2), jnp.concatenate([A1, C1], axis=1))
    A, C = solved[:, :n], solved[:, n:]
    C = C2 + _symmetric(lanes.product(A2, C, A2.T))
    J = J1 + _symmetric(lanes.product(A1.T, lanes.product(J2, A)))
    return lanes.product(A2, A), C, J


def _solve(matrix, rhs):
    """Gauss–Jordan elimination with partial pivoting.

    I + C J is not symmetric, and its leading minors may vanish where it is well conditioned. Plain
    operations, since on CPU a batch of LAPACK calls runs one matrix at a time. The loop over the
    pivots is not unrolled: the scan repeats this code for each of its 2 log₂ T levels.
    """
    n = matrix.shape[0]
    index = jnp.arange(n)

    def eliminate(k, M):
        here = (index == k).astype(M.dtype)
        column = lax.dynamic_index_in_dim(M, k, axis=1)
        pivot = jnp.argmax(jnp.where(index >= k, jnp.abs(column[:, 0]), -1))
        # Swap rows by a change of rank one: no gathers.
        swap = here - (index == pivot).astype(M.dtype)
        M -= swap[:, None] * jnp.sum(swap[:, None] * M, axis=0)
        row = lax.dynamic_index_in_dim(M, k, axis=0)
        column = lax.dynamic_index_in_dim(M, k, axis=1)
        return M - (column - here[:, None]) * (row / lax.dynamic_index_in_dim(row, k, axis=1))

    return lax.fori_loop(0, n, eliminate, jnp.concatenate([matrix, rhs], axis=1))[:, n:]


def _recursion(act, F, y):
    """x_0 = y_0, x_{t+1} = act(F_t, x_t) + y_{t+1} for all t at once, differentiable.

    act(F, x) is linear in x, and its transpose is act(Fᵀ, ·): F x, or F X Fᵀ on symmetric X.
    """
    back = _transpose(F)[::-1]
    return lax.custom_linear_solve(
        lambda x: x.at[1:].add(-act(F, x[:-1])),
        y,
        lambda _, y: _scan(act, F, y),
        lambda _, y: _scan(act, back, y[::-1])[::-1],
    )


def _recursion_back(act, F, y):
    """x_T = y_T, x_t = act(F_tᵀ, x_{t+1}) + y_t."""
    return _recursion(act, _transpose(F)[::-1], y[::-1])[::-1]


def _scan_back(act, F, y):
    return _associative_affine(act, _transpose(F)[::-1], y[::-1])[::-1]


def _scan(act, F, y):
    """``_recursion`` without its derivative: by the scan, or one after the other where that is
    off by more than rounding of the largest terms so far."""

    def gap(x):
        return act(F, x[:-1]) + y[1:] - x[1:]

    x = _associative_affine(act, F, y)
    # Squaring a matrix doubles its relative error: a long product of them misses by T roundings.
    # The correction takes that back, at little cost: its matrix products are the same.
    x += _associative_affine(act, F, jnp.concatenate([jnp.zeros_like(y[:1]), gap(x)]))
    size = act(jnp.abs(F), jnp.abs(x[:-1])) + jnp.abs(y[1:])
    holds = jnp.all(jnp.abs(gap(x)) <= _tolerance(x.dtype) * lax.cummax(size))

    def sequential(F, y):
        def step(x, now):
            x = act(now[0], x) + now[1]
            return x, x

        return jnp.concatenate([y[:1], lax.scan(step, y[0], (F, y[1:]))[1]])

    return _replaced_by(sequential)(~holds, x, (F, y))


def _associative_affine(act, F, y):
    def combine(first, then):
        return lanes.product(then[0], first[0]), act(then[0], first[1]) + then[1]

    start = y[1:].at[0].add(act(F[0], y[0]))
    return jnp.concatenate([y[:1], lax.associative_scan(combine, (F, start))[1]])


def _replaced_by(sequential):
    """A function (needed, fast, args) -> ``sequential(*args)`` if needed, else ``fast``.

    ``vmap`` would turn the ``cond`` into a ``select`` and run both; here one predicate decides for
    the whole batch, and ``sequential`` does not run unless some problem needs it.
    """

    @custom_vmap
    def replace(needed, fast, args):
        return lax.cond(needed, lambda: sequential(*args), lambda: fast)

    @replace.def_vmap
    def replace_batched(size, batched, *operands):
        needed, fast, args = jax.tree.map(
            lambda a, own: a if own else jnp.broadcast_to(a, (size, *a.shape)),
            operands,
            tuple(batched),
        )
        slow = _replaced_by(jax.vmap(sequential))(jnp.any(needed), fast, args)
        return jnp.where(needed.reshape(size, *[1] * (fast.ndim - 1)), slow, fast), True

    return replace


@lanes.any_rank
def _each_stage(body, *data):
    """``body`` on every stage, with the stages for lanes."""
    out = body(*(jnp.moveaxis(a, 0, -1) for a in data))
    return jax.tree.map(lambda a: jnp.moveaxis(a, -1, 0), out)


def _closed_loop(F, K):
    n = F.shape[1]
    return F[:, :, :n] + lanes.product(F[:, :, n:], K)


def _tolerance(dtype) -> float:
    return _ROUNDING * lanes.eps(dtype)


def _apply(F, x):
    return lanes.product(F, x[..., None])[..., 0]


def _congruence(F, X):
    return lanes.product(F, X, _transpose(F))


def _transpose(a):
    return jnp.swapaxes(a, -1, -2)


def _symmetric(a):
    return (a + _transpose(a)) * 0.5


def _append(a, last):
    return jnp.concatenate([a, last[None]])
