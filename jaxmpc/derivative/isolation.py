"""Failed problems, kept apart: where there is no solution, another point stands in, and the
gradient is what ``Options.unconverged`` says."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jaxmpc.batch import lanes
from jaxmpc.derivative.tied import materialized, tied
from jaxmpc.types import DerivativeRule


class Policy(NamedTuple):
    """What the gradient of a problem is, by ``Options.unconverged``."""

    used: Array  # whether it is that of the solution
    blank: Array  # what it is otherwise

    def __call__(self, cotangent):
        """The cotangents that the problem has by the policy."""
        return jax.tree.map(lambda a: jnp.where(self.used, a, self.blank), cotangent)

    def along(self, tangent):
        """The tangents, likewise; linear in what they are, to be transposed."""

        def one(a):
            blank = jnp.where(jnp.isnan(self.blank), self.blank * a, 0)
            return jnp.where(self.used, a, blank)

        return jax.tree.map(one, tangent)


def by_policy(tree, policy: Policy, rule: DerivativeRule):
    """``tree``, with the derivative that the policy says."""

    def pull(cotangent, value, tree, policy):
        return policy(cotangent), None

    def push(tangents, value, tree, policy):
        return policy.along(materialized(tangents[0]))

    return tied(pull, push, rule=rule, moves=False)(tree, tree, policy)


def zeros_unless(used: Array, tree):
    return lanes.select(used, tree, jax.tree.map(jnp.zeros_like, tree))


def finite(tree) -> Array:
    """Whether everything in a tree is finite, of one problem."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree)]))


def isolated(fn: Callable, moving: Callable, blank: float, rule: DerivativeRule) -> Callable:
    """``fn(x, u, t, theta)``, user code outside of any solver, with the derivatives of ``moving``
    where values and derivatives in x and u are finite; else ``blank``, which a batch survives.

    The derivatives are evaluated, or even traced, only where ``fn`` is differentiated: it need not
    be differentiable. Of a loop around it, the backward pass keeps its arguments and computes the
    rest anew: what stands in for weights that a batch shares is not to be kept at every step.
    """

    def slopes(fn, *point):
        """Of all outputs in all inputs, summed up."""
        if rule == "jvp":
            return jax.jvp(fn, point, jax.tree.map(jnp.ones_like, point))
        value, pull = jax.vjp(fn, *point)
        return value, pull(jax.tree.map(jnp.ones_like, value))

    @jax.custom_jvp
    def sound(value, x, u, t, theta):
        return finite(value)

    def and_differentiable(primals, _):
        at, x, u, t, theta = primals
        found = finite((at, slopes(lambda x, u: moving(x, u, t, theta), x, u)))
        return found, SymbolicZero.from_primal_value(found)

    sound.defjvp(and_differentiable, symbolic_zeros=True)

    def pull(cotangent, value, moves, policy):
        return policy(cotangent), None

    def push(tangents, value, moves, policy):
        return policy.along(materialized(tangents[0]))

    def call(x, u, t, theta):
        value = lax.stop_gradient(fn(x, u, t, theta))
        policy = Policy(sound(value, x, u, t, theta), jnp.asarray(blank, x.dtype))
        x, u, theta = stand_in(policy.used, (x, u, theta), blank)
        moves = moving(x, u, t, theta)
        return tied(pull, push, rule=rule, moves=False)(value, moves, policy)

    return jax.checkpoint(call, prevent_cse=False)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def stand_in(solved: Array, tree, blank: float):
    """``tree``, but for a problem without a solution that of one in its batch that has one: any
    constant is singular for somebody's cost. To first order the identity; ``blank`` where no
    problem has a solution, for then nothing has a derivative."""
    return _borrow(solved, tree)


@stand_in.defjvp
def _stand_in_jvp(blank, primals, tangents):
    solved, tree = primals
    some = _anywhere(solved)

    def mask(tangent):
        if tangent.dtype == jax.dtypes.float0:
            return tangent
        return jnp.where(some, tangent, 0) if blank == 0 else jnp.where(some, 1, blank) * tangent

    return stand_in(solved, tree, blank), jax.tree.map(mask, tangents[1])


@custom_vmap
def _borrow(solved, tree):
    """Ones where there is nobody to borrow from; under ``vmap``, what each problem has of its own
    is replaced. What the batch shares stays shared: a copy per problem would not fit into memory.
    """

    def one(leaf):
        inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        return jnp.where(solved, leaf, jnp.ones_like(leaf)) if inexact else leaf

    return jax.tree.map(one, tree)


@_borrow.def_vmap
def _borrow_batched(size, batched, solved, tree):
    solved_batched, tree_batched = batched
    solved = solved if solved_batched else jnp.broadcast_to(solved, size)
    first = jnp.min(jnp.where(solved, jnp.arange(size), size), initial=size)
    donor = jnp.arange(size) == first

    def pick(a):  # Of a batch that is spread over devices, an index would gather all of it.
        if not jnp.issubdtype(a.dtype, jnp.number):
            return a[jnp.argmax(donor)]
        mine = jnp.where(donor.reshape(size, *[1] * (a.ndim - 1)), a, jnp.zeros((), a.dtype))
        return jnp.sum(mine, 0, dtype=a.dtype)

    lent = jax.tree.map(lambda a, own: pick(a) if own else a, tree, tree_batched)
    lent = _borrow(jnp.any(solved), lent)  # an outer batch may have somebody

    def one(leaf, lent, own):
        if not own:
            return lent
        return jnp.where(solved.reshape(size, *[1] * (leaf.ndim - 1)), leaf, lent)

    return jax.tree.map(one, tree, lent, tree_batched), tree_batched


@custom_vmap
def _anywhere(solved):
    """Whether any problem of the batch has a solution: one value for all of it."""
    return solved


@_anywhere.def_vmap
def _anywhere_batched(size, batched, solved):
    return _anywhere(jnp.any(solved)), False
