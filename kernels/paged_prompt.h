// The paged attention of several new tokens of a sequence: the lanes of a vector are queries, so that a number of a key
// or value is a factor of all of them, and nothing is summed up over lanes.

#ifndef AGD_PAGED_PROMPT_H
#define AGD_PAGED_PROMPT_H

#include "paged.h"

// Vectors of queries of one task: they share the keys and values that are read.
#define VECTORS 4
// Keys and values that are held as floats at once.
#define PROMPT_TILE 32
// Sums of each stream that are held in registers: there are 32 of them, or half as many of half the size.
#ifdef __AVX512F__
#define BLOCK 8
#else
#define BLOCK 2
#endif

typedef int32_t numbers __attribute__((vector_size(4 * LANES)));

// LANES queries: their positions, and over the keys so far the highest score, the sum of exp(score - highest) and the
// mean of the scores' tangents under it.
typedef struct {
    int32_t positions[LANES], first, last;
    float highest[LANES], total[LANES], mean[LANES];
} Queries;

// Scores [BLOCK][2] of BLOCK keys, and their tangents where `changes`, for queries [2][dim].
INLINE void score_block(const int dim, const int changes, const lanes *queries, const float *keys,
                        const float *tangents, lanes *to) {
    lanes s[BLOCK] = {0}, change[BLOCK] = {0};
    for (int i = 0; i < dim; i++) {
        const lanes q = queries[i], moved = queries[dim + i];
        _Pragma("GCC unroll 8") for (int key = 0; key < BLOCK; key++) {
            s[key] += q * keys[key * dim + i];
            if (changes) {
                change[key] += moved * keys[key * dim + i];
                change[key] += q * tangents[key * dim + i];
            }
        }
    }
    for (int key = 0; key < BLOCK; key++) {
        to[2 * key] = s[key];
        to[2 * key + 1] = change[key];
    }
}

// Adds the values of `count` rows to the sums [2][dim], after what `soften_lanes` wants done with these.
INLINE void add_block_values(const int dim, const int changes, int64_t count, const lanes *scores, const float *values,
                             const float *tangents, lanes scale, lanes shift, lanes *sums) {
    for (int start = 0; start < dim; start += BLOCK) {
        lanes o[BLOCK], tangent[BLOCK];
        _Pragma("GCC unroll 8") for (int i = 0; i < BLOCK; i++) {
            o[i] = sums[start + i] * scale;
            tangent[i] = sums[dim + start + i] * scale + o[i] * shift;
        }
        for (int64_t key = 0; key < count; key++) {
            const lanes weight = scores[2 * key], change = scores[2 * key + 1];
            const float *v = values + key * dim + start, *w = tangents + key * dim + start;
            _Pragma("GCC unroll 8") for (int i = 0; i < BLOCK; i++) {
                o[i] += weight * v[i];
                if (changes) tangent[i] += change * v[i];
                tangent[i] += weight * w[i];
            }
        }
        _Pragma("GCC unroll 8") for (int i = 0; i < BLOCK; i++) {
            sums[start + i] = o[i];
            sums[dim + start + i] = tangent[i];
        }
    }
}

// As `soften` of paged_token.h, each lane by itself; scores [count][2]. A lane that has seen no key yet has only scores
// of -inf, and what was hidden changes no bit.
static void soften_lanes(Queries *so_far, float *scores, int64_t count, float ratio, float *scale, float *shift) {
    float highest[LANES], base[LANES], total[LANES] = {0}, moved[LANES] = {0};
    memcpy(highest, so_far->highest, sizeof highest);
    for (int64_t key = 0; key < count; key++) {
        const float *s = scores + 2 * key * LANES;
#pragma omp simd
        for (int i = 0; i < LANES; i++) highest[i] = s[i] > highest[i] ? s[i] : highest[i];
    }
#pragma omp simd
    for (int i = 0; i < LANES; i++) base[i] = highest[i] == -INFINITY ? 0 : highest[i];
    for (int64_t key = 0; key < count; key++) {
        float *s = scores + 2 * key * LANES, *change = s + LANES;
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            s[i] = exponential(s[i] - base[i]);
            total[i] += s[i];
            moved[i] += s[i] * (change[i] - so_far->mean[i]);
        }
    }
#pragma omp simd
    for (int i = 0; i < LANES; i++) {
        scale[i] = exponential(so_far->highest[i] - base[i]);
        so_far->highest[i] = highest[i];
        so_far->total[i] = so_far->total[i] * scale[i] + total[i];
        const float step = so_far->total[i] == 0 ? 0 : moved[i] / so_far->total[i];
        so_far->mean[i] += step;
        shift[i] = -ratio * step;
    }
    for (int64_t key = 0; key < count; key++) {
        const float *s = scores + 2 * key * LANES;
        float *change = scores + (2 * key + 1) * LANES;
#pragma omp simd
        for (int i = 0; i < LANES; i++) change[i] = ratio * s[i] * (change[i] - so_far->mean[i]);
    }
}

// Scores of `count` keys from `key` on that a query does not see become -inf, their tangents 0.
static void hide(const Queries *queries, int64_t key, int64_t count, int64_t window, float *scores) {
    for (int64_t i = 0; i < count; i++) {
        float *s = scores + 2 * i * LANES, *change = s + LANES;
        const int32_t last = key + i, first = window ? last + window : INT32_MAX;
#pragma omp simd
        for (int lane = 0; lane < LANES; lane++) {
            const int hidden = queries->positions[lane] < last || queries->positions[lane] >= first;
            s[lane] = hidden ? -INFINITY : s[lane];
            change[lane] = hidden ? 0 : change[lane];
        }
    }
}

// Rows of one plane of the keys [from, to) as floats, their elements in the order of `element`.
INLINE void read_plane(const int dim, const int half, const Cache *cache, const Sequence *sequence, int64_t head,
                       int64_t plane, int64_t from, int64_t to, float *tile) {
    for (int64_t key = from; key < to;) {
        const int64_t page_end = (key / cache->block_size + 1) * cache->block_size, end = to < page_end ? to : page_end;
        int64_t at = place_of(cache, sequence, head, key) + plane * cache->plane;
        for (; key < end; key++, at += cache->token)
            UNROLL for (int part = 0; part < dim; part += PAIR(dim) * LANES, tile += PAIR(dim) * LANES)
                fetch(half, PAIR(dim), cache->data, at + part, (lanes *)tile);
    }
}

// Keys [from, to) of the tile for one vector of queries.
INLINE void attend_block(const int dim, const Layer *layer, int64_t tile_start, int64_t from, int64_t to,
                         const float *const planes[4], Queries *queries, const lanes *heads, lanes *scores,
                         lanes *sums) {
    const int64_t first = (from - tile_start) * dim, window = layer->window;
    const int changes = layer->score_factor != 0;
    lanes scale, shift;
    for (int64_t key = 0; key < to - from; key += BLOCK) {
        const float *k = planes[0] + first + key * dim, *tangents = planes[1] + first + key * dim;
        if (changes)
            score_block(dim, 1, heads, k, tangents, scores + 2 * key);
        else
            score_block(dim, 0, heads, k, tangents, scores + 2 * key);
    }
    if (to - 1 > queries->first || (window && from <= queries->last - window))
        hide(queries, from, to - from, window, (float *)scores);
    soften_lanes(queries, (float *)scores, to - from, layer->score_factor / layer->value_factor, (float *)&scale,
                 (float *)&shift);
    if (changes)
        add_block_values(dim, 1, to - from, scores, planes[2] + first, planes[3] + first, scale, shift, sums);
    else
        add_block_values(dim, 0, to - from, scores, planes[2] + first, planes[3] + first, scale, shift, sums);
}

// Floats of the workspace of `attend_tokens` for so many queries.
static int64_t prompt_floats(int64_t dim, int64_t num_queries) {
    const int64_t vectors = (num_queries + LANES - 1) / LANES, rows = PROMPT_TILE + BLOCK;
    return vectors * (sizeof(Queries) / sizeof(float) + 4 * dim * LANES) + rows * (2 * LANES + 4 * dim);
}

// `count` new tokens from `start` on, all heads of one group.
INLINE void attend_tokens(const int dim, const Call *call, const Sequence *sequence, int64_t kv_head, int64_t start,
                          int64_t count, float *workspace) {
    const Layer *layer = call->layer;
    const int64_t group = layer->heads / layer->kv_heads, window = layer->window, before = sequence->length + start;
    const int64_t num_queries = count * group, vectors = (num_queries + LANES - 1) / LANES;
    const int64_t num_planes = value_plane(layer) + 2, rows = PROMPT_TILE + BLOCK;
    const int half = call->cache->half;
    lanes *const heads = (lanes *)workspace, *const sums = heads + vectors * 2 * dim;
    lanes *const scores = sums + vectors * 2 * dim;
    float *const tile = (float *)(scores + rows * 2);
    Queries *const queries = (Queries *)(tile + 4 * rows * dim);
    const float *const planes[4] = {tile, tile + rows * dim, tile + (num_planes - 2) * rows * dim,
                                    tile + (num_planes - 1) * rows * dim};
    float head[2 * dim];

    memset(heads, 0, vectors * 4 * dim * sizeof(lanes));
    memset(queries, 0, vectors * sizeof(Queries));
    for (int64_t i = 0; i < vectors * LANES; i++) {
        // Lanes without a query are as the last one, but see nothing of it.
        const int64_t query = i < num_queries ? i : num_queries - 1, lane = i % LANES;
        Queries *at = queries + i / LANES;
        at->highest[lane] = -INFINITY;
        at->positions[lane] = at->last = before + query / group;
        if (lane == 0) at->first = at->last;
        if (i >= num_queries) continue;
        read_query(dim, call, sequence->row + start + query / group, kv_head * group + query % group, head);
        float *to = (float *)(heads + i / LANES * 2 * dim) + lane;
        for (int64_t part = 0; part < value_plane(layer) * dim / LANES; part++)
            UNROLL for (int j = 0; j < LANES; j++, to += LANES) *to = head[element(dim, half, part, j)];
    }
    for (int64_t key = window && before + 1 > window ? before + 1 - window : 0; key < before + count;) {
        const int64_t tile_end = (key / PROMPT_TILE + 1) * PROMPT_TILE;
        const int64_t end = before + count < tile_end ? before + count : tile_end;
        for (int64_t plane = 0; plane < num_planes; plane++) {
            float *const to = tile + plane * rows * dim;
            if (half)
                read_plane(dim, 1, call->cache, sequence, kv_head, plane, key, end, to);
            else
                read_plane(dim, 0, call->cache, sequence, kv_head, plane, key, end, to);
        }
        for (int64_t i = 0; i < vectors; i++) {
            const int64_t first = window ? queries[i].first + 1 - window : 0, last = queries[i].last + 1;
            const int64_t from = first > key ? first : key, to = last < end ? last : end, at = i * 2 * dim;
            if (from < to)
                attend_block(dim, layer, key, from, to, planes, queries + i, heads + at, scores, sums + at);
        }
        key = end;
    }
    for (int64_t i = 0; i < num_queries; i++) {
        const float *from = (float *)(sums + i / LANES * 2 * dim) + i % LANES;
        const float scale = 1 / queries[i / LANES].total[i % LANES], factors[2] = {scale, scale * layer->value_factor};
        for (int part = 0; part < 2 * dim / LANES; part++)
            UNROLL for (int j = 0; j < LANES; j++, from += LANES)
                head[element(dim, half, part, j)] = *from * factors[part / (dim / LANES)];
        write_head(dim, call, sequence->row + start + i / group, kv_head * group + i % group, head);
    }
}

#endif
