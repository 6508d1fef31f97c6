/* 256-bit vectors: eight outputs at a time. With AVX-VNNI vpdpbusd does what it does at 512 bits; without it bytes are
   widened to int16 and multiplied by vpmaddwd, which cannot saturate (vpmaddubsw, on bytes, does). */
#include <immintrin.h>

#include "evenbits_cpu.h"

#define LANES 8
#define VECTORS 2
#define BLOCK 32
#define HAVE_ROWS

typedef __m256i vec;

EB_INLINE vec v_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
EB_INLINE void v_store(void *p, vec v) { _mm256_storeu_si256((__m256i *)p, v); }
EB_INLINE vec v_add(vec a, vec b) { return _mm256_add_epi32(a, b); }
EB_INLINE vec v_subtract(vec a, vec b) { return _mm256_sub_epi32(a, b); }
EB_INLINE vec v_zero(void) { return _mm256_setzero_si256(); }
EB_INLINE vec v_offset(void) { return _mm256_set1_epi8((char)0x80); }
EB_INLINE vec v_table(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }

#ifdef USE_VNNI
#define TILE 4
#define OFFSET 128
#define V_DOT(acc, w, x) __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(x))
#define V_DOT_MEMORY(acc, w, x)                                                                                       \
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "m"(*(const __m256i *)(x)))
#else
#define TILE 2
#define OFFSET 0
EB_INLINE vec v_wide_dot(vec acc, vec w, const void *x) {
    vec w0 = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(w)), w1 = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(w, 1));
    vec x0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)x));
    vec x1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)x + 1));
    /* Pairs of quads: hadd puts each quad's two sums together, in the lane order of vpdpbusd. */
    vec sums = _mm256_hadd_epi32(_mm256_madd_epi16(w0, x0), _mm256_madd_epi16(w1, x1));
    return _mm256_add_epi32(acc, _mm256_permute4x64_epi64(sums, 0xd8));
}
#define V_DOT_MEMORY(acc, w, x) ((acc) = v_wide_dot(acc, w, x))
#endif
#define PANEL_OFFSET OFFSET

typedef struct {
    vec normal, outlier, rest, nibble, identifier, zero;
} decoder;

/* zero: what 0 decodes to, 128 if weights are to be unsigned. */
EB_INLINE decoder v_decoder(const int8_t *tables, int kind, const int offset) {
    decoder d = {.nibble = _mm256_set1_epi8(15), .identifier = _mm256_set1_epi8(8)};
    d.zero = offset ? v_offset() : v_zero();
    if (kind == EB_W_INT8) return d;
    d.normal = _mm256_xor_si256(v_table(tables), d.zero);
    d.outlier = _mm256_xor_si256(v_table(tables + 16), d.zero);
    d.rest = _mm256_xor_si256(v_table(tables + 32), d.zero);
    return d;
}

EB_INLINE vec v_decode_int8(const decoder *d, vec bytes) { return OFFSET ? _mm256_xor_si256(bytes, d->zero) : bytes; }

/* 32 bytes → values of the low and of the high nibbles. */
EB_INLINE void v_decode(const decoder *d, int kind, vec bytes, vec *even, vec *odd) {
    vec low = _mm256_and_si256(bytes, d->nibble), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), d->nibble);
    *even = _mm256_shuffle_epi8(d->normal, low);
    *odd = _mm256_shuffle_epi8(d->normal, high);
    if (kind == EB_W_NIBBLES) return;
    *even = _mm256_blendv_epi8(*even, _mm256_shuffle_epi8(d->outlier, low), _mm256_cmpeq_epi8(high, d->identifier));
    *odd = _mm256_blendv_epi8(*odd, _mm256_shuffle_epi8(d->outlier, high), _mm256_cmpeq_epi8(low, d->identifier));
}

/* What exceeds int8 of the outliers of 32 bytes; returns whether there is any. */
EB_INLINE int v_rest(const decoder *d, vec bytes, vec *even, vec *odd) {
    vec low = _mm256_and_si256(bytes, d->nibble), high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), d->nibble);
    vec none = d->zero;
    *even = _mm256_blendv_epi8(none, _mm256_shuffle_epi8(d->rest, low), _mm256_cmpeq_epi8(high, d->identifier));
    *odd = _mm256_blendv_epi8(none, _mm256_shuffle_epi8(d->rest, high), _mm256_cmpeq_epi8(low, d->identifier));
    vec same = _mm256_and_si256(_mm256_cmpeq_epi8(*even, none), _mm256_cmpeq_epi8(*odd, none));
    return _mm256_movemask_epi8(same) != -1;
}

EB_INLINE vec v_shuffle(vec a, vec b, const int imm) {
    return imm ? _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd))
               : _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
}

/* 8 rows of 32 bytes → 8 vectors, vector t with bytes 4t … 4t + 3 of every row. */
EB_INLINE void transpose(const uint8_t *const *rows, vec *out) {
    vec a[8], b[8];
    EB_UNROLL for (int i = 0; i < 8; i++) a[i] = v_load(rows[i]);
    EB_UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    EB_UNROLL for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm256_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm256_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm256_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    EB_UNROLL for (int c = 0; c < 4; c++) {
        out[c] = _mm256_permute2x128_si256(a[c], a[4 + c], 0x20);
        out[4 + c] = _mm256_permute2x128_si256(a[c], a[4 + c], 0x31);
    }
}

#include "packing.h"

#define MOST_STEPS 256 /* of micro_rows */

EB_INLINE void micro_rows(const int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps,
                          int32_t *totals) {
#ifdef USE_VNNI
    vec acc[TILE][VECTORS];
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = v_load(totals + r * 16 + 8 * v);
    for (int s = 0; s < steps; s++, x += 4, panel += VECTORS * 32) {
        vec w[VECTORS];
        EB_UNROLL for (int v = 0; v < VECTORS; v++) w[v] = v_load(panel + 32 * v);
        EB_UNROLL for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride, 4);
            vec broadcast = _mm256_set1_epi32(four);
            EB_UNROLL for (int v = 0; v < VECTORS; v++) V_DOT(acc[r][v], w[v], broadcast);
        }
    }
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < VECTORS; v++) v_store(totals + r * 16 + 8 * v, acc[r][v]);
#else
    vec acc[TILE][2 * VECTORS]; /* four outputs each, two int32 sums per output */
    int16_t wide[TILE][4 * MOST_STEPS] __attribute__((aligned(32)));
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4 * steps; i++) wide[r][i] = x[r * stride + i];
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < 2 * VECTORS; v++) acc[r][v] = v_zero();
    for (int s = 0; s < steps; s++, panel += VECTORS * 32) {
        vec broadcast[TILE];
        EB_UNROLL for (int r = 0; r < rows; r++) {
            int64_t four;
            memcpy(&four, wide[r] + 4 * s, 8);
            broadcast[r] = _mm256_set1_epi64x(four);
        }
        EB_UNROLL for (int v = 0; v < 2 * VECTORS; v++) {
            vec w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(panel + 16 * v)));
            EB_UNROLL for (int r = 0; r < rows; r++)
                acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(w, broadcast[r]));
        }
    }
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < VECTORS; v++) {
            vec sums = _mm256_hadd_epi32(acc[r][2 * v], acc[r][2 * v + 1]);
            int32_t *to = totals + r * 16 + 8 * v;
            v_store(to, _mm256_add_epi32(v_load(to), _mm256_permute4x64_epi64(sums, 0xd8)));
        }
#endif
}

#define MICRO(rows) micro_rows(rows, x, stride, panel, steps, totals)

/* totals[r][n] += Σ over steps of the four products of x row r with output n. */
static void micro(int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int most, int32_t *totals) {
    for (int steps; most > 0; most -= steps, x += 4 * steps, panel += steps * VECTORS * 32) {
        steps = EB_MIN(most, MOST_STEPS);
        switch (rows) {
        case 1: MICRO(1); break;
        case 2: MICRO(2); break;
        case 3: MICRO(EB_MIN(3, TILE)); break;
        default: MICRO(TILE);
        }
    }
}

#define TILE_PART(m) eb_even_part(m, TILE)
EB_INLINE void micro_begin(void) {}
EB_INLINE void micro_end(void) {}

#define ROWS_UP_TO(a) (rows_group(a) ? 2 : 0)
#define ROWS_MOST 2

#include "linear.h"
#include "floats256.h"
