// What lies between the linear layers of the tangent pass, on a CPU: each a single pass over its streams.
// kernels/streams.py says what the arguments hold; agd_vllm/attribution/rules.py has the rules and the twins.

#include <math.h>

#include "lanes.h"

// Rows of floats, or of bfloat16 if `half`.
typedef struct {
    void *data;
    int32_t half;
} Rows;

// The compiler makes a loop of its own for each kind of rows.
#define FOR_KINDS(rows, call) \
    do {                      \
        if ((rows)->half) {   \
            enum { half = 1 };\
            call;             \
        } else {              \
            enum { half = 0 };\
            call;             \
        }                     \
    } while (0)

INLINE void add_row(int half, float *to, const void *rows, int64_t from, int64_t dim) {
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) to[i] += get(rows, half, from + i);
}

INLINE void scale_row(int half, void *out, int64_t to, const float *x, const float *gain, float scale,
                      const float *value, float along, int64_t dim) {
#pragma omp simd
    for (int64_t i = 0; i < dim; i++) put(out, half, to + i, gain[i] * (x[i] * scale - value[i] * along));
}

// streams [streams, rows, dim] += added, where there is any; out = their norm.
void agd_rms_norm(float *streams, const Rows *added, const float *gain, Rows *out, int64_t num_streams, int64_t rows,
                  int64_t dim, float eps, int32_t through_norm) {
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) {
        float *value = streams + row * dim, total = 0, scale = 0;
        for (int64_t stream = 0; stream < num_streams; stream++) {
            const int64_t from = (stream * rows + row) * dim;
            float *x = streams + from, along = 0;
            if (added->data) FOR_KINDS(added, add_row(half, x, added->data, from, dim));
            if (stream == 0) {
#pragma omp simd reduction(+ : total)
                for (int64_t i = 0; i < dim; i++) total += x[i] * x[i];
                scale = 1 / sqrtf(total / dim + eps);
            } else if (through_norm) {
#pragma omp simd reduction(+ : along)
                for (int64_t i = 0; i < dim; i++) along += x[i] * value[i];
                along *= scale * scale * scale / dim;
            }
            FOR_KINDS(out, scale_row(half, out->data, from, x, gain, scale, value, along, dim));
        }
    }
}

// 1 / (1 + exp(-x))
INLINE float sigmoid(float x) {
    const float e = exponential(-fabsf(x));
    return (x < 0 ? e : 1) / (1 + e);
}

enum { SILU, GELU_TANH };
enum { ATTNLRP, CPLRP, IXG };

// Elements whose factors are kept while the tangents use them.
#define CHUNK 64

INLINE void gate_row(int half, int activation, int rule, const void *gate, const void *up, int64_t stride, void *out,
                     int64_t num_streams, int64_t rows, int64_t row, int64_t dim) {
    const float scale = 0.79788456f, cubic = 0.044715f;  // sqrt(2 / pi): the tanh approximation of GELU
    for (int64_t start = 0; start < dim; start += CHUNK) {
        float on_gate[CHUNK], on_up[CHUNK];
        const int64_t count = dim - start < CHUNK ? dim - start : CHUNK;
        const int64_t from = row * stride + start, to = row * dim + start;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            const float g = get(gate, half, from + i), u = get(up, half, from + i);
            // phi(g) / g: silu's is the sigmoid, and (1 + tanh z) / 2 is the sigmoid of 2 z.
            const float ratio = sigmoid(activation == SILU ? g : 2 * scale * (g + cubic * g * g * g));
            const float curve = ratio * (1 - ratio) * g;
            const float slope = ratio + (activation == SILU ? curve : 2 * scale * (1 + 3 * cubic * g * g) * curve);
            on_gate[i] = rule == ATTNLRP ? ratio * u / 2 : rule == CPLRP ? 0 : slope * u;
            on_up[i] = rule == ATTNLRP ? ratio * g / 2 : ratio * g;
            put(out, half, to + i, g * ratio * u);
        }
        for (int64_t stream = 1; stream < num_streams; stream++) {
            const int64_t at = from + stream * rows * stride, put_at = to + stream * rows * dim;
#pragma omp simd
            for (int64_t i = 0; i < count; i++)
                put(out, half, put_at + i, on_gate[i] * get(gate, half, at + i) + on_up[i] * get(up, half, at + i));
        }
    }
}

// gate, up and out [streams, rows, dim], all of one kind, rows of gate and up `stride` elements apart. The compiler makes
// a loop of its own for each case.
void agd_gated(const Rows *gate, const Rows *up, int64_t stride, Rows *out, int64_t num_streams, int64_t rows,
               int64_t dim, int32_t activation, int32_t rule) {
#define CASE(ACTIVATION, RULE)                                                                                   \
    case (ACTIVATION) * 3 + (RULE):                                                                              \
        FOR_KINDS(gate, gate_row(half, ACTIVATION, RULE, gate->data, up->data, stride, out->data, num_streams,   \
                                 rows, row, dim));                                                               \
        break
#pragma omp parallel for
    for (int64_t row = 0; row < rows; row++) switch (activation * 3 + rule) {
            CASE(SILU, ATTNLRP);
            CASE(SILU, CPLRP);
            CASE(SILU, IXG);
            CASE(GELU_TANH, ATTNLRP);
            CASE(GELU_TANH, CPLRP);
            CASE(GELU_TANH, IXG);
        }
}
