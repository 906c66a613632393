"""Quick runs of the studies leave the committed results of the full runs alone."""

import shutil
import subprocess
from pathlib import Path

import pytest

import bench.__main__
import bench.paper.__main__
from bench import report
from bench.paper import figures, trials

ROOT = Path(__file__).parents[2]


def name_of(study):
    return getattr(study, "NAME", study.__name__.rpartition(".")[2])


@pytest.fixture
def arguments(monkeypatch):
    """What each run gets that is started by ``main``, which runs nothing."""
    seen = {}
    for study in bench.__main__.STUDIES:
        name = name_of(study)
        monkeypatch.setattr(study, "run", lambda args, name=name: seen.update({name: args}))
    for figure in figures.FIGURES:
        monkeypatch.setattr(figure, "write", lambda self, _: seen.update({self.name: self.args}))
    monkeypatch.setattr(trials, "train", lambda *_: {})
    return seen


def start(name, *options):
    paper = name in {figure.name for figure in figures.FIGURES}
    (bench.paper.__main__ if paper else bench.__main__).main([name, *options])


NAMES = [*map(name_of, bench.__main__.STUDIES), *(figure.name for figure in figures.FIGURES)]


def in_results(path):
    return path.resolve().is_relative_to(report.RESULTS)


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_writes_elsewhere_and_says_where(arguments, capsys, name):
    start(name)
    assert in_results(arguments[name].output)
    assert capsys.readouterr().out == ""
    start(name, "--quick")
    assert not in_results(arguments[name].output)
    assert arguments[name].output.is_relative_to(report.QUICK)
    assert report.shown(arguments[name].output) in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_run_into_the_results_is_refused(arguments, capsys, name):
    with pytest.raises(SystemExit):
        start(name, "--quick", "--output", str(report.RESULTS / "paper"))
    assert not arguments
    assert "no --quick into it" in capsys.readouterr().err
    start(name, "--quick", "--output", "anywhere")
    assert arguments[name].output == Path("anywhere")


def test_a_quick_run_keeps_the_checkpoints_of_the_full_ones(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.paper.__main__, "QUICK_CHECKPOINTS", tmp_path / "quick")
    for folder in ("checkpoints", "quick"):
        (tmp_path / folder).mkdir()
    start("fig3", "--quick", "--fresh")
    assert arguments["fig3"].checkpoints == tmp_path / "quick"
    assert (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "quick").exists()
    start("fig3", "--fresh")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="no checkout")
def test_git_ignores_what_quick_runs_write():
    command = ["git", "check-ignore", "--quiet", str(report.QUICK / "paper" / "fig3.csv")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
