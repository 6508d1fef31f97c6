/* What the pieces of the CPU kernels share: the arguments of a call, the variants, small tools.

   One call computes  y = act( (Σ x̂·w) · scales + bias ):  activations are quantized, weights decoded from their packed
   bytes, products summed in int32, and the epilogue done in float32. Every variant gives the same bits: integers are
   exact, and every float operation stands in one fixed order without fused multiply-adds (-ffp-contract=off).

   M: rows (tokens), K: columns (input channels), N: outputs. */
#ifndef EVENBITS_CPU_H
#define EVENBITS_CPU_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { EB_FLOAT32, EB_FLOAT16, EB_BFLOAT16, EB_INT8, EB_INT32 };            /* types of x and y */
enum { EB_W_INT8, EB_W_NIBBLES, EB_W_PAIRS, EB_W_WIDE_PAIRS };              /* what a weight byte is */
enum { EB_S_FLOAT32, EB_S_FLOAT16, EB_S_E4M3, EB_S_E8M0 };                  /* how weight scales are stored */
enum { EB_ACT_NONE, EB_ACT_RELU, EB_ACT_GELU, EB_ACT_GELU_TANH, EB_ACT_SILU };

/* The order of the fields is that of LinearArgs in loader.py. */
typedef struct {
    const void *x;             /* [M, K], rows x_stride elements apart */
    const float *multiplier;   /* [K] or NULL */
    const float *scale;        /* [1] calibrated, or NULL: every row gets its own */
    const int32_t *zero_point; /* [1] or NULL */
    const uint8_t *weight;     /* [N, weight_stride] */
    const void *weight_scale;  /* [N, groups]; [1] if scale_stride is 0 */
    const float *global_scale; /* [1] or NULL */
    const float *bias;         /* [N] or NULL */
    const int32_t *weight_sum; /* [N], affine activations only */
    void *y;                   /* [M, N] */
    int8_t *codes;             /* eb_quantize: [M, K] */
    float *row_scales;         /* eb_quantize: [M] */
    int32_t *row_zeros;        /* eb_quantize: [M] */
    const float *values;       /* eb_floats: normal[16], outlier[16] */
    const int8_t *tables;      /* normal[16], outlier[16], rest[16]: value of a nibble; rest: what exceeds int8 */
    int64_t rows, columns, outputs;
    int64_t x_type, y_type, x_stride;
    int64_t weight_kind, weight_stride;
    int64_t scale_type, scale_stride, group; /* group: columns per scale, 0: one scale a row */
    int64_t affine, code_min, code_max;
    int64_t activation, threads;
    int64_t finite; /* calibrated scale, but infinities spoil a row as they do with a dynamic one */
    double levels;  /* dynamic symmetric: scale = absmax / levels */
    double unit;    /* what an integer of the tables is worth: 0.5 for FP4 */
} eb_args;

typedef struct {
    const char *name;
    int (*supported)(void);
    int (*linear)(const eb_args *);
    int (*quantize)(const eb_args *);
    int (*floats)(const eb_args *);
} eb_variant;

#define EB_HIDDEN __attribute__((visibility("hidden")))
#define EB_INLINE static inline __attribute__((always_inline))
#define EB_UNROLL _Pragma("GCC unroll 64")
#define EB_MIN(a, b) ((a) < (b) ? (a) : (b))
#define EB_MAX(a, b) ((a) > (b) ? (a) : (b))
#define EB_UP(a, b) (((a) + (b) - 1) / (b) * (b))

/* Slots of memory that a thread keeps between calls (threads.c). */
enum { EB_MEM_CODES, EB_MEM_SUMS, EB_MEM_ROWS, EB_MEM_FLOATS, EB_MEM_PANEL, EB_MEM_REST, EB_MEM_SCALES, EB_MEM_TOTALS,
       EB_MEM_THIN, EB_MEM_SLOTS };
EB_HIDDEN void *eb_memory(int slot, size_t bytes);

typedef void (*eb_task)(void *context, int64_t task);
EB_HIDDEN void eb_parallel(eb_task function, void *context, int64_t tasks, int64_t threads);

EB_INLINE uint32_t eb_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

EB_INLINE float eb_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* A task says that memory ran out; several may at once. */
#define EB_FAIL(job) __atomic_store_n(&(job)->failed, 1, __ATOMIC_RELAXED)

/* The next of parts of at most `most` rows that are as equal as they can be: a last part of one row would be a slow one. */
EB_INLINE int64_t eb_even_part(int64_t rows, int64_t most) {
    int64_t parts = (rows + most - 1) / most;
    return (rows + parts - 1) / parts;
}

/* Sums of products wrap: with weights shifted by 128 a partial sum may pass 2^31, the corrected total never does. */
EB_INLINE int32_t eb_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
EB_INLINE int32_t eb_mul(int32_t a, int32_t b) { return (int32_t)((uint32_t)a * (uint32_t)b); }

#endif
