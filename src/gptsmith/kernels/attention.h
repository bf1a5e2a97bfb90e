/* The model's structures, and attention over keys and values in pages.

   A page holds keys and values of PAGE positions: keys as (D, PAGE), so that a vector holds one
   element of several keys and a score is a chain over D, values as (PAGE, D). D is padded to 16.
   They are floats beside float weights. Else they are bf16, in pairs that the CPU may multiply at
   once: a 32-bit lane has two elements of a key, (D/2, PAGE, 2), or of two values, (PAGE/2, D, 2). */

#include "pack.h"

enum { PAGE = 64, CACHE_BF16 = FORMAT != FLOAT32, STEP = CACHE_BF16 ? 2 : 1 /* of a lane */ };
enum { LAYERNORM, RMSNORM };
enum { GELU, GELU_ERF, RELU2, SWIGLU };

typedef struct {
    const float *weight, *bias; /* bias may be NULL */
} norm;

typedef struct {
    norm attention_norm, mlp_norm;
    const float *q_norm, *k_norm; /* or NULL */
    matrix qkv, proj, up, down;
} block;

typedef struct {
    int64_t n_layer, H, K, D, C, F;
    int64_t norm_kind, mlp, window; /* window 0: none */
    const float *cos, *sin; /* (context, D/2), or NULL without rotation */
    const float *positions; /* (context, C), or NULL */
    float eps;
    const block *blocks;
    norm final_norm;
    matrix embedding;
} model;

typedef struct { /* the tokens of one pass; those of a row are adjacent, at consecutive positions */
    int64_t N;
    const int32_t *ids, *rows, *positions;
    const int32_t *tables; /* (rows, pages_per_row): the page of each PAGE positions */
    int64_t pages_per_row;
    uint8_t *const *pages;  /* each (n_layer, 2, K, PAGE * padded D) floats or bf16 */
    const uint8_t *allowed; /* (N, H or 1, keys), or NULL: causal within the window */
    int64_t allowed_token, allowed_head; /* strides */
    const int32_t *keys; /* with `allowed`: keys of each token's row */
} batch;

INLINE float sum_of_squares(const float *x, int64_t size, float mean) {
    vf total = splat(0);
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vf d = load(x + i) - mean;
        total = fma_(d, d, total);
    }
    float sum = sum_lanes(total);
    for (; i < size; i++) sum += (x[i] - mean) * (x[i] - mean);
    return sum;
}

INLINE int64_t padded_head(const model *m) { return round_up(m->D, 16); }

static uint8_t *head_of_page(const model *m, const batch *b, int64_t row, int64_t page, int64_t layer,
                             int64_t value, int64_t head) {
    uint8_t *keys_and_values = b->pages[b->tables[row * b->pages_per_row + page]];
    return keys_and_values + ((layer * 2 + value) * m->K + head) * PAGE * padded_head(m) * (CACHE_BF16 ? 2 : 4);
}

/* Lanes of keys from slot `at` of element d, or of values from element `at` of slot d. */
INLINE vi load_lanes(const uint8_t *page, int64_t d, int64_t width, int64_t at) {
    return load_int(page + (d / STEP * width + at) * 4);
}

INLINE void put_cached(uint8_t *page, int64_t d, int64_t width, int64_t at, float x) {
    int64_t lane = d / STEP * width + at;
    if (CACHE_BF16) ((uint16_t *)page)[2 * lane + d % 2] = to_bf16(x);
    else ((float *)page)[lane] = x;
}

/* Queries and probabilities are stored as what cached lanes are multiplied by. */
enum { FACTOR = CACHE_BF16 ? sizeof(factor) : sizeof(float) };

INLINE void put_factors(uint8_t *p, int64_t i, vf x) {
    if (CACHE_BF16) store_factors((factor *)p + i, x);
    else store((float *)p + i, x);
}

/* s plus each lane times factor i, or its two elements times factors i and i + 1. */
INLINE vf dot_lanes(vf s, vi lanes, const uint8_t *p, int64_t i) {
    if (CACHE_BF16) return dot_pairs(s, lanes, (const factor *)p + i);
    return fma_((vf)lanes, splat(((const float *)p)[i]), s);
}

/* QK-norm and rotation of one query or key head, in place. */
static void turn(const model *m, const float *weight, int64_t position, float *x) {
    int64_t half = m->D / 2;
    if (weight) {
        float scale = 1.0f / sqrtf(sum_of_squares(x, m->D, 0) / m->D + m->eps);
        for (int64_t i = 0; i < m->D; i++) x[i] = x[i] * scale * weight[i];
    }
    if (!m->cos) return;
    const float *cos = m->cos + position * half, *sin = m->sin + position * half;
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

/* Head `head` of token `i` among H queries, K keys and K values: turned, and stored in its page. */
static void place(const model *m, const batch *b, int64_t layer, int64_t i, int64_t head, float *x) {
    int64_t position = b->positions[i], slot = position % PAGE, value = head >= m->H + m->K;
    if (!value) turn(m, head < m->H ? m->blocks[layer].q_norm : m->blocks[layer].k_norm, position, x);
    if (head < m->H) {
        /* in place: a factor is no wider than a float. A key of odd size ends with an element 0. */
        float scale = 1.0f / sqrtf((float)m->D);
        int64_t d = 0;
        for (; d + LANES <= m->D; d += LANES) put_factors((uint8_t *)x, d, load(x + d) * scale);
        if (d < m->D) {
            float rest[LANES] = {0};
            memcpy(rest, x + d, (m->D - d) * sizeof(float));
            uint8_t factors[LANES * FACTOR];
            put_factors(factors, 0, load(rest) * scale);
            memcpy((uint8_t *)x + d * FACTOR, factors, round_up(m->D - d, FACTOR == 2 ? 2 : 1) * FACTOR);
        }
        return;
    }
    uint8_t *page = head_of_page(m, b, b->rows[i], position / PAGE, layer, value, (head - m->H) % m->K);
    for (int64_t d = 0; d < m->D; d++)
        if (value) put_cached(page, slot, padded_head(m), d, x[d]);
        else put_cached(page, d, PAGE, slot, x[d]);
}

/* sum[q][c] += the values of the slots before `used`, C vectors from element d, times p[q]. */
INLINE void add_values(int Q, int C, const uint8_t *v, int64_t width, int64_t d, const uint8_t *const *p,
                       int64_t used, vf sum[4][4]) {
    vi lanes[4];
    int64_t j = 0;
    for (; j + STEP <= used; j += STEP) {
        UNROLL for (int c = 0; c < C; c++) lanes[c] = load_lanes(v, j, width, d + c * LANES);
        UNROLL for (int q = 0; q < Q; q++)
            UNROLL for (int c = 0; c < C; c++) sum[q][c] = dot_lanes(sum[q][c], lanes[c], p[q], j);
    }
    if (j == used) return; /* else the second of the pair is nobody's */
    UNROLL for (int c = 0; c < C; c++) lanes[c] = load_lanes(v, j, width, d + c * LANES) & 0xffff;
    UNROLL for (int q = 0; q < Q; q++)
        UNROLL for (int c = 0; c < C; c++) sum[q][c] = dot_lanes(sum[q][c], lanes[c], p[q], j);
}

/* Head h of Q tokens of one row, from i: softmax(q k) v, block by block, each rescaling what came
   before (online softmax, Milakov & Gimelshein 2018). A token that may see no key gets zeros. */
INLINE void attend(int Q, const model *m, const batch *b, int64_t layer, int64_t i, int64_t h,
                   const float *qkv, int64_t qkv_width, float *out, int64_t out_width) {
    enum { S = PAGE / LANES };
    uint8_t factors[4][PAGE * FACTOR];
    const uint8_t *query[4], *weight[4];
    const int64_t D = m->D, padded = padded_head(m), first = b->positions[i];
    float largest[4], total[4], *y[4];
    int64_t from[4], to[4]; /* the keys that each query may see */
    UNROLL for (int q = 0; q < Q; q++) {
        largest[q] = -INFINITY, total[q] = 0, y[q] = out + q * out_width;
        query[q] = (const uint8_t *)(qkv + q * qkv_width), weight[q] = factors[q];
        to[q] = b->allowed ? b->keys[i + q] : first + q + 1;
        from[q] = !b->allowed && m->window && to[q] > m->window ? to[q] - m->window : 0;
        memset(y[q], 0, D * sizeof(float));
    }
    for (int64_t start = from[0] / PAGE * PAGE; start < to[Q - 1]; start += PAGE) {
        const uint8_t *k = head_of_page(m, b, b->rows[i], start / PAGE, layer, 0, h / (m->H / m->K));
        const uint8_t *v = head_of_page(m, b, b->rows[i], start / PAGE, layer, 1, h / (m->H / m->K));
        vf score[4][S];
        UNROLL for (int q = 0; q < Q; q++) UNROLL for (int s = 0; s < S; s++) score[q][s] = splat(0);
        for (int64_t d = 0; d < D; d += STEP) {
            vi key[S];
            UNROLL for (int s = 0; s < S; s++) key[s] = load_lanes(k, d, PAGE, s * LANES);
            UNROLL for (int q = 0; q < Q; q++)
                UNROLL for (int s = 0; s < S; s++) score[q][s] = dot_lanes(score[q][s], key[s], query[q], d);
        }
        float p[4][PAGE], rescale[4];
        int64_t used = 0;
        UNROLL for (int q = 0; q < Q; q++) {
            UNROLL for (int s = 0; s < S; s++) store(p[q] + s * LANES, score[q][s]);
            int64_t low = from[q] - start, high = to[q] - start;
            for (int64_t j = 0; j < low && j < PAGE; j++) p[q][j] = -INFINITY;
            for (int64_t j = high < 0 ? 0 : high; j < PAGE; j++) p[q][j] = -INFINITY;
            if (b->allowed) {
                const uint8_t *may = b->allowed + (i + q) * b->allowed_token + h * b->allowed_head;
                for (int64_t j = 0; j < high && j < PAGE; j++) if (!may[start + j]) p[q][j] = -INFINITY;
            }
            vf top = load(p[q]);
            UNROLL for (int s = 1; s < S; s++) top = max_(top, load(p[q] + s * LANES));
            float best = max_lanes(top);
            rescale[q] = 1;
            if (best == -INFINITY) {
                memset(factors[q], 0, sizeof factors[q]);
                continue;
            }
            if (best > largest[q]) {
                float change[LANES];
                store(change, exp_(splat(largest[q] - best)));
                rescale[q] = change[0], largest[q] = best;
            }
            vf sum = splat(0);
            UNROLL for (int s = 0; s < S; s++) {
                vf e = exp_(load(p[q] + s * LANES) - largest[q]);
                put_factors(factors[q], s * LANES, e);
                sum = sum + e;
            }
            total[q] = total[q] * rescale[q] + sum_lanes(sum);
            if (high > used) used = high < PAGE ? high : PAGE;
        }
        /* Slots from `used` on hold nothing that any of the queries may see. */
        int64_t d = 0;
        for (; d + 4 * LANES <= D; d += 4 * LANES) {
            vf sum[4][4];
            UNROLL for (int q = 0; q < Q; q++)
                UNROLL for (int c = 0; c < 4; c++) sum[q][c] = load(y[q] + d + c * LANES) * rescale[q];
            add_values(Q, 4, v, padded, d, weight, used, sum);
            UNROLL for (int q = 0; q < Q; q++)
                UNROLL for (int c = 0; c < 4; c++) store(y[q] + d + c * LANES, sum[q][c]);
        }
        for (; d < D; d += LANES)
            UNROLL for (int q = 0; q < Q; q++) { /* the last vector may be a part of one */
                float part[LANES] = {0};
                int64_t n = D - d < LANES ? D - d : LANES;
                memcpy(part, y[q] + d, n * sizeof(float));
                vf sum[4][4];
                sum[0][0] = load(part) * rescale[q];
                add_values(1, 1, v, padded, d, weight + q, used, sum);
                store(part, sum[0][0]);
                memcpy(y[q] + d, part, n * sizeof(float));
            }
    }
    UNROLL for (int q = 0; q < Q; q++) {
        float inverse = total[q] > 0 ? 1.0f / total[q] : 0;
        for (int64_t d = 0; d < D; d++) y[q][d] *= inverse;
    }
}

static void attention(const model *m, const batch *b, int64_t layer, const float *qkv, int64_t qkv_width,
                      float *mixed, int64_t width, int64_t thread, int64_t threads) {
    int64_t unit = 0, step;
    for (int64_t i = 0; i < b->N; i += step) {
        step = 1;
        while (step < QUERIES && i + step < b->N && b->rows[i + step] == b->rows[i]) step++;
        if (step < QUERIES) step = 1;
        for (int64_t h = 0; h < m->H; h++, unit++) {
            if (unit % threads != thread) continue;
            const float *q = qkv + i * qkv_width + h * m->D;
            float *y = mixed + i * width + h * m->D;
            if (step == 1) attend(1, m, b, layer, i, h, q, qkv_width, y, width);
            else attend(QUERIES, m, b, layer, i, h, q, qkv_width, y, width);
        }
    }
}

