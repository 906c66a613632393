"""The notebooks run from top to bottom, and are committed as they ran."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from examples import unknown
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ThisInterpreter(KernelSpecManager):
    """Starts the interpreter that runs the tests, whatever kernels are installed elsewhere."""

    def get_kernel_spec(self, kernel_name):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def problems(notebook):
    """Errors, and whatever was written to stderr: warnings, mostly."""
    return [
        output.get("text") or output.get("evalue")
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@each_notebook
def test_runs_in_quick_mode(path, tmp_path):
    notebook = read(path)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_spec_manager=ThisInterpreter()),
        timeout=300,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    quick = {
        "JAXMPC_QUICK": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # also where the tests are `--optimized`
        "PYTHONPATH": search_path,
    }
    client.execute(env={**os.environ, **quick})
    assert not problems(notebook)
    assert all(cell.execution_count for cell in code_cells(notebook))


@each_notebook
def test_calls_only_what_there_is(path):
    assert unknown("\n".join(cell.source for cell in code_cells(read(path)))) == []


@each_notebook
def test_is_committed_as_it_ran(path):
    assert path.stat().st_size < 500_000
    notebook = read(path)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert not problems(notebook)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert any(output.output_type == "stream" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(Path.home()) not in path.read_text(encoding="utf-8")
