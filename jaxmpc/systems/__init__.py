"""Example systems as pure functions of `(x, u, t, params)`, in SI units.

* `pendulum` and `cartpole` are the control problems of Amos et al. 2018 (arXiv:1810.13400);
  `quadratic` is the stage cost that both use.
* `acrobot` (swing-up with one motor for two joints), `quadrotor` (in a plane, with rotors that only
  push) and `car` (parking) have plain angles as states, a `terminal_cost` beside the cost, both
  from `jaxmpc.tracking`, and their equations of motion as `ode`, for `jaxmpc.integrators`.

Each system module offers `dynamics` and `cost`, which go to the solver as they are,
`default_params`, the sizes `N` and `M`, the step `DT`, the control bounds `U_LOWER` and `U_UPPER`,
and `state`, `angle` and `sample_states` to make and read states.
"""

from jaxmpc.systems import acrobot, car, cartpole, pendulum, quadratic, quadrotor

__all__ = ["acrobot", "car", "cartpole", "pendulum", "quadratic", "quadrotor"]
