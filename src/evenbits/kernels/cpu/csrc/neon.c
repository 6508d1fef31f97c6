/* NEON with the dot-product instructions (ARMv8.2): four outputs at a time, signed weights. */
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

#include "evenbits_cpu.h"

#define LANES 4
#define VECTORS 4
#define BLOCK 16
#define TILE 4
#define OFFSET 0
#define PANEL_OFFSET 0
#define HAVE_ROWS

typedef int8x16_t vec;

#define V_32(v) vreinterpretq_s32_s8(v)
#define V_DOT_MEMORY(acc, w, x) ((acc) = vreinterpretq_s8_s32(vdotq_s32(V_32(acc), w, vld1q_s8((const int8_t *)(x)))))

EB_INLINE vec v_load(const void *p) { return vld1q_s8((const int8_t *)p); }
EB_INLINE void v_store(void *p, vec v) { vst1q_s8((int8_t *)p, v); }
EB_INLINE vec v_add(vec a, vec b) { return vreinterpretq_s8_s32(vaddq_s32(V_32(a), V_32(b))); }
EB_INLINE vec v_subtract(vec a, vec b) { return vreinterpretq_s8_s32(vsubq_s32(V_32(a), V_32(b))); }
EB_INLINE vec v_zero(void) { return vdupq_n_s8(0); }
EB_INLINE vec v_offset(void) { return vdupq_n_s8(0); }

typedef struct {
    vec normal, outlier, rest;
} decoder;

EB_INLINE decoder v_decoder(const int8_t *tables, int kind, const int offset) {
    decoder d = {vdupq_n_s8(0), vdupq_n_s8(0), vdupq_n_s8(0)};
    (void)offset;
    if (kind == EB_W_INT8) return d;
    d.normal = vld1q_s8(tables);
    d.outlier = vld1q_s8(tables + 16);
    d.rest = vld1q_s8(tables + 32);
    return d;
}

EB_INLINE vec v_decode_int8(const decoder *d, vec bytes) {
    (void)d;
    return bytes;
}

/* 16 bytes → values of the low and of the high nibbles. */
EB_INLINE void v_decode(const decoder *d, int kind, vec bytes, vec *even, vec *odd) {
    uint8x16_t b = vreinterpretq_u8_s8(bytes), low = vandq_u8(b, vdupq_n_u8(15)), high = vshrq_n_u8(b, 4);
    *even = vqtbl1q_s8(d->normal, low);
    *odd = vqtbl1q_s8(d->normal, high);
    if (kind == EB_W_NIBBLES) return;
    *even = vbslq_s8(vceqq_u8(high, vdupq_n_u8(8)), vqtbl1q_s8(d->outlier, low), *even);
    *odd = vbslq_s8(vceqq_u8(low, vdupq_n_u8(8)), vqtbl1q_s8(d->outlier, high), *odd);
}

/* What exceeds int8 of the outliers of 16 bytes; returns whether there is any. */
EB_INLINE int v_rest(const decoder *d, vec bytes, vec *even, vec *odd) {
    uint8x16_t b = vreinterpretq_u8_s8(bytes), low = vandq_u8(b, vdupq_n_u8(15)), high = vshrq_n_u8(b, 4);
    *even = vandq_s8(vreinterpretq_s8_u8(vceqq_u8(high, vdupq_n_u8(8))), vqtbl1q_s8(d->rest, low));
    *odd = vandq_s8(vreinterpretq_s8_u8(vceqq_u8(low, vdupq_n_u8(8))), vqtbl1q_s8(d->rest, high));
    return vmaxvq_u8(vreinterpretq_u8_s8(vorrq_s8(*even, *odd))) != 0;
}

EB_INLINE vec v_shuffle(vec a, vec b, const int odd) {
    return vreinterpretq_s8_s32(odd ? vuzp2q_s32(V_32(a), V_32(b)) : vuzp1q_s32(V_32(a), V_32(b)));
}

/* 4 rows of 16 bytes → 4 vectors, vector t with bytes 4t … 4t + 3 of every row. */
EB_INLINE void transpose(const uint8_t *const *rows, vec *out) {
    int32x4_t a = V_32(v_load(rows[0])), b = V_32(v_load(rows[1])), c = V_32(v_load(rows[2])), d = V_32(v_load(rows[3]));
    int64x2_t ab0 = vreinterpretq_s64_s32(vtrn1q_s32(a, b)), ab1 = vreinterpretq_s64_s32(vtrn2q_s32(a, b));
    int64x2_t cd0 = vreinterpretq_s64_s32(vtrn1q_s32(c, d)), cd1 = vreinterpretq_s64_s32(vtrn2q_s32(c, d));
    out[0] = vreinterpretq_s8_s64(vtrn1q_s64(ab0, cd0));
    out[1] = vreinterpretq_s8_s64(vtrn1q_s64(ab1, cd1));
    out[2] = vreinterpretq_s8_s64(vtrn2q_s64(ab0, cd0));
    out[3] = vreinterpretq_s8_s64(vtrn2q_s64(ab1, cd1));
}

#include "packing.h"

EB_INLINE void micro_rows(const int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps,
                          int32_t *totals) {
    int32x4_t acc[TILE][VECTORS];
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = vld1q_s32(totals + r * 16 + 4 * v);
    for (int s = 0; s < steps; s++, x += 4, panel += VECTORS * 16) {
        vec w[VECTORS];
        EB_UNROLL for (int v = 0; v < VECTORS; v++) w[v] = v_load(panel + 16 * v);
        EB_UNROLL for (int r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, x + r * stride, 4);
            int8x16_t broadcast = vreinterpretq_s8_s32(vdupq_n_s32(four));
            EB_UNROLL for (int v = 0; v < VECTORS; v++) acc[r][v] = vdotq_s32(acc[r][v], w[v], broadcast);
        }
    }
    EB_UNROLL for (int r = 0; r < rows; r++)
        EB_UNROLL for (int v = 0; v < VECTORS; v++) vst1q_s32(totals + r * 16 + 4 * v, acc[r][v]);
}

#define MICRO(rows) micro_rows(rows, x, stride, panel, steps, totals)

/* totals[r][n] += Σ over steps of the four products of x row r with output n. */
static void micro(int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps, int32_t *totals) {
    switch (rows) {
    case 1: MICRO(1); break;
    case 2: MICRO(2); break;
    case 3: MICRO(3); break;
    default: MICRO(4);
    }
}

#define TILE_PART(m) eb_even_part(m, TILE)
EB_INLINE void micro_begin(void) {}
EB_INLINE void micro_end(void) {}

#define ROWS_UP_TO(a) (rows_group(a) ? 4 : 0)
#define ROWS_MOST 4

#include "linear.h"

typedef float32x4_t fvec;
EB_INLINE fvec f_fma(fvec a, fvec b, fvec c) { return vfmaq_f32(c, a, b); }

#include "floats128.h"

static int supported(void) {
#ifdef __linux__
    return (getauxval(AT_HWCAP) >> 20) & 1; /* HWCAP_ASIMDDP */
#else
    return 1; /* every Apple processor with this instruction set has it */
#endif
}

EB_VARIANT(eb_neon, "neon", supported)
