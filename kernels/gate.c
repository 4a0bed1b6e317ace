// The gate on a CPU: each row of float logits is read twice, by one thread, and stays in its cache in between.
// kernels/gate.py says what the arguments hold and has the twin.

#include <math.h>

#include "lanes.h"

// Tokens whose highest logit says whether a candidate can be among them.
#define TILE 256

static float highest_of(const float *x, int64_t count) {
    float highest = -INFINITY;
#pragma omp simd reduction(max : highest)
    for (int64_t i = 0; i < count; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
}

// Tiles are summed up in double precision: a vocabulary has many small terms.
static void measure(const float *x, int64_t vocab, float *entropy, float *log_sum_exp) {
    const float highest = highest_of(x, vocab);
    double total = 0, weighted = 0;
    for (int64_t start = 0; start < vocab; start += TILE) {
        const int64_t count = vocab - start < TILE ? vocab - start : TILE;
        float sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
        for (int64_t i = start; i < start + count; i++) {
            const float z = x[i] - highest, e = exponential(z);
            sum += e;
            // exp(-1e4) is 0: the bound changes nothing but 0 * -inf, which would be NaN.
            product += (z < -1e4f ? -1e4f : z) * e;
        }
        total += sum;
        weighted += product;
    }
    *entropy = log(total) - weighted / total;
    *log_sum_exp = highest + log(total);
}

// The `top_k` most probable tokens in descending order, the lower id first among equals; gives their number.
static int32_t find_candidates(const float *x, int64_t vocab, int64_t pause, int64_t top_k, float min_prob,
                               float log_sum_exp, int32_t *ids) {
    int32_t count = 0;
    // The highest logit known to be too low: a floor of 0 lets in all but what is impossible.
    float unlikely = -INFINITY;
    for (int64_t start = 0; start < vocab; start += TILE) {
        const int64_t end = vocab - start < TILE ? vocab : start + TILE;
        const float highest = highest_of(x + start, end - start);
        if (!(highest > unlikely) || (count == top_k && !(highest > x[ids[top_k - 1]]))) continue;
        for (int64_t i = start; i < end; i++) {
            if (i == pause || !(x[i] > unlikely) || (count == top_k && !(x[i] > x[ids[top_k - 1]]))) continue;
            if (!(expf(x[i] - log_sum_exp) >= min_prob)) {
                unlikely = x[i];
                continue;
            }
            int64_t place = count < top_k ? count++ : top_k - 1;
            for (; place > 0 && x[ids[place - 1]] < x[i]; place--) ids[place] = ids[place - 1];
            ids[place] = i;
        }
    }
    return count;
}

// Outputs [num_rows] and [num_rows, top_k]; `pause` [num_rows] or none, its logits are then left as they are.
void agd_gate(float *logits, int64_t stride, int64_t vocab, const int64_t *rows, int64_t num_rows, const float *tau,
              int64_t top_k, const float *min_prob, const int64_t *pause, float *entropy, float *log_sum_exp,
              uint8_t *open, int32_t *ids, float *probs, int32_t *counts) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t row = 0; row < num_rows; row++) {
        float *x = logits + rows[row] * stride, *row_probs = probs + row * top_k;
        int32_t *row_ids = ids + row * top_k, count = 0;
        measure(x, vocab, entropy + row, log_sum_exp + row);
        if (entropy[row] >= tau[row])
            count = find_candidates(x, vocab, pause ? pause[row] : -1, top_k, min_prob[row], log_sum_exp[row], row_ids);
        for (int64_t i = 0; i < top_k; i++) {
            if (i >= count) row_ids[i] = -1;
            row_probs[i] = i < count ? expf(x[row_ids[i]] - log_sum_exp[row]) : 0;
        }
        counts[row] = count;
        open[row] = count >= 2;
        if (pause) x[pause[row]] = count >= 2 ? 3.40282347e38f : -INFINITY;
    }
}
