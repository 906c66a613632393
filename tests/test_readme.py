"""The README's example runs as it stands."""

import re
from pathlib import Path

import jax
import pytest

import jaxmpc

pytestmark = pytest.mark.usefixtures("compile_quickly")

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run(capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    namespace: dict = {}
    for code in examples:
        exec(compile(code, str(README), "exec"), namespace)
    printed = capsys.readouterr().out
    assert "128 problems" in printed
    assert re.search(r"CONVERGED +128 +100\.0 %", printed)
    assert "Physics(g=Array(" in printed
    plans = namespace["plans"]  # of the example with several devices
    assert len(plans.u.sharding.device_set) == jax.device_count() > 1


def test_every_public_function_is_mentioned():
    text = README.read_text()
    functions = [name for name in jaxmpc.__all__ if name.islower()]
    assert functions
    assert [name for name in functions if f"`{name}`" not in text] == []
