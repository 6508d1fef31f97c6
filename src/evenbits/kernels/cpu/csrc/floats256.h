/* floats.h with AVX2: a table of sixteen floats is two vectors, permuted both; the index's fourth bit chooses (moved to
   the sign, where blendv looks), with pairs the fifth too. */
#define F_WIDTH 8
#define F_ROWS 4
#define F_NARROW 2
#define F_WIDE 4

typedef __m256 fvec;

EB_INLINE fvec f_load(const float *p) { return _mm256_loadu_ps(p); }
EB_INLINE void f_store(float *p, fvec v) { _mm256_storeu_ps(p, v); }
EB_INLINE fvec f_splat(float x) { return _mm256_set1_ps(x); }
EB_INLINE fvec f_scaled(fvec v, fvec s) { return _mm256_mul_ps(v, s); }
EB_INLINE fvec f_fma(fvec a, fvec b, fvec c) { return _mm256_fmadd_ps(a, b, c); }

/* The entries of sixteen floats that the nibble at bit `at` of each word says. */
EB_INLINE fvec f_sixteen(const float *table, __m256i words, const int at) {
    __m256i index = _mm256_srli_epi32(words, at);
    fvec below = _mm256_permutevar8x32_ps(f_load(table), index);
    fvec above = _mm256_permutevar8x32_ps(f_load(table + 8), index);
    return _mm256_blendv_ps(below, above, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - at)));
}

EB_INLINE void f_decode(const float *table, const int paired, const uint8_t *bytes, fvec *w) {
    __m256i b = _mm256_loadu_si256((const __m256i *)bytes);
    EB_UNROLL for (int t = 0; t < 8; t++) w[t] = f_sixteen(table, b, 4 * t);
    if (!paired) return;
    __m256i nibble = _mm256_set1_epi8(15), identifier = _mm256_set1_epi8(8);
    __m256i low = _mm256_and_si256(b, nibble), high = _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble);
    __m256i even = _mm256_cmpeq_epi8(high, identifier), odd = _mm256_cmpeq_epi8(low, identifier);
    if (_mm256_testz_si256(_mm256_or_si256(even, odd), _mm256_set1_epi8(-1))) return; /* no outlier in 64 weights */
    EB_UNROLL for (int t = 0; t < 8; t++) {
        __m256i here = _mm256_slli_epi32(t % 2 ? odd : even, 24 - 8 * (t / 2));
        w[t] = _mm256_blendv_ps(w[t], f_sixteen(table + 16, b, 4 * t), _mm256_castsi256_ps(here));
    }
}

#include "floats.h"
