/* Activations → int8 codes, bit for bit as `_quantize_rows` in ops.py: float32 scale = absmax / levels (affine: in
   double), code = round(x / scale) + zero point, limited.

   The division is a product with 1/scale wherever that cannot change the rounded result: the product is off by at most
   2^-22 relative, so only quotients that close to a half-integer are divided exactly. A row that holds a NaN or an
   infinity (calibrated: a NaN) has no codes: its scale is NaN, its codes and zero point are 0. */
#ifndef EVENBITS_QUANTIZE_H
#define EVENBITS_QUANTIZE_H

#include "numbers.h"

#define EB_CHUNK 256
#define EB_DOUBT 1e-4f /* 127.5 · 2^-22 is 3e-5 */

typedef struct {
    float scale;
    int32_t zero;
} eb_row;

/* Order-preserving integers of floats: -NaN < -inf < … < inf < NaN. */
EB_INLINE int32_t eb_key(float x) {
    int32_t bits = (int32_t)eb_bits(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

EB_INLINE float eb_from_key(int32_t key) { return eb_float((uint32_t)(key ^ ((key >> 31) & 0x7fffffff))); }

static uint32_t eb_absmax_bits(const float *restrict x, int64_t n) {
    uint32_t top = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = eb_bits(x[i]) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    return top;
}

static void eb_range(const float *restrict x, int64_t n, float *low, float *high) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < n; i++) {
        int32_t key = eb_key(x[i]);
        least = key < least ? key : least;
        most = key > most ? key : most;
    }
    *low = n ? eb_from_key(least) : 0.0f;
    *high = n ? eb_from_key(most) : 0.0f;
}

static void eb_codes_exact(const float *restrict x, int64_t n, float scale, float zero, float low, float high,
                           int8_t *restrict codes) {
    for (int64_t i = 0; i < n; i++) {
        float r = __builtin_rintf(x[i] / scale) + zero;
        r = r > low ? r : low;
        r = r < high ? r : high;
        codes[i] = (int8_t)(int32_t)r;
    }
}

static int eb_codes_fast(const float *restrict x, int64_t n, float inverse, float zero, float low, float high,
                         int8_t *restrict codes) {
    int32_t doubt = 0;
    for (int64_t i = 0; i < n; i++) {
        float q = x[i] * inverse, r = __builtin_rintf(q);
        float off = __builtin_fabsf(q - r) - 0.5f;
        doubt |= __builtin_fabsf(off) < EB_DOUBT ? 1 : 0;
        r = r + zero;
        r = r > low ? r : low;
        r = r < high ? r : high;
        codes[i] = (int8_t)(int32_t)r;
    }
    return doubt;
}

static void eb_codes(const float *x, int64_t n, eb_row row, const eb_args *a, int8_t *codes) {
    float zero = (float)row.zero, low = (float)a->code_min, high = (float)a->code_max;
    int ordinary = row.scale > 0x1p-100f && row.scale < 0x1p100f;
    float inverse = ordinary ? 1.0f / row.scale : 0.0f;
    for (int64_t i = 0; i < n; i += EB_CHUNK) {
        int64_t count = EB_MIN(EB_CHUNK, n - i);
        if (!ordinary || eb_codes_fast(x + i, count, inverse, zero, low, high, codes + i))
            eb_codes_exact(x + i, count, row.scale, zero, low, high, codes + i);
    }
}

static float eb_safe_scale(double scale, double if_zero) {
    scale = scale == 0.0 ? if_zero : scale;
    scale = scale < 0x1p-126 ? 0x1p-126 : scale;
    return (float)(scale > 0x1.fffffep127 ? 0x1.fffffep127 : scale);
}

static eb_row eb_affine(const eb_args *a, float low_float, float high_float) {
    double low = EB_MIN((double)low_float, 0.0), high = EB_MAX((double)high_float, 0.0);
    double width = (high - low) / (double)(a->code_max - a->code_min);
    eb_row row = {eb_safe_scale(width, high == 0.0 ? 1.0 : high), 0};
    double zero = (double)a->code_min - __builtin_rint(low / (double)row.scale);
    zero = zero < (double)a->code_min ? (double)a->code_min : zero;
    row.zero = (int32_t)(zero > (double)a->code_max ? (double)a->code_max : zero);
    return row;
}

/* One row of floats [n] → codes, scale, zero point. */
static eb_row eb_quantize_floats(const eb_args *a, const float *x, int64_t n, int8_t *codes) {
    eb_row row = {1.0f, 0}, broken = {__builtin_nanf(""), 0};
    if (a->scale) {
        uint32_t limit = a->finite ? 0x7f7fffff : 0x7f800000;
        row.scale = *a->scale;
        row.zero = a->zero_point ? *a->zero_point : 0;
        if (eb_absmax_bits(x, n) > limit) {
            memset(codes, 0, (size_t)n);
            return broken;
        }
    } else if (a->affine) {
        float low, high;
        eb_range(x, n, &low, &high);
        if (!(low - low == 0.0f && high - high == 0.0f)) {
            memset(codes, 0, (size_t)n);
            return broken;
        }
        row = eb_affine(a, low, high);
    } else {
        uint32_t top = eb_absmax_bits(x, n);
        if (top > 0x7f7fffff) {
            memset(codes, 0, (size_t)n);
            return broken;
        }
        row.scale = eb_safe_scale(eb_float(top) / (float)a->levels, 1.0);
    }
    eb_codes(x, n, row, a, codes);
    return row;
}

/* Row m of the input → codes [K]; floats: room for K numbers. */
static eb_row eb_quantize_row(const eb_args *a, int64_t m, float *restrict floats, int8_t *codes) {
    int64_t n = a->columns, size = a->x_type == EB_INT8 ? 1 : a->x_type == EB_FLOAT32 ? 4 : 2;
    const char *start = (const char *)a->x + m * a->x_stride * size;
    const float *x = (const float *)start;
    if (a->x_type == EB_INT8) {
        eb_row plain = {1.0f, 0};
        memcpy(codes, start, (size_t)n);
        return plain;
    }
    if (a->x_type != EB_FLOAT32) {
        eb_floats_from(start, a->x_type, n, floats);
        x = floats;
    }
    if (a->multiplier) {
        const float *multiplier = a->multiplier;
        if (x == floats)
            for (int64_t i = 0; i < n; i++) floats[i] *= multiplier[i];
        else
            for (int64_t i = 0; i < n; i++) floats[i] = ((const float *)start)[i] * multiplier[i];
        x = floats;
    }
    return eb_quantize_floats(a, x, n, codes);
}

/* The order of codes in a row of the product: natural, or what the two nibbles of bytes decode to.
   run = 4: in every 8 columns the even ones first; run = R: in every 2·R. Both sides have whole runs. */
static void eb_arrange(const int8_t *restrict codes, int64_t n, int64_t run, int8_t *restrict out) {
    if (run == 4) {
        for (int64_t i = 0; i < n; i += 8) {
            uint64_t all, even, odd;
            memcpy(&all, codes + i, 8);
            even = all & 0x00ff00ff00ff00ffu;
            odd = (all >> 8) & 0x00ff00ff00ff00ffu;
            even = (even | even >> 8) & 0x0000ffff0000ffffu;
            odd = (odd | odd >> 8) & 0x0000ffff0000ffffu;
            even = (even | even >> 16) & 0xffffffffu;
            odd = (odd | odd >> 16) << 32;
            even |= odd;
            memcpy(out + i, &even, 8);
        }
        return;
    }
    for (int64_t i = 0; i < n; i += 2 * run)
        for (int64_t j = 0; j < run; j++) {
            out[i + j] = codes[i + 2 * j];
            out[i + run + j] = codes[i + 2 * j + 1];
        }
}

static int32_t eb_sum(const int8_t *restrict codes, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; i++) total += codes[i];
    return total;
}

#endif
