// The paged attention of one new token: keys and values are read straight from the cache, once for a group's heads.

#ifndef AGD_PAGED_TOKEN_H
#define AGD_PAGED_TOKEN_H

#include "attention.h"
#include "paged.h"

// Keys whose scores are held at once; their rows stay in the caches while the heads of a group take turns.
#define TOKEN_TILE 128
// Heads that meet a row while it lies in registers.
#define TOGETHER 4
// Rows that are fetched ahead.
#define AHEAD 16

// Over the keys so far: the highest score, the sum of exp(score - highest), the mean of the scores' tangents under it.
typedef struct {
    float highest, total, mean;
} Softmax;

// What the heads of one group have: queries and sums of values are [2][dim] of each.
typedef struct {
    const Call *call;
    const Sequence *sequence;
    int64_t kv_head;
    lanes *queries, *sums;
    Softmax *states;
} Group;

// As `fetch`, and asks for what lies AHEAD rows further.
INLINE void fetch_ahead(const int half, const int pair, const Cache *cache, int64_t from, lanes to[2]) {
    const char *next = (const char *)cache->data + (from + AHEAD * cache->token) * (half ? 2 : 4);
    __builtin_prefetch(next);
    if (!half && pair == 2) __builtin_prefetch(next + 64);
    fetch(half, pair, cache->data, from, to);
}

// Scores, and their tangents where `changes`, of KEYS rows of `parts` vectors from `at` on for `heads` queries.
INLINE void score_rows(const int half, const int width, const int heads, const int changes, const Cache *cache,
                       int64_t at, int64_t parts, const lanes *queries, float *scores) {
    const int pair = width > 1 ? 2 : 1;
    lanes sums[TOGETHER][2][KEYS];
    for (int key = 0; key < KEYS; key++, at += cache->token) {
        lanes s[TOGETHER] = {0}, through_query[TOGETHER] = {0}, through_key[TOGETHER] = {0};
        for (int64_t first = 0; first < parts; first += width) UNROLL for (int part = 0; part < width; part += pair) {
            const int64_t from = at + (first + part) * LANES;
            lanes k[2], tangent[2];
            fetch_ahead(half, pair, cache, from, k);
            if (changes) fetch_ahead(half, pair, cache, from + cache->plane, tangent);
            UNROLL for (int i = 0; i < pair; i++) UNROLL for (int head = 0; head < heads; head++) {
                const lanes *q = queries + head * 2 * parts + first + part + i;
                s[head] += q[0] * k[i];
                if (changes) {
                    through_query[head] += q[parts] * k[i];
                    through_key[head] += q[0] * tangent[i];
                }
            }
        }
        UNROLL for (int head = 0; head < heads; head++) {
            sums[head][0][key] = s[head];
            sums[head][1][key] = through_query[head] + through_key[head];
        }
    }
    UNROLL for (int head = 0; head < heads; head++) {
        store_sums(sums[head][0], scores + head * 2 * TOKEN_TILE);
        if (changes) store_sums(sums[head][1], scores + (head * 2 + 1) * TOKEN_TILE);
    }
}

// Scores and their tangents of more keys become weights of v (and v') and of v alone, `ratio` times the latter. Sums
// over earlier keys are to be multiplied by `scale`, after `shift` times those of v are added to those of the tangent.
static void soften(Softmax *so_far, float *restrict scores, float *restrict changes, int64_t count, float ratio,
                   float *scale, float *shift) {
    float highest = so_far->highest, total = 0, moved = 0;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < count; i++) highest = scores[i] > highest ? scores[i] : highest;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; i++) {
        scores[i] = exponential(scores[i] - highest);
        total += scores[i];
    }
    *scale = exponential(so_far->highest - highest);
    so_far->highest = highest;
    so_far->total = so_far->total * *scale + total;
    *shift = 0;
    if (ratio == 0) return;
#pragma omp simd reduction(+ : moved)
    for (int64_t i = 0; i < count; i++) moved += scores[i] * (changes[i] - so_far->mean);
    moved /= so_far->total;
    so_far->mean += moved;
    *shift = -ratio * moved;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) changes[i] = ratio * scores[i] * (changes[i] - so_far->mean);
}

// Adds the values of `count` rows from `at` on, all in one page, to the sums of each head: those of `width` vectors of
// a row stay in registers.
INLINE void add_values(const int half, const int width, const int heads, const int changes, const Cache *cache,
                       int64_t at, int64_t count, int64_t parts, const float *scores, lanes *sums) {
    const int pair = width > 1 ? 2 : 1;
    for (int64_t first = 0; first < parts; first += width) {
        lanes o[TOGETHER][2][4];
        UNROLL for (int head = 0; head < heads; head++) UNROLL for (int stream = 0; stream < 2; stream++)
            UNROLL for (int part = 0; part < width; part++)
                o[head][stream][part] = sums[(head * 2 + stream) * parts + first + part];
        int64_t row = at + first * LANES;
        for (int64_t key = 0; key < count; key++, row += cache->token)
            UNROLL for (int part = 0; part < width; part += pair) {
                lanes v[2], tangent[2];
                fetch_ahead(half, pair, cache, row + part * LANES, v);
                fetch_ahead(half, pair, cache, row + cache->plane + part * LANES, tangent);
                UNROLL for (int i = 0; i < pair; i++) UNROLL for (int head = 0; head < heads; head++) {
                    const float *weights = scores + head * 2 * TOKEN_TILE + key;
                    o[head][0][part + i] += weights[0] * v[i];
                    o[head][1][part + i] += weights[0] * tangent[i];
                    if (changes) o[head][1][part + i] += weights[TOKEN_TILE] * v[i];
                }
            }
        UNROLL for (int head = 0; head < heads; head++) UNROLL for (int stream = 0; stream < 2; stream++)
            UNROLL for (int part = 0; part < width; part++)
                sums[(head * 2 + stream) * parts + first + part] = o[head][stream][part];
    }
}

// Keys [from, to), none of them before the tile, for `heads` heads of a group from `query` on.
INLINE void attend_heads(const int half, const int width, const int heads, const int changes, const Group *group,
                         int64_t query, int64_t from, int64_t to) {
    const Cache *cache = group->call->cache;
    const Layer *layer = group->call->layer;
    const int64_t parts = layer->dim / LANES, start = from / KEYS * KEYS;
    lanes *const queries = group->queries + query * 2 * parts, *const sums = group->sums + query * 2 * parts;
    float scores[TOGETHER * 2 * TOKEN_TILE];
    for (int64_t key = start; key < to; key += KEYS) {
        const int64_t at = place_of(cache, group->sequence, group->kv_head, key);
        score_rows(half, width, heads, changes, cache, at, parts, queries, scores + key - start);
    }
    float *const seen = scores + from - start;
    for (int head = 0; head < heads; head++) {
        float *weights = seen + head * 2 * TOKEN_TILE, scale, shift;
        lanes *o = sums + head * 2 * parts, *tangent = o + parts;
        soften(group->states + query + head, weights, weights + TOKEN_TILE, to - from,
               layer->score_factor / layer->value_factor, &scale, &shift);
        for (int64_t part = 0; part < parts; part++) {
            tangent[part] = scale * (tangent[part] + shift * o[part]);
            o[part] *= scale;
        }
    }
    for (int64_t key = from; key < to;) {
        const int64_t page_end = (key / cache->block_size + 1) * cache->block_size, end = to < page_end ? to : page_end;
        const int64_t at = place_of(cache, group->sequence, group->kv_head, key) + value_plane(layer) * cache->plane;
        add_values(half, width, heads, changes, cache, at, end - key, parts, seen + key - from, sums);
        key = end;
    }
}

// Code for each number of heads, kind of cache and width of `add_values`; head sizes share it.
#define HEADS(half, width, count)                                                \
    case count:                                                                  \
        if (group->call->layer->score_factor != 0)                               \
            attend_heads(half, width, count, 1, group, query, from, to);         \
        else                                                                     \
            attend_heads(half, width, count, 0, group, query, from, to);         \
        break;
#define DEFINE(name, half, width)                                                                             \
    static void name(const Group *group, int64_t heads, int64_t query, int64_t from, int64_t to) {            \
        switch (heads) {                                                                                      \
            HEADS(half, width, 1) HEADS(half, width, 2) HEADS(half, width, 3) HEADS(half, width, 4)           \
        }                                                                                                     \
    }
DEFINE(attend_floats_by_1, 0, 1)
DEFINE(attend_floats_by_2, 0, 2)
DEFINE(attend_floats_by_4, 0, 4)
DEFINE(attend_halves_by_1, 1, 1)
DEFINE(attend_halves_by_2, 1, 2)
DEFINE(attend_halves_by_4, 1, 4)
#undef DEFINE

INLINE void attend_token(const int dim, const int half, const Call *call, const Sequence *sequence, int64_t kv_head,
                         float *workspace) {
    const Layer *layer = call->layer;
    const int64_t heads = layer->heads / layer->kv_heads, end = sequence->length + 1, window = layer->window;
    const int parts = dim / LANES;
    lanes *const queries = (lanes *)workspace, *const sums = queries + heads * 2 * parts;
    const Group group = {call, sequence, kv_head, queries, sums, (Softmax *)(sums + heads * 2 * parts)};
    float head[2 * dim];
    for (int64_t query = 0; query < heads; query++) {
        read_query(dim, call, sequence->row, kv_head * heads + query, head);
        for (int part = 0; part < value_plane(layer) * parts; part++)
            for (int lane = 0; lane < LANES; lane++)
                queries[query * 2 * parts + part][lane] = head[element(dim, half, part, lane)];
        group.states[query] = (Softmax){-INFINITY, 0, 0};
    }
    memset(sums, 0, heads * 2 * dim * sizeof(float));
    for (int64_t from = window && end > window ? end - window : 0; from < end;) {
        const int64_t tile_end = (from / TOKEN_TILE + 1) * TOKEN_TILE, to = end < tile_end ? end : tile_end;
        for (int64_t query = 0; query < heads;) {
            // 5 heads are 3 and 2, not 4 and 1.
            const int64_t left = heads - query, evenly = left < 2 * TOGETHER ? (left + 1) / 2 : TOGETHER;
            const int64_t count = left <= TOGETHER ? left : evenly;
            if (parts % 4 == 0)
                (half ? attend_halves_by_4 : attend_floats_by_4)(&group, count, query, from, to);
            else if (parts % 2 == 0)
                (half ? attend_halves_by_2 : attend_floats_by_2)(&group, count, query, from, to);
            else
                (half ? attend_halves_by_1 : attend_floats_by_1)(&group, count, query, from, to);
            query += count;
        }
        from = to;
    }
    for (int64_t query = 0; query < heads; query++) {
        const lanes *o = sums + query * 2 * parts;
        const float scale = 1 / group.states[query].total, factors[2] = {scale, scale * layer->value_factor};
        for (int part = 0; part < 2 * parts; part++)
            for (int lane = 0; lane < LANES; lane++)
                head[element(dim, half, part, lane)] = o[part][lane] * factors[part / parts];
        write_head(dim, call, sequence->row, kv_head * heads + query, head);
    }
}

#endif
