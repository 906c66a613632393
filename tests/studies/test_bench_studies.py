"""The studies of speed, in their quick form and without the other implementations."""

import json
import shutil

import jax
import numpy as np
import pytest

from bench import lqr, peers, scaling
from bench.__main__ import main
from bench.peers import native

ALWAYS = {"study", "contender", "device", "threads", "versions", "dtype", "n", "m", "T", "batch"}
ALWAYS |= {"work"}
MEASURED = {"trace_s", "compile_s", "median_s", "min_s", "max_s", "repeats"}
MEASURED |= {"kkt_residual_worst", "objective_mean"}
SOLVED = {"status", "iterations_mean", "iterations_max"}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The rows and the text of a study."""
    output = tmp_path_factory.mktemp("results")
    made = {}

    def run(name, *options):
        if (name, options) not in made:
            common = ["--quick", "--no-peers", "--repeats", "1", "--output", str(output)]
            main([name, *common, *options])
            assert (output / f"{name}.png").stat().st_size > 1000
            made[name, options] = rows_in(output, name), (output / f"{name}.md").read_text()
        return made[name, options]

    run.output = output
    return run


def rows_in(output, name):
    return [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]


def check_fields(rows, *, solved):
    assert rows
    for row in rows:
        assert row.keys() >= ALWAYS
        if "missing" in row:
            assert not row.keys() & MEASURED
            continue
        assert row.keys() >= MEASURED | (SOLVED if solved else set())
        assert 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert (row["compile_s"] is not None) == (row["contender"] in COMPILED)


COMPILED = {"jaxmpc", "fixed point", "unrolled"}


@pytest.mark.slow
def test_lqr(quick):
    rows, text = quick("lqr")
    check_fields(rows, solved=False)
    names = {(row["contender"], row["dtype"], row["work"]) for row in rows}
    both, types = (lqr.FORWARD, lqr.BOTH), ("float32", "float64")
    assert names == {
        (name, dtype, work)
        for name in ("jaxmpc", "C++ lanes", "mpc.pytorch")
        for dtype in types
        for work in both
    } | {("HPIPM", "float64", lqr.FORWARD)}
    assert len(rows) == len(names) + 1  # HPIPM, for what is float64, beside both types
    for row in rows:
        assert row["threads"] == 1
        if row["contender"] in ("HPIPM", "mpc.pytorch"):
            assert row["missing"] == lqr.LEFT_OUT
        elif row["contender"] == "C++ lanes" and shutil.which("g++") is None:
            assert row["missing"] == "absent (g++ is not installed)"
        else:
            limit = 1e-12 if row["dtype"] == "float64" else 1e-4
            assert row["kkt_residual_worst"] < limit
            assert row["rollout_error_worst"] < limit
            if row["work"] == lqr.BOTH:
                assert row["gradient_error_worst"] < limit
    assert f"{lqr.LEFT_OUT} | – |" in text
    assert "python -m bench lqr --quick" in text


def test_the_measures_of_lqr_tell_wrong_results():
    given = lqr.problem(2, 1, 6, 4, 0, "float64")
    z = lqr.truth(*(given[name] for name in lqr.DATA))
    x, u = z[..., :2], z[..., 2:]
    right = lqr.judged(given, x, u)
    assert right["kkt_residual_worst"] < 1e-13
    assert right["rollout_error_worst"] < 1e-13

    moved = u.copy()
    moved[2, 4, 0] += 1e-3
    wrong = lqr.judged(given, x, moved)
    assert wrong["kkt_residual_worst"] > 1e-5
    assert wrong["kkt_residual_median"] < 1e-13
    assert wrong["rollout_error_worst"] > 1e-5
    assert wrong["objective_mean"] > right["objective_mean"]

    gradient = {
        name: np.asarray(a) for name, a in jax.jit(lqr._both)(given, given["z_bar"])[1].items()
    }
    assert lqr.gradient_error(given, gradient, 1) < 1e-12
    for name in lqr.DATA:
        assert lqr.gradient_error(given, gradient | {name: 1.01 * gradient[name]}, 1) > 1e-5


def test_what_is_absent_is_said_to_be(tmp_path, monkeypatch):
    given = lqr.problem(2, 1, 5, 3, 0, "float64")
    native._hpipm_library.cache_clear()
    monkeypatch.setattr(native, "ACADOS", tmp_path)
    with pytest.raises(native.Absent, match=r"make peers"):
        native.Hpipm(given)
    monkeypatch.setattr(peers, "INSTALLED", tmp_path / "nowhere")
    assert peers.attempt("reference_lqr.py", given) == dict(missing=peers.ABSENT)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.Absent, match=r"g\+\+ is not installed"):
        native.Lanes(given, "float64", 1, ((7, 7),))


@pytest.mark.skipif(not (native.ACADOS / "lib").exists(), reason="make peers")
def test_hpipm_solves_the_same_problem():
    given = lqr.problem(4, 2, 7, 3, 0, "float64")
    try:
        solver = native.Hpipm(given)
    except native.Absent as reason:
        pytest.skip(str(reason))
    solver.solve()
    quality = lqr.judged(given, *solver.plan())
    assert quality["kkt_residual_worst"] < 1e-12
    assert quality["rollout_error_worst"] < 1e-12


@pytest.mark.slow
def test_scaling(quick):
    rows, text = quick("scaling")
    check_fields([row for row in rows if row["problem"] == "lqr_solve"], solved=False)
    check_fields([row for row in rows if row["problem"] != "lqr_solve"], solved=True)
    assert {row["method"] for row in rows} == {"sequential", "parallel"}
    for row in rows:
        if "missing" in row:
            assert row["method"] == "parallel"
            assert "no method" in row["missing"]
        else:
            assert row["dtype"] == "float32"
            assert row["kkt_residual_worst"] < 1e-4
    assert "exponent" in text


def test_exponents():
    line = [dict(against="horizon", T=T, median_s=1.0 + T**1.5) for T in (1, 2, 1e4, 1e5, 1e6)]
    assert scaling.exponent(line) == pytest.approx(1.5, abs=1e-3)
    assert scaling.exponent(line[:1]) is None


@pytest.mark.slow
def test_compile(quick):
    rows, text = quick("compile")
    check_fields(rows, solved=True)
    (row,) = rows
    assert row["system"] == "pendulum"
    assert row["dtype"] == "float32"
    assert row["ready_min_s"] <= row["trace_s"] + row["compile_s"] + 1e-9
    assert row["kkt_residual_worst"] < 1e-4
    assert "compile" in text


@pytest.mark.slow
def test_compile_with_every_kind_of_constraint(quick):
    rows, text = quick("compile", "--systems", "constraints")
    check_fields(rows, solved=True)
    (row,) = rows
    assert row["ready_cpu_s"] > 0
    assert row["status"] == {"CONVERGED": 1.0}
    assert row["violation_worst"] < 1e-4
    assert "--systems constraints" in text


@pytest.mark.slow
def test_smoothing(quick):
    rows, text = quick("smoothing")
    assert [row["contender"] for row in rows] == [
        "exact", "gradient", "plan", "unrolled", "randomised", "soft bounds"
    ]  # fmt: skip
    for row in rows:
        assert np.all(np.isfinite(row["loss"]))
        assert row["contender"] in text


@pytest.mark.slow  # compiles the derivative of the unrolled iterations
def test_fixed_point(quick):
    rows, text = quick("fixed_point")
    check_fields(rows, solved=True)
    contenders, works = ("fixed point", "unrolled"), ("forward", "backward")
    assert [(row["contender"], row["work"]) for row in rows] == [
        (contender, work) for contender in contenders for work in works
    ]
    for row in rows:
        assert row["dtype"] == "float32"
        assert row["temporary_bytes"] > 0
        assert row["iterations_max"] <= row["k"]
        if row["work"] == "backward":
            assert row["residual_bytes"] > 0
            assert row["gradient_error_median"] >= 0
    assert "of the time of one forward iteration" in text

    # Nothing is measured again: the rows are there.
    common = ["--quick", "--no-peers", "--repeats", "1", "--output", str(quick.output)]
    main(["fixed_point", *common, "--resume"])
    assert rows_in(quick.output, "fixed_point") == rows
