/* floats.h with AVX-512: the table of sixteen floats is one vector, and permuting it is one instruction. */
#define F_WIDTH 16
#define F_ROWS 6
#define F_NARROW 4
#define F_WIDE 8

typedef __m512 fvec;

EB_INLINE fvec f_load(const float *p) { return _mm512_loadu_ps(p); }
EB_INLINE void f_store(float *p, fvec v) { _mm512_storeu_ps(p, v); }
EB_INLINE fvec f_splat(float x) { return _mm512_set1_ps(x); }
EB_INLINE fvec f_scaled(fvec v, fvec s) { return _mm512_mul_ps(v, s); }
EB_INLINE fvec f_fma(fvec a, fvec b, fvec c) { return _mm512_fmadd_ps(a, b, c); }

/* An index has its number in the lowest four bits (five with two tables); those above do not count. */
EB_INLINE void f_decode(const float *table, const int paired, const uint8_t *bytes, fvec *w) {
    static const int8_t identifier[16] __attribute__((aligned(16))) = {[8] = 16};
    __m512i b = _mm512_loadu_si512(bytes);
    fvec normal = f_load(table);
    if (!paired) {
        EB_UNROLL for (int t = 0; t < 8; t++) w[t] = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4 * t), normal);
        return;
    }
    fvec outlier = f_load(table + 16);
    __m512i flag = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)identifier)), nibble = _mm512_set1_epi8(15);
    __m512i low = _mm512_and_si512(b, nibble), high = _mm512_and_si512(_mm512_srli_epi16(b, 4), nibble);
    __m512i even = _mm512_or_si512(low, _mm512_shuffle_epi8(flag, high));
    __m512i odd = _mm512_or_si512(high, _mm512_shuffle_epi8(flag, low));
    EB_UNROLL for (int t = 0; t < 4; t++) {
        w[2 * t] = _mm512_permutex2var_ps(normal, _mm512_srli_epi32(even, 8 * t), outlier);
        w[2 * t + 1] = _mm512_permutex2var_ps(normal, _mm512_srli_epi32(odd, 8 * t), outlier);
    }
}

#include "floats.h"
