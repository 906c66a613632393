"""Tanks and a reactor, in units from 1e-6 to 1e3."""

from tests.families.family import Family, Rows
from tests.families.parts import around, euler, held


def four_tanks():
    """Levels in metres, pumps in volts, flows of 1e-5 m³/s; the upper tanks feed the lower."""
    T, dt, area, hole, pump, share = 40, 5.0, 28e-4, 7.1e-6, 3.3e-6, 0.65

    def ode(lib, x, u, p):
        # Zero below empty, smoothly, so that a trial plan may try it.
        wet = [0.5 * (x[i] + lib.sqrt(x[i] ** 2 + 1e-6)) for i in range(4)]
        out = [hole / area * lib.sqrt(2 * 9.81 * h) for h in wet]
        flow = [pump / area * u[i] for i in range(2)]
        return [
            out[2] - out[0] + share * flow[0],
            out[3] - out[1] + share * flow[1],
            (1 - share) * flow[1] - out[2],
            (1 - share) * flow[0] - out[3],
        ]

    def cost(lib, x, u, t, p):
        return 1e2 * ((x[0] - p[0]) ** 2 + (x[1] - p[1]) ** 2) + 1e-4 * (u[0] ** 2 + u[1] ** 2)

    def end(lib, x, p):
        return 1e4 * ((x[0] - p[0]) ** 2 + (x[1] - p[1]) ** 2)

    def sample(rng, N):
        x = around(rng, N, [0.12, 0.12, 0.03, 0.03], [0.03, 0.03, 0.01, 0.01])
        return x, held(T, [3, 3]), around(rng, N, [0.16, 0.16], [0.03, 0.03])

    return Family(
        "four_tanks", 4, 2, T, euler(ode, dt), cost, sample, end, u_lower=0.0, u_upper=8.0,
        x_lower=[0.05, 0.05, 0.015, 0.015], x_upper=[0.2, 0.2, 0.045, 0.045],
        previous=[3, 3], rate_limit=[1.0, 1.0],
    )  # fmt: skip


def reactor():
    """An exothermic reaction: mol/m³ and kelvin, a flow of 1e-3 m³/s, a jacket that changes slowly;
    within a box at the end."""
    T, dt, volume = 60, 1.5, 0.1

    def ode(lib, x, u, p):
        rate = 1.2e9 * lib.exp(-8750 / x[1]) * x[0]
        heat = 0.2092 * rate + 0.0349 * (u[1] - x[1])
        flow = u[0] / volume
        return [flow * (1000 - x[0]) - rate, flow * (p[0] - x[1]) + heat]

    def cost(lib, x, u, t, p):
        return 1e-4 * (x[0] - p[1]) ** 2 + 1e-2 * (u[1] - 300) ** 2 + 1e6 * (u[0] - 1.67e-3) ** 2

    def dock(lib, x, u, t, p):
        return [x[0] - p[1] - 10, p[1] - 10 - x[0]]

    def sample(rng, N):
        x = around(rng, N, [600, 328], [100, 5])
        return x, held(T, [1.67e-3, 295]), around(rng, N, [350, 500], [5, 60])

    return Family(
        "reactor", 2, 2, T, euler(ode, dt), cost, sample,
        u_lower=[0.8e-3, 270], u_upper=[2.5e-3, 340], x_lower=[0, 300], x_upper=[1000, 356],
        previous=[1.67e-3, 300], rate_limit=[2e-4, 5.0], rows=(Rows(dock, "terminal"),),
    )  # fmt: skip


FAMILIES = [four_tanks, reactor]
