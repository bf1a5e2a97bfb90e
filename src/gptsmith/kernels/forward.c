/* A transformer's forward pass on a CPU, for any number of tokens in one order of addition.

   Every number that a token gets depends on that token, the weights, and the keys and values of its
   text at absolute positions; never on what else is in the batch, on how a prompt was cut, or on
   the number of threads. Three rules make it so: each output of a matrix product is one chain of
   additions along its weight row; attention goes over blocks of PAGE keys, fixed by position; the
   rest works row by row. Several tokens share loads of weights and keys, never sums.

   A call is one parallel region on the OpenMP runtime that torch uses: two of them would fight for
   the cores. Its functions are called by address, so the compiler needs no OpenMP of its own. */

#include "attention.h"
#include "barrier.h"
#include "sample.h"

typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
    int (*thread)(void), (*team)(void); /* omp_get_thread_num, omp_get_num_threads */
    int64_t threads; /* wanted; a limit of the user's may give fewer */
} runtime;

typedef struct { /* N rows of each; of the last two at least one for each thread */
    float *qkv, *mixed, *hidden, *normed;
    uint8_t *prepared;
    int64_t prepared_bytes; /* of the widest row */
} scratch;

/* ---- Row by row -------------------------------------------------------------------------------- */

/* y = norm(x), C real and `width` padded elements (weights and biases are zero beyond C). */
static void normalize(int64_t kind, norm n, float eps, const float *x, int64_t C, int64_t width, float *y) {
    float mean = 0;
    if (kind == LAYERNORM) {
        vf total = splat(0);
        for (int64_t i = 0; i < width; i += LANES) total = total + load(x + i);
        mean = sum_lanes(total) / C;
    }
    float scale = 1.0f / sqrtf(sum_of_squares(x, C, mean) / C + eps);
    for (int64_t i = 0; i < width; i += LANES) {
        vf v = (load(x + i) - mean) * scale * load(n.weight + i);
        store(y + i, n.bias ? v + load(n.bias + i) : v);
    }
}

INLINE vf activate(int64_t mlp, vf x) {
    switch (mlp) {
    case GELU: return x * sigmoid(1.5957691216057308f * fma_(x * x * x, splat(0.044715f), x));
    case GELU_ERF: return 0.5f * x * (1.0f + erf_(x * 0.70710678118654752f));
    case RELU2: x = max_(x, splat(0)); return x * x;
    default: return x * sigmoid(x);
    }
}

/* 64 hidden units of the MLP from what `up` gave; beyond F zeros. */
static void hidden_units(int64_t mlp, int64_t F, int64_t start, const float *up, float *y) {
    float gate[64], value[64];
    int64_t n = F - start < 64 ? F - start : 64;
    memset(gate, 0, sizeof gate);
    memcpy(gate, up + start, n * sizeof(float));
    for (int i = 0; i < 64; i += LANES) store(y + i, activate(mlp, load(gate + i)));
    if (mlp != SWIGLU) return;
    memset(value, 0, sizeof value);
    memcpy(value, up + F + start, n * sizeof(float));
    for (int i = 0; i < 64; i += LANES) store(y + i, load(y + i) * load(value + i));
}

/* ---- A pass ------------------------------------------------------------------------------------ */

static void run(const runtime *r, void (*work)(void *), void *task) {
    if (r->threads > 1) r->parallel(work, task, (unsigned)r->threads, 0);
    else work(task);
}
INLINE int64_t thread_of(const runtime *r) { return r->threads > 1 ? r->thread() : 0; }
INLINE int64_t threads_of(const runtime *r) { return r->threads > 1 ? r->team() : 1; }

/* The items of `count` that are this thread's. */
#define SHARE(i, count) \
    for (int64_t i = (count) * thread / threads, end_ = (count) * (thread + 1) / threads; i < end_; i++)

typedef struct {
    const runtime *runtime;
    const model *model;
    const batch *batch;
    scratch s;
    float *x;
    barrier *barrier;
} forward_task;

/* What a thread knows. Work between two products is shared by rows and parts of rows; for a single
   token each thread does it for itself, which costs less than waiting for each other. */
typedef struct {
    const forward_task *task;
    int64_t thread, threads;
    int64_t part, parts;
    float *normed;
    uint8_t *prepared;
} worker;

static void wait_here(const worker *w) { wait_for_all(w->task->barrier, w->threads); }

static void wait_for_rows(const worker *w) {
    if (w->parts > 1) wait_here(w);
}

static void norm_rows(const worker *w, norm n, const matrix *next) {
    const model *m = w->task->model;
    int64_t thread = w->part, threads = w->parts, width = next->inputs;
    SHARE(i, w->task->batch->N) {
        float *y = w->normed + i * width;
        normalize(m->norm_kind, n, m->eps, w->task->x + i * width, m->C, width, y);
        for (int64_t k = 0; k < width; k += 64)
            prepare(width, k, y + k, w->prepared + i * prepared_bytes(width));
    }
    wait_for_rows(w);
}

/* y, or x with add, of the prepared rows. */
static void multiply(const worker *w, const matrix *m, float *y, int64_t width, int add) {
    linear(m, w->prepared, w->task->batch->N, y, width, add, w->thread, w->threads);
    wait_here(w);
}

static void attention_part(const worker *w, int64_t layer) {
    const model *m = w->task->model;
    const batch *b = w->task->batch;
    const block *k = m->blocks + layer;
    float *qkv = w->task->s.qkv, *mixed = w->task->s.mixed;
    int64_t thread = w->thread, threads = w->threads, heads = m->H + 2 * m->K, N = b->N;
    int64_t qkv_width = k->qkv.outputs, width = k->proj.inputs, size = m->H * m->D;
    norm_rows(w, k->attention_norm, &k->qkv);
    multiply(w, &k->qkv, qkv, qkv_width, 0);
    SHARE(u, N * heads)
        place(m, b, layer, u / heads, u % heads, qkv + u / heads * qkv_width + u % heads * m->D);
    SHARE(i, N) memset(mixed + i * width + size, 0, (width - size) * sizeof(float));
    wait_here(w);
    attention(m, b, layer, qkv, qkv_width, mixed, width, thread, threads);
    wait_here(w);
    thread = w->part, threads = w->parts;
    int64_t pieces = width / 64;
    SHARE(u, N * pieces) {
        uint8_t *row = w->prepared + u / pieces * prepared_bytes(width);
        prepare(width, u % pieces * 64, mixed + u * 64, row);
    }
    wait_for_rows(w);
    multiply(w, &k->proj, w->task->x, k->proj.outputs, 1);
}

static void mlp_part(const worker *w, int64_t layer) {
    const model *m = w->task->model;
    const block *k = m->blocks + layer;
    float *hidden = w->task->s.hidden;
    norm_rows(w, k->mlp_norm, &k->up);
    multiply(w, &k->up, hidden, k->up.outputs, 0);
    int64_t thread = w->part, threads = w->parts, width = k->down.inputs, pieces = width / 64;
    SHARE(u, w->task->batch->N * pieces) {
        float y[64];
        uint8_t *row = w->prepared + u / pieces * prepared_bytes(width);
        hidden_units(m->mlp, m->F, u % pieces * 64, hidden + u / pieces * k->up.outputs, y);
        prepare(width, u % pieces * 64, y, row);
    }
    wait_for_rows(w);
    multiply(w, &k->down, w->task->x, k->down.outputs, 1);
}

static void forward_thread(void *argument) {
    const forward_task *task = argument;
    const runtime *r = task->runtime;
    const model *m = task->model;
    const batch *b = task->batch;
    const int64_t thread = thread_of(r), threads = threads_of(r), width = m->embedding.inputs;
    worker w = {task, thread, threads, thread, threads, task->s.normed, task->s.prepared};
    if (b->N == 1) {
        w.part = 0, w.parts = 1;
        w.normed += thread * width, w.prepared += thread * task->s.prepared_bytes;
    }
    SHARE(i, b->N) {
        float *x = task->x + i * width;
        unpack_row(&m->embedding, b->ids[i], x);
        if (m->positions)
            for (int64_t c = 0; c < m->C; c++) x[c] += m->positions[b->positions[i] * m->C + c];
    }
    wait_here(&w);
    for (int64_t layer = 0; layer < m->n_layer; layer++) {
        attention_part(&w, layer);
        mlp_part(&w, layer);
    }
    SHARE(i, b->N) {
        float *x = task->x + i * width;
        normalize(m->norm_kind, m->final_norm, m->eps, x, m->C, width, x);
    }
}

/* x (N, padded C): the vectors after the final norm. Keys and values go to the pages. */
void forward(const runtime *r, const model *m, const batch *b, scratch s, float *x) {
    barrier barrier = {0};
    forward_task task = {r, m, b, s, x, &barrier};
    run(r, forward_thread, &task);
}

typedef struct {
    const runtime *runtime;
    const matrix *m;
    const float *x;
    int64_t N;
    uint8_t *prepared;
    float *y;
    barrier *barrier;
} product_task;

static void product_thread(void *argument) {
    const product_task *t = argument;
    const matrix *m = t->m;
    int64_t thread = thread_of(t->runtime), threads = threads_of(t->runtime), pieces = m->inputs / 64;
    SHARE(u, t->N * pieces) {
        uint8_t *row = t->prepared + u / pieces * prepared_bytes(m->inputs);
        prepare(m->inputs, u % pieces * 64, t->x + u * 64, row);
    }
    wait_for_all(t->barrier, threads);
    linear(m, t->prepared, t->N, t->y, m->outputs, 0, thread, threads);
}

/* y (N, outputs) of x (N, inputs), sizes padded. */
void product(const runtime *r, const matrix *m, const float *x, int64_t N, uint8_t *prepared, float *y) {
    barrier barrier = {0};
    product_task task = {r, m, x, N, prepared, y, &barrier};
    run(r, product_thread, &task);
}

typedef struct {
    const runtime *runtime;
    const choice *choices;
    int64_t N, V;
    int64_t *tokens;
} sample_task;

static void sample_thread(void *argument) {
    const sample_task *t = argument;
    int64_t thread = thread_of(t->runtime), threads = threads_of(t->runtime), V = round_up(t->V, BLOCK);
    float *weights = malloc(V * sizeof *weights);
    candidate *found = malloc(V * sizeof *found);
    SHARE(i, t->N) t->tokens[i] = choose(t->choices + i, t->V, weights, found);
    free(weights), free(found);
}

/* The token of each of N rows of V logits; -1 where the largest is not a finite number. */
void sample(const runtime *r, const choice *choices, int64_t N, int64_t V, int64_t *tokens) {
    runtime used = *r;
    if (used.threads > N) used.threads = N;
    sample_task task = {&used, choices, N, V, tokens};
    run(&used, sample_thread, &task);
}

typedef struct {
    const runtime *runtime;
    const matrix *m;
    const void *weight;
    int64_t bf16, rows, columns;
} pack_task;

static void pack_thread(void *argument) {
    const pack_task *t = argument;
    const matrix *m = t->m;
    int64_t thread = thread_of(t->runtime), threads = threads_of(t->runtime);
    int64_t bytes = tile_bytes(m->format, m->inputs);
    float *x = malloc(m->inputs * sizeof(float));
    SHARE(i, m->outputs) {
        memset(x, 0, m->inputs * sizeof(float));
        for (int64_t k = 0; i < t->rows && k < t->columns; k++)
            x[k] = t->bf16 ? from_bf16(((const uint16_t *)t->weight)[i * t->columns + k])
                           : ((const float *)t->weight)[i * t->columns + k];
        pack_output(m->format, m->inputs, x, i % TILE, (uint8_t *)m->data + i / TILE * bytes);
    }
    free(x);
}

/* Fill m->data from a weight (rows, columns) of floats or bf16. */
void pack(const runtime *r, const matrix *m, const void *weight, int64_t bf16, int64_t rows, int64_t columns) {
    pack_task task = {r, m, weight, bf16, rows, columns};
    run(r, pack_thread, &task);
}

/* x (inputs): row `row` of the weight. */
void unpack(const matrix *m, int64_t row, float *x) { unpack_row(m, row, x); }

int64_t packed_bytes(int64_t format, int64_t outputs, int64_t inputs) {
    return outputs / TILE * tile_bytes(format, inputs);
}

int64_t row_bytes(int64_t inputs) { return prepared_bytes(inputs); }
