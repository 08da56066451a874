/* The kernels of an MoE layer for float32 on a CPU; cpu.py registers them as operators, library.py compiles them.
 *
 * Three parts: what happens to rows between matrix products, each in one pass over memory; gates and balance statistics;
 * and the products themselves where an expert has few rows, as from a single image or with many experts.
 *
 * Matrices are row-major, indices int64. Each function takes a struct of members of 8 bytes, mirrored by cpu.py:
 * pointers, sizes, then `threads`, the number of OpenMP threads. `parts` is room for each thread's own sums. Work is
 * split among threads in a fixed way, or so that the split does not matter: the same number of threads gives the same
 * bits. Without AVX-512 the compiler's generic vectors are used, of any width.
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

typedef struct {
    const float *rows;
    float *total, *parts;
    int64_t n, d, threads;
} column_sums_t;

/* The sum of each column of rows (n, d). */
void column_sums(const column_sums_t *a) {
    int64_t d = a->d;
    int used = 1;
#pragma omp parallel num_threads(a->threads) if (a->n * d >= SERIAL_BELOW)
    {
        int64_t first, last;
        my_part(a->n, &first, &last);
        float *sums = clear_sums(a->parts, 2 * d, d);
#pragma omp single nowait
        used = omp_get_num_threads();
        for (int64_t i = first; i < last; i++) {
            for (int64_t j = 0; j < d; j += LANES)
                store_up_to(sums + j, load_up_to(sums + j, d - j) + load_up_to(a->rows + i * d + j, d - j), d - j);
            if ((i - first) % FLOOR == FLOOR - 1 || i == last - 1) move_up(sums, d);
        }
    }
    add_parts(a->parts + d, used, 2 * d, d, a->total);
}

typedef struct {
    const float *x;
    const int64_t *item;
    float *out;
    int64_t n, m, d, threads;
} gather_t;

/* Row i of `out` (m, d) is row item[i] of x (n, d), or zero where item[i] is n. */
void gather(const gather_t *a) {
    int64_t size = a->d * sizeof(float);
#pragma omp parallel for schedule(static) num_threads(a->threads) if (a->m * a->d >= SERIAL_BELOW)
    for (int64_t i = 0; i < a->m; i++)
        if (a->item[i] < a->n)
            memcpy(a->out + i * a->d, a->x + a->item[i] * a->d, size);
        else
            memset(a->out + i * a->d, 0, size);
}

typedef struct {
    const float *rows;
    const int64_t *row;
    const float *gate;
    float *y;
    int64_t n, k, m, d, stride, threads;
} combine_t;

/* y (n, d): the sum of an item's k rows, each times its gate if there are gates; row m adds nothing. */
void combine(const combine_t *a) {
    int64_t k = a->k, d = a->d;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (a->n * d >= SERIAL_BELOW)
    for (int64_t i = 0; i < a->n; i++)
        for (int64_t j = 0; j < d; j += LANES) {
            vec total = {0};
            for (int64_t c = i * k; c < (i + 1) * k; c++) {
                if (a->row[c] == a->m) continue;
                vec v = load_up_to(a->rows + a->row[c] * a->stride + j, d - j);
                total += a->gate ? a->gate[c] * v : v;
            }
            store_up_to(a->y + i * d + j, total, d - j);
        }
}

typedef struct {
    const float *grad, *rows;
    const int64_t *row;
    const float *gate;
    float *grad_rows, *grad_gate;
    char *written;
    int64_t n, k, m, d, stride, threads;
} combine_backward_t;

/* Gradients with respect to rows and gates. `written` (m), zero at first, tells the rows that belong to no item. */
void combine_backward(const combine_backward_t *a) {
    int64_t k = a->k, d = a->d;
#pragma omp parallel num_threads(a->threads) if (a->n * d >= SERIAL_BELOW)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < a->n; i++)
            for (int64_t c = i * k; c < (i + 1) * k; c++) {
                int64_t r = a->row[c];
                a->grad_gate[c] = 0;
                if (r == a->m) continue;
                const float *from = a->grad + i * d, *other = a->rows + r * a->stride;
                float *to = a->grad_rows + r * d;
                vec dot = {0};
                for (int64_t j = 0; j < d; j += LANES) {
                    vec g = load_up_to(from + j, d - j);
                    dot += g * load_up_to(other + j, d - j);
                    store_up_to(to + j, g * a->gate[c], d - j);
                }
                a->grad_gate[c] = sum(dot);
                a->written[r] = 1;
            }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < a->m; r++)
            if (!a->written[r]) memset(a->grad_rows + r * d, 0, d * sizeof(float));
    }
}

typedef struct {
    const int64_t *expert;
    int64_t *item, *row, *count;
    int64_t m, k, experts, threads;
} sort_t;

/* A counting sort of m assignments, k to an item: the item of each row, the row of each assignment, rows of each expert. */
void sort_by_expert(const sort_t *a) {
    int64_t place[a->experts];
    memset(a->count, 0, a->experts * sizeof(int64_t));
    for (int64_t i = 0; i < a->m; i++) a->count[a->expert[i]]++;
    for (int64_t e = 0, first = 0; e < a->experts; first += a->count[e++]) place[e] = first;
    for (int64_t i = 0; i < a->m; i++) {
        int64_t r = place[a->expert[i]]++;
        a->item[r] = i / a->k;
        a->row[i] = r;
    }
}

INLINE void gelu_row(const float *hidden, const float *bias, float *act, int64_t d, int by_tanh) {
    for (int64_t j = 0; j < d; j += LANES) {
        vec x = load_up_to(hidden + j, d - j) + load_up_to(bias + j, d - j);
        store_up_to(act + j, gelu(x, by_tanh).value, d - j);
    }
}

typedef struct {
    const float *hidden, *bias;
    float *act;
    int64_t n, d, by_tanh, threads;
} bias_gelu_t;

void bias_gelu(const bias_gelu_t *a) {
    int64_t d = a->d;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (a->n * d >= SERIAL_BELOW)
    for (int64_t i = 0; i < a->n; i++) gelu_row(a->hidden + i * d, a->bias, a->act + i * d, d, a->by_tanh);
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

typedef struct {
    const float *hidden, *bias;
    float *grad, *act, *grad_bias, *parts;
    int64_t n, d, by_tanh, threads;
} bias_gelu_backward_t;

void bias_gelu_backward(const bias_gelu_backward_t *a) {
    int64_t n = a->n, d = a->d;
    int used = 1;
#pragma omp parallel num_threads(a->threads) if (n * d >= SERIAL_BELOW)
    {
        int64_t first, last;
        my_part(n, &first, &last);
#pragma omp single nowait
        used = omp_get_num_threads();
        gelu_backward_rows(a->hidden, a->bias, a->grad, a->act, d, clear_sums(a->parts, 2 * d, d), first, last, d,
                           a->by_tanh);
    }
    add_parts(a->parts + d, used, 2 * d, d, a->grad_bias);
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
/* Sums over items come from as many parts as there are blocks, added in their order: the same whatever the threads. */
#define BLOCK (64 * LANES)

int64_t blocks_of(int64_t n) { return (n + BLOCK - 1) / BLOCK; }

typedef struct {
    const float *logits;
    int64_t *chosen;
    float *gates;
    int64_t n, experts, k, threads;
} top_gates_t;

/* The k largest softmax values of each item, in falling order, and whose they are; the first of equal ones first. */
void top_gates(const top_gates_t *a) {
    int64_t n = a->n, experts = a->experts, k = a->k;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (n * experts >= SERIAL_BELOW)
    for (int64_t block = 0; block < (n + LANES - 1) / LANES; block++) {
        int64_t i = block * LANES, rows = n - i < LANES ? n - i : LANES;
        vec value[experts], p[experts];
        ivec taken[experts];
        for (int64_t e = 0; e < experts; e++) value[e] = load_column(a->logits + i * experts + e, experts, rows);
        vec scale = softmax(value, p, experts);
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
                a->chosen[(i + r) * k + c] = best[r];
                a->gates[(i + r) * k + c] = weight[r] * scale[r];
            }
        }
    }
}

typedef struct {
    const float *logits;
    const int64_t *chosen;
    const float *grad_gates;
    float *grad_logits;
    int64_t n, experts, k, threads;
} top_gates_backward_t;

void top_gates_backward(const top_gates_backward_t *a) {
    int64_t n = a->n, experts = a->experts, k = a->k;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (n * experts >= SERIAL_BELOW)
    for (int64_t block = 0; block < (n + LANES - 1) / LANES; block++) {
        int64_t i = block * LANES, rows = n - i < LANES ? n - i : LANES;
        vec value[experts], p[experts], grad[experts], mean = {0};
        for (int64_t e = 0; e < experts; e++) {
            value[e] = load_column(a->logits + i * experts + e, experts, rows);
            grad[e] = (vec){0};
        }
        for (int64_t c = 0; c < k; c++) {
            ivec index;
            vec of_choice;
            for (int r = 0; r < LANES; r++) {
                int64_t from = (i + (r < rows ? r : rows - 1)) * k + c;
                index[r] = (int32_t)a->chosen[from];
                of_choice[r] = a->grad_gates[from];
            }
            for (int64_t e = 0; e < experts; e++) grad[e] += choose(index == (int32_t)e, of_choice, (vec){0});
        }
        vec scale = softmax(value, p, experts);
        for (int64_t e = 0; e < experts; e++) mean += (p[e] *= scale) * grad[e];
        for (int64_t e = 0; e < experts; e++)
            store_column(a->grad_logits + i * experts + e, p[e] * (grad[e] - mean), experts, rows);
    }
}

/* The value of each item's last choice, the K-th largest one: its threshold. */
INLINE vec threshold_of(const float *noisy, const int64_t *chosen, int64_t experts, int64_t k, int64_t rows,
                        ivec *index) {
    vec threshold;
    for (int r = 0; r < LANES; r++) {
        int64_t item = r < rows ? r : rows - 1;
        (*index)[r] = (int32_t)chosen[item * k + k - 1];
        threshold[r] = noisy[item * experts + (*index)[r]];
    }
    return threshold;
}

typedef struct {
    const float *logits, *noisy;
    const int64_t *chosen;
    float *totals, *parts;
    int64_t n, experts, k, threads;
    double noise_std;
} totals_t;

/* Sums over items (2 experts + 1): importance, load (zero without noise: noise_std 0), and the entropies. */
void expert_totals(const totals_t *a) {
    int64_t n = a->n, experts = a->experts, k = a->k, blocks = blocks_of(n), width = 2 * experts + 1;
    float noise_std = a->noise_std;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (n * experts >= SERIAL_BELOW)
    for (int64_t block = 0; block < blocks; block++) {
        vec plain[experts], p[experts], importance[experts], loads[experts], entropy = {0};
        memset(importance, 0, sizeof(importance));
        memset(loads, 0, sizeof(loads));
        int64_t begin = block * BLOCK, end = begin + BLOCK < n ? begin + BLOCK : n;
        for (int64_t i = begin; i < end; i += LANES) {
            int64_t rows = n - i < LANES ? n - i : LANES;
            ivec here, index; /* -1 for a row, 0 past the end */
            for (int r = 0; r < LANES; r++) here[r] = -(r < rows);
            for (int64_t e = 0; e < experts; e++) plain[e] = load_column(a->logits + i * experts + e, experts, rows);
            vec scale = softmax(plain, p, experts), log_total = {0}, top = plain[0], mean = {0}, threshold = {0};
            if (noise_std > 0)
                threshold = threshold_of(a->noisy + i * experts, a->chosen + i * k, experts, k, rows, &index);
            for (int64_t e = 1; e < experts; e++) top = choose(plain[e] > top, plain[e], top);
            for (int64_t e = 0; e < experts; e++) {
                vec share = p[e] * scale;
                importance[e] += choose(here, share, (vec){0});
                mean += share * (plain[e] - top);
                if (noise_std > 0)
                    loads[e] += choose(here, normal((plain[e] - threshold) / noise_std), (vec){0});
            }
            for (int r = 0; r < LANES; r++) log_total[r] = -__builtin_logf(scale[r]);
            entropy += choose(here, log_total - mean, (vec){0});
        }
        float *part = a->parts + block * width;
        for (int64_t e = 0; e < experts; e++) {
            part[e] = sum(importance[e]);
            part[experts + e] = sum(loads[e]);
        }
        part[2 * experts] = sum(entropy);
    }
    add_parts(a->parts, blocks, width, width, a->totals);
}

typedef struct {
    const float *logits, *noisy;
    const int64_t *chosen;
    const float *grad_totals;
    float *grad_logits, *grad_noisy;
    int64_t n, experts, k, threads;
    double noise_std;
} totals_backward_t;

/* Through importance and load; `grad_noisy` (the thresholds' share) only with noise. */
void expert_totals_backward(const totals_backward_t *a) {
    int64_t n = a->n, experts = a->experts, k = a->k;
    float noise_std = a->noise_std;
    const float *grad_importance = a->grad_totals, *grad_load = a->grad_totals + experts;
#pragma omp parallel for schedule(static) num_threads(a->threads) if (n * experts >= SERIAL_BELOW)
    for (int64_t block = 0; block < (n + LANES - 1) / LANES; block++) {
        int64_t i = block * LANES, rows = n - i < LANES ? n - i : LANES;
        vec plain[experts], p[experts], grad[experts], mean = {0};
        for (int64_t e = 0; e < experts; e++) plain[e] = load_column(a->logits + i * experts + e, experts, rows);
        vec scale = softmax(plain, p, experts);
        for (int64_t e = 0; e < experts; e++) mean += (p[e] *= scale) * grad_importance[e];
        for (int64_t e = 0; e < experts; e++) grad[e] = p[e] * (grad_importance[e] - mean);
        if (noise_std > 0) {
            ivec index;
            vec moved = {0};
            vec threshold = threshold_of(a->noisy + i * experts, a->chosen + i * k, experts, k, rows, &index);
            for (int64_t e = 0; e < experts; e++) {
                vec slope = normal_density((plain[e] - threshold) / noise_std) * (grad_load[e] / noise_std);
                grad[e] += slope;
                moved -= slope;
            }
            for (int64_t e = 0; e < experts; e++)
                store_column(a->grad_noisy + i * experts + e, choose(index == (int32_t)e, moved, (vec){0}), experts,
                             rows);
        }
        for (int64_t e = 0; e < experts; e++) store_column(a->grad_logits + i * experts + e, grad[e], experts, rows);
    }
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

/* c (rows, columns) = a^T b for few rows n of a and b, of which b has room for whole tiles. `large`: c is a
 * part of more than caches hold. */
static void few_rows_outer(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                           int64_t n, int64_t rows, int64_t columns, int large) {
    int past_caches = large && n <= OUTER_DEPTH && ((uintptr_t)c | ldc * sizeof(float)) % sizeof(vec) == 0;
    float strip[OUTER_DEPTH * STRIP], edge[TILE_ROWS * TILE_COLUMNS];
    for (int64_t i = 0; i < rows; i += STRIP)
        for (int64_t k = 0; k < n; k += OUTER_DEPTH) {
            int64_t depth = n - k < OUTER_DEPTH ? n - k : OUTER_DEPTH, height = rows - i < STRIP ? rows - i : STRIP;
            for (int64_t r = 0; r < depth; r++)
                memcpy(strip + r * STRIP, a + (k + r) * lda + i, height * sizeof(float));
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
typedef struct {
    const float *x;
    const int64_t *first_row;
    const float *w1, *b1, *w2, *b2;
    float *hidden, *act, *out;
    int64_t experts, d, h, by_tanh, threads;
} few_rows_experts_t;

/* out = GELU(x w1 + b1) w2 + b2 for the rows first_row[e] to first_row[e + 1] of each expert e. `hidden`, x w1, and
 * `act`, which may be the same, have rows of row_stride(h), `out` of row_stride(d). */
void few_rows_experts(const few_rows_experts_t *a) {
    int64_t experts = a->experts, d = a->d, h = a->h, ldh = row_stride(h), ldo = row_stride(d);
    tasks_t over_h = tasks_of(h, experts, a->threads), over_d = tasks_of(d, experts, a->threads);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < over_h.number; i++) {
            task_t t = task_at(over_h, i, h, experts, a->first_row);
            if (!t.n) continue;
            few_rows(a->x + t.row * d, d, a->w1 + t.expert * d * h, h, a->hidden + t.row * ldh, ldh, t.n, d, t.first,
                     t.last);
            for (int64_t at = t.row * ldh + t.first; at < (t.row + t.n) * ldh; at += ldh)
                gelu_row(a->hidden + at, a->b1 + t.expert * h + t.first, a->act + at, t.last - t.first, a->by_tanh);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < over_d.number; i++) {
            task_t t = task_at(over_d, i, d, experts, a->first_row);
            if (!t.n) continue;
            few_rows(a->act + t.row * ldh, ldh, a->w2 + t.expert * h * d, d, a->out + t.row * ldo, ldo, t.n, h,
                     t.first, t.last);
            for (int64_t r = t.row; r < t.row + t.n; r++)
                for (int64_t j = t.first; j < t.last; j++) a->out[r * ldo + j] += a->b2[t.expert * d + j];
        }
    }
}

typedef struct {
    const float *x;
    const int64_t *first_row;
    const float *w1, *b1, *w2, *hidden, *grad;
    float *grad_x, *grad_w1, *grad_b1, *grad_w2, *grad_b2, *grad_rows, *grad_hidden, *act, *parts;
    int64_t experts, d, h, by_tanh, large, threads;
} few_rows_experts_backward_t;

/* `grad` (m, d) is that of the outputs; `grad_rows` is room for it in rows of row_stride(d), `grad_hidden` and `act` are
 * room like `hidden`. What follows from an expert's columns of hidden is computed at once, while they are in cache; its
 * input's gradient, in rows of row_stride(d), needs them all. What is NULL is left out. `large`: the weights' gradients
 * are more than caches hold. */
void few_rows_experts_backward(const few_rows_experts_backward_t *a) {
    int64_t experts = a->experts, d = a->d, h = a->h, ldh = row_stride(h), ldo = row_stride(d);
    int64_t room = 2 * (d > h ? d : h);
    tasks_t over_h = tasks_of(h, experts, a->threads), over_d = tasks_of(d, experts, a->threads);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t e = 0; e < experts; e++) {
            int64_t first = a->first_row[e], last = a->first_row[e + 1];
            if (first == last) continue;
            float *sums = clear_sums(a->parts, room, d);
            for (int64_t i = first; i < last; i++) {
                float *to = a->grad_rows + i * ldo;
                memcpy(to, a->grad + i * d, d * sizeof(float));
                memset(to + d, 0, (ldo - d) * sizeof(float));
                for (int64_t j = 0; j < d; j++) sums[j] += to[j];
                if ((i - first) % FLOOR == FLOOR - 1 || i == last - 1) move_up(sums, d);
            }
            memcpy(a->grad_b2 + e * d, sums + d, d * sizeof(float));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < over_h.number; i++) {
            task_t t = task_at(over_h, i, h, experts, a->first_row);
            if (!t.n) continue;
            int64_t width = t.last - t.first, at = t.row * ldh + t.first, of_h = t.expert * h + t.first;
            const float *dy = a->grad_rows + t.row * ldo;
            float *grad_hidden = a->grad_hidden + t.row * ldh, *sums = clear_sums(a->parts, room, width);
            few_rows_transposed(dy, ldo, a->w2 + t.expert * h * d, d, grad_hidden, ldh, t.n, d, t.first, t.last);
            gelu_backward_rows(a->hidden + at, a->b1 + of_h, a->grad_hidden + at, a->act + at, ldh, sums, 0, t.n,
                               width, a->by_tanh);
            memcpy(a->grad_b1 + of_h, sums + width, width * sizeof(float));
            if (a->grad_w2)
                few_rows_outer(a->act + at, ldh, dy, ldo, a->grad_w2 + of_h * d, d, t.n, width, d, a->large);
            if (a->grad_w1)
                few_rows_outer(a->x + t.row * d, d, a->grad_hidden + at, ldh, a->grad_w1 + t.expert * d * h + t.first,
                               h, t.n, d, width, a->large);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < over_d.number; i++) {
            task_t t = task_at(over_d, i, d, experts, a->first_row);
            if (!t.n || !a->grad_x) continue;
            few_rows_transposed(a->grad_hidden + t.row * ldh, ldh, a->w1 + t.expert * d * h, h,
                                a->grad_x + t.row * ldo, ldo, t.n, h, t.first, t.last);
        }
    }
}
