"""The quick suite notices faults of one line: see ``faults``."""

import faults
import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=pytest.mark.xdist_group(f.name), id=f.name) for f in faults.FAULTS],
)
def test_a_fault_of_one_line_is_noticed(fault):
    assert faults.caught_by(fault) is not None


def test_every_fault_changes_one_place():
    for fault in faults.FAULTS:
        text = (faults.ROOT / "jaxmpc" / fault.file).read_text("utf-8")
        assert text.count(fault.right) == 1, fault.name
        assert fault.right != fault.wrong
