"""The study of gradients, with few starts and without the other implementation."""

import json

import pytest

from bench import peers
from bench.__main__ import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The rows that the study keeps, and the text that it keeps and prints."""
    output = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "INSTALLED", output / "nowhere")
        main(["gradients", "--starts", "16", "--output", str(output)])
    rows = [json.loads(line) for line in (output / "gradients.jsonl").read_text().splitlines()]
    return rows, (output / "gradients.md").read_text()


def rows_of(rows, method):
    found = [row for row in rows if row["method"] == method]
    assert [row["control_weight"] for row in found] == [0.001, 0.1]
    return found


def test_exact_gradients_are_the_truth(study):
    for row in rows_of(study[0], "jaxmpc"):
        assert row["starts"] >= 2
        assert row["worst_error"] <= 1e-8
        assert row["smallest_cosine"] >= 1 - 1e-12
        assert row["wrong_way"] == 0


def test_the_truth_agrees_with_central_differences(study):
    for row in rows_of(study[0], "central differences"):
        assert row["starts"] >= 2
        assert row["worst_error"] <= 1e-6


def test_the_measure_tells_wrong_gradients(study):
    for row in rows_of(study[0], 'jaxmpc, `backward_hessian="ilqr"`'):
        assert row["median_error"] > 0.05


def test_an_absent_peer_is_said_to_be_absent(study):
    rows, text = study
    for method in ("AUTO_DIFF", "ANALYTIC"):
        for row in rows_of(rows, f"mpc.pytorch, `GradMethods.{method}`"):
            assert row["missing"] == peers.ABSENT
            assert not any(name.endswith("error") for name in row)
    absent = [line for line in text.splitlines() if "mpc.pytorch" in line]
    assert len(absent) == 4
    assert all("absent (make peers)" in line for line in absent)
