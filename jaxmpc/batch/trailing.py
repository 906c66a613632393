"""``jax.vmap`` with the batch on the last axes, and left there.

``jax.vmap`` moves the batch to the front as soon as a function puts vectors together, and XLA then
reduces and slices along a last axis of three or four entries. Here a function is traced to a jaxpr,
and its primitives are applied to arrays with the batch at the end: a stage's cost becomes a handful
of operations on long contiguous vectors.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxmpc.batch import lanes

_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor
    ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or
    pow rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan tanh xor""".split()
)
_REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or".split())
_SUMS = dict(reduce_sum=jnp.add, reduce_max=jnp.maximum, reduce_min=jnp.minimum)
# Worth storing: fused into each of their users, they would be computed anew for each derivative.
_EXPENSIVE = frozenset(
    """acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1
    lgamma log log1p logistic pow rsqrt sin sinh sqrt tan tanh""".split()
)
# Calls whose body is what they compute.
_CALLS = dict(jit="jaxpr", pjit="jaxpr", closed_call="call_jaxpr", custom_jvp_call="call_jaxpr")


def vmap(fn, batched, batch: tuple[int, ...]):
    """``fn`` across a batch of that shape, which ``batched`` arguments have as their last axes.

    ``batched`` is a pytree of bools like the arguments, or a prefix of one. Every output has it.
    """

    def call(*args):
        flags = jax.tree.leaves(jax.tree.broadcast(batched, args))
        leaves, treedef = jax.tree.flatten(args)
        inner = [
            jax.ShapeDtypeStruct(
                jnp.shape(a)[: jnp.ndim(a) - len(batch)] if own else jnp.shape(a),
                jax.dtypes.result_type(a),
                weak_type=jax.typeof(a).weak_type,
            )
            for a, own in zip(leaves, flags, strict=True)
        ]
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*jax.tree.unflatten(treedef, inner))
        outs = _evaluate(closed, list(zip(leaves, flags, strict=True)), batch)
        full = [_broadcast(a, own, batch) for a, own in outs]
        return jax.tree.unflatten(jax.tree.structure(out), full)

    return call


def _broadcast(a, own: bool, batch):
    if own:
        return a
    shape = jnp.shape(a)
    return jnp.broadcast_to(jnp.reshape(a, shape + (1,) * len(batch)), shape + batch)


def _evaluate(closed: core.ClosedJaxpr, args, batch):
    """The outputs of a jaxpr as pairs (value, whether it has the batch)."""
    values: dict[core.Var, Any] = {}

    def read(atom):
        return (atom.val, False) if isinstance(atom, core.Literal) else values[atom]

    jaxpr = closed.jaxpr
    values.update(zip(jaxpr.constvars, ((c, False) for c in closed.consts), strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))
    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        name = eqn.primitive.name
        if name in _CALLS and _CALLS[name] in eqn.params:
            outs = _evaluate(eqn.params[_CALLS[name]], given, batch)
        elif any(own for _, own in given):
            outs = [(a, True) for a in _apply(eqn, given, batch)]
        else:
            outs = [(a, False) for a in _bind(eqn, *(a for a, _ in given))]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(eqn, given, batch):
    """One equation of which an operand has the batch."""
    name, params, num = eqn.primitive.name, eqn.params, len(batch)
    if eqn.effects or len(eqn.outvars) != 1:
        return _by_vmap(eqn, given, batch)
    shape = eqn.outvars[0].aval.shape
    a, own = given[0]
    if name in _ELEMENTWISE:
        operands = []
        for a, own in given:
            a = _broadcast(a, own, batch)
            # A scalar operand, of select_n or clamp, or a literal.
            operands.append(jnp.broadcast_to(a, shape + batch))
        bind = functools.partial(eqn.primitive.bind, **params)
        out = lanes.materialize(bind, *operands) if name in _EXPENSIVE else bind(*operands)
    elif name in _SUMS and 0 < math.prod(a.shape[i] for i in params["axes"]) <= lanes.MAX_TERMS:
        # Written out: a reduction would go through one lane after the other.
        axes = params["axes"]
        others = [i for i in range(a.ndim) if i not in axes]
        num_terms = math.prod(a.shape[i] for i in axes)
        terms = a.transpose(*axes, *others).reshape(num_terms, *(a.shape[i] for i in others))
        out = functools.reduce(_SUMS[name], terms)
    elif name in _REDUCTIONS:
        out = eqn.primitive.bind(a, **params)
    elif name == "dot_general" and _few_terms(eqn):
        out = _dot(given, params["dimension_numbers"], batch)
    elif name == "broadcast_in_dim":
        dims = (*params["broadcast_dimensions"], *range(len(shape), len(shape) + num))
        out = lax.broadcast_in_dim(a, shape + batch, dims)
    elif name == "reshape" and params.get("dimensions") is None:
        out = lax.reshape(a, shape + batch)
    elif name in ("squeeze", "expand_dims"):
        out = lax.reshape(a, shape + batch)
    elif name == "transpose":
        order = (*params["permutation"], *range(len(shape), len(shape) + num))
        out = lax.transpose(a, order)
    elif name == "slice":
        start, limit = (*params["start_indices"], *[0] * num), (*params["limit_indices"], *batch)
        strides = params["strides"] and (*params["strides"], *[1] * num)
        out = lax.slice(a, start, limit, strides)
    elif name == "concatenate":
        out = lax.concatenate([_broadcast(a, own, batch) for a, own in given], params["dimension"])
    elif name == "pad":
        a, value = _broadcast(a, own, batch), given[1]
        if value[1]:
            return _by_vmap(eqn, given, batch)
        out = lax.pad(a, value[0], (*params["padding_config"], *[(0, 0, 0)] * num))
    else:
        return _by_vmap(eqn, given, batch)
    return [out]


def _few_terms(eqn) -> bool:
    ((contracted, _), _) = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval
    return (
        len({v.aval.dtype for v in (*eqn.invars, *eqn.outvars)}) == 1
        and jnp.issubdtype(left.dtype, jnp.floating)
        and 0 < math.prod(left.shape[i] for i in contracted) <= lanes.MAX_TERMS
        and math.prod(eqn.outvars[0].aval.shape) <= lanes.MAX_TERMS**2
    )


def _dot(given, dimension_numbers, batch):
    """A product of small arrays as a sum of long ones."""
    contracted, paired = dimension_numbers
    sides = []
    for (a, own), along, pairs in zip(given, contracted, paired, strict=True):
        a = _broadcast(a, own, batch)
        ndim = a.ndim - len(batch)
        others = [i for i in range(ndim) if i not in (*along, *pairs)]
        shape = [a.shape[i] for i in pairs], [a.shape[i] for i in others]
        a = a.transpose(*along, *pairs, *others, *range(ndim, a.ndim))
        terms = math.prod(a.shape[: len(along)])
        sides.append((a.reshape(terms, *a.shape[len(along) :]), *shape))
    (left, pairs, rows), (right, _, columns) = sides
    left = left.reshape(len(left), *pairs, *rows, *[1] * len(columns), *batch)
    right = right.reshape(len(right), *pairs, *[1] * len(rows), *columns, *batch)
    return functools.reduce(jnp.add, (left[k] * right[k] for k in range(len(left))))


def _by_vmap(eqn, given, batch):
    """Any other primitive, by its own rule for batches."""
    in_axes = tuple(-1 if own else None for _, own in given)
    fn = functools.partial(_bind, eqn)
    for _ in batch:
        fn = jax.vmap(fn, in_axes, -1)
    return fn(*(a for a, _ in given))


def _bind(eqn, *operands):
    """The outputs of an equation, whatever its primitive takes besides arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    outs = eqn.primitive.bind(*operands, **params)
    return outs if eqn.primitive.multiple_results else [outs]
