// What the parts of the paged attention share. kernels/paged_attention.py says what the fields hold.

#ifndef AGD_PAGED_H
#define AGD_PAGED_H

#include <math.h>

#include "lanes.h"

typedef struct {
    const int32_t *pages;
    int64_t length;  // tokens in the cache before this step
    int64_t count;   // new ones
    int64_t row;     // the first of them among the rows of the batch
} Sequence;

typedef struct {
    const Sequence *sequences;
    int64_t num_sequences, rows;
    const int64_t *slots, *positions;
} Batch;

typedef struct {
    int64_t heads, kv_heads, dim, window;
    const float *rope, *query_gain, *key_gain;
    float scale, eps, score_factor, value_factor;
    int64_t through_norm;
} Layer;

// Strides are in elements.
typedef struct {
    void *data;
    int64_t half, block_size, block, head, plane, token;
} Cache;

// One call for one layer: qkv [2 rows, (heads + 2 kv_heads) dim] and out [2 rows, heads dim], bfloat16 if `half`;
// `mask` [rows, heads] or none.
typedef struct {
    const Batch *batch;
    const Layer *layer;
    const Cache *cache;
    const float *mask;
    const void *qkv;
    void *out;
    int64_t half;
} Call;

// Planes of the cache: k, k', v, v'; without k' where scores have no tangent.
INLINE int64_t value_plane(const Layer *layer) { return layer->score_factor != 0 ? 2 : 1; }

// Where a key of a sequence lies.
INLINE int64_t place_of(const Cache *cache, const Sequence *sequence, int64_t head, int64_t key) {
    const uint32_t index = key, size = cache->block_size;
    return sequence->pages[index / size] * cache->block + head * cache->head + index % size * cache->token;
}

#define UNROLL _Pragma("GCC unroll 16")

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

// Vectors of a row that are fetched together, and where lane `lane` of vector `part` lies in the row: of bfloat16, two
// vectors are the even and the odd elements.
#define PAIR(dim) ((dim) >= 2 * LANES ? 2 : 1)

INLINE int element(const int dim, const int half, int part, int lane) {
    return half && PAIR(dim) == 2 ? part / 2 * 2 * LANES + 2 * lane + part % 2 : part * LANES + lane;
}

INLINE void fetch(const int half, const int pair, const void *data, int64_t from, lanes to[2]) {
    const char *at = (const char *)data + from * (half ? 2 : 4);
    if (!half) {
        UNROLL for (int i = 0; i < pair; i++) to[i] = load((const float *)at + i * LANES);
    } else if (pair == 2) {
        const words both = *(const words *)at;
        to[0] = (lanes)(both << 16);
        to[1] = (lanes)(both & 0xffff0000);
    } else
        to[0] = (lanes)(__builtin_convertvector(*(const halves *)at, words) << 16);
}

INLINE void read_row(const void *data, int64_t half, int64_t from, int64_t count, float *to) {
    if (half) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) to[i] = get(data, 1, from + i);
    } else
        memcpy(to, (const float *)data + from, count * sizeof(float));
}

INLINE void write_row(void *data, int64_t half, int64_t to, int64_t count, const float *from) {
    if (half) {
#pragma omp simd
        for (int64_t i = 0; i < count; i++) put(data, 1, to + i, from[i]);
    } else
        memcpy((float *)data + to, from, count * sizeof(float));
}

// RMSNorm of a head [streams][dim] in place, by the rule of rules.rms_norm.
INLINE void norm_head(const int dim, float *x, int64_t streams, const float *gain, const Layer *layer) {
    float total = 0, along = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < dim; i++) total += x[i] * x[i];
    const float scale = 1 / sqrtf(total / dim + layer->eps);
    if (streams > 1) {
        float *tangent = x + dim;
        if (layer->through_norm) {
#pragma omp simd reduction(+ : along)
            for (int64_t i = 0; i < dim; i++) along += x[i] * tangent[i];
            along *= scale * scale * scale / dim;
        }
        for (int64_t i = 0; i < dim; i++) tangent[i] = gain[i] * (tangent[i] * scale - x[i] * along);
    }
    for (int64_t i = 0; i < dim; i++) x[i] *= gain[i] * scale;
}

// A query or key head of one row as floats [streams][dim]: normed if there is a gain, rotated, times `scale`.
INLINE void read_head(const int dim, const Call *call, int64_t row, int64_t head, const float *gain, float scale,
                      float *to) {
    const Layer *layer = call->layer;
    const int64_t streams = value_plane(layer), middle = dim / 2;
    const float *cosine = layer->rope + call->batch->positions[row] * dim, *sine = cosine + middle;
    for (int64_t stream = 0; stream < streams; stream++) {
        const int64_t line = (stream * call->batch->rows + row) * (layer->heads + 2 * layer->kv_heads);
        read_row(call->qkv, call->half, (line + head) * dim, dim, to + stream * dim);
    }
    if (gain) norm_head(dim, to, streams, gain, layer);
    for (int64_t stream = 0; stream < streams; stream++) {
        float *x = to + stream * dim;
#pragma omp simd
        for (int64_t i = 0; i < middle; i++) {
            const float low = x[i], high = x[middle + i];
            x[i] = scale * (low * cosine[i] - high * sine[i]);
            x[middle + i] = scale * (high * cosine[i] + low * sine[i]);
        }
    }
}

INLINE void read_query(const int dim, const Call *call, int64_t row, int64_t head, float *to) {
    read_head(dim, call, row, head, call->layer->query_gain, call->layer->scale, to);
}

// What a head attends to, [2][dim]. A head of the region is a component itself: o' += mask o.
INLINE void write_head(const int dim, const Call *call, int64_t row, int64_t head, float *o) {
    const int64_t heads = call->layer->heads;
    const float mask = call->mask ? call->mask[row * heads + head] : 0;
    if (mask != 0)
        for (int64_t i = 0; i < dim; i++) o[dim + i] += mask * o[i];
    for (int64_t stream = 0; stream < 2; stream++) {
        const int64_t to = ((stream * call->batch->rows + row) * heads + head) * dim;
        write_row(call->out, call->half, to, dim, o + stream * dim);
    }
}

#endif
