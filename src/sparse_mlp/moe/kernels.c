/* The kernels of an MoE layer for float32 on a CPU; compiled.py says what each computes, and compiles them.
 *
 * Three parts: what experts do to rows between their matrix products, each in one pass over memory; the router; and the
 * products themselves where an expert has few rows, as from a single image or of many experts.
 *
 * Matrices are row-major, indices int64. `parts` is room for each thread's own sums. Work is cut among OpenMP's
 * threads in a fixed way, or so that the cut does not matter: as many threads give the same bits. Without AVX-512 the
 * compiler's vectors serve, of any width.
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
#define DEPTH 64              /* rows of the weight that a tile reads before it goes on to the next columns */
#define STRIP (8 * TILE_ROWS) /* rows of a weight's gradient that are worked on together */
#define OUTER_DEPTH 128       /* and of the items whose products add up to it */
#define CHUNK 1024            /* columns of the weight that a thread takes at a time, where there are enough for all */
#define SERIAL_BELOW 8192     /* numbers; a second thread takes microseconds to wake */

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

/* For what is not read again soon: memory need not be fetched first. At multiples of a vector's size;
 * `after_past_caches` is called before another thread may read it. */
INLINE void store_past_caches(float *p, vec v) {
#ifdef __AVX512F__
    _mm512_stream_ps(p, (__m512)v);
#else
    store(p, v);
#endif
}
INLINE void after_past_caches(void) {
#ifdef __AVX512F__
    _mm_sfence();
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
    __mmask16 above = _mm512_cmp_ps_mask((__m512)x, (__m512)all(-87.0f), _CMP_NLT_UQ);
    return (vec)_mm512_maskz_scalef_ps(above, (__m512)p, (__m512)n); /* below lie subnormal numbers, which are slow */
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

/* Its derivative; 0 where that is below 4e-27, so that what is multiplied by it does not become subnormal. */
INLINE vec normal_density(vec x) {
    vec s = x * x;
    return choose(s > 120.0f, (vec){0}, 0.3989422804f * exponential(-0.5f * s));
}

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
 * every FLOOR rows a thread moves `low` into `high`, and at the end the threads' are added. A thread has (2, d)
 * of its room. */
#define FLOOR 128

INLINE float *clear_sums(float *parts, int64_t room, int64_t d) {
    float *low = parts + omp_get_thread_num() * room;
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

INLINE void gelu_row(const float *hidden, const float *bias, float *act, int64_t d, int by_tanh) {
    for (int64_t j = 0; j < d; j += LANES) {
        vec x = load_up_to(hidden + j, d - j) + load_up_to(bias + j, d - j);
        store_up_to(act + j, gelu(x, by_tanh).value, d - j);
    }
}

void bias_gelu(const float *hidden, const float *bias, float *act, int64_t n, int64_t d, int by_tanh, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n * d >= SERIAL_BELOW)
    for (int64_t i = 0; i < n; i++) gelu_row(hidden + i * d, bias, act + i * d, d, by_tanh);
}

/* Rows first to last of an expert: `grad`, so far with respect to GELU(hidden + bias), becomes that with respect to
 * hidden, and goes into the sums; GELU is made again, into `act`. d columns of matrices with ld. */
INLINE void gelu_backward_rows(const float *hidden, const float *bias, float *grad, float *act, int64_t ld, float *sums,
                               int64_t first, int64_t last, int64_t d, int by_tanh) {
    for (int64_t i = first; i < last; i++) {
        for (int64_t j = 0; j < d; j += LANES) {
            gelu_t g = gelu(load_up_to(hidden + i * ld + j, d - j) + load_up_to(bias + j, d - j), by_tanh);
            vec slope = g.slope * load_up_to(grad + i * ld + j, d - j);
            store_up_to(grad + i * ld + j, slope, d - j);
            store_up_to(act + i * ld + j, g.value, d - j);
            store_up_to(sums + j, load_up_to(sums + j, d - j) + slope, d - j);
        }
        if ((i - first) % FLOOR == FLOOR - 1 || i == last - 1) move_up(sums, d);
    }
}

void bias_gelu_backward(const float *hidden, const float *bias, float *grad, float *act, float *grad_bias, float *parts,
                        int64_t n, int64_t d, int by_tanh, int threads) {
    int used = 1;
#pragma omp parallel num_threads(threads) if (n * d >= SERIAL_BELOW)
    {
        int64_t first, last;
        my_part(n, &first, &last);
#pragma omp single nowait
        used = omp_get_num_threads();
        gelu_backward_rows(hidden, bias, grad, act, d, clear_sums(parts, 2 * d, d), first, last, d, by_tanh);
    }
    add_parts(parts + d, used, 2 * d, d, grad_bias);
}

/* Rows first to last of an expert, through `y_item += gate (out + bias)`: gradients with respect to `out`, which go
 * into the sums too, and to the gates. */
INLINE void gather_gated_rows(const float *grad, const int64_t *item, const float *gate, const float *out,
                              const float *bias, float *grad_out, int64_t ld, float *grad_gate, float *sums,
                              int64_t first, int64_t last, int64_t d) {
    for (int64_t i = first; i < last; i++) {
        const float *from = grad + item[i] * d, *other = out + i * ld;
        float *to = grad_out + i * ld;
        vec dot = {0};
        for (int64_t j = 0; j < d; j += LANES) {
            vec g = load_up_to(from + j, d - j);
            dot += g * (load_up_to(other + j, d - j) + load_up_to(bias + j, d - j));
            g *= gate[i];
            store_up_to(to + j, g, d - j);
            store_up_to(sums + j, load_up_to(sums + j, d - j) + g, d - j);
        }
        grad_gate[i] = sum(dot);
        if ((i - first) % FLOOR == FLOOR - 1 || i == last - 1) move_up(sums, d);
    }
}

void gather_gated(const float *grad, const int64_t *item, const float *gate, const float *out, const float *bias,
                  float *grad_out, float *grad_gate, float *grad_bias, float *parts, int64_t n, int64_t d,
                  int threads) {
    int used = 1;
#pragma omp parallel num_threads(threads) if (n * d >= SERIAL_BELOW)
    {
        int64_t first, last;
        my_part(n, &first, &last);
#pragma omp single nowait
        used = omp_get_num_threads();
        gather_gated_rows(grad, item, gate, out, bias, grad_out, d, grad_gate, clear_sums(parts, 2 * d, d), first,
                          last, d);
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
            value[e] = noisy ? load_column(noisy + i * experts + e, experts, rows) : plain[e];
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
        if (grad_totals && noisy) {
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
        float *part = clear_sums(parts, 2 * experts * d, experts * d);
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

/* c (m, TILE_COLUMNS) = a (m, depth) b (depth, TILE_COLUMNS), added to what is there unless `fresh`. The number of a in
 * row i, column k is a[i * row + k * column]. Reads ahead `lines` vectors of each row of `next`, a part of a weight
 * that comes after this one, so that memory and arithmetic overlap. */
INLINE void tile(int m, const float *a, int64_t row, int64_t column, const float *b, int64_t ldb, float *c, int64_t ldc,
                 int64_t depth, int fresh, const float *next, int64_t ldn, int lines, int past_caches) {
    vec total[TILE_ROWS][TILE_VECTORS];
    for (int i = 0; i < m; i++)
        for (int v = 0; v < TILE_VECTORS; v++) total[i][v] = fresh ? (vec){0} : load(c + i * ldc + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
        vec of_b[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; v++) of_b[v] = load(b + k * ldb + v * LANES);
        for (int v = 0; v < lines; v++) __builtin_prefetch(next + k * ldn + v * LANES, 0, 2);
        for (int i = 0; i < m; i++)
            for (int v = 0; v < TILE_VECTORS; v++) total[i][v] += of_b[v] * a[i * row + k * column];
    }
    for (int i = 0; i < m; i++)
        for (int v = 0; v < TILE_VECTORS; v++)
            if (past_caches)
                store_past_caches(c + i * ldc + v * LANES, total[i][v]);
            else
                store(c + i * ldc + v * LANES, total[i][v]);
}

INLINE void tile_of(int64_t m, const float *a, int64_t row, int64_t column, const float *b, int64_t ldb, float *c,
                    int64_t ldc, int64_t depth, int fresh, const float *next, int64_t ldn, int lines, int past_caches) {
    switch (m) {
    case 1: tile(1, a, row, column, b, ldb, c, ldc, depth, fresh, next, ldn, lines, past_caches); break;
    case 2: tile(2, a, row, column, b, ldb, c, ldc, depth, fresh, next, ldn, lines, past_caches); break;
    case 3: tile(3, a, row, column, b, ldb, c, ldc, depth, fresh, next, ldn, lines, past_caches); break;
    case 4: tile(4, a, row, column, b, ldb, c, ldc, depth, fresh, next, ldn, lines, past_caches); break;
    case 5: tile(5, a, row, column, b, ldb, c, ldc, depth, fresh, next, ldn, lines, past_caches); break;
    case 6: tile(6, a, row, column, b, ldb, c, ldc, depth, fresh, next, ldn, lines, past_caches); break;
    }
}

#if LANES == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif LANES == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#ifdef __clang__
#define INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* to (columns, ldt) = from (rows, columns)^T, filled up with zeros to TILE_COLUMNS rows. */
INLINE void copy_transposed(const float *from, int64_t ldf, float *to, int64_t ldt, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < TILE_COLUMNS; i += LANES)
        for (int64_t j = 0; j < columns; j += LANES) {
            vec v[LANES], w[LANES];
            for (int r = 0; r < LANES; r++)
                v[r] = i + r < rows ? load_up_to(from + (i + r) * ldf + j, columns - j) : (vec){0};
            for (int step = 1; step < LANES; step *= 2) { /* interleaving with what is half of all away, log times */
                for (int r = 0; r < LANES / 2; r++) {
                    w[2 * r] = INTERLEAVE(v[r], v[r + LANES / 2], LOW);
                    w[2 * r + 1] = INTERLEAVE(v[r], v[r + LANES / 2], HIGH);
                }
                for (int r = 0; r < LANES; r++) v[r] = w[r];
            }
            for (int r = 0; r < LANES && j + r < columns; r++) store(to + (j + r) * ldt + i, v[r]);
        }
}

/* c = a (n, depth) b (depth, TILE_COLUMNS), as `tile` says, for all rows; the first few groups of them read ahead. */
INLINE void tiles(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t n,
                  int64_t depth, int fresh, const float *next, int64_t ldn) {
    int64_t groups = (n + TILE_ROWS - 1) / TILE_ROWS, ahead = groups < TILE_VECTORS ? groups : TILE_VECTORS;
    for (int64_t g = 0; g < groups; g++) {
        int64_t i = n * g / groups, m = n * (g + 1) / groups - i;
        int64_t line = TILE_VECTORS * g / ahead, end = TILE_VECTORS * (g + 1) / ahead;
        tile_of(m, a + i * lda, lda, 1, b, ldb, c + i * ldc, ldc, depth, fresh, next + line * LANES, ldn,
                next && g < ahead ? end - line : 0, 0);
    }
}

/* c = a (n, inner) b (inner, columns first to last), for few rows n: b is read once, in the order it lies in memory.
 * c has room for whole tiles, and zeros where b has no column. */
static void few_rows(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t n,
                     int64_t inner, int64_t first, int64_t last) {
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
            tiles(a + k, lda, from, stride, c + j, ldc, n, depth, k == 0, next, ldb);
        }
    }
}

/* The same for a b that lies transposed, (columns, inner). */
static void few_rows_transposed(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                                int64_t n, int64_t inner, int64_t first, int64_t last) {
    float copy[DEPTH * TILE_COLUMNS];
    for (int64_t j = first; j < last; j += TILE_COLUMNS)
        for (int64_t k = 0; k < inner; k += DEPTH) {
            int64_t depth = inner - k < DEPTH ? inner - k : DEPTH;
            const float *from = b + j * ldb + k, *next = NULL;
            if (k + 2 * DEPTH <= inner)
                next = from + DEPTH;
            else if (j + 2 * TILE_COLUMNS <= last)
                next = b + (j + TILE_COLUMNS) * ldb;
            copy_transposed(from, ldb, copy, TILE_COLUMNS, last - j, depth);
            tiles(a + k, lda, copy, TILE_COLUMNS, c + j, ldc, n, depth, k == 0, next, ldb);
        }
}

/* c (rows, columns) = a^T b for few rows n of a and b, of which b has room for whole tiles; row i of a is item[i], if
 * that is given. `large`: c is a part of more than caches hold. */
static void few_rows_outer(const float *a, const int64_t *item, int64_t lda, const float *b, int64_t ldb, float *c,
                           int64_t ldc, int64_t n, int64_t rows, int64_t columns, int large) {
    int past_caches = large && n <= OUTER_DEPTH && ((uintptr_t)c | ldc * sizeof(float)) % sizeof(vec) == 0;
    float strip[OUTER_DEPTH * STRIP], edge[TILE_ROWS * TILE_COLUMNS];
    for (int64_t i = 0; i < rows; i += STRIP)
        for (int64_t k = 0; k < n; k += OUTER_DEPTH) {
            int64_t depth = n - k < OUTER_DEPTH ? n - k : OUTER_DEPTH, height = rows - i < STRIP ? rows - i : STRIP;
            for (int64_t r = 0; r < depth; r++)
                memcpy(strip + r * STRIP, a + (item ? item[k + r] : k + r) * lda + i, height * sizeof(float));
            for (int64_t j = 0; j < columns; j += TILE_COLUMNS)
                for (int64_t r = 0; r < height; r += TILE_ROWS) {
                    int64_t m = height - r < TILE_ROWS ? height - r : TILE_ROWS, width = columns - j;
                    float *to = c + (i + r) * ldc + j;
                    int whole = width >= TILE_COLUMNS;
                    if (!whole && k)
                        for (int64_t q = 0; q < m; q++)
                            memcpy(edge + q * TILE_COLUMNS, to + q * ldc, width * sizeof(float));
                    tile_of(m, strip + r, 1, STRIP, b + k * ldb + j, ldb, whole ? to : edge,
                            whole ? ldc : TILE_COLUMNS, depth, k == 0, NULL, 0, 0, whole && past_caches);
                    if (!whole)
                        for (int64_t q = 0; q < m; q++)
                            memcpy(to + q * ldc, edge + q * TILE_COLUMNS, width * sizeof(float));
                }
        }
    after_past_caches();
}

/* From row to row of what products of few rows write: whole tiles, and a vector more, lest the rows of a tile fall into
 * the same few sets of a cache. */
int64_t row_stride(int64_t columns) { return (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS + LANES; }

/* The products of all experts are cut into tasks, columns first to last of an expert with its n rows from `row` on. */
typedef struct {
    int64_t chunk, number;
} tasks_t;
typedef struct {
    int64_t expert, row, n, first, last;
} task_t;

/* Columns that a thread takes at a time: whole tiles, and about two tasks for each thread. */
static tasks_t tasks_of(int64_t columns, int64_t experts, int threads) {
    int64_t chunk = CHUNK;
    while (chunk >= 2 * TILE_COLUMNS && experts * ((columns + chunk - 1) / chunk) < 2 * threads) chunk /= 2;
    return (tasks_t){chunk, experts * ((columns + chunk - 1) / chunk)};
}

INLINE task_t task_at(tasks_t tasks, int64_t index, int64_t columns, int64_t experts, const int64_t *first_row) {
    int64_t per_expert = tasks.number / experts, e = index / per_expert, first = index % per_expert * tasks.chunk;
    int64_t last = first + tasks.chunk < columns ? first + tasks.chunk : columns;
    return (task_t){e, first_row[e], first_row[e + 1] - first_row[e], first, last};
}

void few_rows_experts(const float *x, const int64_t *item, const int64_t *first_row, const float *w1, const float *b1,
                      const float *w2, float *x_rows, float *hidden, float *act, float *out, int64_t experts, int64_t d,
                      int64_t h, int by_tanh, int threads) {
    int64_t ldh = row_stride(h), ldo = row_stride(d);
    tasks_t over_h = tasks_of(h, experts, threads), over_d = tasks_of(d, experts, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < first_row[experts]; i++) memcpy(x_rows + i * d, x + item[i] * d, d * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < over_h.number; i++) {
            task_t t = task_at(over_h, i, h, experts, first_row);
            if (!t.n) continue;
            few_rows(x_rows + t.row * d, d, w1 + t.expert * d * h, h, hidden + t.row * ldh, ldh, t.n, d, t.first,
                     t.last);
            for (int64_t at = t.row * ldh + t.first; at < (t.row + t.n) * ldh; at += ldh)
                gelu_row(hidden + at, b1 + t.expert * h + t.first, act + at, t.last - t.first, by_tanh);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < over_d.number; i++) {
            task_t t = task_at(over_d, i, d, experts, first_row);
            if (!t.n) continue;
            few_rows(act + t.row * ldh, ldh, w2 + t.expert * h * d, d, out + t.row * ldo, ldo, t.n, h, t.first, t.last);
        }
    }
}

/* `grad` is that of the gated sums; `grad_rows`, `grad_hidden` and `act` are room. What comes of an expert's columns of
 * hidden is done at once, while they are in cache; its input's gradient needs them all. `grad_x` may be `out`.
 * `large`: the weights' gradients are more than caches hold. */
void few_rows_experts_backward(const float *x, const float *grad, const int64_t *item, const int64_t *first_row,
                               const float *gate, const float *w1, const float *b1, const float *w2, const float *b2,
                               const float *hidden, const float *out, float *grad_gate, float *grad_x, float *grad_w1,
                               float *grad_b1, float *grad_w2, float *grad_b2, float *grad_rows, float *grad_hidden,
                               float *act, float *parts, int64_t experts, int64_t d, int64_t h, int by_tanh,
                               int large, int threads) {
    int64_t ldh = row_stride(h), ldo = row_stride(d), room = 2 * (d > h ? d : h);
    tasks_t over_h = tasks_of(h, experts, threads), over_d = tasks_of(d, experts, threads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < experts; e++) {
            if (first_row[e] == first_row[e + 1]) continue;
            float *sums = clear_sums(parts, room, d);
            gather_gated_rows(grad, item, gate, out, b2 + e * d, grad_rows, ldo, grad_gate, sums, first_row[e],
                              first_row[e + 1], d);
            memcpy(grad_b2 + e * d, sums + d, d * sizeof(float));
            for (int64_t i = first_row[e]; i < first_row[e + 1]; i++)
                memset(grad_rows + i * ldo + d, 0, (ldo - d) * sizeof(float));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < over_h.number; i++) {
            task_t t = task_at(over_h, i, h, experts, first_row);
            if (!t.n) continue;
            int64_t width = t.last - t.first, at = t.row * ldh + t.first, of_h = t.expert * h + t.first;
            const float *dy = grad_rows + t.row * ldo;
            few_rows_transposed(dy, ldo, w2 + t.expert * h * d, d, grad_hidden + t.row * ldh, ldh, t.n, d, t.first,
                                t.last);
            float *sums = clear_sums(parts, room, width);
            gelu_backward_rows(hidden + at, b1 + of_h, grad_hidden + at, act + at, ldh, sums, 0, t.n, width, by_tanh);
            memcpy(grad_b1 + of_h, sums + width, width * sizeof(float));
            if (grad_w2) few_rows_outer(act + at, NULL, ldh, dy, ldo, grad_w2 + of_h * d, d, t.n, width, d, large);
            if (grad_w1)
                few_rows_outer(x, item + t.row, d, grad_hidden + at, ldh, grad_w1 + t.expert * d * h + t.first, h,
                               t.n, d, width, large);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < over_d.number; i++) {
            task_t t = task_at(over_d, i, d, experts, first_row);
            if (!t.n || !grad_x) continue;
            few_rows_transposed(grad_hidden + t.row * ldh, ldh, w1 + t.expert * d * h, h, grad_x + t.row * ldo, ldo,
                                t.n, h, t.first, t.last);
        }
    }
}
