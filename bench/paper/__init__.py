"""The experiments of Amos et al. 2018 (arXiv:1810.13400), figure by figure.

`python -m bench.paper --help` lists them. From the bottom up: `trials` trains the trials of a run
side by side, with checkpoints; `imitation` and `lstm` are the paper's learners, `lqr` those of
section 5.2; `figures` says which runs a figure needs, and draws them.
"""
