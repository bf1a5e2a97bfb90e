/* Products of packed matrices and rows: y = W x + b.

   Matrices are packed in tiles of TILE outputs (packed_matrix.py). Rows are floats, their lengths
   multiples of 64, zero beyond their end. Each output is one chain of additions along its weight
   row, in a lane of its own; several rows share loads of weights, never sums.

   A library multiplies weights of one format, -DFORMAT=INT8 for example: compiling all four takes
   three times as long, and a model has one. (A table of embeddings beside a head of its own may have
   another format, as it is only unpacked.) */

#pragma once

#include "simd.h"

enum { TILE = 16, RUNS = 4, V = TILE / LANES };
enum { FLOAT32, BFLOAT16, INT8, INT4 };
enum { QUANTIZED = FORMAT == INT8 || FORMAT == INT4 };

/* Tiles that several rows share loads of, and queries (attention.h) that share loads of keys: as
   many as the registers hold (32 of AVX512, 16 of AVX2). */
#if LANES == 16
enum { SHARED_RUNS = 4, QUERIES = 4 };
#else
enum { SHARED_RUNS = 1, QUERIES = 1 };
#endif

typedef struct {
    const uint8_t *data;
    const float *bias; /* outputs, padded as the tiles are; or NULL */
    int64_t format, outputs, inputs; /* multiples of 64 */
} matrix;

INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* Rows as the products read them ("prepared"): float32 weights meet the floats as they are, bf16
   weights factors (simd.h). Quantized weights meet bytes, with the scale (largest magnitude / 127)
   and the sum of each group behind them. */

INLINE int64_t group_of(int64_t format) { return format == INT4 ? 32 : 64; }

INLINE int64_t prepared_bytes(int64_t inputs) {
    if (QUANTIZED) return round_up(inputs + 8 * (inputs / group_of(FORMAT)), 64);
    return inputs * (FORMAT == BFLOAT16 ? sizeof(factor) : sizeof(float));
}

static void quantize_group(const float *x, int64_t size, int8_t *q, float *scale, int32_t *sum) {
    vf top = splat(0);
    for (int64_t i = 0; i < size; i += LANES) {
        vf v = load(x + i);
        top = max_(top, max_(v, -v));
    }
    float largest = max_lanes(top);
    float inverse = largest > 0 ? 127.0f / largest : 0;
    int32_t total = 0;
    int32_t whole[64];
    for (int64_t i = 0; i < size; i += LANES) *(vi_at *)(whole + i) = round_int(load(x + i) * inverse);
    for (int64_t i = 0; i < size; i++) {
        q[i] = (int8_t)whole[i];
        total += whole[i];
    }
    *scale = largest / 127.0f;
    *sum = total;
}

/* 64 inputs from `start` of one row. */
static void prepare(int64_t inputs, int64_t start, const float *x, uint8_t *row) {
    if (QUANTIZED) {
        int64_t size = group_of(FORMAT);
        float *scales = (float *)(row + inputs);
        int32_t *sums = (int32_t *)(scales + inputs / size);
        for (int64_t i = start; i < start + 64; i += size)
            quantize_group(x + i - start, size, (int8_t *)row + i, scales + i / size, sums + i / size);
        return;
    }
    for (int64_t i = 0; i < 64; i += LANES) {
        if (FORMAT == BFLOAT16) store_factors((factor *)row + start + i, load(x + i));
        else store((float *)row + start + i, load(x + i));
    }
}

INLINE int64_t scale_bytes(int64_t format, int64_t inputs) { /* at the front of a quantized tile */
    if (format != INT8 && format != INT4) return 0;
    return round_up(inputs / group_of(format) * TILE * 2, 64);
}

INLINE int64_t tile_bytes(int64_t format, int64_t inputs) {
    switch (format) {
    case FLOAT32: return inputs * TILE * 4;
    case BFLOAT16: return inputs * TILE * 2;
    case INT8: return scale_bytes(format, inputs) + inputs * TILE;
    default: return scale_bytes(format, inputs) + inputs * TILE / 2;
    }
}

typedef vf sums[RUNS][4][V]; /* of a tile of each run, for each of up to four rows */

#define EACH_TILE UNROLL for (int t = 0; t < T; t++) UNROLL for (int v = 0; v < V; v++)
#define EACH_ROW UNROLL for (int r = 0; r < R; r++)

/* Four rows compute for longer than their weights take to load: meanwhile half of the tiles that come
   next are fetched into the second cache, the other half beside the next four rows. */
INLINE void fetch(int R, const uint8_t **next, int64_t at) {
    if (R == 4) __builtin_prefetch(next[0] + at, 0, 2), __builtin_prefetch(next[1] + at, 0, 2);
}

INLINE void dot_float32(int T, int R, const uint8_t **w, const uint8_t **next, const uint8_t **x,
                        int64_t inputs, sums s) {
    for (int64_t k = 0; k < inputs; k++) {
        fetch(R, next, k * TILE * 4);
        vf weights[RUNS][V];
        EACH_TILE weights[t][v] = load((const float *)w[t] + k * TILE + v * LANES);
        EACH_ROW {
            vf input = splat(((const float *)x[r])[k]);
            EACH_TILE s[t][r][v] = fma_(weights[t][v], input, s[t][r][v]);
        }
    }
}

/* A 32-bit lane holds the weights of two inputs. */
INLINE void dot_bfloat16(int T, int R, const uint8_t **w, const uint8_t **next, const uint8_t **x,
                         int64_t inputs, sums s) {
    for (int64_t k = 0; k < inputs; k += 2) {
        fetch(R, next, k * TILE * 2);
        vi pairs[RUNS][V];
        EACH_TILE pairs[t][v] = load_int(w[t] + (k * TILE + v * LANES * 2) * 2);
        EACH_ROW EACH_TILE s[t][r][v] = dot_pairs(s[t][r][v], pairs[t][v], (const factor *)x[r] + k);
    }
}

/* A 32-bit lane holds the weights of four inputs (int4: of eight, the low nibbles first). */
INLINE void dot_quantized(int T, int R, const uint8_t **w, const uint8_t **next, const uint8_t **x,
                          int64_t inputs, sums s) {
    const int64_t size = group_of(FORMAT), groups = inputs / size, front = scale_bytes(FORMAT, inputs);
    const int offset = FORMAT == INT4 ? 8 : INT8_OFFSET;
    for (int64_t g = 0; g < groups; g++) {
        vi whole[RUNS][4][V];
        EACH_ROW {
            const int32_t *x_sums = (const int32_t *)(x[r] + inputs) + groups;
            EACH_TILE whole[t][r][v] = splat_int(-offset * x_sums[g]);
        }
        for (int64_t k = g * size; k < (g + 1) * size; k += FORMAT == INT4 ? 8 : 4) {
            vi weights[RUNS][V];
            int64_t at = front + k * TILE / (FORMAT == INT4 ? 2 : 1);
            if (R == 1) /* measured: 15% faster than without; bf16 gains nothing */
                UNROLL for (int t = 0; t < T; t++) __builtin_prefetch(w[t] + at + 256);
            fetch(R, next, at);
            EACH_TILE weights[t][v] = load_int(w[t] + at + v * LANES * 4);
            EACH_ROW {
                vi input = splat_int(*(const int32_t *)(x[r] + k));
                if (FORMAT == INT8) {
                    EACH_TILE whole[t][r][v] = dot_int8(whole[t][r][v], weights[t][v], input);
                } else {
                    vi next = splat_int(*(const int32_t *)(x[r] + k + 4));
                    EACH_TILE {
                        vi low = weights[t][v] & 0x0f0f0f0f, high = (weights[t][v] >> 4) & 0x0f0f0f0f;
                        whole[t][r][v] = dot_int4(whole[t][r][v], low, input);
                        whole[t][r][v] = dot_int4(whole[t][r][v], high, next);
                    }
                }
            }
        }
        EACH_TILE {
            vf scale = load_bf16((const uint16_t *)w[t] + g * TILE + v * LANES);
            EACH_ROW s[t][r][v] = fma_(
                to_float(whole[t][r][v]), scale * ((const float *)(x[r] + inputs))[g], s[t][r][v]);
        }
    }
}

/* T tiles of R rows, from row i: y = product + bias, or y += that. */
INLINE void tiles(int T, int R, const matrix *m, const int64_t *tile, const uint8_t *x, int64_t i,
                  int64_t stride, float *y, int64_t width, int add) {
    const uint8_t *w[RUNS], *next[2], *rows[4];
    sums s;
    for (int t = 0; t < T; t++) w[t] = m->data + tile[t] * tile_bytes(FORMAT, m->inputs);
    for (int a = 0; a < 2; a++) next[a] = w[(i / 2 + a) % T] + tile_bytes(FORMAT, m->inputs);
    EACH_ROW rows[r] = x + (i + r) * stride;
    EACH_ROW EACH_TILE s[t][r][v] = splat(0);
    switch (FORMAT) {
    case FLOAT32: dot_float32(T, R, w, next, rows, m->inputs, s); break;
    case BFLOAT16: dot_bfloat16(T, R, w, next, rows, m->inputs, s); break;
    default: dot_quantized(T, R, w, next, rows, m->inputs, s);
    }
    EACH_ROW EACH_TILE {
        int64_t o = tile[t] * TILE + v * LANES;
        vf sum = m->bias ? s[t][r][v] + load(m->bias + o) : s[t][r][v];
        float *to = y + (i + r) * width + o;
        store(to, add ? load(to) + sum : sum);
    }
}

/* All rows against one tile of each run. One row reads the four runs side by side; for several,
   what the registers hold decides. */
INLINE void all_rows(const matrix *m, const int64_t *tile, const uint8_t *x, int64_t stride,
                     int64_t N, float *y, int64_t width, int add) {
    int64_t i = 0;
    for (; i + 4 <= N; i += 4)
        for (int t = 0; t < RUNS; t += SHARED_RUNS)
            tiles(SHARED_RUNS, 4, m, tile + t, x, i, stride, y, width, add);
    for (; i + 2 <= N; i += 2)
        for (int t = 0; t < RUNS; t += SHARED_RUNS)
            tiles(SHARED_RUNS, 2, m, tile + t, x, i, stride, y, width, add);
    if (i < N) tiles(RUNS, 1, m, tile, x, i, stride, y, width, add);
}

/* y (N, width) of prepared rows. Each thread reads four long runs of tiles that lie far apart in
   memory, which is faster than one run: more pages of it are open at a time. */
static void linear(const matrix *m, const uint8_t *x, int64_t N, float *y, int64_t width, int add,
                   int64_t thread, int64_t threads) {
    int64_t run = m->outputs / TILE / RUNS, stride = prepared_bytes(m->inputs);
    for (int64_t i = run * thread / threads; i < run * (thread + 1) / threads; i++) {
        int64_t tile[RUNS] = {i, i + run, i + 2 * run, i + 3 * run};
        all_rows(m, tile, x, stride, N, y, width, add);
    }
}
