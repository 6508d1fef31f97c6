/* AVX-512 with VNNI (and VL, BW): 64 products per vpdpbusd. The accumulators are tied by inline assembly: GCC 12 spills
   those of the intrinsic. amx.c has the same but for its micro. */
#include <immintrin.h>

#include "evenbits_cpu.h"

#define LANES 16
#define VECTORS 4
#define BLOCK 64
#define OFFSET 128 /* of weights in the direct path */
#define HAVE_ROWS
#ifndef PANEL_OFFSET
#define PANEL_OFFSET 128
#define TILE 6
#endif

typedef __m512i vec;

#define V_DOT(acc, w, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x))
#define V_DOT_MEMORY(acc, w, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "m"(*(const __m512i *)(x)))

EB_INLINE vec v_load(const void *p) { return _mm512_loadu_si512(p); }
EB_INLINE void v_store(void *p, vec v) { _mm512_storeu_si512(p, v); }
EB_INLINE vec v_add(vec a, vec b) { return _mm512_add_epi32(a, b); }
EB_INLINE vec v_subtract(vec a, vec b) { return _mm512_sub_epi32(a, b); }
EB_INLINE vec v_zero(void) { return _mm512_setzero_si512(); }
EB_INLINE vec v_offset(void) { return _mm512_set1_epi8((char)0x80); }
EB_INLINE vec v_table(const void *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }

typedef struct {
    vec normal, outlier, rest, nibble, identifier, zero;
#ifdef __AVX512VBMI__
    vec both, flag; /* values of nibble + 16 · (partner is the identifier); 16 at the identifier */
#endif
} decoder;

/* zero: what 0 decodes to, 128 if weights are to be unsigned. */
EB_INLINE decoder v_decoder(const int8_t *tables, int kind, const int offset) {
    decoder d = {.nibble = _mm512_set1_epi8(15), .identifier = _mm512_set1_epi8(8)};
    d.zero = offset ? v_offset() : v_zero();
    if (kind == EB_W_INT8) return d;
    d.normal = _mm512_xor_si512(v_table(tables), d.zero);
    d.outlier = _mm512_xor_si512(v_table(tables + 16), d.zero);
    d.rest = _mm512_xor_si512(v_table(tables + 32), d.zero);
#ifdef __AVX512VBMI__
    static const int8_t flag[16] = {[8] = 16};
    d.both = _mm512_xor_si512(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)tables)), d.zero);
    d.flag = v_table(flag);
#endif
    return d;
}

EB_INLINE vec v_decode_int8(const decoder *d, vec bytes) { return _mm512_xor_si512(bytes, d->zero); }

/* 64 bytes → values of the low and of the high nibbles. */
EB_INLINE void v_decode(const decoder *d, int kind, vec bytes, vec *even, vec *odd) {
    vec low = _mm512_and_si512(bytes, d->nibble), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), d->nibble);
#ifdef __AVX512VBMI__ /* two shuffles fewer for the one port that has them: no masks */
    if (kind != EB_W_NIBBLES) {
        *even = _mm512_permutexvar_epi8(_mm512_or_si512(low, _mm512_shuffle_epi8(d->flag, high)), d->both);
        *odd = _mm512_permutexvar_epi8(_mm512_or_si512(high, _mm512_shuffle_epi8(d->flag, low)), d->both);
        return;
    }
#endif
    *even = _mm512_shuffle_epi8(d->normal, low);
    *odd = _mm512_shuffle_epi8(d->normal, high);
    if (kind == EB_W_NIBBLES) return;
    *even = _mm512_mask_shuffle_epi8(*even, _mm512_cmpeq_epi8_mask(high, d->identifier), d->outlier, low);
    *odd = _mm512_mask_shuffle_epi8(*odd, _mm512_cmpeq_epi8_mask(low, d->identifier), d->outlier, high);
}

/* What exceeds int8 of the outliers of 64 bytes; returns whether there is any. */
EB_INLINE int v_rest(const decoder *d, vec bytes, vec *even, vec *odd) {
    vec low = _mm512_and_si512(bytes, d->nibble), high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), d->nibble);
    vec zero = d->zero;
    *even = _mm512_mask_shuffle_epi8(zero, _mm512_cmpeq_epi8_mask(high, d->identifier), d->rest, low);
    *odd = _mm512_mask_shuffle_epi8(zero, _mm512_cmpeq_epi8_mask(low, d->identifier), d->rest, high);
    return (_mm512_cmpneq_epi8_mask(*even, zero) | _mm512_cmpneq_epi8_mask(*odd, zero)) != 0;
}

EB_INLINE vec v_shuffle(vec a, vec b, const int imm) {
    return imm ? _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0xdd))
               : _mm512_castps_si512(_mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0x88));
}

/* 16 rows of 64 bytes → 16 vectors, vector t with bytes 4t … 4t + 3 of every row. */
EB_INLINE void transpose(const uint8_t *const *rows, vec *out) {
    vec a[16], b[16];
    EB_UNROLL for (int i = 0; i < 16; i++) a[i] = v_load(rows[i]);
    EB_UNROLL for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    EB_UNROLL for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    /* a[4r + c]: 128-bit lane l holds byte column 4l + c of rows 4r … 4r + 3. */
    EB_UNROLL for (int c = 0; c < 4; c++) {
        vec p = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), q = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        vec r = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd), s = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        out[c] = _mm512_shuffle_i32x4(p, q, 0x88);
        out[8 + c] = _mm512_shuffle_i32x4(p, q, 0xdd);
        out[4 + c] = _mm512_shuffle_i32x4(r, s, 0x88);
        out[12 + c] = _mm512_shuffle_i32x4(r, s, 0xdd);
    }
}

#include "packing.h"

#ifndef MICRO
EB_INLINE void micro_steps(const int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps,
                           vec (*acc)[VECTORS]) {
    for (int s = 0; s < steps; s++, x += 4, panel += VECTORS * 64) {
        vec w[VECTORS];
        EB_UNROLL for (int v = 0; v < VECTORS; v++) w[v] = v_load(panel + 64 * v);
        EB_UNROLL for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride, 4);
            vec broadcast = _mm512_set1_epi32(four);
            EB_UNROLL for (int v = 0; v < VECTORS; v++) V_DOT(acc[r][v], w[v], broadcast);
        }
    }
}

EB_INLINE void micro_rows(const int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps,
                          int32_t *totals) {
    vec acc[TILE][VECTORS];
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = v_load(totals + r * 64 + 16 * v);
    micro_steps(rows, x, stride, panel, steps, acc);
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < VECTORS; v++) v_store(totals + r * 64 + 16 * v, acc[r][v]);
}

#define MICRO(rows) micro_rows(rows, x, stride, panel, steps, totals)

/* totals[r][n] += Σ over steps of the four products of x row r with output n. */
static void micro(int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps, int32_t *totals) {
    switch (rows) {
    case 1: MICRO(1); break;
    case 2: MICRO(2); break;
    case 3: MICRO(3); break;
    case 4: MICRO(4); break;
    case 5: MICRO(5); break;
    default: MICRO(6);
    }
}

/* One group of columns: sums[r][n] += float(start of row r + its products with output n) · scales[n], the product and the
   sum both rounded; what a total would be kept in memory for stays in registers. */
EB_INLINE void micro_group_rows(const int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps,
                                const int32_t *starts, int64_t starts_stride, const float *scales, float *sums) {
    vec acc[TILE][VECTORS];
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = _mm512_set1_epi32(starts[r * starts_stride]);
    micro_steps(rows, x, stride, panel, steps, acc);
    EB_UNROLL for (int v = 0; v < VECTORS; v++) {
        __m512 scale = _mm512_loadu_ps(scales + 16 * v);
        EB_UNROLL for (int r = 0; r < rows; r++) {
            float *to = sums + r * 64 + 16 * v;
            __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][v]), scale);
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), scaled));
        }
    }
}

#define HAVE_MICRO_GROUP
#define GROUP_CASE(n)                                                                                                 \
    case n: micro_group_rows(n, x, stride, panel, steps, starts, starts_stride, scales, sums); break;

static void micro_group(int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps,
                        const int32_t *starts, int64_t starts_stride, const float *scales, float *sums) {
    switch (rows) {
        GROUP_CASE(1) GROUP_CASE(2) GROUP_CASE(3) GROUP_CASE(4) GROUP_CASE(5) GROUP_CASE(6)
    }
}

#define TILE_PART(m) eb_even_part(m, TILE)
EB_INLINE void micro_begin(void) {}
EB_INLINE void micro_end(void) {}
#endif

#ifndef ROWS_UP_TO
#define ROWS_UP_TO(a) (!(a)->group ? 8 : rows_group(a) ? 4 : 0)
#endif
#define ROWS_MOST 8

#include "linear.h"
#include "floats512.h"

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

#ifndef AMX_VARIANT
EB_VARIANT(eb_avx512vnni, "avx512vnni", supported)
#endif
