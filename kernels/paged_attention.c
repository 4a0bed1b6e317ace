// Softmax attention of paged sequences and of their tangents on a CPU: one call for one layer of a mixed batch.
// kernels/paged_attention.py says what the arguments hold; agd_vllm/attribution/paged_twin.py is its twin.

#include <stdlib.h>

#include "paged.h"
#include "paged_prompt.h"
#include "paged_token.h"

typedef struct {
    const Sequence *sequence;
    int64_t start, count;
} Task;

// The new tokens of the batch in tasks of at most `size`, those that take longest first; gives their number.
static int64_t share_out(const Batch *batch, int64_t size, Task *tasks) {
    int64_t num_tasks = 0;
    for (int64_t i = 0; i < batch->num_sequences; i++) {
        const Sequence *sequence = batch->sequences + i;
        for (int64_t end = sequence->count; sequence->count > 1 && end > 0;) {
            const int64_t start = (end - 1) / size * size;
            tasks[num_tasks++] = (Task){sequence, start, end - start};
            end = start;
        }
    }
    for (int64_t i = 0; i < batch->num_sequences; i++)
        if (batch->sequences[i].count == 1) tasks[num_tasks++] = (Task){batch->sequences + i, 0, 1};
    return num_tasks;
}

// A new row's keys and values of both streams to their place in the cache, if they have one.
INLINE void append(const int dim, const Call *call, int64_t row) {
    const Layer *layer = call->layer;
    const Cache *cache = call->cache;
    const int64_t slot = call->batch->slots[row], first_value = value_plane(layer);
    if (slot < 0) return;
    const int64_t place = slot / cache->block_size * cache->block + slot % cache->block_size * cache->token;
    float x[2 * dim];
    for (int64_t head = 0; head < layer->kv_heads; head++) {
        const int64_t at = place + head * cache->head;
        read_head(dim, call, row, layer->heads + head, layer->key_gain, 1, x);
        for (int64_t plane = 0; plane < first_value; plane++)
            write_row(cache->data, cache->half, at + plane * cache->plane, dim, x + plane * dim);
        for (int64_t stream = 0; stream < 2; stream++) {
            const int64_t line = (stream * call->batch->rows + row) * (layer->heads + 2 * layer->kv_heads);
            read_row(call->qkv, call->half, (line + layer->heads + layer->kv_heads + head) * dim, dim, x);
            write_row(cache->data, cache->half, at + (first_value + stream) * cache->plane, dim, x);
        }
    }
}

// What no sequence has is 0.
static void clear(const Call *call, int64_t row) {
    const int64_t bytes = call->layer->heads * call->layer->dim * (call->half ? 2 : 4);
    for (int64_t stream = 0; stream < 2; stream++)
        memset((char *)call->out + (stream * call->batch->rows + row) * bytes, 0, bytes);
}

// The compiler makes code of its own for each size of a head.
#define SIZES(CASE) CASE(16) CASE(32) CASE(64) CASE(96) CASE(128) CASE(256)
#define DEFINE(dim)                                                                                           \
    static void attend_##dim(const Call *call, const Task *task, int64_t kv_head, float *workspace) {         \
        if (task->sequence->count > 1)                                                                        \
            attend_tokens(dim, call, task->sequence, kv_head, task->start, task->count, workspace);           \
        else if (call->cache->half)                                                                           \
            attend_token(dim, 1, call, task->sequence, kv_head, workspace);                                   \
        else                                                                                                  \
            attend_token(dim, 0, call, task->sequence, kv_head, workspace);                                   \
    }                                                                                                         \
    static void append_##dim(const Call *call, int64_t row) { append(dim, call, row); }
SIZES(DEFINE)

// Returns 0; 1 for a head size that it has no code for; 2 where memory is short.
int agd_paged_attention(const Call *call) {
    void (*append_row)(const Call *, int64_t) = NULL;
    void (*attend)(const Call *, const Task *, int64_t, float *) = NULL;
#define CHOOSE(dim)                \
    case dim:                      \
        append_row = append_##dim; \
        attend = attend_##dim;     \
        break;
    switch (call->layer->dim) { SIZES(CHOOSE) }
    if (!attend) return 1;
    const Batch *batch = call->batch;
    const int64_t group = call->layer->heads / call->layer->kv_heads, dim = call->layer->dim;
    const int64_t size = VECTORS * LANES > group ? VECTORS * LANES / group : 1;
    const int64_t for_prompts = prompt_floats(dim, size * group), for_tokens = group * (4 * dim + 3);
    const int64_t bytes = (for_prompts > for_tokens ? for_prompts : for_tokens) * sizeof(float);
    int64_t used = 0;
    for (int64_t i = 0; i < batch->num_sequences; i++) used += batch->sequences[i].count;
    Task *tasks = malloc((used + 1) * sizeof(Task));
    if (!tasks) return 2;
    const int64_t num_tasks = share_out(batch, size, tasks);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        // Vectors that lie across two lines of the cache are slower.
        float *workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
        failed = workspace == NULL;
#pragma omp for
        for (int64_t row = 0; row < batch->rows; row++) {
            append_row(call, row);
            if (row >= used) clear(call, row);
        }
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t task = 0; task < num_tasks; task++)
            for (int64_t head = 0; head < call->layer->kv_heads; head++)
                if (!failed) attend(call, tasks + task, head, workspace);
        free(workspace);
    }
    free(tasks);
    return failed ? 2 : 0;
}
