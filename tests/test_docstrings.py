"""The examples in the docstrings of the public functions run and print what they say."""

import doctest
import inspect

import jax
import pytest

import jaxmpc
from jaxmpc import integrators, tracking

FUNCTIONS = {name: getattr(jaxmpc, name) for name in jaxmpc.__all__ if name.islower()}
FUNCTIONS |= {
    f"{module.__name__.removeprefix('jaxmpc.')}.{name}": function
    for module in (integrators, tracking)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if function.__module__ == module.__name__ and not name.startswith("_")
}
CLASSES = {name: getattr(jaxmpc, name) for name in jaxmpc.__all__ if not name.islower()}
CLASSES |= {"tracking.Tracking": tracking.Tracking}


def examples(name, thing):
    text = inspect.getdoc(thing) or ""
    return doctest.DocTestParser().get_doctest(text, {}, name, None, None)


@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_the_examples_print_what_they_say(name, capsys):
    test = examples(name, (FUNCTIONS | CLASSES)[name])
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    with jax.enable_x64(False):  # as it is for who does not ask for more
        result = doctest.DocTestRunner(optionflags=flags).run(test)
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted == len(test.examples)


def test_every_public_function_has_an_example():
    assert [name for name, fn in FUNCTIONS.items() if not examples(name, fn).examples] == []
