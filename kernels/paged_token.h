// The paged attention of one new token: keys and values are read straight from the cache, once for all heads of a group.

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

#define UNROLL _Pragma("GCC unroll 16")

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(2), may_alias));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

// Over the keys so far: the highest score, the sum of exp(score - highest), the mean of the scores' tangents under it.
typedef struct {
    float highest, total, mean;
} Softmax;

// Vectors of a row that are fetched together, and where lane `lane` of vector `part` lies in the row: of bfloat16, two
// vectors are the even and the odd elements.
#define PAIR(dim) ((dim) >= 2 * LANES ? 2 : 1)

INLINE int element(const int dim, const int half, int part, int lane) {
    return half && PAIR(dim) == 2 ? part / 2 * 2 * LANES + 2 * lane + part % 2 : part * LANES + lane;
}

INLINE void fetch(const int dim, const int half, const void *data, int64_t from, int64_t stride, lanes to[2]) {
    const char *at = (const char *)data + from * (half ? 2 : 4);
    __builtin_prefetch(at + AHEAD * stride * (half ? 2 : 4));
    if (!half && PAIR(dim) == 2) __builtin_prefetch(at + AHEAD * stride * 4 + 64);
    if (!half) {
        UNROLL for (int i = 0; i < PAIR(dim); i++) to[i] = load((const float *)at + i * LANES);
    } else if (PAIR(dim) == 2) {
        const words both = *(const words *)at;
        to[0] = (lanes)(both << 16);
        to[1] = (lanes)(both & 0xffff0000);
    } else
        to[0] = (lanes)(__builtin_convertvector(*(const halves *)at, words) << 16);
}

// Scores, and their tangents where `changes`, of KEYS rows from `at` on for `heads` queries [2][dim].
INLINE void score_rows(const int dim, const int half, const int heads, const int changes, const Cache *cache, int64_t at,
                       const lanes *queries, float *scores) {
    lanes sums[TOGETHER][2][KEYS];
    for (int key = 0; key < KEYS; key++, at += cache->token) {
        lanes s[TOGETHER] = {0}, through_query[TOGETHER] = {0}, through_key[TOGETHER] = {0};
        UNROLL for (int part = 0; part < dim / LANES; part += PAIR(dim)) {
            lanes k[2], tangent[2];
            fetch(dim, half, cache->data, at + part * LANES, cache->token, k);
            if (changes) fetch(dim, half, cache->data, at + cache->plane + part * LANES, cache->token, tangent);
            UNROLL for (int i = 0; i < PAIR(dim); i++) UNROLL for (int head = 0; head < heads; head++) {
                const lanes *q = queries + head * 2 * (dim / LANES) + part + i;
                s[head] += q[0] * k[i];
                if (changes) {
                    through_query[head] += q[dim / LANES] * k[i];
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

// Adds the values of `count` rows from `at` on, all in one page, to the sums [2][dim] of each head.
INLINE void add_values(const int dim, const int half, const int heads, const int changes, const Cache *cache, int64_t at,
                       int64_t count, const float *scores, lanes *sums) {
    // So many vectors of a row that their sums fit into registers.
    enum { width = 4 };
    const int step = dim / LANES % width == 0 && heads < TOGETHER ? width : PAIR(dim);
    for (int first = 0; first < dim / LANES; first += step) {
        lanes o[TOGETHER][2][width];
        UNROLL for (int head = 0; head < heads; head++) UNROLL for (int stream = 0; stream < 2; stream++)
            UNROLL for (int part = 0; part < step; part++)
                o[head][stream][part] = sums[(head * 2 + stream) * (dim / LANES) + first + part];
        int64_t row = at + first * LANES;
        for (int64_t key = 0; key < count; key++, row += cache->token) {
            UNROLL for (int part = 0; part < step; part += PAIR(dim)) {
                lanes v[2], tangent[2];
                fetch(dim, half, cache->data, row + part * LANES, cache->token, v);
                fetch(dim, half, cache->data, row + cache->plane + part * LANES, cache->token, tangent);
                UNROLL for (int i = 0; i < PAIR(dim); i++) UNROLL for (int head = 0; head < heads; head++) {
                    const float *weights = scores + head * 2 * TOKEN_TILE + key;
                    o[head][0][part + i] += weights[0] * v[i];
                    o[head][1][part + i] += weights[0] * tangent[i];
                    if (changes) o[head][1][part + i] += weights[TOKEN_TILE] * v[i];
                }
            }
        }
        UNROLL for (int head = 0; head < heads; head++) UNROLL for (int stream = 0; stream < 2; stream++)
            UNROLL for (int part = 0; part < step; part++)
                sums[(head * 2 + stream) * (dim / LANES) + first + part] = o[head][stream][part];
    }
}

// Keys [from, to) for `heads` heads of a group; `from` is the first that they see of its KEYS.
INLINE void attend_tile(const int dim, const int half, const int heads, const int changes, const Call *call,
                        const Sequence *sequence, int64_t kv_head, int64_t from, int64_t to, const lanes *queries,
                        Softmax *states, lanes *sums) {
    const Cache *cache = call->cache;
    const Layer *layer = call->layer;
    float scores[TOGETHER * 2 * TOKEN_TILE];
    const int64_t start = from / KEYS * KEYS;
    for (int64_t key = start; key < to; key += KEYS)
        score_rows(dim, half, heads, changes, cache, place_of(cache, sequence, kv_head, key), queries, scores + key - start);
    float *const seen = scores + from - start;
    for (int head = 0; head < heads; head++) {
        float *weights = seen + head * 2 * TOKEN_TILE, scale, shift;
        lanes *o = sums + head * 2 * (dim / LANES), *tangent = o + dim / LANES;
        soften(states + head, weights, weights + TOKEN_TILE, to - from, layer->score_factor / layer->value_factor, &scale,
               &shift);
        for (int part = 0; part < dim / LANES; part++) {
            tangent[part] = scale * (tangent[part] + shift * o[part]);
            o[part] *= scale;
        }
    }
    for (int64_t key = from; key < to;) {
        const int64_t page_end = (key / cache->block_size + 1) * cache->block_size, end = to < page_end ? to : page_end;
        const int64_t at = place_of(cache, sequence, kv_head, key) + value_plane(layer) * cache->plane;
        add_values(dim, half, heads, changes, cache, at, end - key, seen + key - from, sums);
        key = end;
    }
}

INLINE void attend_token(const int dim, const int half, const Call *call, const Sequence *sequence, int64_t kv_head,
                         float *workspace) {
    const Layer *layer = call->layer;
    const int64_t group = layer->heads / layer->kv_heads, end = sequence->length + 1, window = layer->window;
    lanes *const queries = (lanes *)workspace, *const sums = queries + group * 2 * (dim / LANES);
    Softmax *const states = (Softmax *)(sums + group * 2 * (dim / LANES));
    float head[2 * dim];
    for (int64_t query = 0; query < group; query++) {
        read_query(call, sequence->row, kv_head * group + query, head);
        for (int part = 0; part < 2 * dim / LANES; part++)
            for (int lane = 0; lane < LANES; lane++)
                queries[query * 2 * (dim / LANES) + part][lane] = head[element(dim, half, part, lane)];
        states[query] = (Softmax){-INFINITY, 0, 0};
    }
    memset(sums, 0, group * 2 * dim * sizeof(float));
    for (int64_t from = window && end > window ? end - window : 0; from < end;) {
        const int64_t tile_end = (from / TOKEN_TILE + 1) * TOKEN_TILE, to = end < tile_end ? end : tile_end;
        for (int64_t query = 0; query < group;) {
            const int64_t left = group - query, at = query * 2 * (dim / LANES);
            // 5 heads are 3 and 2, not 4 and 1.
            const int64_t heads = left <= TOGETHER ? left : left < 2 * TOGETHER ? (left + 1) / 2 : TOGETHER;
#define HEADS(count, changes)                                                                                          \
    attend_tile(dim, half, count, changes, call, sequence, kv_head, from, to, queries + at, states + query, sums + at)
#define CASE(count)                                               \
    case count:                                                   \
        if (layer->score_factor != 0)                             \
            HEADS(count, 1);                                      \
        else                                                      \
            HEADS(count, 0);                                      \
        break
            switch (heads) {
                CASE(1);
                CASE(2);
                CASE(3);
                CASE(4);
            }
#undef CASE
#undef HEADS
            query += heads;
        }
        from = to;
    }
    for (int64_t query = 0; query < group; query++) {
        const lanes *o = sums + query * 2 * (dim / LANES);
        for (int part = 0; part < 2 * dim / LANES; part++)
            for (int lane = 0; lane < LANES; lane++)
                head[element(dim, half, part, lane)] =
                    o[part][lane] * ((part < dim / LANES ? 1 : layer->value_factor) / states[query].total);
        write_head(call, sequence->row, kv_head * group + query, head);
    }
}

#endif
