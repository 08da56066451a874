/* The kernels of an MoE layer for float32 on a CPU; compiled.py says what each computes, and compiles them.
 *
 * Three parts: what experts do to rows between their matrix products, each in one pass over memory; the router; and the
 * products themselves where an expert has few rows, as from a single image.
 *
 * Matrices are row-major, indices int64. `parts` is room for each thread's own
 * sums. Work is cut among OpenMP's threads in a fixed way, or so that the cut does not matter: as many threads give the
 * same bits. Without AVX-512 the compiler's vectors serve, of any width.
 */

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

#if defined(__AVX512F__)
#define LANES 16
#define TILE_VECTORS 4 /* a tile of 6 rows by 4 vectors takes 24 of 32 registers */
#elif defined(__AVX__)
#define LANES 8
#define TILE_VECTORS 2 /* 12 of 16 */
#else
#define LANES 4
#define TILE_VECTORS 4
#endif
#define TILE_ROWS 6
#define TILE_COLUMNS (TILE_VECTORS * LANES)
#define DEPTH 64           /* rows of the weight that a tile reads before it goes on to the next columns */
#define CHUNK 1024         /* columns of the weight that a thread takes at a time, where there are enough for all */
#define SERIAL_BELOW 8192  /* numbers; a second thread takes microseconds to wake */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float vec_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

#define INLINE static inline __attribute__((always_inline))

INLINE vec load(const float *p) { return *(const vec_unaligned *)p; }
INLINE void store(float *p, vec v) { *(vec_unaligned *)p = v; }
INLINE vec all(float value) { return value - (vec){0}; }
INLINE vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* The first n of a vector's numbers, the others zero. */
INLINE vec load_some(const float *p, int64_t n) {
#ifdef __AVX512F__
    return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#else
    vec v = {0};
    memcpy(&v, p, n * sizeof(float));
    return v;
#endif
}
INLINE void store_some(float *p, vec v, int64_t n) {
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    memcpy(p, &v, n * sizeof(float));
#endif
}

INLINE float sum(vec v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}
INLINE vec load_up_to(const float *p, int64_t n) { return n >= LANES ? load(p) : load_some(p, n); }
INLINE void store_up_to(float *p, vec v, int64_t n) {
    if (n >= LANES)
        store(p, v);
    else
        store_some(p, v, n);
}

/* exp(x) to 2 units in the last place; 0 below -87, infinite above 88, NaN for NaN. */
INLINE vec exponential(vec x) {
#ifdef __AVX512F__
    vec n = (vec)_mm512_roundscale_ps((__m512)(x * 1.44269504f), 0);
#else
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    vec shifted = x * 1.44269504f + round;
    vec n = shifted - round;
#endif
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = 1.3981999507e-3f + 1.9875691500e-4f * r;
    p = 8.3334519073e-3f + p * r;
    p = 4.1665795894e-2f + p * r;
    p = 1.6666665459e-1f + p * r;
    p = 5.0000001201e-1f + p * r;
    p = p * r * r + r + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    p = (vec)((ivec)p + (((ivec)shifted - (ivec)all(round)) << 23));
    return choose(x < -87.0f, (vec){0}, choose(x > 88.0f, all(__builtin_inff()), p));
#endif
}

/* 1 / x for 1 <= x < inf. */
INLINE vec reciprocal(vec x) {
#ifdef __AVX512F__
    vec r = (vec)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r); /* a division takes as long as all the rest of GELU */
#else
    return 1.0f / x;
#endif
}

/* The lesser and the greater of x and a bound; NaN stays NaN. */
INLINE vec at_most(vec x, float bound) {
#ifdef __AVX512F__
    return (vec)_mm512_min_ps((__m512)all(bound), (__m512)x);
#else
    return choose(x > bound, all(bound), x);
#endif
}
INLINE vec at_least(vec x, float bound) {
#ifdef __AVX512F__
    return (vec)_mm512_max_ps((__m512)all(bound), (__m512)x);
#else
    return choose(x < bound, all(bound), x);
#endif
}

/* P(X < x) of a normal variable, to 1e-7: a minimax fit of (P - 1/2) / x by a quotient of polynomials in x^2 up to 5.4,
 * beyond which float32 knows only 0 and 1. */
INLINE vec normal(vec any) {
    vec x = at_least(at_most(any, 5.4f), -5.4f);
    vec s = x * x;
    vec p = 3.7297514e-4f + 6.7603170e-6f * s;
    p = 5.9055592e-3f + p * s;
    p = 5.4889198e-2f + p * s;
    p = 3.9894172e-1f + p * s;
    vec q = 1.3383178e-4f + 5.6320419e-7f * s;
    q = 3.0459476e-3f + q * s;
    q = 4.0526844e-2f + q * s;
    q = 3.0424445e-1f + q * s;
    q = 1.0f + q * s;
    return choose(any < -5.4f, (vec){0}, 0.5f + x * p * reciprocal(q));
}

/* Its derivative. */
INLINE vec normal_density(vec x) { return 0.3989422804f * exponential(-0.5f * at_most(x * x, 200.0f)); }

typedef struct {
    vec value, slope;
} gelu_t;

/* GELU and its derivative: by the normal distribution, or by tanh. */
INLINE gelu_t gelu(vec x, int by_tanh) {
    if (by_tanh) {
        const float k = 0.7978845608f, c = 0.044715f;
        vec square = x * x;
        vec s = 1.0f / (1.0f + exponential(-2.0f * k * x * (1.0f + c * square)));
        return (gelu_t){x * s, s + 2.0f * k * x * s * (1.0f - s) * (1.0f + 3.0f * c * square)};
    }
    vec below = normal(x);
    return (gelu_t){x * below, below + x * normal_density(x)};
}

/* The part of n things that this thread works on. */
INLINE void my_part(int64_t n, int64_t *first, int64_t *last) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *first = n * thread / threads;
    *last = n * (thread + 1) / threads;
}

/* ---- What experts do to rows ---- */

/* Sums over rows, one for each of d columns, go through two floors, for float32 loses what is small beside a long sum:
 * every FLOOR rows a thread moves `low` into `high`, and at the end the threads' are added. A thread's room is (2, d). */
#define FLOOR 128

INLINE float *clear_sums(float *parts, int64_t d) {
    float *low = parts + omp_get_thread_num() * 2 * d;
    memset(low, 0, 2 * d * sizeof(float));
    return low;
}

INLINE void move_up(float *low, int64_t d) {
    for (int64_t j = 0; j < d; j++) low[d + j] += low[j];
    memset(low, 0, d * sizeof(float));
}

static void add_parts(const float *parts, int64_t number, int64_t stride, int64_t d, float *total) {
    for (int64_t j = 0; j < d; j++) {
        float t = 0;
        for (int64_t i = 0; i < number; i++) t += parts[i * stride + j];
        total[j] = t;
    }
}

void gather(const float *x, const int64_t *item, float *out, int64_t n, int64_t d, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n * d >= SERIAL_BELOW)
    for (int64_t i = 0; i < n; i++) memcpy(out + i * d, x + item[i] * d, d * sizeof(float));
}

void combine(const float *rows, const int64_t *row, const float *gate, const int64_t *expert, const float *bias,
             float *y, int64_t n, int64_t k, int64_t d, int64_t stride, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n * d >= SERIAL_BELOW)
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < d; j += LANES) {
            vec total = {0};
            for (int64_t c = 0; c < k; c++) {
                vec v = load_up_to(rows + row[i * k + c] * stride + j, d - j);
                if (gate) v = gate[i * k + c] * (v + load_up_to(bias + expert[i * k + c] * d + j, d - j));
                total += v;
            }
            store_up_to(y + i * d + j, total, d - j);
        }
    }
}

void bias_gelu(const float *hidden, const float *bias, float *act, int64_t n, int64_t d, int by_tanh, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n * d >= SERIAL_BELOW)
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < d; j += LANES) {
            vec x = load_up_to(hidden + i * d + j, d - j) + load_up_to(bias + j, d - j);
            store_up_to(act + i * d + j, gelu(x, by_tanh).value, d - j);
        }
    }
}

void bias_gelu_backward(const float *hidden, const float *bias, float *grad, float *act, float *grad_bias, float *parts,
                        int64_t n, int64_t d, int by_tanh, int threads) {
    int used = 1;
#pragma omp parallel num_threads(threads) if (n * d >= SERIAL_BELOW)
    {
        int64_t first, last;
        my_part(n, &first, &last);
        float *part = clear_sums(parts, d);
#pragma omp single nowait
        used = omp_get_num_threads();
        for (int64_t i = first; i < last; i++) {
            for (int64_t j = 0; j < d; j += LANES) {
                gelu_t g = gelu(load_up_to(hidden + i * d + j, d - j) + load_up_to(bias + j, d - j), by_tanh);
                vec slope = g.slope * load_up_to(grad + i * d + j, d - j);
                store_up_to(grad + i * d + j, slope, d - j);
                store_up_to(act + i * d + j, g.value, d - j);
                store_up_to(part + j, load_up_to(part + j, d - j) + slope, d - j);
            }
            if ((i - first) % FLOOR == FLOOR - 1 || i == last - 1) move_up(part, d);
        }
    }
    add_parts(parts + d, used, 2 * d, d, grad_bias);
}

void gather_gated(const float *grad, const int64_t *item, const float *gate, const float *out, const float *bias,
                  float *grad_out, float *grad_gate, float *grad_bias, float *parts, int64_t n, int64_t d,
                  int threads) {
    int used = 1;
#pragma omp parallel num_threads(threads) if (n * d >= SERIAL_BELOW)
    {
        int64_t first, last;
        my_part(n, &first, &last);
        float *part = clear_sums(parts, d);
#pragma omp single nowait
        used = omp_get_num_threads();
        for (int64_t i = first; i < last; i++) {
            const float *from = grad + item[i] * d, *other = out + i * d;
            float *to = grad_out + i * d;
            vec dot = {0};
            for (int64_t j = 0; j < d; j += LANES) {
                vec g = load_up_to(from + j, d - j);
                dot += g * (load_up_to(other + j, d - j) + load_up_to(bias + j, d - j));
                g *= gate[i];
                store_up_to(to + j, g, d - j);
                store_up_to(part + j, load_up_to(part + j, d - j) + g, d - j);
            }
            grad_gate[i] = sum(dot);
            if ((i - first) % FLOOR == FLOOR - 1 || i == last - 1) move_up(part, d);
        }
    }
    add_parts(parts + d, used, 2 * d, d, grad_bias);
}

/* ---- The router: LANES items side by side, for a row of logits is short ---- */

/* Column e of the next LANES rows of a (n, experts) matrix, rows past its end as row n - 1; and back. */
INLINE vec load_column(const float *p, int64_t experts, int64_t rows) {
    vec v;
    for (int i = 0; i < LANES; i++) v[i] = p[(i < rows ? i : rows - 1) * experts];
    return v;
}
INLINE void store_column(float *p, vec v, int64_t experts, int64_t rows) {
    for (int i = 0; i < LANES && i < rows; i++) p[i * experts] = v[i];
}

/* exp(value - max) into `out`, and one over their sum. */
INLINE vec softmax(const vec *value, vec *out, int64_t experts) {
    vec top = value[0], total = {0};
    for (int64_t e = 1; e < experts; e++) top = choose(value[e] > top, value[e], top);
    for (int64_t e = 0; e < experts; e++) total += out[e] = exponential(value[e] - top);
    return 1.0f / total;
}

#define PATCH 4 /* rows and experts that are worked on together: each number loaded is used that often */

/* logits (n, experts) = x (n, d) w^T. */
static void scores(const float *x, const float *w, float *logits, int64_t n, int64_t experts, int64_t d) {
    for (int64_t i = 0; i < n; i += PATCH)
        for (int64_t e = 0; e < experts; e += PATCH) {
            const float *row[PATCH], *of_expert[PATCH];
            for (int r = 0; r < PATCH; r++) { /* past the end as the last one, not stored */
                row[r] = x + (i + r < n ? i + r : n - 1) * d;
                of_expert[r] = w + (e + r < experts ? e + r : experts - 1) * d;
            }
            vec total[PATCH][PATCH] = {0};
            for (int64_t j = 0; j < d; j += LANES)
                for (int r = 0; r < PATCH; r++) {
                    vec v = load_up_to(row[r] + j, d - j);
                    for (int c = 0; c < PATCH; c++) total[r][c] += v * load_up_to(of_expert[c] + j, d - j);
                }
            for (int r = 0; r < PATCH && i + r < n; r++)
                for (int c = 0; c < PATCH && e + c < experts; c++) logits[(i + r) * experts + e + c] = sum(total[r][c]);
        }
}

/* Sums over items come from as many parts as there are blocks, added in their order: the same whatever the threads. */
#define BLOCK (64 * LANES)

int64_t route_blocks(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

void route(const float *x, const float *w, float *logits, const float *noise, float noise_std, float *noisy,
           int64_t *chosen, float *gates, float *totals, float *parts, int64_t n, int64_t d, int64_t experts, int64_t k,
           int threads) {
    int64_t blocks = route_blocks(n), width = 3 * experts + 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (n * (d + experts) >= SERIAL_BELOW)
    for (int64_t block = 0; block < blocks; block++) {
        vec plain[experts], value[experts], p[experts], importance[experts], loads[experts], entropy = {0};
        ivec count[experts];
        memset(importance, 0, sizeof(importance));
        memset(loads, 0, sizeof(loads));
        memset(count, 0, sizeof(count));
        int64_t begin = block * BLOCK, end = begin + BLOCK < n ? begin + BLOCK : n;
        scores(x + begin * d, w, logits + begin * experts, end - begin, experts, d);
        for (int64_t i = begin; i < end; i += LANES) {
            int64_t rows = n - i < LANES ? n - i : LANES;
            ivec here; /* -1 for a row, 0 past the end */
            for (int r = 0; r < LANES; r++) here[r] = -(r < rows);
            for (int64_t e = 0; e < experts; e++) {
                plain[e] = value[e] = load_column(logits + i * experts + e, experts, rows);
                if (noise) {
                    value[e] += noise_std * load_column(noise + i * experts + e, experts, rows);
                    store_column(noisy + i * experts + e, value[e], experts, rows);
                }
            }
            vec scale = softmax(value, p, experts), threshold = {0};
            ivec taken[experts];
            memset(taken, 0, sizeof(taken));
            for (int64_t c = 0; c < k; c++) {
                ivec best = ~(ivec){0}; /* -1: none yet */
                vec top = {0}, weight = {0};
                for (int64_t e = 0; e < experts; e++) {
                    ivec better = ~taken[e] & ((best < 0) | (value[e] > top));
                    top = choose(better, value[e], top);
                    weight = choose(better, p[e], weight);
                    best = (better & (int32_t)e) | (~better & best);
                }
                for (int64_t e = 0; e < experts; e++) taken[e] |= best == (int32_t)e;
                for (int r = 0; r < rows; r++) {
                    chosen[(i + r) * k + c] = best[r];
                    gates[(i + r) * k + c] = weight[r] * scale[r];
                }
                threshold = top;
            }
            if (!totals) continue;
            scale = softmax(plain, p, experts);
            vec log_total = {0}, top = plain[0], mean = {0};
            for (int64_t e = 1; e < experts; e++) top = choose(plain[e] > top, plain[e], top);
            for (int64_t e = 0; e < experts; e++) {
                vec share = p[e] * scale;
                importance[e] += choose(here, share, (vec){0});
                mean += share * (plain[e] - top);
                count[e] -= here & taken[e];
                if (noise) loads[e] += choose(here, normal((plain[e] - threshold) / noise_std), (vec){0});
            }
            for (int r = 0; r < LANES; r++) log_total[r] = -__builtin_logf(scale[r]);
            entropy += choose(here, log_total - mean, (vec){0});
        }
        if (!totals) continue;
        float *part = parts + block * width;
        for (int64_t e = 0; e < experts; e++) {
            part[e] = sum(importance[e]);
            part[experts + e] = sum(loads[e]);
            part[2 * experts + e] = sum(__builtin_convertvector(count[e], vec));
        }
        part[3 * experts] = sum(entropy);
    }
    if (totals) add_parts(parts, blocks, width, width, totals);
}

void route_backward(const float *logits, const float *noisy, float noise_std, const int64_t *chosen,
                    const float *grad_gates, const float *grad_totals, float *grad_logits, int64_t n, int64_t experts,
                    int64_t k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n * experts >= SERIAL_BELOW)
    for (int64_t block = 0; block < (n + LANES - 1) / LANES; block++) {
        int64_t i = block * LANES, rows = n - i < LANES ? n - i : LANES;
        vec plain[experts], value[experts], p[experts], grad[experts];
        ivec index[k];
        vec of_choice[k];
        for (int64_t e = 0; e < experts; e++) {
            plain[e] = load_column(logits + i * experts + e, experts, rows);
            value[e] = noisy == logits ? plain[e] : load_column(noisy + i * experts + e, experts, rows);
            grad[e] = (vec){0};
        }
        for (int64_t c = 0; c < k; c++)
            for (int r = 0; r < LANES; r++) {
                int64_t from = (i + (r < rows ? r : rows - 1)) * k + c;
                index[c][r] = (int32_t)chosen[from];
                of_choice[c][r] = grad_gates ? grad_gates[from] : 0;
            }
        if (grad_gates) {
            vec scale = softmax(value, p, experts), mean = {0};
            for (int64_t e = 0; e < experts; e++) {
                p[e] *= scale;
                for (int64_t c = 0; c < k; c++) grad[e] += choose(index[c] == (int32_t)e, of_choice[c], (vec){0});
                mean += p[e] * grad[e];
            }
            for (int64_t e = 0; e < experts; e++) grad[e] = p[e] * (grad[e] - mean);
        }
        if (grad_totals) {
            vec scale = softmax(plain, p, experts), mean = {0};
            for (int64_t e = 0; e < experts; e++) mean += (p[e] *= scale) * grad_totals[e];
            for (int64_t e = 0; e < experts; e++) grad[e] += p[e] * (grad_totals[e] - mean);
        }
        if (grad_totals && noisy != logits) {
            const float *grad_load = grad_totals + experts;
            vec threshold = {0}, moved = {0};
            for (int64_t e = 0; e < experts; e++)
                threshold = choose(index[k - 1] == (int32_t)e, value[e], threshold);
            for (int64_t e = 0; e < experts; e++) {
                vec slope = normal_density((plain[e] - threshold) / noise_std) * (grad_load[e] / noise_std);
                grad[e] += slope;
                moved += slope;
            }
            for (int64_t e = 0; e < experts; e++)
                grad[e] -= choose(index[k - 1] == (int32_t)e, moved, (vec){0});
        }
        for (int64_t e = 0; e < experts; e++) store_column(grad_logits + i * experts + e, grad[e], experts, rows);
    }
}

void scores_backward(const float *x, const float *w, const float *grad_logits, float *grad_x, float *grad_w,
                     float *parts, int64_t n, int64_t experts, int64_t d, int threads) {
    int used = 1;
#pragma omp parallel num_threads(threads) if (n * d >= SERIAL_BELOW)
    {
        int64_t first, last;
        my_part(n, &first, &last);
        float *part = clear_sums(parts, experts * d);
#pragma omp single nowait
        used = omp_get_num_threads();
        for (int64_t i = first; i < last; i += PATCH) {
            int64_t rows = last - i < PATCH ? last - i : PATCH;
            float g[PATCH][experts];
            for (int r = 0; r < PATCH; r++)
                for (int64_t e = 0; e < experts; e++) g[r][e] = r < rows ? grad_logits[(i + r) * experts + e] : 0;
            for (int64_t j = 0; j < d; j += LANES) {
                vec v[PATCH], gv[PATCH];
                for (int r = 0; r < PATCH; r++) {
                    v[r] = r < rows ? load_up_to(x + (i + r) * d + j, d - j) : (vec){0};
                    gv[r] = r < rows && grad_x ? load_up_to(grad_x + (i + r) * d + j, d - j) : (vec){0};
                }
                for (int64_t e = 0; e < experts; e++) {
                    vec we = load_up_to(w + e * d + j, d - j), total = load_up_to(part + e * d + j, d - j);
                    for (int r = 0; r < PATCH; r++) {
                        gv[r] += we * g[r][e];
                        total += v[r] * g[r][e];
                    }
                    store_up_to(part + e * d + j, total, d - j);
                }
                for (int r = 0; r < rows && grad_x; r++) store_up_to(grad_x + (i + r) * d + j, gv[r], d - j);
            }
            if ((i - first) % FLOOR == FLOOR - PATCH || i + PATCH >= last) move_up(part, experts * d);
        }
    }
    add_parts(parts + experts * d, used, 2 * experts * d, experts * d, grad_w);
}

void sort_by_expert(const int64_t *expert, int64_t *order, int64_t *count, int64_t m, int64_t experts, int threads) {
    (void)threads; /* microseconds */
    int64_t place[experts];
    memset(count, 0, experts * sizeof(int64_t));
    for (int64_t i = 0; i < m; i++) count[expert[i]]++;
    for (int64_t e = 0, first = 0; e < experts; first += count[e++]) place[e] = first;
    for (int64_t i = 0; i < m; i++) order[place[expert[i]]++] = i;
}

/* ---- Products of few rows ---- */

/* c (m, TILE_COLUMNS) = a (m, depth) b (depth, TILE_COLUMNS), added to what is there unless `fresh`. Reads ahead to
 * `next`, the part of b that comes after this one, so that memory and arithmetic overlap. */
INLINE void tile(int m, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t depth,
                 int fresh, const float *next) {
    vec total[TILE_ROWS][TILE_VECTORS];
    for (int i = 0; i < m; i++)
        for (int v = 0; v < TILE_VECTORS; v++) total[i][v] = fresh ? (vec){0} : load(c + i * ldc + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
        vec column[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) {
            column[v] = load(b + k * ldb + v * LANES);
            if (next) __builtin_prefetch(next + k * ldb + v * LANES, 0, 2);
        }
        for (int i = 0; i < m; i++)
            for (int v = 0; v < TILE_VECTORS; v++) total[i][v] += column[v] * a[i * lda + k];
    }
    for (int i = 0; i < m; i++)
        for (int v = 0; v < TILE_VECTORS; v++) store(c + i * ldc + v * LANES, total[i][v]);
}

static void tile_of(int64_t m, const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                    int64_t depth, int fresh, const float *next) {
    switch (m) {
    case 1: tile(1, a, lda, b, ldb, c, ldc, depth, fresh, next); break;
    case 2: tile(2, a, lda, b, ldb, c, ldc, depth, fresh, next); break;
    case 3: tile(3, a, lda, b, ldb, c, ldc, depth, fresh, next); break;
    case 4: tile(4, a, lda, b, ldb, c, ldc, depth, fresh, next); break;
    case 5: tile(5, a, lda, b, ldb, c, ldc, depth, fresh, next); break;
    case 6: tile(6, a, lda, b, ldb, c, ldc, depth, fresh, next); break;
    }
}

/* c = a (n, inner) b (inner, columns first to last), for few rows n: b is read once, in the order it lies in memory.
 * c has room for whole tiles. */
static void few_rows(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t n,
                     int64_t inner, int64_t first, int64_t last) {
    int64_t groups = (n + TILE_ROWS - 1) / TILE_ROWS;
    float edge[DEPTH * TILE_COLUMNS];
    for (int64_t k = 0; k < inner; k += DEPTH) {
        int64_t depth = inner - k < DEPTH ? inner - k : DEPTH;
        for (int64_t j = first; j < last; j += TILE_COLUMNS) {
            const float *from = b + k * ldb + j, *next = NULL;
            int64_t stride = ldb;
            if (j + TILE_COLUMNS > last) { /* a part of a tile: from a copy filled up with zeros */
                memset(edge, 0, sizeof(edge));
                for (int64_t i = 0; i < depth; i++)
                    memcpy(edge + i * TILE_COLUMNS, from + i * ldb, (last - j) * sizeof(float));
                from = edge, stride = TILE_COLUMNS;
            } else if (j + 2 * TILE_COLUMNS <= last) {
                next = from + TILE_COLUMNS;
            } else if (k + 2 * DEPTH <= inner) {
                next = b + (k + DEPTH) * ldb + first;
            }
            for (int64_t g = 0; g < groups; g++) {
                int64_t i = n * g / groups, m = n * (g + 1) / groups - i;
                tile_of(m, a + i * lda + k, lda, from, stride, c + i * ldc + j, ldc, depth, k == 0, g ? NULL : next);
            }
        }
    }
}

int64_t tile_columns(void) { return TILE_COLUMNS; }

/* Columns that a thread takes at a time: whole tiles, and about two pieces of work for each thread. */
static int64_t chunk_of(int64_t columns, int64_t experts, int threads) {
    int64_t chunk = CHUNK;
    while (chunk >= 2 * TILE_COLUMNS && experts * ((columns + chunk - 1) / chunk) < 2 * threads) chunk /= 2;
    return chunk;
}

void few_rows_experts(const float *x, const int64_t *item, const int64_t *first_row, const float *w1, const float *b1,
                      const float *w2, float *x_rows, float *hidden, float *out, int64_t experts, int64_t d, int64_t h,
                      int by_tanh, int threads) {
    int64_t ldh = (h + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    int64_t ldo = (d + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    int64_t chunk1 = chunk_of(h, experts, threads), chunks1 = (h + chunk1 - 1) / chunk1;
    int64_t chunk2 = chunk_of(d, experts, threads), chunks2 = (d + chunk2 - 1) / chunk2;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < first_row[experts]; i++) memcpy(x_rows + i * d, x + item[i] * d, d * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < experts * chunks1; task++) {
            int64_t e = task / chunks1, first = task % chunks1 * chunk1, last = first + chunk1 < h ? first + chunk1 : h;
            int64_t row = first_row[e], n = first_row[e + 1] - row;
            if (!n) continue;
            few_rows(x_rows + row * d, d, w1 + e * d * h, h, hidden + row * ldh, ldh, n, d, first, last);
            for (int64_t i = row; i < row + n; i++)
                for (int64_t j = first; j < last; j += LANES) {
                    vec bias = load_up_to(b1 + e * h + j, last - j);
                    store(hidden + i * ldh + j, gelu(load(hidden + i * ldh + j) + bias, by_tanh).value);
                }
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < experts * chunks2; task++) {
            int64_t e = task / chunks2, first = task % chunks2 * chunk2, last = first + chunk2 < d ? first + chunk2 : d;
            int64_t row = first_row[e], n = first_row[e + 1] - row;
            if (!n) continue;
            few_rows(hidden + row * ldh, ldh, w2 + e * h * d, d, out + row * ldo, ldo, n, h, first, last);
        }
    }
}
