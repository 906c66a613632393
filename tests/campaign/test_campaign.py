"""No CONVERGED that extended precision does not confirm, whatever the problem, and no status, plan
or gradient that depends on the unit of the cost."""

import pytest

from tests.campaign.measure import Chunk, chunks, measured, verdict

SHARE = {"float64": 0.999, "float32": 0.995}  # of the well-posed that converge


def assert_true(chunk, z):
    v = verdict(chunk, z)
    assert not v.false.any(), z["residual"][v.false] / z["size"][v.false]
    assert not v.moved.any(), z["kind"][v.moved]
    return v


SAMPLES = [
    Chunk(3, 2, 6, "float64", "default", N=70, seed=1),
    Chunk(3, 2, 6, "float32", "default", N=70, seed=1),
    Chunk(4, 1, 20, "float32", "ilqr", N=88),  # slow ways to the end, and plants that amplify
]


@pytest.mark.parametrize("chunk", SAMPLES, ids=lambda chunk: chunk.name)
def test_a_sample_of_the_campaign(chunk):
    v = assert_true(chunk, measured(chunk, cache=None))
    assert v.converged[v.well_posed].all()
    assert v.well_posed.mean() > 0.8


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_the_campaign():
    """``python -m tests.campaign`` prints its rows, in parts if need be."""
    well, both = dict.fromkeys(SHARE, 0), dict.fromkeys(SHARE, 0)
    for chunk in chunks():
        v = assert_true(chunk, measured(chunk))
        well[chunk.dtype] += v.well_posed[0].sum()
        both[chunk.dtype] += (v.well_posed & v.converged)[0].sum()
    for dtype, share in SHARE.items():
        assert both[dtype] >= share * well[dtype]
