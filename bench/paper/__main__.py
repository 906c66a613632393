"""The experiments of Amos et al. 2018, trained again: arXiv:1810.13400, sections 5.1 to 5.4.

Each figure is written as CSV with its curves, as PNG, and as a Markdown table of every trial beside
what the paper says. Runs can be stopped at any moment, by Ctrl-C or kill -9, and go on where they
were when the same command is given again. A quick run keeps all of that apart, in bench_output/.
"""

import argparse
import os
import pathlib
import shutil
import signal

from bench import report
from bench.paper import figures, trials

# Apart from those of the full runs: --fresh removes them.
QUICK_CHECKPOINTS = report.QUICK / "paper" / "checkpoints"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="FIGURE", required=True)
    for name, chosen in [*((f.name, [f]) for f in figures.FIGURES), ("all", figures.FIGURES)]:
        text = chosen[0].__doc__.partition("\n")[0] if len(chosen) == 1 else "All of them."
        subparser = subparsers.add_parser(name, help=text, description=text)
        add_arguments(subparser)
        subparser.set_defaults(figures=chosen, figure=name)
    args = parser.parse_args(argv)
    report.choose_output(args)
    if args.checkpoints is None:
        args.checkpoints = QUICK_CHECKPOINTS if args.quick else pathlib.Path("checkpoints")
    # What a script starts in the background inherits that it ignores kill -INT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if args.fresh:
        shutil.rmtree(args.checkpoints, ignore_errors=True)
    chosen = [figure(args) for figure in args.figures]
    plans: dict = {}
    for figure in chosen:
        plans |= figure.plans()
    trained: dict = {}
    if plans:
        how = args.checkpoints, args.figure, args.jobs, args.save_every
        trained = trials.train(plans, *how)
    for figure in chosen:
        figure.write(trained)


def add_arguments(parser):
    report.add_basic_arguments(
        parser, "a few epochs of little, in a minute", "of the first trial", "paper"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that train side by side (one for each CPU: %(default)s)",
    )
    parser.add_argument(
        "--checkpoints",
        type=pathlib.Path,
        metavar="DIR",
        help="what is needed to go on after an interruption (checkpoints; with --quick "
        f"{report.shown(QUICK_CHECKPOINTS)})",
    )
    parser.add_argument(
        "--save-every",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="of training between checkpoints (%(default)s)",
    )
    parser.add_argument("--fresh", action="store_true", help="begin again, without checkpoints")


if __name__ == "__main__":
    main()
