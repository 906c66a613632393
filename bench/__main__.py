"""Studies of jaxmpc beside other implementations.

Each prints a Markdown table and keeps it, with the numbers behind it, in bench/results/; a quick
run keeps them in bench_output/, which git ignores.
"""

import argparse

from bench import (
    box_lq,
    compile_time,
    constrained,
    fixed_point,
    gradients,
    lqr,
    mpc,
    report,
    scaling,
    smoothing,
)

# A study is a module with a docstring, `add_arguments(parser)` and `run(args)`; it may have a NAME.
STUDIES = (gradients, mpc, box_lq, constrained, lqr, scaling, compile_time, fixed_point, smoothing)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="STUDY", required=True)
    for study in STUDIES:
        name = getattr(study, "NAME", study.__name__.rpartition(".")[2])
        subparser = subparsers.add_parser(
            name,
            help=study.__doc__.partition("\n")[0],
            description=study.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        study.add_arguments(subparser)
        subparser.set_defaults(run=study.run)
    args = parser.parse_args(argv)
    report.choose_output(args)
    args.run(args)


if __name__ == "__main__":
    main()
