"""In every family with rows, the gradient of every output in every input is that of the dense KKT
system: to 1e-9 where its condition number allows that, else to what ``certify`` says."""

import dataclasses

import numpy as np
import pytest

from jaxmpc import Status
from tests.families.bounded import FAMILIES as BOUNDED
from tests.families.families import FAMILIES
from tests.families.gradients import compared

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

STARTS = 3
EXACT, WELL_CONDITIONED = 1e-9, 1e7
UNEVEN = 1.07
TIMES = 100  # so much more than what is certified an error may be

WITHOUT = {family().name for family in BOUNDED}  # rows
NAMES = [name for name, f in FAMILIES.items() if name not in WITHOUT and not f.infeasible]


def family_of(name):
    """That of the name; but where a bound is a whole number of limits of the rate away, a control
    that ramps up to it is held by both at once, and the derivative has two sides."""
    family = FAMILIES[name]
    if family.rate_limit is None:
        return family
    return dataclasses.replace(family, rate_limit=[UNEVEN * a for a in family.rate_limit])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in NAMES]
)
def test_gradients_beside_the_dense_kkt_system(name):
    converged = 0
    for i, one in enumerate(compared(family_of(name), STARTS)):
        if one.status != Status.CONVERGED:
            continue
        converged += 1
        c = one.certificate
        certified = c.kkt_residual / c.multiplier  # the slope of the objective in a bound is one
        if one.condition > WELL_CONDITIONED:
            certified += c.adjoint_residual + c.kkt_residual / (c.curvature * one.size)
        allowed = max(EXACT, TIMES * float(certified))
        worst = max(one.errors, key=lambda of: np.nan_to_num(one.errors[of], nan=np.inf))
        assert one.errors[worst] <= allowed, (i, worst, one.errors[worst], one.condition, certified)
    assert converged
