"""Units are a matter of taste: in others, the same plan comes by the same way."""

import functools

import jax
import numpy as np
import pytest

from jaxmpc import Status
from tests.families.families import FAMILIES
from tests.families.family import Family, Rows
from tests.families.parts import around, held, midpoint, quadratic, terminal
from tests.families.units import changes, own_units, solver
from tests.families.vehicles import unicycle

KINDS = ("rows", "states", "controls", "cost", "far rows")


def parking():
    """Past a post and into the lot, to stand there with a given heading."""

    def post(lib, x, u, t, p):
        return [0.16 - (x[0] - 0.9) ** 2 - (x[1] - p[0]) ** 2]

    def sample(rng, N):
        x = around(rng, N, [0, 0.3, 0], [0.1, 0.2, 0.3])
        return x, held(15, [0.6, 0.0]), rng.uniform(-0.2, 0.0, N)

    return Family(
        "parking", 3, 2, 15, midpoint(unicycle, 0.2),
        quadratic([0.1, 0.1, 0.05], [0.2, 0.1], [2, 0.5, 0]), sample,
        u_lower=[-0.2, -1.5], u_upper=[1.2, 1.5],
        rows=(
            Rows(post),
            Rows(lambda lib, x, u, t, p: [x[0] - 2, x[1] - 0.5, x[2]], "terminal", True),
        ),
    )  # fmt: skip


def hoist():
    """A load on a rope below a trolley, with limits of speed, of swing and of how fast the push may
    change; it has to hang nearly still at the end."""

    def ode(lib, x, u, p):
        push = u[0] - 0.3 * x[1]
        return [x[1], push, x[3], -p[0] * lib.sin(x[2]) - push * lib.cos(x[2]) - 0.1 * x[3]]

    def sample(rng, N):
        x = np.append(around(rng, N, [0, 0], [0.2, 0.1]), around(rng, N, [0, 0], [0.1, 0.1]), 1)
        return x, np.zeros((15, 1)), rng.uniform(3, 5, N)

    return Family(
        "hoist", 4, 1, 15, midpoint(ode, 0.2),
        quadratic([1, 0.1, 0.5, 0.1], [0.1], [1.5, 0, 0, 0]), sample,
        terminal([10, 2, 2, 1], [1.5, 0, 0, 0]), u_lower=-1.5, u_upper=1.5,
        x_lower=[-np.inf, -0.8, -0.25, -np.inf], x_upper=[np.inf, 0.8, 0.25, np.inf],
        rows=(Rows(lambda lib, x, u, t, p: [x[2] ** 2 + x[3] ** 2 - 0.01], "terminal"),),
        previous=[0.0], rate_limit=[0.8],
    )  # fmt: skip


SMALL = {f.name: f for f in (parking(), hoist())}
LARGE = (
    "bryson_denham", "min_effort", "chain", "rendezvous", "crane", "terminal_ball",
    "unicycle_ring", "swerve_rate", "rocket_vertical",
)  # fmt: skip


def cases(families):
    pairs = [(name, kind) for name in families for kind in KINDS]
    return pytest.mark.parametrize(
        "name, kind",
        [
            pytest.param(*pair, marks=pytest.mark.xdist_group(pair[0]), id=", ".join(pair))
            for pair in pairs
        ],
    )


@functools.cache
def solved(name, N):
    """By one program, from N starts, with all changes of units and none: name -> status, iterations
    and the plan in the old units."""
    family = SMALL.get(name) or FAMILIES[name]
    x, u, p = family.starts(N)
    lanes = {"": own_units(family)}
    for kind in changes(family).values():
        lanes.update(kind)
    batch = [
        np.concatenate(lane)
        for lane in zip(
            *(
                (x * new.x, u * new.u, np.append(p, np.tile(new.flat(), (N, 1)), 1))
                for new in lanes.values()
            ),
            strict=True,
        )
    ]
    z = jax.tree.map(np.asarray, jax.jit(jax.vmap(solver(family)))(*batch))
    found = {}
    for i, (key, new) in enumerate(lanes.items()):
        here = slice(i * N, (i + 1) * N)
        found[key] = z.status[here], z.iterations[here], z.u[here] / new.u
    return found


def differences(name, N, kind):
    """A text for every plan that is another, or comes by another way."""
    family = SMALL.get(name) or FAMILIES[name]
    found = solved(name, N)
    status, iterations, u = found[""]
    texts = []
    for key in changes(family)[kind]:
        new_status, new_iterations, new_u = found[key]
        off = np.max(np.abs(new_u - u), (1, 2)) / np.max(np.abs(u), (1, 2))
        for i in range(N):
            same = new_status[i] == status[i]
            if same and status[i] == Status.CONVERGED:
                near = abs(int(new_iterations[i]) - int(iterations[i]))
                same = off[i] <= 1e-7 and near <= max(3, iterations[i] / 5)
            if not same:
                texts.append(
                    f"{key}, start {i}: {Status(int(status[i])).name} in {iterations[i]}, then "
                    f"{Status(int(new_status[i])).name} in {new_iterations[i]}, off {off[i]:.0e}"
                )
    return texts


@cases(SMALL)
def test_small_problems_do_not_depend_on_units(name, kind):
    assert np.all(solved(name, 2)[""][0] == Status.CONVERGED)
    unlike = differences(name, 2, kind)
    assert not unlike, "\n".join(unlike)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
@cases(LARGE)
def test_families_do_not_depend_on_units(name, kind):
    unlike = differences(name, 3, kind)
    assert not unlike, "\n".join(unlike)
