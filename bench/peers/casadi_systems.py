"""The pendulum and the cartpole of the paper as CasADi expressions."""

import casadi as ca


def pendulum(x, u, physics, dt):
    g, m, l = physics
    cos, sin, rate = ca.vertsplit(x)
    rate = rate + dt * (1.5 * g / l * sin + 3 * u / (m * l**2))
    angle = ca.atan2(sin, cos) + dt * rate
    return ca.vertcat(ca.cos(angle), ca.sin(angle), rate)


def cartpole(x, u, physics, dt):
    g, m_c, m_p, l = physics
    y, y_dot, cos, sin, rate = ca.vertsplit(x)
    share = m_p / (m_c + m_p)
    a = u / (m_c + m_p) + share * l * rate**2 * sin
    rate_dot = (g * sin - a * cos) / (l * (4 / 3 - share * cos**2))
    y_ddot = a - share * l * rate_dot * cos
    angle = ca.atan2(sin, cos) + dt * rate
    return ca.vertcat(
        y + dt * y_dot, y_dot + dt * y_ddot, ca.cos(angle), ca.sin(angle), rate + dt * rate_dot
    )


SYSTEMS = {"pendulum": pendulum, "cartpole": cartpole}
