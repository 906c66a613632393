"""The step of a trip: of the barrier, of the restoration or of the finish."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxmpc.batch import lanes
from jaxmpc.problem.problem import Data
from jaxmpc.riccati.pivots import convex_part, definite_threshold
from jaxmpc.riccati.rows import add_pull, add_squares
from jaxmpc.riccati.sequential import row_freedom
from jaxmpc.solver.interior import active_set, barrier
from jaxmpc.solver.interior.barrier import Eliminated, Layout, Pairs
from jaxmpc.solver.interior.local import Local, known_or, row_sizes
from jaxmpc.solver.interior.newton import Direction, newton, nowhere
from jaxmpc.solver.interior.state import FINISH, PROBE, RESTORE, Measures, Search, tiny_of
from jaxmpc.types import Options

# Recursions for one step: without rows, to measure what the controls can do about each; with the
# exact Hessian; and, where that is not convex, with one that is.
_MEASURE, _EXACT, _CONVEX, _DONE = 0, 1, 2, 3

_WELL_HELD = 0.5  # the weight that holds a row, over its own stiffness: this power of 1 / eps
_BOUNDARY = 0.99  # the share of the way to the boundary that a step may take


class Step(NamedTuple):
    direction: Direction
    bound: Array  # [T, m], where clamped controls go
    moves: Array  # by how much every row and bound changes
    changes: Pairs
    slopes: Array  # what rows and bounds added to the LQR
    weights: Array
    alpha: Array  # the longest step
    alpha_dual: Array
    definite: Array  # the exact Hessian is positive definite
    convex: Array  # another one stood in
    measures: Measures
    estimate: Array  # [T+1, n], costates of the plan without rows, where problems are measured


def propose(
    data: Data,
    options: Options,
    s: Search,
    here: Local,
    layout: Layout,
    tau: Array,
    measuring: Array,
    stands: Array,
) -> Step:
    """With the barrier τ; ``measuring`` problems are measured anew; those that ``stands`` do not
    step: their factors are those of the exact KKT matrix."""
    at, expanded, sides = s.at, here.expanded, here.sides
    x, u, values, pairs = at.x, at.u, at.values, at.pairs
    low, high = data.u_lower, data.u_upper
    n, tiny = x.shape[1], tiny_of(x)
    probing, restoring = s.mode == PROBE, s.mode == RESTORE
    finishing = s.mode == FINISH
    # With multipliers to begin with, a probe is the first step of a finish at once.
    on_set = finishing | here.warm
    pinned = jnp.where(on_set, here.clamped, low == high)
    bound = _bound_of(here, u, s.fresh, data)
    offset = jnp.where(on_set & here.clamped, bound - u, 0)
    gaps = jnp.where(finishing & ~s.fresh, 0, values.gaps)
    exact = options.hessian == "exact"

    def rows_with(hold: Array) -> tuple[Eliminated, Array, Array]:
        """What rows and bounds add to the LQR, with the weights that hold rows."""
        eliminated = barrier.eliminate(
            sides, pairs, here.g, tau, jnp.where(restoring, 0, pairs.nu),
            jnp.where(restoring, here.weight, hold),
        )  # fmt: skip
        slopes, weights = active_set.slopes_and_weights(sides, here.g, here.state, hold)
        slopes = jnp.where(on_set, slopes, eliminated.slope)
        return eliminated, slopes, jnp.where(on_set, weights, eliminated.weight)

    def recursion(carry):
        kind, direction, definite, convex, measures, estimate = carry
        _, slopes, weights = rows_with(measures.hold)
        off = (kind == _MEASURE) & (sides.row | probing)
        slopes, weights = jnp.where(off, 0, slopes), jnp.where(off, 0, weights)
        own = (kind == _EXACT) | ((kind == _CONVEX) & s.mirror & exact)
        H, H_final = lanes.select(own, (here.H, here.H_final), (expanded.C, expanded.C_final))
        H, H_final = lax.cond(
            kind == _EXACT,
            lambda: (H, H_final),
            lambda: (
                jax.vmap(convex_part, (0, None))(H, jnp.concatenate([here.sizes.x, here.sizes.u])),
                convex_part(H_final, here.sizes.x),
            ),
        )
        c, c_final = add_pull(expanded.c, expanded.c_final, expanded.G, layout.rows(slopes))
        upper, lower = layout.bounds(slopes)
        c = c.at[:, n:].add(upper - lower)
        H, H_final = add_squares(H, H_final, expanded.G, layout.rows(weights))
        upper, lower = layout.bounds(weights)
        H = H.at[:, n:, n:].add(jax.vmap(lanes.diagonal_matrix)(upper + lower))
        width = (kind == _MEASURE) & probing & jnp.isfinite(high - low) & (high > low)
        width = jnp.where(width, high - low, jnp.inf)
        pins = jnp.where(kind == _MEASURE, low == high, pinned)
        plain = finishing & ~s.fresh & (kind == _EXACT)
        d = newton(
            H, H_final, expanded.F, c, c_final, gaps, ~pins, offset, width, s.regularization, plain
        )
        threshold = definite_threshold(x.dtype)
        definite = jnp.where(kind == _EXACT, lanes.every(d.factors.curvature > threshold), definite)
        convex = jnp.where(kind == _EXACT, ~stands & ~(definite & exact), convex)
        measures = lax.cond(
            kind == _MEASURE,
            lambda: lanes.select(measuring, _measured(data, s, here, layout, d), measures),
            lambda: measures,
        )
        estimate = jnp.where(kind == _MEASURE, d.costate, estimate)
        takes = (kind == _EXACT) | ((kind == _CONVEX) & convex)
        direction = lanes.select(takes, d, direction)
        more = (kind == _EXACT) & ~jnp.any(convex)
        kind = jnp.where(more, _DONE, kind + 1)
        return kind, direction, definite, convex, measures, estimate

    kind = jnp.where(jnp.any(measuring), _MEASURE, _EXACT)
    no = jnp.zeros(stands.shape, bool)
    # One recursion after the other in a loop, so that its program is there once.
    _, direction, definite, convex, measures, estimate = lax.while_loop(
        lambda carry: carry[0] < _DONE,
        recursion,
        (kind, nowhere(x, u), no, no, s.measures, jnp.zeros_like(x)),
    )
    eliminated, slopes, weights = rows_with(measures.hold)
    moves = layout.along(expanded.G, direction.dx, direction.du)
    changes = barrier.changes(sides, pairs, eliminated, moves)
    boundary = jnp.clip(1 - tau / s.measures.scale, _BOUNDARY, 1 - lanes.eps(x) ** 0.5)
    alpha, alpha_dual = barrier.shares(sides, pairs, changes, boundary)
    if options.trust_region is not None:
        reach = options.trust_region / jnp.maximum(jnp.max(jnp.abs(direction.du), axis=0), tiny)
        alpha = jnp.minimum(alpha, jnp.min(reach, axis=0))
    return Step(
        direction=direction,
        bound=bound,
        moves=moves,
        changes=changes,
        slopes=slopes,
        weights=weights,
        alpha=alpha,
        alpha_dual=alpha_dual,
        definite=definite,
        convex=convex,
        measures=measures,
        estimate=estimate,
    )


def _measured(data: Data, s: Search, here: Local, layout: Layout, d: Direction) -> Measures:
    """From the recursion without rows; what is to be gained, and how far that is away, from the
    probe alone."""
    values, sizes, expanded = s.at.values, here.sizes, here.expanded
    probing, before = s.mode == PROBE, s.measures
    eps, tiny = lanes.eps(values.costs), tiny_of(values.costs)
    T, n = expanded.F.shape[:2]
    gain = jnp.maximum(-d.descent, 0)
    # Where nothing prices a control, it is its bounds that say how far it goes; later on they are
    # among what the recursion is of.
    width = jnp.where(probing, data.u_upper - data.u_lower, jnp.inf)
    far = gain * jax.vmap(lanes.diagonal)(d.factors.Quu_inv)
    share = jnp.minimum(1, width / jnp.sqrt(jnp.where(far > 0, far, 1)))
    inverse = d.factors.Quu_inv * share[:, :, None] * share[:, None, :]
    of_rows, of_z = row_freedom(d.factors._replace(Quu_inv=inverse), expanded.F, expanded.G)
    of_bounds = jnp.concatenate([of_z[n:], of_z[n:]])
    freedom = layout.pack(of_rows, jnp.broadcast_to(of_bounds, (T, *of_bounds.shape)))

    violation = active_set.violation(here.plain, here.g)
    repair = jnp.max(violation**2 / jnp.maximum(freedom, tiny), axis=0)
    gain += jnp.where(jnp.isfinite(repair), repair, 0)
    gain = jnp.maximum(gain, 1e-6 * jnp.sum(jnp.abs(values.costs), axis=0))
    scale = jnp.where(probing, jnp.where(gain > 0, gain, 1), before.scale)
    reach = jnp.sqrt(scale * jnp.where(jnp.isfinite(of_z), of_z, 0))
    reach = jnp.where(probing, reach, before.reach)
    # What is 0 at first has the size of what it may become.
    size_z = jnp.maximum(jnp.concatenate([sizes.x, sizes.u]), reach)
    size_z = known_or(data.sizes, size_z)
    grown = layout.rows_alone(row_sizes(expanded.G, size_z, values.g))
    some = jnp.where(probing & (grown > 0), grown, sizes.some)
    # Beyond the second, rounding in g would show in the multiplier.
    stiff = 1 / (eps**_WELL_HELD * jnp.maximum(freedom, tiny))
    stiff = jnp.clip(stiff, scale / some**2 * eps**-0.25, scale / some**2 * eps**-0.75)
    return Measures(scale, reach, freedom, jnp.where(here.sides.row, stiff, 0))


def _bound_of(here: Local, u: Array, fresh: Array, data: Data) -> Array:
    """The bound that a clamped control goes to: the one that holds it against the gradient, or at
    the beginning of a finish the nearer one."""
    low, high = data.u_lower, data.u_upper
    at_low = jnp.where(fresh, u - low < high - u, here.gradient > 0)
    bound = jnp.where(at_low | (low == high), low, high)
    return jnp.where(jnp.isfinite(bound), bound, u)
