"""In every family with rows, the gradient of every output in every input is that of the dense KKT
system: to 1e-9 where its condition number allows that, else to what ``certify`` says."""

import numpy as np
import pytest

from jaxmpc import Status
from tests.families.bounded import FAMILIES as BOUNDED
from tests.families.families import FAMILIES
from tests.families.gradients import compared

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

STARTS = 3
EXACT, WELL_CONDITIONED = 1e-9, 1e7
TIMES = 100  # so much more than what is certified an error may be

WITHOUT = {family().name for family in BOUNDED}  # rows
NAMES = [name for name, f in FAMILIES.items() if name not in WITHOUT and not f.infeasible]


def marks(name):
    found = [pytest.mark.xdist_group(name)]
    if FAMILIES[name].rate_limit is not None:
        # In the bounds of controls that limits of the rate lead to, the two differ; which of them
        # is right is not settled.
        found.append(pytest.mark.xfail(strict=False))
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NAMES])
def test_gradients_beside_the_dense_kkt_system(name):
    converged = 0
    for i, one in enumerate(compared(FAMILIES[name], STARTS)):
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
