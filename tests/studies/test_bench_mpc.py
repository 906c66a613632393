"""Studies beside other implementations, at small sizes and without these."""

import json

import pytest

from bench import peers
from bench.__main__ import main

pytestmark = pytest.mark.slow  # the study `compile` goes the same way, quickly

DESCRIBED = {"study", "contender", "device", "threads", "dtype", "system", "n", "m", "T", "batch"}
DESCRIBED |= {"work"}
MEASURED = {"versions", "trace_s", "compile_s", "median_s", "min_s", "max_s", "repeats", "status"}
MEASURED |= {"iterations_mean", "iterations_max", "kkt_residual_worst", "objective_mean"}


@pytest.fixture(scope="module", params=["mpc", "box_lq", "constrained"])
def study(request, tmp_path_factory):
    """The name of the study, the rows that it keeps, and where."""
    output = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "INSTALLED", output / "nowhere")
        options = ["--quick"] if request.param == "box_lq" else ["--quick", "--no-peers"]
        main([request.param, *options, "--repeats", "2", "--output", str(output)])
    lines = (output / f"{request.param}.jsonl").read_text().splitlines()
    return request.param, [json.loads(line) for line in lines], output


def test_every_row_says_what_was_measured_and_how(study):
    name, rows, _ = study
    assert rows
    for row in rows:
        assert DESCRIBED <= row.keys()
        assert row["study"] == name
        assert "missing" in row or MEASURED <= row.keys()


def test_jaxmpc_converges_and_its_residual_is_small(study):
    rows = [row for row in study[1] if row["contender"].startswith("jaxmpc")]
    assert "forward + gradient" in {row["work"] for row in rows}
    for row in rows:
        assert row["status"] == {"CONVERGED": 1.0}
        bound = row.get("target", 1e-5 if row["dtype"] == "float32" else 1e-6)
        assert row["kkt_residual_worst"] <= bound
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]


def test_an_absent_peer_is_said_to_be_absent(study):
    name, rows, output = study
    reason = peers.ABSENT if name == "box_lq" else "left out (--no-peers)"
    others = [row for row in rows if not row["contender"].startswith("jaxmpc")]
    expected = dict(
        mpc={"mpc.pytorch", "acados"},
        box_lq={"mpc.pytorch", "HPIPM"},
        constrained={"acados", "CasADi + IPOPT"},
    )[name]
    assert {row["contender"] for row in others} >= expected
    for row in others:
        assert row["missing"] == reason
        assert "median_s" not in row
    text = (output / f"{name}.md").read_text()
    absent = [line for line in text.splitlines() if f"| {min(expected)} |" in line]
    assert absent
    assert all(reason in line for line in absent)


def test_a_picture_and_the_command_are_kept(study):
    name, _, output = study
    assert (output / f"{name}.png").stat().st_size > 10_000
    assert f"python -m bench {name} --quick" in (output / f"{name}.md").read_text()
