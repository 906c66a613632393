"""``batchwise``: the whole batch at once, and each device for itself."""

import gc
import math
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmpc.batch import batchwise as module
from jaxmpc.batch.batchwise import batchwise

B, N = 32, 3
SEEN = []  # the sizes that `many` was called with


def one(params, x):
    """Steps until x is small; ``params`` is shared or not."""

    def step(carry):
        x, count = carry
        return jnp.tanh(params["w"] @ x) + params["rate"] * x, count + 1

    x, count = jax.lax.while_loop(lambda c: goes_on(*c), step, (x, jnp.int32(0)))
    return {"x": x, "count": count, "few": count < 10, "nothing": None}


def goes_on(x, count):
    return (jnp.sum(x**2, -1) > 1e-2) & (count < 40)


def many(size, batched, params, x):
    """The same, with all that needs the batch as a whole: an end for all, an order, indices."""
    SEEN.append(size)
    params, x = jax.tree.map(
        lambda a, own: a if own else jnp.broadcast_to(a, (size, *a.shape)),
        (params, x),
        (batched[0], batched[1]),
    )

    def step(carry):
        x, count = carry
        order = jnp.argsort(~goes_on(x, count))
        live = goes_on(x, count)[order]
        w, rate = params["w"][order], params["rate"][order]
        new = jnp.tanh(jnp.einsum("bij,bj->bi", w, x[order])) + rate[:, None] * x[order]
        x = x.at[order].set(jnp.where(live[:, None], new, x[order]))
        return x, count.at[order].add(live.astype(jnp.int32))

    start = x, jnp.zeros(size, jnp.int32)
    x, count = jax.lax.while_loop(lambda c: jnp.any(goes_on(*c)), step, start)
    return {"x": x, "count": count, "few": count < 10, "nothing": None}


solve = batchwise(one, many)
KINDS = [AxisType.Auto, AxisType.Explicit]
PARAMS = {
    "w": jnp.array([[0.3, 0.2, 0.1], [0.0, 0.4, 0.1], [0.1, 0.0, 0.2]]),
    "rate": jnp.array(0.5),
    "none": None,
}
X = jax.random.normal(jax.random.key(0), (B, N))


def batch(params, x):
    return jax.vmap(solve, (None, 0))(params, x)


@jax.jit
def expected(params, x):
    return jax.vmap(one, (None, 0))(params, x)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def mesh_of(shape, kind):
    return jax.make_mesh(
        shape, ("a", "b")[: len(shape)], axis_types=(kind,) * len(shape),
        devices=jax.devices()[: math.prod(shape)],
    )  # fmt: skip


def place(mesh, spec, tree):
    return jax.device_put(tree, NamedSharding(mesh, spec))


COLLECTIVE = r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("


def run(f, *args):
    """The result, what communicates in the compiled program, and the sizes of the parts."""
    SEEN.clear()
    compiled = jax.jit(lambda *args: f(*args)).lower(*args).compile()  # traced anew
    return compiled(*args), re.findall(COLLECTIVE, compiled.as_text()), set(SEEN)


def test_a_single_problem_is_one():
    SEEN.clear()
    assert_same(jax.jit(solve)(PARAMS, X[0]), one(PARAMS, X[0]))
    assert not SEEN


@pytest.mark.parametrize("size", [1, B])
def test_a_batch_is_many(size):
    got, _, sizes = run(batch, PARAMS, X[:size])
    assert_same(got, expected(PARAMS, X[:size]))
    assert sizes == {size}
    assert_same(batch(PARAMS, X[:size]), got)


def test_the_batch_axis_is_anywhere_and_so_are_the_results():
    params = {**PARAMS, "rate": jnp.linspace(0.3, 0.6, B)}
    axes = {"w": None, "rate": 0, "none": None}
    got = jax.vmap(solve, (axes, 1))(params, X.T)
    assert_same(got, jax.vmap(one, (axes, 1))(params, X.T))


NESTED = {
    "both": ((None, 0), (None, 0), PARAMS["w"], X.reshape(4, 8, N)),
    "weights outside": ((None, 0), (0, None), jnp.stack([PARAMS["w"]] * 3) * 0.9, X),
    "weights inside": ((0, None), (None, 0), jnp.stack([PARAMS["w"]] * 3) * 0.9, X),
}


@pytest.fixture(params=["copied", "not copied"])
def small(request, monkeypatch):
    """What lacks some axes of a nested batch is small enough to be copied along them, or not."""
    monkeypatch.setattr(module, "_COPIED", 1024 if request.param == "copied" else 0)


@pytest.mark.parametrize("name", NESTED)
def test_nested_batches(name, small):
    inner, outer, w, x = NESTED[name]

    def nested(f):
        return jax.vmap(jax.vmap(lambda w, x: f({**PARAMS, "w": w}, x), inner), outer)

    assert_same(jax.jit(nested(solve))(w, x), nested(one)(w, x))


def test_what_is_shared_is_not_copied():
    """Nor in a nested batch, for the problems that share it."""
    seen = []

    def look(size, batched, w, x):
        seen.append((size, batched, w.shape, x.shape))
        return x

    f = batchwise(lambda w, x: x, look)
    jax.vmap(jax.vmap(f, (None, 0)), (None, 0))(jnp.ones((5, 5)), X.reshape(4, 8, N))
    assert seen[-1] == (32, (False, True), (5, 5), (32, N))
    weights = jnp.ones((2, 50, 50))
    jax.vmap(jax.vmap(f, (None, 0)), (0, None))(weights, X)
    assert seen[-1] == (32, (False, True), (50, 50), (32, N))
    text = str(jax.make_jaxpr(jax.vmap(jax.vmap(f, (None, 0)), (0, None)))(weights, X))
    assert "[2,32,50,50]" not in text


def test_what_is_small_is_copied_to_keep_the_batch_together():
    seen = []

    def look(size, batched, w, x):
        seen.append((size, batched, w.shape, x.shape))
        return x

    f = batchwise(lambda w, x: x, look)
    jax.vmap(jax.vmap(f, (None, 0)), (0, None))(jnp.ones((2, 5, 5)), X)
    assert seen[-1] == (64, (True, True), (64, 5, 5), (64, N))


def test_three_levels(small):
    w = jnp.stack([PARAMS["w"]] * 3) * jnp.array([0.5, 1.0, 1.1])[:, None, None]

    def nested(f):
        g = jax.vmap(lambda w, x: f({**PARAMS, "w": w}, x), (None, 0))
        return jax.vmap(jax.vmap(g, (0, None)), (None, 0))

    x = X.reshape(4, 8, N)
    assert_same(jax.jit(nested(solve))(w, x), nested(one)(w, x))


def test_keys_integers_and_bools():
    def draw(key, i, flag):
        return jnp.where(flag, jax.random.normal(key) * i.astype(float), 0.0), i, flag, key

    f = batchwise(draw, lambda size, batched, *args: jax.vmap(draw)(*args))
    args = jax.random.split(jax.random.key(1), 8), jnp.arange(8), jnp.arange(8) % 2 == 0
    for mesh in (None, mesh_of((8,), AxisType.Auto), mesh_of((8,), AxisType.Explicit)):
        placed = args if mesh is None else place(mesh, P("a"), args)
        got, _, _ = run(jax.vmap(f), *placed)
        want = jax.vmap(draw)(*args)
        assert_same(
            (*got[:3], jax.random.key_data(got[3])), (*want[:3], jax.random.key_data(args[0]))
        )


# What the user wrote, how large each device's part is then, and whether it had to be moved first.
SPREAD = [
    (AxisType.Auto, (8,), P("a"), 4),
    (AxisType.Auto, (4, 2), P(("a", "b")), 4),
    (AxisType.Auto, (4, 2), P("a"), 4),  # the compiler's to use: also along the other axis
    (AxisType.Auto, (8,), P(), 4),
    (AxisType.Explicit, (8,), P("a"), 4),
    (AxisType.Explicit, (4, 2), P(("a", "b")), 4),
    (AxisType.Explicit, (4, 2), P(("b", "a")), 4),
    (AxisType.Explicit, (4, 2), P("a"), 8),
    (AxisType.Explicit, (4, 2), P("b"), 16),
    (AxisType.Explicit, (8,), P(), B),
]


@pytest.mark.parametrize("kind, shape, spec, part", SPREAD)
def test_every_device_solves_its_part_and_none_waits_for_another(kind, shape, spec, part):
    mesh = mesh_of(shape, kind)
    got, collectives, sizes = run(batch, place(mesh, P(), PARAMS), place(mesh, spec, X))
    assert_same(got, expected(PARAMS, X))
    assert collectives == []
    assert sizes == {part}
    used = spec if kind == AxisType.Explicit else P(mesh.axis_names)
    assert got["count"].sharding.is_equivalent_to(NamedSharding(mesh, used), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_dealt_out_is_solved_by_everyone(kind):
    mesh = mesh_of((8,), kind)
    params = place(mesh, P(), PARAMS)
    got, collectives, sizes = run(batch, params, place(mesh, P(), X[:30]))
    assert_same(got, expected(PARAMS, X[:30]))
    assert (collectives, sizes) == ([], {30})


def test_problems_that_are_in_pieces_are_put_together():
    mesh = mesh_of((4, 2), AxisType.Auto)
    params = {**PARAMS, "w": jnp.eye(4)[::-1] * 0.3}
    x = jnp.concatenate([X, X[:, :1]], 1)
    placed = {**place(mesh, P(), params), "w": place(mesh, P("a"), params["w"])}
    got, _, sizes = run(batch, placed, place(mesh, P(None, "b"), x))
    assert_same(got, expected(params, x))
    assert sizes == {4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, spec", [((8, 4), P("a")), ((2, 16), P(None, "a"))])
def test_either_of_two_batch_axes_may_be_spread(kind, shape, spec):
    mesh = mesh_of((4,), kind)
    params, x = place(mesh, P(), PARAMS), place(mesh, spec, X.reshape(*shape, N))
    got, collectives, sizes = run(jax.vmap(batch, (None, 0)), params, x)
    assert_same(got, jax.vmap(expected, (None, 0))(PARAMS, X.reshape(*shape, N)))
    assert collectives == []
    assert min(sizes) <= B // 4


def closed_loop(params, x):
    """A scan around a batch."""
    return jax.lax.scan(lambda x, _: (0.1 + batch(params, x)["x"], None), x, None, length=3)[0]


def batched_loop(params, x):
    """A batch of scans."""

    def loop(x):
        return jax.lax.scan(lambda x, _: (0.1 + solve(params, x)["x"], None), x, None, length=3)[0]

    return jax.vmap(loop)(x)


def one_batch_after_the_other(params, x):
    return jax.lax.map(lambda scale: batch(params, scale * x)["x"], jnp.array([0.9, 1.0]))


def beside_a_gradient(params, x):
    """A constant to differentiation, in something that is differentiated and checkpointed."""

    @jax.custom_jvp
    def constant(params, x):
        return solve(params, x)["x"]

    @constant.defjvp
    def _(primals, _):
        out = constant(*primals)
        return out, jnp.zeros_like(out)

    def total(x):
        return jnp.sum(jax.checkpoint(jax.vmap(lambda x: x * constant(params, x)))(x))

    return jax.grad(total)(x)


@pytest.mark.parametrize("f", [closed_loop, batched_loop, one_batch_after_the_other,
                               beside_a_gradient])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_inside_other_transformations(f, kind):
    mesh = mesh_of((8,), kind)
    with jax.set_mesh(mesh):
        got, collectives, sizes = run(f, place(mesh, P(), PARAMS), place(mesh, P("a"), X))
    np.testing.assert_allclose(got, jax.jit(f)(PARAMS, X), rtol=1e-12, atol=1e-14)
    assert collectives == []
    assert sizes == {4}


def test_no_tracer_leaks():
    gc.freeze()  # what other tests have left is not looked through for each tracer
    try:
        with jax.checking_leaks():
            run(beside_a_gradient, PARAMS, X)
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("axes", [{"a"}, {"a", "b"}])
def test_inside_a_shard_map_each_device_has_its_part_already(axes):
    mesh = mesh_of((4, 2), AxisType.Auto)
    spec = P(tuple(sorted(axes)))
    f = jax.shard_map(batch, mesh=mesh, in_specs=(P(), spec), out_specs=spec, axis_names=axes,
                      check_vma=False)  # fmt: skip
    got, collectives, sizes = run(f, PARAMS, X)
    assert_same(got, expected(PARAMS, X))
    assert collectives == []
    assert sizes == {8 if axes == {"a"} else 4}


def test_a_mesh_in_context_is_used_where_the_arrays_have_none():
    mesh = mesh_of((8,), AxisType.Auto)
    here = NamedSharding(mesh, P("a"))

    def f(params, x):
        return batch(params, jax.lax.with_sharding_constraint(x, here))

    with jax.set_mesh(mesh):
        got, collectives, sizes = run(f, PARAMS, np.asarray(X))
    assert_same(got, expected(PARAMS, X))
    assert (collectives, sizes) == ([], {4})


def test_a_mesh_of_one_device():
    for kind in KINDS:
        mesh = mesh_of((1,), kind)
        got, _, sizes = run(batch, place(mesh, P(), PARAMS), place(mesh, P("a"), X))
        assert_same(got, expected(PARAMS, X))
        assert sizes == {B}


@pytest.mark.parametrize("num", [1, 8])
def test_export(num):
    mesh = mesh_of((num,), AxisType.Explicit)
    params, x = place(mesh, P(), PARAMS), place(mesh, P("a"), X)

    def f(params, x):
        return batch(params, x)["x"]

    exported = jax.export.export(jax.jit(f))(params, x)
    assert exported.nr_devices == num
    np.testing.assert_allclose(exported.call(params, x), f(PARAMS, X), rtol=1e-12, atol=1e-14)


def test_the_program_depends_on_nothing_but_the_problem():
    """No address, no callback: a persistent compilation cache may keep it."""
    mesh = mesh_of((8,), AxisType.Auto)
    args = place(mesh, P(), PARAMS), place(mesh, P("a"), X)
    texts = []
    for _ in range(2):
        again = batchwise(lambda *a: one(*a), lambda *a: many(*a))
        f = jax.jit(lambda params, x, f=again: jax.vmap(f, (None, 0))(params, x))
        texts.append(f.lower(*args).as_text())
    assert texts[0] == texts[1]
