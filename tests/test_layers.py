"""Which folder of the library may import which, and that none reaches into another's privacy."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "jaxmpc"

# What each folder or file may import, beside itself. A dot names one file of a folder.
MAY_IMPORT = {
    "batch": [],
    "riccati": ["batch"],
    "types": [],
    "validation": ["types"],
    "problem": ["batch", "riccati", "types", "validation"],
    "solver": ["batch", "riccati", "types", "validation", "problem"],
    "derivative": [
        "batch",
        "riccati",
        "types",
        "validation",
        "problem",
        "solver.linearization",
        "solver.springs",
    ],
    # For writing problems: without any solver.
    "integrators": ["batch", "types", "validation"],
    "tracking": ["validation"],
    "systems": ["batch", "validation", "integrators", "tracking"],
}
INNER = ["batch", "riccati", "problem", "solver", "derivative"]
# All other files are public calls: they import whatever is above, and one another.


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {name_of(path): ast.parse(path.read_text("utf-8")) for path in ROOT.rglob("*.py")}


def imported(tree):
    """(module of the library, the name that it is known by here) of every import; a name that is
    imported from a module counts as an import of that module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "jaxmpc":
                    yield alias.name.removeprefix("jaxmpc").lstrip("."), alias.asname or alias.name
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module.split(".")[0] == "jaxmpc":
                module = node.module.removeprefix("jaxmpc").lstrip(".")
                for alias in node.names:
                    inside = f"{module}.{alias.name}".lstrip(".")
                    is_module = inside in TREES
                    yield inside if is_module else module, alias.asname or alias.name


def within(module, place):
    return module == place or module.startswith(place + ".")


def test_the_table_names_what_is_there():
    places = [*MAY_IMPORT, *(place for allowed in MAY_IMPORT.values() for place in allowed)]
    assert [place for place in places if place not in TREES] == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_down_only(folder):
    allowed = [folder, *MAY_IMPORT[folder]]
    wrong = [
        f"{importer} imports {module or 'jaxmpc'}"
        for importer, tree in TREES.items()
        if within(importer, folder)
        for module, _ in imported(tree)
        if not any(within(module, place) for place in allowed)
    ]
    assert wrong == []


def test_there_is_no_circle():
    graph = {importer: {module for module, _ in imported(tree)} for importer, tree in TREES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises where there is one


def test_private_names_stay_in_their_file():
    wrong = []
    for importer, tree in TREES.items():
        modules = {known for module, known in imported(tree) if module.endswith(known)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                names = [part for name in names for part in name.split(".")]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [node.attr] if node.value.id in modules else []
            else:
                continue
            private = [n for n in names if n.startswith("_") and not n.startswith("__")]
            wrong += [f"{importer}, line {node.lineno}: {name}" for name in private]
    assert wrong == []


@pytest.mark.parametrize("folder", INNER)
def test_inner_folders_hand_on_nothing(folder):
    assert (ROOT / folder / "__init__.py").read_text("utf-8").strip() == ""
