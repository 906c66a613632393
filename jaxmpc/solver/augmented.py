"""The augmented Lagrangian of the constraints.

Every row g of the constraints has a price h(g) that is added to the objective: for a hard
inequality 0 where g ≤ 0 and ∞ beyond, for an equality ∞ but at 0, for a soft inequality
linear · s + ½ quadratic · s² with s = max(g, 0). All three are convex, with the conjugate

    h*(ν) = ½ max(ν − linear, 0)² / quadratic   for ν ≥ lower,

lower = 0 for inequalities and −∞ for equalities, linear = ∞ for whatever is hard. In place of h
the solver minimises its smooth lower model around an estimate μ of the multiplier,

    ψ(g) = max over ν ≥ lower   ν g − h*(ν) − (ν − μ)² / 2ρ,

whose derivative is the maximiser ν itself. A minimum of the whole at which ν = μ is a minimum of
the problem; hence μ ← ν, again and again, with ρ raised where that closes the gap too slowly.

Source: Rockafellar 1976, Augmented Lagrangians and applications of the proximal point algorithm in
convex programming; Bertsekas 1982, Constrained Optimization and Lagrange Multiplier Methods, 2.2
(ψ for hard rows) and 5.3 (for prices with kinks).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxmpc.batch import lanes
from jaxmpc.problem.expansions import Expansion
from jaxmpc.problem.prices import Prices, RowState
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.point import Rows
from jaxmpc.riccati.rows import along_rows, largest, per_row
from jaxmpc.solver.box_qp import clamped

_FIRST = 10.0  # ρ to begin with, relative to the curvature of the cost
_GROWTH = 10.0
# ρ grows unless an update shrinks the gap to this share: far from feasible, a large ρ is a narrow
# valley to search in; near it, the valley is straight, and a large ρ closes the gap in a few steps.
_ENOUGH_FAR, _ENOUGH_NEAR, _NEAR = 0.5, 0.02, 1e-2
# ρ at most, relative to that curvature: what is needed to come near at all; and near, what leaves
# the digits to tell the two apart, a power of eps.
_LARGEST, _DIGITS = 1e6, 0.4
_ROUNDING = 16  # a residual of so many roundings is not worth another step
_STALLED = 0.95  # an update that leaves more than this share of the gap has not helped
_PATIENCE = 3  # so many in a row with the largest ρ
_STATIONARY = 1e-3  # relative size of the gradient of a violation that no step lessens


class Penalty(NamedTuple):
    """The parameters of the augmented Lagrangian, and how their updates went."""

    mu: Rows  # estimates of the multipliers
    rho: Array  # one a problem; 0 before the first trip
    gap: Array  # at the last update
    stalls: Array  # updates in a row that did not lessen it


def start(mu: Rows, zero: Array) -> Penalty:
    """``zero``: one a problem."""
    return Penalty(mu, zero, zero + jnp.inf, zero)


def begin(penalty: Penalty, expansion: Expansion) -> tuple[Penalty, tuple[Array, Array]]:
    """With a first ρ, if there is none yet; and the largest ρ far from feasible, and near."""
    stiffness = _stiffness(expansion)
    rho = jnp.where(penalty.rho > 0, penalty.rho, _FIRST * stiffness)
    near = lanes.eps(rho) ** -_DIGITS
    return penalty._replace(rho=rho), (stiffness * max(_LARGEST, near), stiffness * near)


def _stiffness(expansion: Expansion) -> Array:
    """The curvature of the cost in the direction of the row that it resists least: 1 / Gᵀ C⁻¹ G,
    with the largest entries of states and of controls for C."""
    if not expansion.G.num:
        return jnp.ones_like(expansion.c_final[0])
    n = expansion.c_final.shape[0]
    diagonal = jnp.abs(jax.vmap(lanes.diagonal)(expansion.C))
    final = jnp.max(jnp.abs(lanes.diagonal(expansion.C_final)), axis=0)
    of_x = jnp.maximum(jnp.max(diagonal[:, :n], axis=(0, 1)), final)
    of_u = jnp.max(diagonal[:, n:], axis=(0, 1))
    # Where one is not priced at all, the other's scale is all there is to go by.
    of_x, of_u = jnp.where(of_x > 0, of_x, of_u), jnp.where(of_u > 0, of_u, of_x)
    stage, final = expansion.G
    of_stage = jnp.max(stage[:, :, :n] ** 2, axis=2) / of_x
    of_stage += jnp.max(stage[:, :, n:] ** 2, axis=2) / of_u
    softest = largest(Rows(of_stage, jnp.max(final**2, axis=1) / of_x))
    usable = (softest > 0) & jnp.isfinite(softest)
    return jnp.where(usable, 1 / jnp.where(usable, softest, 1), 1)


def update(
    state: RowState,
    penalty: Penalty,
    gap: Array,
    size: Array,
    tolerance: Array,
    limits,
) -> Penalty:
    """After a minimisation: μ ← ν, and a larger ρ unless the gap closes fast."""
    closed = gap <= tolerance * size
    most, most_near = limits
    near = (gap <= _NEAR * size) & (penalty.rho * _GROWTH <= most_near)
    slow = ~closed & (gap > jnp.where(near, _ENOUGH_NEAR, _ENOUGH_FAR) * penalty.gap)
    room = penalty.rho * _GROWTH <= most
    stalled = ~closed & ~room & (gap > _STALLED * penalty.gap)
    return Penalty(
        mu=state.multiplier,
        rho=jnp.where(slow & room, penalty.rho * _GROWTH, penalty.rho),
        gap=gap,
        stalls=jnp.where(stalled, penalty.stalls + 1, 0),
    )


def follow(ahead: RowState, g: Rows, penalty: Penalty) -> Penalty:
    """With the μ for which the multipliers at g are those of the model, ``ahead``, where it holds
    a row. Those of μ + ρ g differ by ρ times what the model misses, and at the end of a search that
    is rounding: this makes of the step one of sequential quadratic programming."""

    def shifted(g, mu, nu, active):
        return jnp.where(active, nu - penalty.rho * g, mu)

    return penalty._replace(mu=per_row(shifted, g, penalty.mu, ahead.multiplier, ahead.active))


def drowned(residual: Array, penalty: Penalty, expansion: Expansion, size: Array) -> Array:
    """Whether the gradient is what the rounding of g makes of it, by way of ρ."""
    rounding = lanes.eps(size) * penalty.rho * size * slope(expansion)
    return residual <= _ROUNDING * rounding


def values(g: Rows, penalty: Penalty, prices: Prices) -> Rows:
    """ψ of every row."""

    def psi(g, mu, lower, linear, quadratic):
        nu = _multiplier(g, mu, penalty.rho, lower, linear, quadratic)
        beyond = jnp.maximum(mu + penalty.rho * g - linear, 0) / (penalty.rho + quadratic)
        conjugate = 0.5 * quadratic * beyond**2
        return nu * g - conjugate - 0.5 * (nu - mu) ** 2 / penalty.rho

    return per_row(psi, g, penalty.mu, *prices)


def _multiplier(g, mu, rho, lower, linear, quadratic):
    shifted = mu + rho * g
    beyond = jnp.maximum(shifted - linear, 0)
    return jnp.clip(shifted, lower, linear) + quadratic / (rho + quadratic) * beyond


def state(g: Rows, penalty: Penalty, prices: Prices) -> RowState:
    """The piece that every row is on, and the maximiser ν of ψ."""
    return on_pieces(g, penalty, prices, *_pieces(g, penalty, prices))


def _pieces(g: Rows, penalty: Penalty, prices: Prices) -> tuple[Rows, Rows]:
    shifted = per_row(lambda g, mu: mu + penalty.rho * g, g, penalty.mu)
    beyond = per_row(jnp.greater, shifted, prices.linear, dtype=bool)
    above = per_row(jnp.greater, shifted, prices.lower, dtype=bool)
    return per_row(lambda a, b: a & ~b, above, beyond), beyond


def on_pieces(g: Rows, penalty: Penalty, prices: Prices, active: Rows, beyond: Rows) -> RowState:
    """ψ′ as the quadratic pieces that are named have it at g, be it inside of them or not."""
    rho = penalty.rho

    def slope(g, mu, active, beyond, lower, linear, quadratic):
        shifted = mu + rho * g
        finite = jnp.where(beyond, linear, 0)
        with_slack = finite + quadratic / (rho + quadratic) * (shifted - finite)
        return jnp.where(
            active, shifted, jnp.where(beyond, with_slack, jnp.where(lower < 0, shifted, 0))
        )

    return RowState(per_row(slope, g, penalty.mu, active, beyond, *prices), active, beyond)


def weights(state: RowState, rho: Array, prices: Prices, exact: Array) -> Rows:
    """The weight of GᵀG in the Hessian: ψ'', or with ``exact`` that of the price itself on the
    rows with slack."""

    def weight(active, beyond, quadratic):
        with_slack = jnp.where(exact, quadratic, rho * quadratic / (rho + quadratic))
        return jnp.where(active, rho, jnp.where(beyond, with_slack, 0))

    return per_row(weight, state.active, state.beyond, prices.quadratic, dtype=rho.dtype)


def gap(state: RowState, penalty: Penalty) -> Array:
    """How far the rows are from feasible and complementary, in the units of g: |ν − μ| / ρ, which
    is |g| where a row is active."""
    moved = per_row(lambda nu, mu: jnp.abs(nu - mu) / penalty.rho, state.multiplier, penalty.mu)
    return largest(moved)


def size(G: Rows, x: Array, u: Array) -> Array:
    """The largest Σ_j |G_ij z_j| of a row, whose rounding it cannot be without."""
    return largest(along_rows(per_row(jnp.abs, G), jnp.abs(x), jnp.abs(u)))


def hopeless(
    penalty: Penalty, expansion: Expansion, change: Array, gap: Array, data: Data, u: Array
) -> Array:
    """Whether no small change of the controls lessens the violation: updates have not for a while,
    and what they add to the gradient, ρ times that of the violation, vanishes but where bounds
    hold the controls against it."""
    held = clamped(change, u, data.u_lower, data.u_upper)
    left = jnp.max(jnp.where(held, 0, jnp.abs(change)), axis=(0, 1))
    reach = penalty.rho * gap * slope(expansion)
    return (penalty.stalls >= _PATIENCE) & (left <= _STATIONARY * reach)


def slope(expansion: Expansion) -> Array:
    """The most that a control moves a row, within its own stage."""
    n = expansion.c_final.shape[0]
    (stage, final), B = expansion.G, expansion.F[:, :, n:]
    of_states = Rows(jnp.max(jnp.abs(stage), axis=2), jnp.max(jnp.abs(final), axis=1))
    through_states = jnp.max(jnp.abs(B), axis=(0, 1, 2)) * largest(of_states)
    of_controls = jnp.max(jnp.abs(stage[:, :, n:]), axis=(0, 1, 2), initial=0)
    return jnp.maximum(through_states, of_controls)
