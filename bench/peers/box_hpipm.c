// A batch of box-constrained linear-quadratic problems by HPIPM, one after the other.
//
// Compiled by box_hpipm.py as a shared library against HPIPM's headers. HPIPM has no x_0 among its
// variables: it is put into b_0 beforehand. The last stage keeps its controls, which cost and move
// nothing. Matrices are column-major.

#include <stdlib.h>
#include <time.h>

#include <blasfeo_common.h>
#include <blasfeo_d_aux.h>
#include <hpipm_common.h>
#include <hpipm_d_ocp_qp.h>
#include <hpipm_d_ocp_qp_dim.h>
#include <hpipm_d_ocp_qp_ipm.h>
#include <hpipm_d_ocp_qp_sol.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// A [size, n, n], B [size, n, m], Q [size, n, n], R [size, m, m], x_init [size, n] to u [size, T,
// m], status and iterations [size]. Returns the seconds that HPIPM took, without setting up.
double box_solve(int n, int m, int T, int size, const double *A, const double *B, const double *Q,
                 const double *R, const double *x_init, double limit, double tolerance, double *u,
                 int *status, int *iterations) {
    const int N = T - 1;
    struct d_ocp_qp_dim dim;
    struct d_ocp_qp qp;
    struct d_ocp_qp_sol sol;
    struct d_ocp_qp_ipm_arg arg;
    struct d_ocp_qp_ipm_ws ws;
    int *nx = malloc(sizeof(int) * T), *nu = malloc(sizeof(int) * T), *zeros = calloc(T, sizeof(int));
    for (int t = 0; t < T; ++t) nx[t] = t ? n : 0, nu[t] = m;
    void *dim_memory = malloc(d_ocp_qp_dim_memsize(N));
    d_ocp_qp_dim_create(N, &dim, dim_memory);
    d_ocp_qp_dim_set_all(nx, nu, zeros, nu, zeros, zeros, zeros, zeros, &dim);

    void *arg_memory = malloc(d_ocp_qp_ipm_arg_memsize(&dim));
    d_ocp_qp_ipm_arg_create(&dim, &arg, arg_memory);
    d_ocp_qp_ipm_arg_set_default(BALANCE, &arg);
    int most = 200;
    d_ocp_qp_ipm_arg_set_iter_max(&most, &arg);
    d_ocp_qp_ipm_arg_set_tol_stat(&tolerance, &arg);
    d_ocp_qp_ipm_arg_set_tol_eq(&tolerance, &arg);
    d_ocp_qp_ipm_arg_set_tol_ineq(&tolerance, &arg);
    d_ocp_qp_ipm_arg_set_tol_comp(&tolerance, &arg);
    void *ws_memory = malloc(d_ocp_qp_ipm_ws_memsize(&dim, &arg));
    d_ocp_qp_ipm_ws_create(&dim, &arg, &ws, ws_memory);
    void *qp_memory = malloc(d_ocp_qp_memsize(&dim)), *sol_memory = malloc(d_ocp_qp_sol_memsize(&dim));
    d_ocp_qp_create(&dim, &qp, qp_memory);
    d_ocp_qp_sol_create(&dim, &sol, sol_memory);

    int *index = malloc(sizeof(int) * m);
    double *lower = malloc(sizeof(double) * m), *upper = malloc(sizeof(double) * m);
    double *first = malloc(sizeof(double) * n);
    for (int j = 0; j < m; ++j) index[j] = j, lower[j] = -limit, upper[j] = limit;

    double seconds = 0.0;
    for (int i = 0; i < size; ++i) {
        const double *a = A + (size_t)i * n * n, *b = B + (size_t)i * n * m;
        d_ocp_qp_set_all_zero(&qp);
        for (int row = 0; row < n; ++row) {
            first[row] = 0.0;
            for (int k = 0; k < n; ++k) first[row] += a[k * n + row] * x_init[(size_t)i * n + k];
        }
        for (int t = 0; t < T; ++t) {
            d_ocp_qp_set_R(t, (double *)R + (size_t)i * m * m, &qp);
            d_ocp_qp_set_idxbu(t, index, &qp);
            d_ocp_qp_set_lbu(t, lower, &qp);
            d_ocp_qp_set_ubu(t, upper, &qp);
            if (t > 0) d_ocp_qp_set_Q(t, (double *)Q + (size_t)i * n * n, &qp);
            if (t < N) d_ocp_qp_set_B(t, (double *)b, &qp);
            if (t > 0 && t < N) d_ocp_qp_set_A(t, (double *)a, &qp);
        }
        if (N > 0) d_ocp_qp_set_b(0, first, &qp);
        const double start = now();
        d_ocp_qp_ipm_solve(&qp, &sol, &arg, &ws);
        seconds += now() - start;
        d_ocp_qp_ipm_get_status(&ws, status + i);
        d_ocp_qp_ipm_get_iter(&ws, iterations + i);
        for (int t = 0; t < T; ++t) d_ocp_qp_sol_get_u(t, &sol, u + ((size_t)i * T + t) * m);
    }
    free(nx), free(nu), free(zeros), free(index), free(lower), free(upper), free(first);
    free(dim_memory), free(arg_memory), free(ws_memory), free(qp_memory), free(sol_memory);
    return seconds;
}
