/* Packing and quantizing weights: rows of floats or bf16 into tiles.

   Quantized weights are whole numbers times a scale in bf16 for each group of inputs. int8: -127 to
   127, where the largest magnitude of a group becomes 127. int4: -8 to 7, where the largest becomes
   -8, so the scale has its sign, reversed. A search for the scale with the least squared error gained
   nothing in the perplexity of trained models (docs/log.md). */

#include "matrix.h"

/* Whole numbers q of one group; returns the scale. */
static uint16_t quantize_weights(int64_t format, const float *x, float *q) {
    int64_t size = group_of(format), at = 0;
    for (int64_t i = 1; i < size; i++) if (fabsf(x[i]) > fabsf(x[at])) at = i;
    uint16_t stored = to_bf16(format == INT8 ? fabsf(x[at]) / 127 : x[at] / -8);
    float scale = from_bf16(stored), low = format == INT8 ? -127 : -8, high = -low - (format == INT4);
    vf inverse = splat(scale != 0 ? 1.0f / scale : 0);
    for (int64_t i = 0; i < size; i += LANES)
        store(q + i, min_(max_(to_float(round_int(load(x + i) * inverse)), splat(low)), splat(high)));
    return stored;
}

/* Input k of output `lane` of a tile: w as it is, or a quantized whole number. */
INLINE void put_weight(int64_t format, uint8_t *body, int64_t k, int64_t lane, float w) {
    switch (format) {
    case FLOAT32: ((float *)body)[k * TILE + lane] = w; break;
    case BFLOAT16: ((uint16_t *)body)[(k / 2 * TILE + lane) * 2 + k % 2] = to_bf16(w); break;
    case INT8: body[(k / 4 * TILE + lane) * 4 + k % 4] = (uint8_t)((int)w + 128); break;
    default: {
        uint8_t *byte = body + (k / 8 * TILE + lane) * 4 + k % 4, nibble = (uint8_t)((int)w + 8);
        *byte = k % 8 < 4 ? nibble : *byte | (uint8_t)(nibble << 4);
    }
    }
}

INLINE float get_weight(int64_t format, const uint8_t *body, int64_t k, int64_t lane) {
    switch (format) {
    case FLOAT32: return ((const float *)body)[k * TILE + lane];
    case BFLOAT16: return from_bf16(((const uint16_t *)body)[(k / 2 * TILE + lane) * 2 + k % 2]);
    case INT8: return body[(k / 4 * TILE + lane) * 4 + k % 4] - 128;
    default: return (body[(k / 8 * TILE + lane) * 4 + k % 4] >> (k % 8 / 4 * 4) & 15) - 8;
    }
}

/* One output of a tile from its weight row x, padded with zeros. */
static void pack_output(int64_t format, int64_t inputs, const float *x, int64_t lane, uint8_t *tile) {
    uint8_t *body = tile + scale_bytes(format, inputs);
    if (format == FLOAT32 || format == BFLOAT16) {
        for (int64_t k = 0; k < inputs; k++) put_weight(format, body, k, lane, x[k]);
        return;
    }
    int64_t size = group_of(format);
    for (int64_t g = 0; g < inputs / size; g++) {
        float q[64];
        ((uint16_t *)tile)[g * TILE + lane] = quantize_weights(format, x + g * size, q);
        for (int64_t i = 0; i < size; i++) put_weight(format, body, g * size + i, lane, q[i]);
    }
}

/* One row of a packed matrix, as floats: the vector of a token under an embedding. */
static void unpack_row(const matrix *m, int64_t row, float *x) {
    const uint8_t *tile = m->data + row / TILE * tile_bytes(m->format, m->inputs);
    const uint8_t *body = tile + scale_bytes(m->format, m->inputs);
    int64_t lane = row % TILE, size = group_of(m->format);
    for (int64_t k = 0; k < m->inputs; k++) {
        x[k] = get_weight(m->format, body, k, lane);
        if (m->format == INT8 || m->format == INT4)
            x[k] *= from_bf16(((const uint16_t *)tile)[k / size * TILE + lane]);
    }
}
