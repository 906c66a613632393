"""What the studies share: options, Markdown tables, plots, versions, and the files that keep the
results: <study>.jsonl with the rows, <study>.md and <study>.png with what a reader wants of them.
"""

import argparse
import importlib.metadata
import json
import math
import pathlib
import platform

RESULTS = pathlib.Path(__file__).parent / "results"
# Of quick runs, which say nothing about jaxmpc: git ignores it.
QUICK = pathlib.Path(__file__).parents[1] / "bench_output"


def add_basic_arguments(parser, quick: str, seed: str = "of the problems", part: str = "") -> None:
    """The options that every study has; ``part``: the folder in RESULTS and in QUICK."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seed", type=int, default=0, help=f"{seed} (%(default)s)")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        metavar="DIR",
        help=f"where the results go ({shown(RESULTS / part)}; with --quick {shown(QUICK / part)})",
    )
    parser.set_defaults(parser=parser, part=part)


def choose_output(args) -> None:
    """Fill in --output. What full runs have measured is kept; a quick run never replaces it."""
    if args.output is None:
        args.output = (QUICK if args.quick else RESULTS) / args.part
        if args.quick:
            print(f"A quick run: its results go to {shown(args.output)}.", flush=True)
    elif args.quick and args.output.resolve().is_relative_to(RESULTS.resolve()):
        args.parser.error(f"{shown(RESULTS)} keeps what full runs measured: no --quick into it")


def shown(path: pathlib.Path) -> str:
    """``path`` as a reader sees it: from this folder, where it lies in it."""
    root = QUICK.parent
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def add_common_arguments(parser) -> None:
    """The options that every study of speed has."""
    add_basic_arguments(parser, "small sizes only, in half a minute")
    parser.add_argument("--repeats", type=int, default=7, help="of a measurement (%(default)s)")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the other implementations too, where `make peers` was run",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that are there already, and go on"
    )


# Options that say where results are kept, not what they are.
WHERE = ("run", "parser", "part", "output", "resume", "checkpoints", "fresh", "save_every")


def command(args) -> str:
    """The command line that gives ``args``."""
    words = [args.parser.prog]
    for name, value in vars(args).items():
        if name in WHERE or value == args.parser.get_default(name):
            continue
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            words += [f"--{option}", *map(str, values)]
    return " ".join(words)


class Rows:
    """Rows of <study>.jsonl, each written as soon as it is measured.

    ``resume`` keeps old ones; what was missing is tried again, unless ``missing`` keeps it too.
    """

    def __init__(
        self, directory: pathlib.Path, name: str, resume: bool = False, missing: bool = False
    ):
        self.path = directory / f"{name}.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        kept = resume and self.path.exists()
        text = self.path.read_text(encoding="utf-8") if kept else ""
        rows = [json.loads(line) for line in text.splitlines()]
        self.rows: list[dict] = []
        self.path.write_text("", encoding="utf-8")
        for row in rows:
            if missing or "missing" not in row:
                self.add(row)

    def __iter__(self):
        return iter(self.rows)

    def find(self, key: dict) -> dict | None:
        """The last row with all that ``key`` says, if there is one."""
        found = (row for row in reversed(self.rows) if key.items() <= row.items())
        return next(found, None)

    def add(self, row: dict) -> None:
        """Keep ``row``; what is not finite becomes null."""
        line = json.dumps(_finite(row), allow_nan=False)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.rows.append(json.loads(line))


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A Markdown table: the first ``left`` columns to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def seconds(value: float) -> str:
    """A time for a table, to three digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * scale >= 1.0 or unit == "µs":
            break
    digits = max(0, 2 - math.floor(math.log10(max(value * scale, 1e-9))))
    return f"{value * scale:.{min(digits, 3)}f} {unit}"


TIMES = ("median", "range", "compile", "iterations mean / max", "converged")


def times(row: dict) -> list[str]:
    """What a table says in the columns TIMES."""
    compiling = row["trace_s"] + row["compile_s"]
    return [
        seconds(row["median_s"]),
        f"{seconds(row['min_s'])} – {seconds(row['max_s'])}",
        seconds(compiling) if compiling else "–",
        f"{row['iterations_mean']:.1f} / {row['iterations_max']}",
        f"{row['status'].get('CONVERGED', 0.0):.1%}" if row["status"] else "not said",
    ]


def notes(rows: list[dict], command: str, places: set[str]) -> str:
    """What stands below a table: the command, where it ran, and the versions of each contender."""
    versions = {row["contender"]: row["versions"] for row in rows if "versions" in row}
    where = f"`{command}` on {'; '.join(sorted(places))}"
    return "  \n".join([where, *(f"{name}: {version}" for name, version in versions.items())])


def number(value: float | None, form: str = ".1e") -> str:
    """A number for a table; what was not finite is said to be so."""
    return "not finite" if value is None else format(value, form)


def pyplot():
    """Matplotlib's pyplot, drawing into files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(path: pathlib.Path, panels: dict[str, dict[str, tuple]], ylabel: str = "seconds") -> None:
    """Log-log lines, one panel a title: panels[title][label] = (xs, ys), with the name of the x
    axis after a "|" in the title. Each line is labelled where it ends."""
    plt = pyplot()
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.2 * lines), squeeze=False, layout="constrained"
    )
    labels = sorted({label for panel in panels.values() for label in panel})
    colors = {label: f"C{number % 10}" for number, label in enumerate(labels)}
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        name, _, xlabel = title.partition("|")
        axis.set(xscale="log", yscale="log", title=name, xlabel=xlabel, ylabel=ylabel)
        axis.margins(x=0.05, y=0.1)
        ends = []
        for label, (xs, ys) in panel.items():
            axis.plot(xs, ys, "o-", color=colors[label], markersize=3, linewidth=1.2)
            ends.append((math.log(ys[-1]), label, xs[-1]))
        if not ends:
            continue
        # Labels to the right of the panel, in the order of the line's ends and apart.
        bottom, top = map(math.log, axis.get_ylim())
        space, height = 0.075 * (top - bottom), -math.inf
        for end, label, _ in sorted(ends):
            height = max(height + space, end)
            place = (1.02, (height - bottom) / (top - bottom))
            axis.text(
                *place,
                label,
                color=colors[label],
                fontsize=7,
                transform=axis.transAxes,
                va="center",
            )
        axis.tick_params(labelsize=8)
        axis.grid(True, which="major", linewidth=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def versions(*packages: str) -> str:
    """Of Python and the packages; one that runs without being installed is left out."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def save_text(directory: pathlib.Path, name: str, text: str) -> None:
    """Print ``text`` and write it to <name>.md."""
    print(text)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text + "\n", encoding="utf-8")
