/* Activations → int8 codes, bit for bit as `_quantize_rows` in ops.py: float32 scale = absmax / levels (affine: in
   double), code = round(x / scale) + zero point, limited.

   The division is a product with 1/scale wherever that cannot change the rounded result: the product is off by at most
   2^-22 relative, so only quotients that close to a half-integer are divided exactly. A row that holds a NaN or an
   infinity (calibrated: a NaN) has no codes: its scale is NaN, its codes and zero point are 0. */
#ifndef EVENBITS_QUANTIZE_H
#define EVENBITS_QUANTIZE_H

#include "numbers.h"
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

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

#ifdef __AVX512BW__
/* The same with 64 numbers at a time. Beyond +-2^20 all codes are at their limits: what is cut off there changes none. */
static int eb_codes_fast(const float *restrict x, int64_t n, float inverse, float zero, float low, float high,
                         int8_t *restrict codes) {
    const __m512 factor = _mm512_set1_ps(inverse), most = _mm512_set1_ps(0x1p20f), least = _mm512_set1_ps(-0x1p20f);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i shift = _mm512_set1_epi16((int16_t)zero);
    const __m512i bottom = _mm512_set1_epi8((int8_t)low), top = _mm512_set1_epi8((int8_t)high);
    __m512 far = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 64) {
        __m512i whole[4];
        for (int v = 0; v < 4; v++) {
            int64_t left = EB_MAX(0, EB_MIN(16, n - i - 16 * v));
            __m512 q = _mm512_mul_ps(_mm512_maskz_loadu_ps((__mmask16)((1u << left) - 1), x + i + 16 * v), factor);
            q = _mm512_max_ps(_mm512_min_ps(q, most), least);
            whole[v] = _mm512_cvtps_epi32(q);
            far = _mm512_max_ps(far, _mm512_abs_ps(_mm512_sub_ps(q, _mm512_cvtepi32_ps(whole[v]))));
        }
        __m512i a = _mm512_adds_epi16(_mm512_packs_epi32(whole[0], whole[1]), shift);
        __m512i b = _mm512_adds_epi16(_mm512_packs_epi32(whole[2], whole[3]), shift);
        __m512i c = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(a, b));
        c = _mm512_min_epi8(_mm512_max_epi8(c, bottom), top);
        _mm512_mask_storeu_epi8(codes + i, n - i < 64 ? ((uint64_t)1 << (n - i)) - 1 : ~(uint64_t)0, c);
    }
    return _mm512_reduce_max_ps(far) > 0.5f - EB_DOUBT;
}
#else
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
#endif

static void eb_codes(const float *x, int64_t n, eb_row row, const eb_args *a, int8_t *codes) {
    float zero = (float)row.zero, low = (float)a->code_min, high = (float)a->code_max;
    int ordinary = row.scale > 0x1p-100f && row.scale < 0x1p100f && row.zero >= -128 && row.zero <= 127;
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
