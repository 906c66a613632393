"""What cannot be right is refused at trace time, by a message that names the argument, what came
and what was expected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmpc import (
    Constraints,
    Options,
    certify,
    ilqr_box,
    lqr_solve,
    mpc_solve,
    receding_horizon,
)

N, M, T = 2, 1, 3

LQR = dict(
    x_init=np.zeros(N),
    C=np.tile(np.eye(N + M), (T, 1, 1)),
    c=np.zeros((T, N + M)),
    F=np.zeros((T, N, N + M)),
)

LQR_ERRORS = {
    "x_init integer": (
        dict(x_init=np.zeros(N, int)),
        TypeError,
        "x_init must be a floating-point array, got dtype int64: pass floats",
    ),
    "x_init complex": (
        dict(x_init=np.zeros(N, complex)),
        TypeError,
        "x_init must be a floating-point array, got dtype complex128",
    ),
    "x_init no array": (dict(x_init="zero"), TypeError, "x_init must be an array, got str"),
    "x_init batched": (
        dict(x_init=np.zeros((4, N))),
        ValueError,
        r"x_init must have shape \[n\] .*, got \[4, 2\]; batch with jax.vmap",
    ),
    "x_init empty": (
        dict(x_init=np.zeros(0)),
        ValueError,
        r"x_init must have shape \[n\] with every size at least 1, got \[0\](?m:$)",
    ),
    "c of rank 1": (
        dict(c=np.zeros(N + M)),
        ValueError,
        r"c must have shape \[T, n\+m\] with every size at least 1, got \[3\](?m:$)",
    ),
    "c without controls": (
        dict(c=np.zeros((T, N))),
        ValueError,
        r"c must have shape \[T, n\+m\] = \[3, 3\], got \[3, 2\]",
    ),
    "c of another length than C and F": (
        dict(c=np.zeros((T - 1, N + M))),
        ValueError,
        r"c must have shape \[T, n\+m\] = \[3, 3\], got \[2, 3\]",
    ),
    "no controls": (
        dict(x_init=np.zeros(N + M)),
        ValueError,
        r"with m at least 1: x_init gives n = 3, they have 3 columns",
    ),
    "C": (
        dict(C=np.eye(N + M)),
        ValueError,
        r"C must have shape \[T, n\+m, n\+m\] = \[3, 3, 3\], got \[3, 3\]",
    ),
    "F": (
        dict(F=np.zeros((T, N, N))),
        ValueError,
        r"F must have shape \[T, n, n\+m\] = \[3, 2, 3\], got \[3, 2, 2\]",
    ),
    "f": (
        dict(f=np.zeros((T + 1, N))),
        ValueError,
        r"f must have shape \[T, n\] = \[3, 2\], got \[4, 2\]",
    ),
    "C_final": (
        dict(C_final=np.eye(N + M)),
        ValueError,
        r"C_final must have shape \[n, n\] = \[2, 2\], got \[3, 3\]",
    ),
    "c_final": (
        dict(c_final=np.zeros(N + M)),
        ValueError,
        r"c_final must have shape \[n\] = \[2\], got \[3\]",
    ),
    "free of another dtype": (
        dict(free=np.ones((T, M))),
        TypeError,
        "free must be a boolean array, got dtype float64",
    ),
    "free of another shape": (
        dict(free=np.ones((M, T), bool)),
        ValueError,
        r"free must have shape \[T, m\] = \[3, 1\], got \[1, 3\]",
    ),
}


# What is concrete is checked alike inside of jit.
everywhere = pytest.mark.parametrize(
    "where", [lambda call: call(), jax.eval_shape], ids=["outside", "inside"]
)


@everywhere
@pytest.mark.parametrize("changes, error, message", LQR_ERRORS.values(), ids=LQR_ERRORS)
def test_lqr_solve_refuses(changes, error, message, where):
    with pytest.raises(error, match=message):
        where(lambda: lqr_solve(**(LQR | changes)))


def cost(x, u, t, params):
    return x @ x + u @ u


def dynamics(x, u, t, params):
    return x + jnp.sum(u)


def terminal_cost(x, params):
    return x @ x


@jax.custom_vjp
def reverse_only(x):
    return jnp.sin(x)


reverse_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))


MPC = dict(cost=cost, dynamics=dynamics, x_init=np.zeros(N), u_init=np.zeros((T, M)))

MPC_ERRORS = {
    "x_init integer": (
        dict(x_init=np.zeros(N, int)),
        TypeError,
        "x_init must be a floating-point array, got dtype int64: pass floats",
    ),
    "u_init integer": (
        dict(u_init=[[0], [0]]),
        TypeError,
        r"u_init must be .* got dtype int64: pass floats \(for example jnp.asarray\(u_init, float",
    ),
    "x_init batched": (
        dict(x_init=np.zeros((4, N))),
        ValueError,
        r"x_init must have shape \[n\] .*, got \[4, 2\]; batch with jax.vmap",
    ),
    "u_init batched": (
        dict(u_init=np.zeros((4, T, M))),
        ValueError,
        r"u_init must have shape \[T, m\] .*, got \[4, 3, 1\]; batch with jax.vmap",
    ),
    "u_init of rank 1": (
        dict(u_init=np.zeros(T)),
        ValueError,
        r"u_init must have shape \[T, m\] with every size at least 1, got \[3\](?m:$)",
    ),
    "no stages": (
        dict(u_init=np.zeros((0, M))),
        ValueError,
        r"u_init must have shape \[T, m\] with every size at least 1, got \[0, 1\](?m:$)",
    ),
    "x_guess of another shape": (
        dict(x_guess=np.zeros((T, N))),
        ValueError,
        r"x_guess must have shape \[T\+1, n\] = \[4, 2\], got \[3, 2\]",
    ),
    "x_guess integer": (
        dict(x_guess=np.zeros((T + 1, N), int)),
        TypeError,
        "x_guess must be a floating-point array, got dtype int64: pass floats",
    ),
    "bounds of another shape": (
        dict(u_lower=np.zeros(T)),
        ValueError,
        r"u_lower must broadcast to \[T, m\] = \[3, 1\], got \[3\]",
    ),
    "bounds no array": (dict(u_upper="high"), TypeError, "u_upper must be an array, got str"),
    "bounds boolean": (
        dict(u_upper=True),
        TypeError,
        "u_upper must be a real number or array, got dtype bool",
    ),
    "bounds complex": (
        dict(u_lower=1j),
        TypeError,
        "u_lower must be a real number or array, got dtype complex128",
    ),
    "bounds crossed": (
        dict(u_lower=np.array([[0.0], [2.0], [0.0]]), u_upper=1),
        ValueError,
        r"u_lower must be at most u_upper, got u_lower\[1, 0\] = 2.0 and u_upper\[1, 0\] = 1.0",
    ),
    "bounds NaN": (
        dict(u_upper=np.nan),
        ValueError,
        r"u_lower must be at most u_upper, got .* u_upper\[0, 0\] = nan",
    ),
    "bounds in lists": (
        dict(u_lower=[3.0], u_upper=[2]),
        ValueError,
        r"u_lower must be at most u_upper, got u_lower\[0, 0\] = 3.0 and u_upper\[0, 0\] = 2.0",
    ),
    "params of objects": (
        dict(params={"gains": np.array([1.0, None])}),
        TypeError,
        r"params must hold arrays of numbers, got an array of dtype object at params\['gains'\]",
    ),
    "a cost of three arguments": (
        dict(cost=lambda x, u, t: x @ x),
        TypeError,
        r"cost must take the arguments \(x, u, t, params\), got a function of \(x, u, t\)",
    ),
    "a dynamics of five arguments": (
        dict(dynamics=lambda x, u, t, params, dt: x),
        TypeError,
        r"dynamics must take the arguments \(x, u, t, params\), got .* \(x, u, t, params, dt\)",
    ),
    "a terminal cost of one argument": (
        dict(terminal_cost=lambda x: x @ x),
        TypeError,
        r"terminal_cost must take the arguments \(x, params\), got a function of \(x\)",
    ),
    "a constraint of two arguments": (
        dict(constraints=Constraints(inequality=lambda x, u: x)),
        TypeError,
        r"constraints.inequality must take the arguments \(x, u, t, params\), got .* \(x, u\)",
    ),
    "a dynamics with reverse mode only": (
        dict(dynamics=lambda x, u, t, params: reverse_only(x + jnp.sum(u))),
        TypeError,
        r"dynamics must have derivatives in forward mode.* lax.custom_root or jax.custom_jvp",
    ),
    "a cost without derivatives": (
        dict(cost=lambda x, u, t, params: jax.pure_callback(lambda x: x, x[0], x[0])),
        TypeError,
        r"cost must have derivatives in forward mode, twice \(Pure callbacks do not support JVP",
    ),
    "cost no callable": (dict(cost=1.0), TypeError, "cost must be a callable, got float"),
    "dynamics no callable": (dict(dynamics=None), TypeError, "dynamics must be .*, got NoneType"),
    "terminal_cost no callable": (
        dict(terminal_cost=0.0),
        TypeError,
        "terminal_cost must be a callable, got float",
    ),
    "cost no scalar": (
        dict(cost=lambda x, u, t, params: u),
        ValueError,
        r"cost must return a scalar, of shape \[\], got shape \[1\]",
    ),
    "terminal_cost no scalar": (
        dict(terminal_cost=lambda x, params: x),
        ValueError,
        r"terminal_cost must return a scalar, of shape \[\], got shape \[2\]",
    ),
    "cost integer": (
        dict(cost=lambda x, u, t, params: t),
        TypeError,
        "cost must return floating-point values, got dtype int32",
    ),
    "cost with auxiliary output": (
        dict(cost=lambda x, u, t, params: (u[0], x)),
        TypeError,
        "cost must return one array, got tuple",
    ),
    "dynamics of another shape": (
        dict(dynamics=lambda x, u, t, params: u),
        ValueError,
        r"dynamics must return a state of shape \[n\] = \[2\], got shape \[1\]",
    ),
    "dynamics a list": (
        dict(dynamics=lambda x, u, t, params: [x[0], x[1]]),
        TypeError,
        "dynamics must return one array, got list",
    ),
    "dynamics without return": (
        dict(dynamics=lambda x, u, t, params: None),
        TypeError,
        "dynamics must return one array, got NoneType",
    ),
    "dynamics complex": (
        dict(dynamics=lambda x, u, t, params: jax.lax.complex(x, x)),
        TypeError,
        "dynamics must return floating-point values, got dtype complex128",
    ),
    "options of another type": (
        dict(options={"tolerance": 1e-3}),
        TypeError,
        "options must be a jaxmpc.Options, got dict",
    ),
}

OPTION_ERRORS = {
    "tolerance zero": (
        dict(tolerance=0.0),
        ValueError,
        "options.tolerance must be positive, got 0.0",
    ),
    "tolerance NaN": (
        dict(tolerance=np.nan),
        ValueError,
        "options.tolerance must be positive, got nan",
    ),
    "tolerance no number": (
        dict(tolerance="tight"),
        TypeError,
        "options.tolerance must be a number, got str",
    ),
    "tolerance no scalar": (
        dict(tolerance=np.ones(2)),
        ValueError,
        r"options.tolerance must be a scalar, got shape \[2\]",
    ),
    "max_iterations negative": (
        dict(max_iterations=-1),
        ValueError,
        "options.max_iterations must be a non-negative integer, got -1",
    ),
    "max_iterations fraction": (
        dict(max_iterations=2.5),
        ValueError,
        "options.max_iterations must be a non-negative integer, got 2.5",
    ),
    "max_iterations infinite": (
        dict(max_iterations=np.inf),
        ValueError,
        "options.max_iterations must be a non-negative integer, got inf",
    ),
    "max_iterations None": (
        dict(max_iterations=None),
        TypeError,
        "options.max_iterations must be a number, got NoneType",
    ),
    "regularization negative": (
        dict(regularization=-1e-3),
        ValueError,
        "options.regularization must be non-negative and finite, got -0.001",
    ),
    "regularization infinite": (
        dict(regularization=np.inf),
        ValueError,
        "options.regularization must be non-negative and finite, got inf",
    ),
    "line_search_decay 1": (
        dict(line_search_decay=1.0),
        ValueError,
        "options.line_search_decay must be between 0 and 1, both excluded, got 1.0",
    ),
    "trust_region zero": (
        dict(trust_region=0.0),
        ValueError,
        "options.trust_region must be positive, got 0.0",
    ),
    "trust_region of another shape": (
        dict(trust_region=[0.1, 0.2]),
        ValueError,
        r"options.trust_region must broadcast to \[m\] = \[1\], got \[2\]",
    ),
    "hessian": (
        dict(hessian="gauss-newton"),
        ValueError,
        r"options.hessian must be one of \('exact', 'ilqr'\), got 'gauss-newton'",
    ),
    "backward_hessian": (
        dict(backward_hessian=None),
        ValueError,
        r"options.backward_hessian must be one of \('exact', 'ilqr'\), got None",
    ),
    "unconverged": (
        dict(unconverged="raise"),
        ValueError,
        r"options.unconverged must be one of \('zero', 'nan', 'implicit'\), got 'raise'",
    ),
}


@everywhere
@pytest.mark.parametrize("solve", [ilqr_box, mpc_solve])
@pytest.mark.parametrize("changes, error, message", MPC_ERRORS.values(), ids=MPC_ERRORS)
def test_the_solvers_refuse(solve, changes, error, message, where):
    with pytest.raises(error, match=message):
        where(lambda: solve(**(MPC | changes)).u)


@everywhere
@pytest.mark.parametrize("solve", [ilqr_box, mpc_solve])
@pytest.mark.parametrize("changes, error, message", OPTION_ERRORS.values(), ids=OPTION_ERRORS)
def test_the_solvers_refuse_options(solve, changes, error, message, where):
    with pytest.raises(error, match=message):
        where(lambda: solve(**MPC, options=Options(**changes)).u)


def test_an_error_of_the_function_itself_stays_what_it_is():
    def wrong(x, u, t, params):
        return x + cost(x)

    with pytest.raises(TypeError, match=r"cost\(\) missing 3 required positional arguments"):
        mpc_solve(**(MPC | dict(dynamics=wrong)))


PLANTS = {
    "nothing": (
        lambda x, u, t, params: None,
        TypeError,
        "plant must return one array, got NoneType",
    ),
    "a tuple": (
        lambda x, u, t, params: (x, u),
        TypeError,
        "plant must return one array, got tuple",
    ),
    "another shape": (lambda x, u, t, params: u, ValueError, r"plant returns .* \[2\], got \[1\]"),
    "of two arguments": (
        lambda x, u: x,
        TypeError,
        r"plant must take the arguments \(x, u, t, params\), got a function of \(x, u\)",
    ),
}


@pytest.mark.parametrize("plant, error, message", PLANTS.values(), ids=PLANTS)
def test_receding_horizon_refuses_plants(plant, error, message):
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: receding_horizon(**MPC, num_steps=2, plant=plant).u)


def test_certify_names_what_does_not_belong_together():
    solution = jax.eval_shape(lambda: mpc_solve(**MPC))
    solution = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), solution)
    with pytest.raises(
        ValueError, match=r"x_init must have shape \[n\], of .*, = \[2\], got \[3\]"
    ):
        certify(cost, dynamics, np.zeros(N + 1), solution)
    batch = jax.tree.map(lambda a: a[None], solution)
    with pytest.raises(ValueError, match=r"solution must be that of one problem.*jax.vmap"):
        certify(cost, dynamics, np.zeros(N), batch)
    with pytest.raises(TypeError, match=r"solution must be a jaxmpc.Solution, got"):
        certify(cost, dynamics, np.zeros(N), solution.u)


def test_options_may_hold_tracers_and_are_checked_where_they_are_concrete():
    def objective(tolerance, regularization):
        options = Options(tolerance=tolerance, regularization=regularization)
        return ilqr_box(**MPC, options=options).objective

    assert jax.eval_shape(objective, 1e-6, 0.0).shape == ()
    with pytest.raises(ValueError, match=r"options.regularization must be .*, got -1.0"):
        jax.eval_shape(lambda tolerance: objective(tolerance, -1.0), 1e-6)


def test_shapes_are_checked_under_jit_too():
    with pytest.raises(ValueError, match=r"u_init must have shape \[T, m\]"):
        jax.jit(lambda u_init: ilqr_box(**(MPC | dict(u_init=u_init))))(np.zeros(T))


def test_ilqr_box_has_no_gradient_and_names_who_has():
    def objective(x_init):
        return ilqr_box(**(MPC | dict(x_init=x_init))).objective

    with pytest.raises(TypeError, match=r"ilqr_box .*not differentiable.* use jaxmpc.mpc_solve"):
        jax.grad(objective)(jnp.ones(N))
