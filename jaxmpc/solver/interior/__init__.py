"""A primal-dual interior-point method for problems with rows, with an active-set finish.

Every row and bound is held away from its boundary by a barrier τ that goes to nothing, and has a
multiplier of its own (``barrier``). The states are unknowns beside the controls: on the way the
dynamics need not hold, and a trial step costs no rollout. What a step has to lower is the violation
or the barrier objective (``filter``); where it can do neither, a restoration minimises the
violation alone. Once the barrier shows which rows are active, the plan of that active set is found
by Newton's method on rollouts (``active_set``); where that leads nowhere, the barrier goes on.

A trip (``method``) evaluates the trajectory (``local``), judges it, takes a step (``step``), the
LQR of which is in ``newton``, and searches for its length. All that it carries is in ``state``.

Source: Wächter and Biegler 2006, Mathematical Programming 106 (interior point, filter,
restoration); Rao, Wright and Rawlings 1998 (the LQR of every step).
"""
