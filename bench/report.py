"""What the studies share: Markdown tables, versions, and the files that keep the results."""

import importlib.metadata
import json
import pathlib
import platform

RESULTS = pathlib.Path(__file__).parent / "results"


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table: the first ``left`` columns to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def versions(*packages: str) -> str:
    """Of Python and the packages; one that runs without being installed is left out."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def save(directory: pathlib.Path, name: str, rows: list[dict], text: str) -> None:
    """Write ``rows`` to <name>.jsonl, one a line, and ``text`` to <name>.md."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, allow_nan=False) for row in rows]
    (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")
