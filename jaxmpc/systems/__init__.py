"""Example systems as pure functions of `(x, u, t, params)`, in SI units.

`pendulum` and `cartpole` are the control problems of Amos et al. 2018 (arXiv:1810.13400);
`quadratic` is the stage cost that both use. Each system module offers `dynamics` and `cost`, which
go to the solver as they are, `default_params`, the control bounds `U_LOWER` and `U_UPPER`, and
`state`, `angle` and `sample_states` to make and read states.
"""

from jaxmpc.systems import cartpole, pendulum, quadratic

__all__ = ["cartpole", "pendulum", "quadratic"]
