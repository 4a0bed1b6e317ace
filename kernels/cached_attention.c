// Softmax attention of cached sequences and of their tangents on a CPU: one call for one layer of ragged sequences.
// kernels/cached_attention.py says what the arguments hold; agd_vllm/attribution/rules.py has the rule and its twin.

#include <math.h>
#include <stdlib.h>

#include "attention.h"

// Queries of one task: their scores for some thousand keys still lie in the second-level cache.
#define TOKENS 8
// Keys whose values are read while every query of the task uses them: they stay in the first-level cache.
#define TILE 32

typedef struct {
    void *keys, *values;  // of layer 0: [layers, kv_heads, streams, capacity, head_dim]
    int64_t capacity;
    int64_t length;  // tokens in the cache before this call
    int64_t count;   // new ones
    int64_t row;     // the first of them among the rows of the call
} Sequence;

typedef struct {
    int64_t rows, streams, key_streams, heads, kv_heads, window;
    int64_t half;  // the caches hold bfloat16, else float
    float score_factor, value_factor;
} Shape;

// Sums over a row of the products with each of KEYS rows `k`, those of q2 with k2 added where there are any.
INLINE void products(const int dim, const float *q, const float *k, const float *q2, const float *k2, float *to) {
    lanes sums[KEYS] = {0};
    for (int part = 0; part < dim; part += LANES) {
        const lanes factor = load(q + part);
        for (int i = 0; i < KEYS; i++) sums[i] += factor * load(k + i * dim + part);
        if (q2) {
            const lanes other = load(q2 + part);
            for (int i = 0; i < KEYS; i++) sums[i] += other * load(k2 + i * dim + part);
        }
    }
    store_sums(sums, to);
}

// Adds `count` rows of `one` and `count` of `other`, each times its weight, those of `other` times `factor` too: two
// chains of sums, for one alone would wait for itself.
INLINE void add_rows(const int dim, int64_t count, const float *one, const float *one_weights, const float *other,
                     const float *other_weights, float factor, float *to) {
    lanes sums[dim / LANES], other_sums[dim / LANES];
    memcpy(sums, to, sizeof sums);
    memset(other_sums, 0, sizeof other_sums);
    for (int64_t i = 0; i < count; i++) {
        const float weight = one_weights[i], other_weight = factor * other_weights[i];
        for (int part = 0; part < dim / LANES; part++) {
            sums[part] += weight * load(one + i * dim + part * LANES);
            other_sums[part] += other_weight * load(other + i * dim + part * LANES);
        }
    }
    for (int part = 0; part < dim / LANES; part++) sums[part] += other_sums[part];
    memcpy(to, sums, sizeof sums);
}

// Scores of keys [from, to) to probabilities, and their changes [streams - 1][width] to the tangents f a'.
static void softmax(float *scores, int64_t from, int64_t to, int64_t streams, int64_t width, float score_factor) {
    float highest = -INFINITY, total = 0;
    for (int64_t key = from; key < to; key++) highest = scores[key] > highest ? scores[key] : highest;
#pragma omp simd reduction(+ : total)
    for (int64_t key = from; key < to; key++) {
        scores[key] = exponential(scores[key] - highest);
        total += scores[key];
    }
    const float scale = 1 / total;
    for (int64_t key = from; key < to; key++) scores[key] *= scale;
    for (int64_t stream = 1; stream < streams; stream++) {
        float *restrict change = scores + stream * width, mean = 0;
#pragma omp simd reduction(+ : mean)
        for (int64_t key = from; key < to; key++) mean += scores[key] * change[key];
        for (int64_t key = from; key < to; key++) change[key] = score_factor * scores[key] * (change[key] - mean);
    }
}

// `count` rows of each stream of a cache as floats, `size` rows apart; `from` is the first of the value's.
INLINE void read_tile(const int dim, const int half, const void *cache, int64_t from, int64_t plane, int64_t streams,
                      int64_t count, int64_t size, float *tile) {
    for (int64_t stream = 0; stream < streams; stream++) {
        float *to = tile + stream * size * dim;
        const int64_t start = from + stream * plane;
#pragma omp simd
        for (int64_t i = 0; i < count * dim; i++) to[i] = get(cache, half, start + i);
    }
}

// One task: `count` queries of each head of one group, from token `start` on, over the keys that they can see.
INLINE void attend_group(const int dim, const int half, const Sequence *sequence, const Shape *shape, int64_t layer,
                         int64_t kv_head, int64_t start, int64_t count, const float *queries, float *out,
                         float *workspace) {
    const int64_t group = shape->heads / shape->kv_heads, streams = shape->streams, key_streams = shape->key_streams;
    const int64_t plane = sequence->capacity * dim, stride = shape->rows * shape->heads * dim;
    const int64_t keys = (layer * shape->kv_heads + kv_head) * key_streams * plane;
    const int64_t values = (layer * shape->kv_heads + kv_head) * streams * plane;
    const int64_t before = sequence->length + start, end = before + count, window = shape->window;
    const int64_t first = window && before + 1 > window ? before + 1 - window : 0, num_keys = end - first;
    const int64_t width = (num_keys + KEYS - 1) / KEYS * KEYS, num_queries = count * group;
    float *const packed = workspace, *const tile = packed + num_queries * streams * dim;
    float *const scores = tile + TILE * streams * dim;
    // Heads of a group lie side by side, tokens after one another, streams in planes.
#define ROW(query, stream)                                                                                         \
    ((((sequence->row + start + (query) / group) * shape->heads) + kv_head * group + (query) % group) * dim + \
     (stream) * stride)

    for (int64_t query = 0; query < num_queries; query++)
        for (int64_t stream = 0; stream < key_streams; stream++)
            memcpy(packed + (query * streams + stream) * dim, queries + ROW(query, stream), dim * sizeof(float));
    for (int64_t key = 0; key < num_keys; key += KEYS) {
        const int64_t there = num_keys - key < KEYS ? num_keys - key : KEYS;
        read_tile(dim, half, sequence->keys, keys + (first + key) * dim, plane, key_streams, there, KEYS, tile);
        for (int64_t query = 0; query < num_queries; query++) {
            const float *q = packed + query * streams * dim;
            float *to = scores + query * key_streams * width + key;
            products(dim, q, tile, NULL, NULL, to);
            for (int64_t stream = 1; stream < key_streams; stream++)
                products(dim, q + stream * dim, tile, q, tile + stream * KEYS * dim, to + stream * width);
        }
    }

#define FROM(query) (window && before + (query) / group + 1 > window ? before + (query) / group + 1 - window - first : 0)
#define TO(query) (before + (query) / group + 1 - first)
    for (int64_t query = 0; query < num_queries; query++)
        softmax(scores + query * key_streams * width, FROM(query), TO(query), key_streams, width, shape->score_factor);

    static const float nothing[TILE];
    memset(packed, 0, num_queries * streams * dim * sizeof(float));
    for (int64_t key = 0; key < num_keys; key += TILE) {
        const int64_t there = num_keys - key < TILE ? num_keys - key : TILE;
        read_tile(dim, half, sequence->values, values + (first + key) * dim, plane, streams, there, TILE, tile);
        for (int64_t query = 0; query < num_queries; query++) {
            const int64_t low = FROM(query) > key ? FROM(query) : key, high = TO(query) < key + TILE ? TO(query) : key + TILE;
            const float *weights = scores + query * key_streams * width + low, *rows = tile + (low - key) * dim;
            float *o = packed + query * streams * dim;
            if (high <= low) continue;
            const int64_t seen = high - low, pairs = seen / 2;
            add_rows(dim, pairs, rows, weights, rows + pairs * dim, weights + pairs, 1, o);
            add_rows(dim, seen % 2, rows + 2 * pairs * dim, weights + 2 * pairs, rows, weights, 0, o);
            for (int64_t stream = 1; stream < streams; stream++) {
                // CP-LRP: the weights have no tangent.
                const float *changes = stream < key_streams ? weights + stream * width : nothing;
                add_rows(dim, seen, rows, changes, rows + stream * TILE * dim, weights, shape->value_factor, o + stream * dim);
            }
        }
    }
    for (int64_t query = 0; query < num_queries; query++)
        for (int64_t stream = 0; stream < streams; stream++)
            memcpy(out + ROW(query, stream), packed + (query * streams + stream) * dim, dim * sizeof(float));
}

// New rows [streams, rows, kv_heads, dim] of one sequence into its cache.
static void append(void *cache, const float *fresh, const Sequence *sequence, int64_t streams, const Shape *shape,
                   int64_t layer, int64_t dim) {
    for (int64_t head = 0; head < shape->kv_heads; head++)
        for (int64_t stream = 0; stream < streams; stream++)
            for (int64_t token = 0; token < sequence->count; token++) {
                const int64_t to = (((layer * shape->kv_heads + head) * streams + stream) * sequence->capacity +
                                    sequence->length + token) * dim;
                const float *from =
                    fresh + ((stream * shape->rows + sequence->row + token) * shape->kv_heads + head) * dim;
                if (shape->half)
                    for (int64_t i = 0; i < dim; i++) put(cache, 1, to + i, from[i]);
                else
                    memcpy((float *)cache + to, from, dim * sizeof(float));
            }
}

// Returns 0; 1 for a head size that it has no code for; 2 where memory is short.
int agd_cached_attention(const Sequence *sequences, int64_t num_sequences, const Shape *shape, int64_t layer,
                         int64_t dim, const float *queries, const float *keys, const float *values, float *out) {
    if (dim != 16 && dim != 32 && dim != 64 && dim != 96 && dim != 128 && dim != 256) return 1;
    int64_t num_blocks = 0, longest = 0;
    for (int64_t i = 0; i < num_sequences; i++) {
        const int64_t blocks = (sequences[i].count + TOKENS - 1) / TOKENS;
        const int64_t length = sequences[i].length + sequences[i].count;
        num_blocks = blocks > num_blocks ? blocks : num_blocks;
        longest = length > longest ? length : longest;
    }
    const int64_t rows = TOKENS * (shape->heads / shape->kv_heads);
    const int64_t floats = (rows + TILE) * shape->streams * dim + rows * shape->key_streams * (longest + KEYS);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *workspace = calloc(floats, sizeof(float));
        failed = workspace == NULL;
#pragma omp for
        for (int64_t i = 0; i < num_sequences; i++) {
            append(sequences[i].keys, keys, sequences + i, shape->key_streams, shape, layer, dim);
            append(sequences[i].values, values, sequences + i, shape->streams, shape, layer, dim);
        }
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t i = 0; i < num_sequences; i++)
            for (int64_t head = 0; head < shape->kv_heads; head++)
                for (int64_t block = 0; block < num_blocks; block++) {
                    const int64_t start = block * TOKENS, left = sequences[i].count - start;
                    if (failed || left <= 0) continue;
                    const int64_t count = left < TOKENS ? left : TOKENS;
#define CASE(size)                                                                                        \
    case size:                                                                                            \
        if (shape->half)                                                                                  \
            attend_group(size, 1, sequences + i, shape, layer, head, start, count, queries, out, workspace); \
        else                                                                                              \
            attend_group(size, 0, sequences + i, shape, layer, head, start, count, queries, out, workspace); \
        break
                    switch (dim) {
                        CASE(16);
                        CASE(32);
                        CASE(64);
                        CASE(96);
                        CASE(128);
                        CASE(256);
                    }
                }
        free(workspace);
    }
    return failed ? 2 : 0;
}
