/* Number types and functions in plain C, the same operations in every variant: the compiler turns them into vectors. */
#ifndef EVENBITS_NUMBERS_H
#define EVENBITS_NUMBERS_H

#include "evenbits_cpu.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

EB_INLINE float eb_from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, em = h & 0x7fff;
    uint32_t normal = (em << 13) + (112u << 23);
    normal += em >= 0x7c00 ? 112u << 23 : 0;                     /* infinity, NaN */
    uint32_t small = eb_bits((float)(int32_t)em * 0x1p-24f);     /* subnormal or zero, exact */
    return eb_float(sign | (em < 0x400 ? small : normal));
}

EB_INLINE float eb_from_e4m3(uint8_t b) {
    uint32_t sign = (uint32_t)(b & 0x80) << 24, em = b & 0x7f;
    uint32_t normal = em == 0x7f ? 0x7fc00000u : (em << 20) + (120u << 23);
    uint32_t small = eb_bits((float)(int32_t)em * 0x1p-9f);
    return eb_float(sign | (em < 8 ? small : normal));
}

static inline void eb_floats_from_e4m3(const uint8_t *src, int64_t n, float *restrict dst) {
    int64_t i = 0;
#ifdef __F16C__
    /* The bits of a float16 with the same digits, 2^8 too small; 0x7f is NaN. */
    for (; i + 8 <= n; i += 8) {
        __m128i b = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)(src + i)));
        __m128i em = _mm_slli_epi16(_mm_and_si128(b, _mm_set1_epi16(0x7f)), 7);
        __m128i h = _mm_or_si128(em, _mm_slli_epi16(_mm_and_si128(b, _mm_set1_epi16(0x80)), 8));
        h = _mm_or_si128(h, _mm_cmpeq_epi16(em, _mm_set1_epi16(0x3f80)));
        _mm256_storeu_ps(dst + i, _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.0f)));
    }
#endif
    for (; i < n; i++) dst[i] = eb_from_e4m3(src[i]);
}

EB_INLINE float eb_from_e8m0(uint8_t b) { return b ? eb_float((uint32_t)b << 23) : 0x1p-127f; }

EB_INLINE uint16_t eb_to_bfloat(float x) {
    uint32_t bits = eb_bits(x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

EB_INLINE uint16_t eb_to_half(float x) {
    uint32_t bits = eb_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits */
        float shifted = eb_float(magnitude) + 0.5f;
        return (uint16_t)(sign | (eb_bits(shifted) - 0x3f000000));
    }
    magnitude += 0xfff + ((magnitude >> 13) & 1);
    return (uint16_t)(sign | ((magnitude - (112u << 23)) >> 13));
}

static inline void eb_floats_from(const void *src, int64_t type, int64_t n, float *restrict dst) {
    const uint16_t *h = src;
    int64_t i = 0;
    if (type == EB_BFLOAT16) {
        for (; i < n; i++) dst[i] = eb_float((uint32_t)h[i] << 16);
        return;
    }
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(h + i))));
#endif
    for (; i < n; i++) dst[i] = eb_from_half(h[i]);
}

static inline void eb_floats_to(const float *restrict src, int64_t type, int64_t n, void *dst) {
    uint16_t *h = dst;
    int64_t i = 0;
    if (type == EB_BFLOAT16) {
        for (; i < n; i++) h[i] = eb_to_bfloat(src[i]);
        return;
    }
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i *)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
#endif
    for (; i < n; i++) h[i] = eb_to_half(src[i]);
}

/* n stored scales → float32: times the factor of the tensor, limited to finite numbers, times the unit of the codes. */
static inline void eb_scales(const eb_args *a, int64_t first, int64_t n, float *restrict out) {
    float factor = a->global_scale ? *a->global_scale : 1.0f, unit = (float)a->unit;
    const uint8_t *bytes = a->weight_scale;
    if (a->scale_type == EB_S_FLOAT32)
        memcpy(out, (const float *)a->weight_scale + first, (size_t)n * sizeof(float));
    else if (a->scale_type == EB_S_FLOAT16)
        eb_floats_from((const uint16_t *)a->weight_scale + first, EB_FLOAT16, n, out);
    else if (a->scale_type == EB_S_E4M3)
        eb_floats_from_e4m3(bytes + first, n, out);
    else
        for (int64_t i = 0; i < n; i++) out[i] = eb_from_e8m0(bytes[first + i]);
    if (a->global_scale)
        for (int64_t i = 0; i < n; i++) {
            float s = out[i] * factor;
            out[i] = s > 0x1.fffffep127f ? 0x1.fffffep127f : s;
        }
    if (unit != 1.0f)
        for (int64_t i = 0; i < n; i++) out[i] *= unit;
}

/* e^x for x in [-87, 88] (limited to it); NaN stays NaN. Cephes' polynomial; 2^n is built from bits. */
EB_INLINE float eb_exp(float x) {
    float t = x < -87.0f ? -87.0f : x;
    t = t > 88.0f ? 88.0f : t;
    float z = t * 1.44269504088896341f + 12582912.0f; /* n + 1.5·2^23 */
    float n = z - 12582912.0f;
    uint32_t power = (eb_bits(z) - 0x4b400000u + 127u) << 23;
    float r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return ((p * r) * r + r + 1.0f) * eb_float(power);
}

EB_INLINE float eb_silu(float x) { return x / (1.0f + eb_exp(-x)); }

EB_INLINE float eb_gelu_tanh(float x) {
    float u = x * (1.5957691216f + 0.0713548162726f * (x * x)); /* 2·sqrt(2/π)·(x + 0.044715 x³) */
    return x / (1.0f + eb_exp(-u));
}

/* x·Φ(x) by erfc(|x|/√2) = poly(t)·exp(-x²/2), t = 1/(1 + p·|x|/√2): Abramowitz and Stegun 7.1.26, error 1.5e-7. */
EB_INLINE float eb_gelu(float x) {
    float z = eb_float(eb_bits(x) & 0x7fffffff) * 0.70710678118654752f;
    float t = 1.0f / (1.0f + 0.3275911f * z);
    float p = 1.061405429f;
    p = p * t + -1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t + -0.284496736f;
    p = p * t + 0.254829592f;
    float square = z * z;
    square = square > 60.0f ? 60.0f : square; /* beyond, products would be subnormal: ten times slower, and no closer */
    float half = (0.5f * x) * ((p * t) * eb_exp(-square));
    return x > 20.0f ? x : x > 0.0f ? x - half : half; /* the first for infinity */
}

static inline void eb_activate(int64_t activation, float *restrict y, int64_t n) {
    if (activation == EB_ACT_RELU)
        for (int64_t i = 0; i < n; i++) y[i] = y[i] < 0.0f ? 0.0f : y[i];
    else if (activation == EB_ACT_GELU)
        for (int64_t i = 0; i < n; i++) y[i] = eb_gelu(y[i]);
    else if (activation == EB_ACT_GELU_TANH)
        for (int64_t i = 0; i < n; i++) y[i] = eb_gelu_tanh(y[i]);
    else if (activation == EB_ACT_SILU)
        for (int64_t i = 0; i < n; i++) y[i] = eb_silu(y[i]);
}

#endif
