// A batch of unconstrained LQR problems by HPIPM's Riccati recursion, one after the other.
//
// Compiled by native.py as a shared library against HPIPM's headers. The problem is that of
// riccati_lanes.cpp. HPIPM has no x_0 among its variables: it is put into b_0 and r_0 beforehand,
// as HPIPM's own examples do. The last stage keeps its controls: they cost, and move nothing.

#include <stdlib.h>

#include <blasfeo_common.h>
#include <blasfeo_d_aux.h>
#include <hpipm_common.h>
#include <hpipm_d_ocp_qp.h>
#include <hpipm_d_ocp_qp_dim.h>
#include <hpipm_d_ocp_qp_ipm.h>
#include <hpipm_d_ocp_qp_kkt.h>
#include <hpipm_d_ocp_qp_sol.h>

struct batch {
    int n, m, T, size;
    void *memory[4];  // of dim, arg, ws; and the list of those of the problems
    struct d_ocp_qp_dim dim;
    struct d_ocp_qp_ipm_arg arg;
    struct d_ocp_qp_ipm_ws ws;
    struct d_ocp_qp *qp;
    struct d_ocp_qp_sol *sol;
};

// The columns `from` … `from + cols` of the row-major `A` [rows, stride], in column-major order.
static double *columns(const double *A, int rows, int stride, int from, int cols, double *out) {
    for (int j = 0; j < cols; ++j)
        for (int i = 0; i < rows; ++i) out[j * rows + i] = A[i * stride + from + j];
    return out;
}

static void set_stage(struct batch *b, struct d_ocp_qp *qp, int t, const double *C,
                      const double *c, const double *F, const double *f, const double *x_init) {
    const int n = b->n, m = b->m, p = n + m;
    double *work = malloc(sizeof(double) * p * p), *vector = malloc(sizeof(double) * p);
    const double *C_u = C + n * p;
    d_ocp_qp_set_R(t, columns(C_u, m, p, n, m, work), qp);
    for (int i = 0; i < m; ++i) {
        vector[i] = c[n + i];
        for (int j = 0; t == 0 && j < n; ++j) vector[i] += C_u[i * p + j] * x_init[j];
    }
    d_ocp_qp_set_r(t, vector, qp);
    if (t > 0) {
        d_ocp_qp_set_Q(t, columns(C, n, p, 0, n, work), qp);
        d_ocp_qp_set_S(t, columns(C_u, m, p, 0, n, work), qp);
        for (int i = 0; i < n; ++i) vector[i] = c[i];
        d_ocp_qp_set_q(t, vector, qp);
    }
    if (t < b->T - 1) {
        d_ocp_qp_set_B(t, columns(F, n, p, n, m, work), qp);
        if (t > 0) d_ocp_qp_set_A(t, columns(F, n, p, 0, n, work), qp);
        for (int i = 0; i < n; ++i) {
            vector[i] = f[i];
            for (int j = 0; t == 0 && j < n; ++j) vector[i] += F[i * p + j] * x_init[j];
        }
        d_ocp_qp_set_b(t, vector, qp);
    }
    free(work);
    free(vector);
}

struct batch *hpipm_create(int n, int m, int T, int size, const double *C, const double *c,
                           const double *F, const double *f, const double *x_init) {
    struct batch *b = malloc(sizeof *b);
    const int p = n + m, N = T - 1;
    int none = 0;
    b->n = n, b->m = m, b->T = T, b->size = size;

    b->memory[0] = malloc(d_ocp_qp_dim_memsize(N));
    d_ocp_qp_dim_create(N, &b->dim, b->memory[0]);
    int *nx = malloc(sizeof(int) * T), *nu = malloc(sizeof(int) * T);
    int *zeros = calloc(T, sizeof(int));
    for (int t = 0; t < T; ++t) nx[t] = t ? n : 0, nu[t] = m;
    d_ocp_qp_dim_set_all(nx, nu, zeros, zeros, zeros, zeros, zeros, zeros, &b->dim);
    free(nx), free(nu), free(zeros);

    b->memory[1] = malloc(d_ocp_qp_ipm_arg_memsize(&b->dim));
    d_ocp_qp_ipm_arg_create(&b->dim, &b->arg, b->memory[1]);
    d_ocp_qp_ipm_arg_set_default(SPEED, &b->arg);
    double zero = 0.0;
    d_ocp_qp_ipm_arg_set_reg_prim(&zero, &b->arg);
    d_ocp_qp_ipm_arg_set_comp_dual_sol_eq(&none, &b->arg);  // x and u alone
    b->memory[2] = malloc(d_ocp_qp_ipm_ws_memsize(&b->dim, &b->arg));
    d_ocp_qp_ipm_ws_create(&b->dim, &b->arg, &b->ws, b->memory[2]);
    b->ws.square_root_alg = b->arg.square_root_alg;  // else only the whole solver passes it on

    b->qp = malloc(sizeof *b->qp * size);
    b->sol = malloc(sizeof *b->sol * size);
    void **memory = b->memory[3] = malloc(sizeof(void *) * 2 * size);
    for (int i = 0; i < size; ++i) {
        memory[2 * i] = malloc(d_ocp_qp_memsize(&b->dim));
        d_ocp_qp_create(&b->dim, b->qp + i, memory[2 * i]);
        d_ocp_qp_set_all_zero(b->qp + i);
        memory[2 * i + 1] = malloc(d_ocp_qp_sol_memsize(&b->dim));
        d_ocp_qp_sol_create(&b->dim, b->sol + i, memory[2 * i + 1]);
        for (int t = 0; t < T; ++t) {
            const size_t at = (size_t)i * T + t;
            set_stage(b, b->qp + i, t, C + at * p * p, c + at * p, F + at * n * p, f + at * n,
                      x_init + (size_t)i * n);
        }
    }
    return b;
}

void hpipm_solve(struct batch *b) {
    for (int i = 0; i < b->size; ++i)
        d_ocp_qp_fact_solve_kkt_unconstr(b->qp + i, b->sol + i, &b->arg, &b->ws);
}

// x [size, T, n], without x_0, which HPIPM does not have; u [size, T, m].
void hpipm_read(struct batch *b, double *x, double *u) {
    for (int i = 0; i < b->size; ++i)
        for (int t = 0; t < b->T; ++t) {
            const size_t at = (size_t)i * b->T + t;
            d_ocp_qp_sol_get_u(t, b->sol + i, u + at * b->m);
            if (t > 0) d_ocp_qp_sol_get_x(t, b->sol + i, x + at * b->n);
        }
}

void hpipm_free(struct batch *b) {
    void **memory = b->memory[3];
    for (int i = 0; i < 2 * b->size; ++i) free(memory[i]);
    for (int i = 0; i < 4; ++i) free(b->memory[i]);
    free(b->qp);
    free(b->sol);
    free(b);
}
