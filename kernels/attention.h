// What the attentions of a CPU share: sums over the lanes of vectors.

#ifndef AGD_ATTENTION_H
#define AGD_ATTENTION_H

#include "lanes.h"

// Keys that a query meets at once.
#define KEYS 8

// Lanes of a and b, those of b counted on from LANES.
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t indices __attribute__((vector_size(4 * LANES)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (indices){__VA_ARGS__})
#endif

// Sums of neighbouring lanes: those of `a` in the first half, those of `b` in the second.
static inline lanes pair_sums(lanes a, lanes b) {
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// The sum over the lanes of each of KEYS vectors.
static inline void store_sums(const lanes x[KEYS], float to[KEYS]) {
    const lanes low = pair_sums(pair_sums(x[0], x[1]), pair_sums(x[2], x[3]));
    const lanes high = pair_sums(pair_sums(x[4], x[5]), pair_sums(x[6], x[7]));
    const lanes pairs = pair_sums(low, high), sums = pair_sums(pairs, pairs);
    memcpy(to, &sums, KEYS * sizeof(float));
}

#endif
