/* AMX: 16 × 16 totals of 64 products each per instruction, for products of more than a few rows. The rest, decoding and
   the direct path, is that of avx512vnni.c; weights of a panel stay signed. A panel's steps are the rows of AMX's tiles
   of weights as they are. Linux lets a process use the tiles after it has asked once. */
#define AMX_VARIANT
#define PANEL_OFFSET 0
#define TILE 32
#define MICRO

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} tile_config;

/* GCC's tile loads and stores do not say that they read and write memory: buffers must be written before, read after. */
#define TILE_FENCE() __asm__ volatile("" ::: "memory")

/* What the tiles of this thread are set to: rows of the two halves of x, steps. */
static __thread int configured[3];

static void configure(int upper, int lower, int steps) {
    tile_config c = {.palette = 1};
    for (int i = 0; i < 4; i++) { /* totals: upper rows × two vectors, lower rows × two vectors */
        c.rows[i] = (uint8_t)(i < 2 ? upper : lower);
        c.bytes[i] = 64;
    }
    c.rows[4] = (uint8_t)upper;
    c.rows[5] = (uint8_t)lower;
    c.bytes[4] = c.bytes[5] = (uint16_t)(4 * steps);
    c.rows[6] = c.rows[7] = (uint8_t)steps;
    c.bytes[6] = c.bytes[7] = 64;
    TILE_FENCE();
    _tile_loadconfig(&c);
    configured[0] = upper, configured[1] = lower, configured[2] = steps;
}

static inline void micro_begin(void) { configured[0] = 0; }
static inline void micro_end(void) { _tile_release(); }

/* totals[r][n] += Σ over steps of the four products of x row r with output n. */
static void micro(int rows, const int8_t *x, int64_t stride, const uint8_t *panel, int steps, int32_t *totals) {
    int upper = rows < 16 ? rows : 16, lower = rows - upper, depth = steps < 16 ? steps : 16, s;
    uint8_t last[16 * 256] __attribute__((aligned(64)));
    if (!steps) return;
    if (configured[0] != upper || configured[1] != (lower ? lower : 1) || configured[2] != depth)
        configure(upper, lower ? lower : 1, depth);
    if (steps % depth) { /* the last steps, filled up with zeros: what they meet of x does not matter */
        memset(last, 0, sizeof last);
        memcpy(last, panel + (int64_t)(steps - steps % depth) * 256, (size_t)(steps % depth) * 256);
    }
    TILE_FENCE();
    for (int v = 0; v < 4; v += 2) {
        int32_t *to = totals + 16 * v;
        _tile_loadd(0, to, 256);
        _tile_loadd(1, to + 16, 256);
        if (lower) {
            _tile_loadd(2, to + 16 * 64, 256);
            _tile_loadd(3, to + 16 * 64 + 16, 256);
        }
        for (s = 0; s < steps; s += depth) {
            const uint8_t *w = s + depth <= steps ? panel + (int64_t)s * 256 : last;
            _tile_loadd(4, x + 4 * s, stride);
            _tile_loadd(6, w + 64 * v, 256);
            _tile_dpbssd(0, 4, 6);
            _tile_loadd(7, w + 64 * v + 64, 256);
            _tile_dpbssd(1, 4, 7);
            if (lower) {
                _tile_loadd(5, x + 16 * stride + 4 * s, stride);
                _tile_dpbssd(2, 5, 6);
                _tile_dpbssd(3, 5, 7);
            }
        }
        _tile_stored(0, to, 256);
        _tile_stored(1, to + 16, 256);
        if (lower) {
            _tile_stored(2, to + 16 * 64, 256);
            _tile_stored(3, to + 16 * 64 + 16, 256);
        }
    }
    TILE_FENCE();
}

#define TILE_PART(m) EB_MIN(TILE, m)
#define HAVE_THIN

#include "avx512vnni.c"

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>

static int supported_amx(void) {
    unsigned a, b, c, d;
    if (!supported()) return 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(0), "c"(0));
    if (a < 7) return 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    if (!(c >> 1 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return 0; /* AVX512-VBMI, AMX-TILE, AMX-INT8 */
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0; /* ARCH_REQ_XCOMP_PERM, tile data */
}
#else
static int supported_amx(void) { return 0; }
#endif

EB_VARIANT(eb_amx, "amx", supported_amx)
