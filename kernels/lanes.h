// What the kernels of a CPU share: vectors as the compiler knows them, and exp.

#ifndef AGD_LANES_H
#define AGD_LANES_H

#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE __attribute__((always_inline)) static inline

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

INLINE float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// float to bfloat16, to the nearest, ties to even, as PyTorch does.
INLINE uint16_t to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The i-th of floats, or of bfloat16 if `half`.
INLINE float get(const void *data, int half, int64_t i) {
    return half ? bits_to_float((uint32_t)((const uint16_t *)data)[i] << 16) : ((const float *)data)[i];
}

INLINE void put(void *data, int half, int64_t i, float x) {
    if (half)
        ((uint16_t *)data)[i] = to_half(x);
    else
        ((float *)data)[i] = x;
}

INLINE lanes load(const float *from) { return *(const lanes *)from; }

// exp(x) of x <= 0, to 2 units in the last place, in a form that compilers vectorise; NaN stays NaN. Below the smallest
// normal number it is 0. exp(x) = 2^n exp(r): adding ROUND rounds x / ln 2 to n, which lands in the lowest bits of the sum;
// the polynomial of exp(r), |r| <= ln(2) / 2, is the one of Cephes (S. Moshier).
INLINE float exponential(float x) {
    const float ROUND = 12582912.0f;
    const float shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    const float scale = bits_to_float((bits << 23) + 0x3f800000);
    return x < -87.0f ? 0 : p * scale;
}

#endif
