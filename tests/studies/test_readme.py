"""The README's examples run as it stands."""

import re
from pathlib import Path

import jax
import pytest
from examples import unknown

import jaxmpc

README = Path(__file__).parents[2] / "README.md"


EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def run(examples, namespace):
    for code in examples:
        exec(compile(code, str(README), "exec"), namespace)


def assert_all_converged(printed):
    assert "128 problems" in printed
    assert re.search(r"CONVERGED +128 +100\.0 %", printed)
    assert "Physics(g=Array(" in printed


def test_the_first_example_runs(capsys):
    run(EXAMPLES[:1], {})
    assert_all_converged(capsys.readouterr().out)


@pytest.mark.slow
def test_the_examples_run(capsys):
    namespace: dict = {}
    run(EXAMPLES, namespace)
    assert_all_converged(capsys.readouterr().out)
    plans = namespace["plans"]  # of the example with several devices
    assert len(plans.u.sharding.device_set) == jax.device_count() > 1


def test_the_examples_call_only_what_there_is():
    assert unknown("\n".join(EXAMPLES)) == []


def test_every_public_function_is_mentioned():
    text = README.read_text()
    functions = [name for name in jaxmpc.__all__ if name.islower()]
    assert functions
    assert [name for name in functions if f"`{name}`" not in text] == []
