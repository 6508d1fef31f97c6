/* Plain C, for any machine with little-endian bytes; the compiler makes of it what it can. Also the plainest account of
   what the other variants do. */
#include "evenbits_cpu.h"

#define LANES 8
#define VECTORS 2
#define BLOCK 16
#define TILE 4
#define PANEL_OFFSET 0

EB_INLINE void put(int8_t *panel, int64_t step, const int8_t *four) {
    memcpy(panel + step * VECTORS * LANES * 4, four, 4);
}

/* LANES rows of BLOCK bytes → steps of the panel, [step][VECTORS · LANES][4]; returns whether some value exceeds int8. */
static int pack_block(const uint8_t *const *rows, int kind, const int8_t *tables, uint8_t *panel_bytes, uint8_t *rest) {
    int8_t *panel = (int8_t *)panel_bytes, *more = (int8_t *)rest;
    int any = 0;
    for (int n = 0; n < LANES; n++)
        for (int t = 0; t < BLOCK / 4; t++) {
            int8_t even[4], odd[4], even_rest[4], odd_rest[4];
            const uint8_t *bytes = rows[n] + 4 * t;
            if (kind == EB_W_INT8) {
                put(panel + 4 * n, t, (const int8_t *)bytes);
                continue;
            }
            for (int i = 0; i < 4; i++) {
                int low = bytes[i] & 15, high = bytes[i] >> 4, paired = kind != EB_W_NIBBLES;
                even[i] = tables[paired && high == 8 ? 16 + low : low];
                odd[i] = tables[paired && low == 8 ? 16 + high : high];
                even_rest[i] = high == 8 ? tables[32 + low] : 0;
                odd_rest[i] = low == 8 ? tables[32 + high] : 0;
                any |= even_rest[i] | odd_rest[i];
            }
            put(panel + 4 * n, 2 * t, even);
            put(panel + 4 * n, 2 * t + 1, odd);
            if (kind != EB_W_WIDE_PAIRS) continue;
            put(more + 4 * n, 2 * t, even_rest);
            put(more + 4 * n, 2 * t + 1, odd_rest);
        }
    return kind == EB_W_WIDE_PAIRS && any;
}

/* totals[r][n] += Σ over steps of the four products of x row r with output n. */
static void micro(int rows, const int8_t *x, int64_t stride, const uint8_t *panel_bytes, int steps, int32_t *totals) {
    for (int r = 0; r < rows; r++, x += stride, totals += VECTORS * LANES) {
        const int8_t *panel = (const int8_t *)panel_bytes;
        for (int s = 0; s < steps; s++, panel += VECTORS * LANES * 4)
            for (int n = 0; n < VECTORS * LANES; n++)
                totals[n] += x[4 * s] * panel[4 * n] + x[4 * s + 1] * panel[4 * n + 1] +
                             x[4 * s + 2] * panel[4 * n + 2] + x[4 * s + 3] * panel[4 * n + 3];
    }
}

#define TILE_PART(m) EB_MIN(TILE, m)
EB_INLINE void micro_begin(void) {}
EB_INLINE void micro_end(void) {}

#include "linear.h"

typedef float fvec __attribute__((vector_size(16)));

/* a · b + c, rounded once. Where the processor cannot: in double, whose product is exact and whose sum, if it is not, is
   made odd in its last bit, so that rounding it to float32 rounds the exact sum. */
EB_INLINE float fma_once(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    double product = (double)a * b, sum = product + c, back = sum - product;
    double error = (product - (sum - back)) + (c - back);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (error != 0.0 && error - error == 0.0 && !(bits & 1)) bits += (error > 0.0) == (sum > 0.0) ? 1 : -(uint64_t)1;
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
#endif
}

EB_INLINE fvec f_fma(fvec a, fvec b, fvec c) {
    return (fvec){fma_once(a[0], b[0], c[0]), fma_once(a[1], b[1], c[1]), fma_once(a[2], b[2], c[2]),
                  fma_once(a[3], b[3], c[3])};
}

#define F_UNROLL
#include "floats128.h"

static int supported(void) { return 1; }

EB_VARIANT(eb_portable, "portable", supported)
