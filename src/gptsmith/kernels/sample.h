/* From logits to a token, as generate/sampling.py defines it ("sample").

   A row is computed by one thread, in an order that depends on the row alone. Weights are floats and
   sums of them doubles: the distribution is that of the definition to seven digits. */

#include "matrix.h"

typedef struct {
    const float *logits;
    double uniform; /* in [0, 1) */
    double temperature, top_p, min_p; /* 0: greedy; 1: off; 0: off */
    int64_t top_k; /* 0: off */
} choice;

typedef struct {
    float logit;
    int32_t id;
} candidate;

enum { BLOCK = 64, BUCKETS = 1024 };

/* The first of the largest numbers; -1 if that is infinite, or one is NaN. */
static int64_t argmax(const float *x, int64_t V) {
    vf top = splat(-INFINITY);
    vi bad = splat_int(0);
    int64_t i = 0;
    for (; i + LANES <= V; i += LANES) {
        vf v = load(x + i);
        top = max_(top, v);
        bad |= v != v;
    }
    int32_t wrong[LANES];
    *(vi_at *)wrong = bad;
    int damaged = 0;
    for (int lane = 0; lane < LANES; lane++) damaged |= wrong[lane];
    float best = max_lanes(top);
    for (; i < V; i++) {
        damaged |= x[i] != x[i];
        if (x[i] > best) best = x[i];
    }
    if (damaged || isinf(best)) return -1;
    for (i = 0; x[i] != best; i++) {}
    return i;
}

/* Positive floats are in the order of their bits: here by exponent and three bits of the fraction. */
INLINE int bucket_of(float weight) {
    uint32_t bits;
    memcpy(&bits, &weight, 4);
    return (int)(bits >> 20);
}

static int compare(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->logit != y->logit) return x->logit > y->logit ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

/* Set the weights (0 to 1) of all logits x to 0 but those of the largest: as many as it takes for
   their sum to reach `mass`, at most `count`. Of equal logits the first stay. */
static void keep_largest(const float *x, float *w, int64_t V, int64_t count, double mass, candidate *found) {
    int64_t sizes[BUCKETS] = {0}, kept = 0, size = 0;
    double masses[BUCKETS] = {0}, sum = 0;
    for (int64_t i = 0; i < V; i++) {
        int at = bucket_of(w[i]);
        sizes[at]++, masses[at] += w[i];
    }
    int last = BUCKETS - 1; /* the bucket where the kept ones end */
    for (; last > 0 && kept + sizes[last] < count && sum + masses[last] < mass; last--)
        kept += sizes[last], sum += masses[last];
    for (int64_t i = 0; i < V; i++) {
        int at = bucket_of(w[i]);
        if (at == last) found[size++] = (candidate){x[i], (int32_t)i};
        else if (at < last) w[i] = 0;
    }
    qsort(found, size, sizeof *found, compare);
    for (int64_t i = 0; i < size; i++) {
        if (kept < count && sum < mass) kept++, sum += w[found[i].id];
        else w[found[i].id] = 0;
    }
}

INLINE double sum_block(const float *w) {
    vf sum = load(w);
    for (int i = LANES; i < BLOCK; i += LANES) sum = sum + load(w + i);
    return sum_lanes(sum);
}

INLINE double sum_weights(const float *w, int64_t V) {
    double sum = 0;
    for (int64_t i = 0; i < V; i += BLOCK) sum += sum_block(w + i);
    return sum;
}

/* The first token up to which the weights sum to more than `uniform`, below 1, of all. */
static int64_t draw(const float *w, int64_t V, double uniform) {
    double target = uniform * sum_weights(w, V), sum = 0, block;
    int64_t start = 0, token = 0;
    for (; sum + (block = sum_block(w + start)) <= target; start += BLOCK) sum += block;
    for (int64_t i = start; i < start + BLOCK && sum <= target; i++)
        if (w[i] > 0) sum += w[i], token = i; /* the last one, should these sums round down */
    return token;
}

/* w and found: memory for V elements, rounded up to a block. */
static int64_t choose(const choice *c, int64_t V, float *w, candidate *found) {
    const float *x = c->logits;
    int64_t best = argmax(x, V), i = 0;
    if (best < 0 || c->temperature <= 0) return best;
    float largest = x[best], inverse = 1.0 / fmax(c->temperature, 1e-30);
    for (; i + LANES <= V; i += LANES) store(w + i, exp_((load(x + i) - largest) * inverse));
    for (; i < round_up(V, BLOCK); i += LANES) {
        float rest[LANES];
        for (int lane = 0; lane < LANES; lane++) rest[lane] = i + lane < V ? x[i + lane] : -INFINITY;
        store(w + i, exp_((load(rest) - largest) * inverse));
    }
    if (c->top_k > 0 && c->top_k < V) keep_largest(x, w, V, c->top_k, INFINITY, found);
    if (c->top_p < 1) keep_largest(x, w, V, V, c->top_p * sum_weights(w, V), found);
    if (c->min_p > 0)
        for (i = 0; i < V; i++) w[i] = w[i] < c->min_p ? 0 : w[i];
    return draw(w, V, c->uniform);
}
