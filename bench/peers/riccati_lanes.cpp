// The Riccati recursion with one LQR problem per SIMD lane: what a hand-written solver of a batch
// of small problems can reach. Everything is stored stage by stage in blocks of the SIMD width,
// batch last, so that each scalar of the recursion is one vector and no lane ever waits.
//
//     minimise over u   Σ_{t<T} ½ z_tᵀ C_t z_t + c_tᵀ z_t,   z = (x, u)
//     subject to        x_0 = x_init,   x_{t+1} = F_t z_t + f_t
//
// Compiled by native.py as a shared library, with -DSIZES="SIZE(n, m) SIZE(n, m) …".

#include <cstddef>
#include <memory>
#include <vector>

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// Arrays as NumPy has them: batch first, contiguous.
struct Given {
    const void *C, *c, *F, *f, *x_init, *z_bar;  // z_bar: cotangents of z
};

struct Solver {
    virtual ~Solver() = default;
    virtual void solve(int threads) = 0;
    virtual void solve_and_differentiate(int threads) = 0;
    virtual void read_plan(void *z) const = 0;
    virtual void read_gradient(void *C, void *c, void *F, void *f, void *x_init) const = 0;
};

template <class Real, int n, int m>
class Lanes final : public Solver {
    static constexpr int p = n + m, width = VECTOR_BYTES / sizeof(Real);
    typedef Real Lane __attribute__((vector_size(VECTOR_BYTES)));

    struct Stage {
        Lane C[p][p], c[p], F[n][p], f[n];
    };
    struct Policy {
        Lane K[m][n], k[m];
        Lane L[m][m], D_inv[m];  // Q_uu = L D Lᵀ, L with a unit diagonal
    };
    struct Point {
        Lane z[p];
    };
    struct State {
        Lane x[n];
    };

    int T, batch, blocks;
    // [blocks, T], or [blocks] for the states.
    std::vector<Stage> data, gradient;
    std::vector<Policy> policy;
    std::vector<Point> plan, cotangent, adjoint;
    std::vector<State> x_init, x_init_bar;

    // out [., ld_out] += Aᵀ B on an a × b tile, A [n, ld_A] and B [n, ld_B], in registers.
    template <int a, int b, int ld_A, int ld_B>
    static void add_tile(const Lane *A, const Lane *B, Lane *out) {
        Lane sum[a][b];
        for (int i = 0; i < a; ++i)
            for (int j = 0; j < b; ++j) sum[i][j] = out[i * ld_B + j];
        for (int k = 0; k < n; ++k)
#pragma GCC unroll 4
            for (int i = 0; i < a; ++i)
#pragma GCC unroll 4
                for (int j = 0; j < b; ++j) sum[i][j] += A[k * ld_A + i] * B[k * ld_B + j];
        for (int i = 0; i < a; ++i)
            for (int j = 0; j < b; ++j) out[i * ld_B + j] = sum[i][j];
    }

    // out [rows, cols] += Aᵀ B, A [n, rows] and B [n, cols]; `lower`: only that triangle counts.
    template <int rows, int cols, bool lower, int i = 0, int j = 0>
    static void add_product(const Lane *A, const Lane *B, Lane *out) {
        if constexpr (i < rows) {
            constexpr int a = rows - i < 4 ? rows - i : 4, b = cols - j < 4 ? cols - j : 4;
            add_tile<a, b, rows, cols>(A + i, B + j, out + i * cols + j);
            constexpr bool next_row = j + 4 >= cols || (lower && j >= i);
            add_product<rows, cols, lower, next_row ? i + 4 : i, next_row ? 0 : j + 4>(A, B, out);
        }
    }

    // q_u ↦ −Q_uu⁻¹ q_u
    static void minimise(const Policy &g, const Lane *q, Lane *k) {
        for (int i = 0; i < m; ++i) {
            k[i] = -q[i];
            for (int j = 0; j < i; ++j) k[i] -= g.L[i][j] * k[j];
        }
        for (int i = 0; i < m; ++i) k[i] *= g.D_inv[i];
        for (int i = m; i-- > 0;)
            for (int j = i + 1; j < m; ++j) k[i] -= g.L[j][i] * k[j];
    }

    static void backward(const Stage *data, Policy *policy, int T) {
        Lane V[n][n] = {}, v[n] = {};
        for (int t = T; t-- > 0;) {
            const Stage &s = data[t];
            Policy &g = policy[t];
            Lane VF[n][p], w[n], Q[p][p], q[p];
            for (int i = 0; i < n; ++i) {
                for (int j = 0; j < p; ++j) VF[i][j] = Lane{};
                w[i] = v[i];
                for (int k = 0; k < n; ++k) w[i] += V[i][k] * s.f[k];
            }
            add_product<n, p, false>(V[0], s.F[0], VF[0]);  // V is symmetric
            for (int i = 0; i < p; ++i) {
                for (int j = 0; j < p; ++j) Q[i][j] = s.C[i][j];
                q[i] = s.c[i];
                for (int k = 0; k < n; ++k) q[i] += s.F[k][i] * w[k];
            }
            add_product<p, p, true>(s.F[0], VF[0], Q[0]);
            for (int j = 0; j < m; ++j) {
                Lane scaled[m], d = Q[n + j][n + j];
                for (int k = 0; k < j; ++k) {
                    scaled[k] = g.L[j][k] / g.D_inv[k];
                    d -= g.L[j][k] * scaled[k];
                }
                g.D_inv[j] = Real(1) / d;
                for (int i = j + 1; i < m; ++i) {
                    Lane sum = Q[n + i][n + j];
                    for (int k = 0; k < j; ++k) sum -= g.L[i][k] * scaled[k];
                    g.L[i][j] = sum * g.D_inv[j];
                }
            }
            minimise(g, q + n, g.k);
            for (int j = 0; j < n; ++j) {
                Lane column[m], K[m];
                for (int i = 0; i < m; ++i) column[i] = Q[n + i][j];
                minimise(g, column, K);
                for (int i = 0; i < m; ++i) g.K[i][j] = K[i];
            }
            for (int i = 0; i < n; ++i) {
                Lane sum = q[i];
                for (int k = 0; k < m; ++k) sum += g.K[k][i] * q[n + k];
                v[i] = sum;
                for (int j = 0; j <= i; ++j) {
                    Lane entry = Q[i][j];
                    for (int k = 0; k < m; ++k) entry += g.K[k][i] * Q[n + k][j];
                    V[i][j] = V[j][i] = entry;
                }
            }
        }
    }

    // z from the policy; with `affine` false for x⁺ = F z.
    template <bool affine>
    static void forward(const Stage *data, const Policy *policy, const Lane *x_init, Point *plan,
                        int T) {
        Lane x[n];
        for (int i = 0; i < n; ++i) x[i] = x_init ? x_init[i] : Lane{};
        for (int t = 0; t < T; ++t) {
            const Policy &g = policy[t];
            const Stage &s = data[t];
            Lane *z = plan[t].z;
            for (int i = 0; i < n; ++i) z[i] = x[i];
            for (int i = 0; i < m; ++i) {
                Lane sum = affine ? g.k[i] : z[n + i];  // else k was left there
                for (int j = 0; j < n; ++j) sum += g.K[i][j] * x[j];
                z[n + i] = sum;
            }
            for (int i = 0; i < n; ++i) {
                Lane sum = affine ? s.f[i] : Lane{};
                for (int j = 0; j < p; ++j) sum += s.F[i][j] * z[j];
                x[i] = sum;
            }
        }
    }

    // The adjoint plan solves the same problem with z_bar as its linear term, f = 0, x_init = 0.
    static void differentiate(const Stage *data, const Policy *policy, const Point *plan,
                              const Point *z_bar, Point *adjoint, Stage *gradient,
                              Lane *x_init_bar, int T) {
        Lane v[n] = {};
        for (int t = T; t-- > 0;) {
            const Stage &s = data[t];
            const Policy &g = policy[t];
            Lane q[p];
            for (int i = 0; i < p; ++i) {
                q[i] = z_bar[t].z[i];
                for (int k = 0; k < n; ++k) q[i] += s.F[k][i] * v[k];
            }
            minimise(g, q + n, adjoint[t].z + n);
            for (int i = 0; i < n; ++i) {
                v[i] = q[i];
                for (int k = 0; k < m; ++k) v[i] += g.K[k][i] * q[n + k];
            }
        }
        forward<false>(data, policy, nullptr, adjoint, T);

        Lane costate[n] = {}, multiplier[n] = {};  // of the plan and of the adjoint plan
        for (int t = T; t-- > 0;) {
            const Stage &s = data[t];
            Stage &bar = gradient[t];
            const Lane *z = plan[t].z, *w = adjoint[t].z;
            for (int i = 0; i < p; ++i) {
                bar.c[i] = w[i];
                for (int j = 0; j < p; ++j) bar.C[i][j] = Real(0.5) * (w[i] * z[j] + z[i] * w[j]);
            }
            for (int i = 0; i < n; ++i) {
                bar.f[i] = multiplier[i];
                for (int j = 0; j < p; ++j) bar.F[i][j] = costate[i] * w[j] + multiplier[i] * z[j];
            }
            Lane new_costate[n], new_multiplier[n];
            for (int i = 0; i < n; ++i) {
                Lane a = s.c[i], b = z_bar[t].z[i];
                for (int j = 0; j < p; ++j) {
                    a += s.C[i][j] * z[j];
                    b += s.C[i][j] * w[j];
                }
                for (int k = 0; k < n; ++k) {
                    a += s.F[k][i] * costate[k];
                    b += s.F[k][i] * multiplier[k];
                }
                new_costate[i] = a;
                new_multiplier[i] = b;
            }
            for (int i = 0; i < n; ++i) {
                costate[i] = new_costate[i];
                multiplier[i] = new_multiplier[i];
            }
        }
        for (int i = 0; i < n; ++i) x_init_bar[i] = multiplier[i];
    }

    void solve_block(int b) {
        const std::size_t at = std::size_t(b) * T;
        backward(&data[at], &policy[at], T);
        forward<true>(&data[at], &policy[at], x_init[b].x, &plan[at], T);
    }

    // Between [batch, steps, size] of NumPy and the lanes at `entry(block · steps + t)[i]`.
    template <class Entry>
    void load(const void *from, int steps, int size, Entry entry) const {
        const Real *array = static_cast<const Real *>(from);
        for (int b = 0; b < blocks; ++b)
            for (int lane = 0; lane < width; ++lane) {
                const int problem = b * width + lane < batch ? b * width + lane : batch - 1;
                for (int t = 0; t < steps; ++t)
                    for (int i = 0; i < size; ++i)
                        entry(std::size_t(b) * steps + t)[i][lane] =
                            array[(std::size_t(problem) * steps + t) * size + i];
            }
    }

    template <class Entry>
    void store(void *to, int steps, int size, Entry entry) const {
        Real *array = static_cast<Real *>(to);
        for (int problem = 0; problem < batch; ++problem)
            for (int t = 0; t < steps; ++t)
                for (int i = 0; i < size; ++i)
                    array[(std::size_t(problem) * steps + t) * size + i] =
                        entry(std::size_t(problem / width) * steps + t)[i][problem % width];
    }

public:
    Lanes(int T, int batch, const Given &given)
        : T(T), batch(batch), blocks((batch + width - 1) / width),
          data(std::size_t(blocks) * T), gradient(data.size()), policy(data.size()),
          plan(data.size()), cotangent(data.size()), adjoint(data.size()), x_init(blocks),
          x_init_bar(blocks) {
        load(given.C, T, p * p, [&](std::size_t at) { return data[at].C[0]; });
        load(given.c, T, p, [&](std::size_t at) { return data[at].c; });
        load(given.F, T, n * p, [&](std::size_t at) { return data[at].F[0]; });
        load(given.f, T, n, [&](std::size_t at) { return data[at].f; });
        load(given.x_init, 1, n, [&](std::size_t at) { return x_init[at].x; });
        load(given.z_bar, T, p, [&](std::size_t at) { return cotangent[at].z; });
    }

    void solve(int threads) override {
#pragma omp parallel for schedule(static) num_threads(threads < blocks ? threads : blocks)
        for (int b = 0; b < blocks; ++b) solve_block(b);
    }

    void solve_and_differentiate(int threads) override {
#pragma omp parallel for schedule(static) num_threads(threads < blocks ? threads : blocks)
        for (int b = 0; b < blocks; ++b) {
            const std::size_t at = std::size_t(b) * T;
            solve_block(b);
            differentiate(&data[at], &policy[at], &plan[at], &cotangent[at], &adjoint[at],
                          &gradient[at], x_init_bar[b].x, T);
        }
    }

    void read_plan(void *z) const override {
        store(z, T, p, [&](std::size_t at) { return plan[at].z; });
    }

    void read_gradient(void *C, void *c, void *F, void *f, void *x0) const override {
        store(C, T, p * p, [&](std::size_t at) { return gradient[at].C[0]; });
        store(c, T, p, [&](std::size_t at) { return gradient[at].c; });
        store(F, T, n * p, [&](std::size_t at) { return gradient[at].F[0]; });
        store(f, T, n, [&](std::size_t at) { return gradient[at].f; });
        store(x0, 1, n, [&](std::size_t at) { return x_init_bar[at].x; });
    }
};

template <class Real>
static Solver *create(int n, int m, int T, int batch, const Given &given) {
#define SIZE(N, M) \
    if (n == N && m == M) return new Lanes<Real, N, M>(T, batch, given);
    SIZES
#undef SIZE
    return nullptr;
}

extern "C" {
Solver *lanes_create(int bytes, int n, int m, int T, int batch, const Given *given) {
    return bytes == 4 ? create<float>(n, m, T, batch, *given)
                      : create<double>(n, m, T, batch, *given);
}
int lanes_width(int bytes) { return VECTOR_BYTES / bytes; }
void lanes_solve(Solver *solver, int threads) { solver->solve(threads); }
void lanes_solve_and_differentiate(Solver *solver, int threads) {
    solver->solve_and_differentiate(threads);
}
void lanes_read_plan(const Solver *solver, void *z) { solver->read_plan(z); }
void lanes_read_gradient(const Solver *solver, void *C, void *c, void *F, void *f, void *x_init) {
    solver->read_gradient(C, c, F, f, x_init);
}
void lanes_free(Solver *solver) { delete solver; }
}
