/* AMX with few rows of x, up to 16: the weights are the left factor. 16 weight rows are decoded to [16][64] bytes as they
   lie, without the transposition that a panel needs, and one instruction multiplies them with 64 columns of all rows of x
   and sums along K. So the time is that of decoding, whatever M is, and totals come out ready to be scaled by groups.
   int8 weights are multiplied where they are.

   x lies as the right factor wants it: [K / 4][m][4], in the order of the decoded weights. M: rows, at most 16. */

#define THIN_ROWS 16
#define THIN_MORE_THAN 4 /* up to here the direct path is faster */
#define THIN_OUTPUTS 64 /* of a task */

/* Whether this path has the call: one scale a row, or groups of whole blocks. */
EB_INLINE int thin_fits(const eb_args *a, int64_t m) {
    int64_t columns = a->weight_kind == EB_W_INT8 ? BLOCK : 2 * BLOCK;
    return m > THIN_MORE_THAN && m <= THIN_ROWS && a->group % columns == 0;
}

/* Row m of the arranged codes → its places in the right factor. */
static void thin_put(const job *j, int64_t m, const int8_t *codes) {
    int64_t count = (j->stride - ROW_PAD) / 4;
    for (int64_t d = 0; d < count; d++) memcpy(j->thin + (d * j->m + m) * 4, codes + 4 * d, 4);
}

static void thin_configure(int64_t m) {
    tile_config c = {.palette = 1};
    for (int i = 0; i < 6; i++) { /* totals 0 1, weights 2 3, x 4 5 */
        c.rows[i] = 16;
        c.bytes[i] = (uint16_t)(i == 2 || i == 3 ? 64 : 4 * m);
    }
    TILE_FENCE();
    _tile_loadconfig(&c);
    configured[0] = 0;
}

typedef struct {
    const uint8_t *rows[16];
    uint8_t tail[16][BLOCK] __attribute__((aligned(64)));
    int64_t whole, blocks;
    int even; /* rows are equally far apart: none is repeated */
} thin_weights;

static void thin_prepare(const eb_args *a, int64_t n0, thin_weights *w) {
    int64_t row_bytes = (a->columns + columns_per_byte(a) - 1) / columns_per_byte(a);
    w->whole = row_bytes / BLOCK;
    w->blocks = (row_bytes + BLOCK - 1) / BLOCK;
    w->even = n0 + 16 <= a->outputs;
    for (int i = 0; i < 16; i++) {
        w->rows[i] = a->weight + EB_MIN(n0 + i, a->outputs - 1) * a->weight_stride;
        if (w->whole == w->blocks) continue;
        memset(w->tail[i], 0, BLOCK);
        memcpy(w->tail[i], w->rows[i] + w->whole * BLOCK, (size_t)(row_bytes - w->whole * BLOCK));
    }
}

/* Block b of 16 weight rows → two tiles of values, [2][16][64]; returns whether some exceed int8, with what is left over
   in `rest`. */
EB_INLINE int thin_decode(const int kind, const decoder *d, const thin_weights *w, int64_t b, int64_t ahead,
                          uint8_t *values, uint8_t *rest) {
    int any = 0;
    EB_UNROLL for (int i = 0; i < 16; i++) {
        const uint8_t *from = b < w->whole ? w->rows[i] + b * BLOCK : w->tail[i];
        vec even, odd, bytes = v_load(from);
        __builtin_prefetch(from + ahead, 0, 3);
        v_decode(d, kind, bytes, &even, &odd);
        v_store(values + i * 64, even);
        v_store(values + 1024 + i * 64, odd);
        if (kind != EB_W_WIDE_PAIRS) continue;
        any |= v_rest(d, bytes, &even, &odd);
        v_store(rest + i * 64, even);
        v_store(rest + 1024 + i * 64, odd);
    }
    return any;
}

EB_INLINE void thin_multiply(const uint8_t *values, const int8_t *x, int64_t m) {
    TILE_FENCE();
    _tile_loadd(2, values, 64);
    _tile_loadd(4, x, 4 * m);
    _tile_dpbssd(0, 2, 4);
    _tile_loadd(3, values + 1024, 64);
    _tile_loadd(5, x + 64 * m, 4 * m);
    _tile_dpbssd(1, 3, 5);
}

/* Totals of blocks b0 … b1 → dots [16 outputs][m]. */
EB_INLINE void thin_dots(const int kind, const job *j, const decoder *d, const thin_weights *w, int64_t b0, int64_t b1,
                         int32_t *dots) {
    uint8_t values[2][2048] __attribute__((aligned(64))), rest[2048] __attribute__((aligned(64)));
    int32_t second[256] __attribute__((aligned(64)));
    int64_t m = j->m, ahead = EB_MIN(1024, 16 * j->a->weight_stride);
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t b = b0; b < b1; b++) {
        const int8_t *x = j->thin + b * (kind == EB_W_INT8 ? 64 : 128) * m;
        if (kind == EB_W_INT8) {
            int whole = b < w->whole && w->even;
            if (!whole)
                for (int i = 0; i < 16; i++)
                    v_store(rest + i * 64, v_load(b < w->whole ? w->rows[i] + b * BLOCK : w->tail[i]));
            for (int i = 0; i < 16; i++) __builtin_prefetch(w->rows[i] + b * BLOCK + ahead, 0, 3);
            TILE_FENCE();
            _tile_loadd(2, whole ? w->rows[0] + b * BLOCK : rest, whole ? j->a->weight_stride : 64);
            _tile_loadd(4, x, 4 * m);
            _tile_dpbssd(0, 2, 4);
            continue;
        }
        /* Two buffers: the tiles of one are read while the other is written. */
        int any = thin_decode(kind, d, w, b, ahead, values[b & 1], rest);
        thin_multiply(values[b & 1], x, m);
        if (kind == EB_W_WIDE_PAIRS && any) thin_multiply(rest, x, m);
    }
    _tile_stored(0, dots, 4 * m);
    _tile_stored(1, second, 4 * m);
    TILE_FENCE();
    for (int64_t i = 0; i < 16 * m; i++) dots[i] = eb_add(dots[i], second[i]);
}

/* 16 outputs of all rows → totals [m][THIN_OUTPUTS], int32 or with groups the bits of float32. */
EB_INLINE void thin_outputs(const int kind, const job *j, const thin_weights *w, const float *scales,
                            int32_t *totals) {
    const decoder d = v_decoder(j->a->tables, kind, 0);
    int32_t dots[256] __attribute__((aligned(64)));
    float sums[256] __attribute__((aligned(64)));
    int64_t m = j->m, unit = j->a->group ? j->a->group / (2 * BLOCK) : w->blocks;
    memset(sums, 0, sizeof sums);
    for (int64_t b = 0, g = 0; b < w->blocks; b += unit, g++) {
        thin_dots(kind, j, &d, w, b, EB_MIN(b + unit, w->blocks), dots);
        if (!j->a->group) continue;
        const float *scale = scales + 16 * g;
        if (m == 1)
            for (int i = 0; i < 16; i++) sums[i] = sums[i] + (float)dots[i] * scale[i];
        else
            for (int64_t i = 0; i < 16; i++)
                for (int64_t r = 0; r < m; r++) sums[i * m + r] = sums[i * m + r] + (float)dots[i * m + r] * scale[i];
    }
    for (int64_t i = 0; i < 16; i++)
        for (int64_t r = 0; r < m; r++)
            memcpy(totals + r * THIN_OUTPUTS + i, j->a->group ? (void *)(sums + i * m + r) : (void *)(dots + i * m + r), 4);
}

static void thin_scales(const eb_args *a, int64_t n0, int64_t groups, float *scales, float *line) {
    for (int64_t i = 0; i < 16; i++) {
        eb_scales(a, EB_MIN(n0 + i, a->outputs - 1) * a->scale_stride, groups, line);
        for (int64_t g = 0; g < groups; g++) scales[16 * g + i] = line[g];
    }
}

static void thin_task(void *context, int64_t task) {
    job *j = context;
    const eb_args *a = j->a;
    int64_t n0 = task * THIN_OUTPUTS, outputs = EB_MIN(THIN_OUTPUTS, a->outputs - n0);
    int32_t totals[THIN_ROWS * THIN_OUTPUTS] __attribute__((aligned(64)));
    float *scales = eb_memory(EB_MEM_SCALES, (size_t)(17 * j->segments + 1) * sizeof(float));
    thin_weights w;
    if (!scales) {
        EB_FAIL(j);
        return;
    }
    thin_configure(j->m);
    for (int64_t n = 0; n < outputs; n += 16) {
        thin_prepare(a, n0 + n, &w);
        if (a->group) thin_scales(a, n0 + n, j->segments, scales, scales + 16 * j->segments);
        switch (a->weight_kind) {
        case EB_W_INT8: thin_outputs(EB_W_INT8, j, &w, scales, totals + n); break;
        case EB_W_NIBBLES: thin_outputs(EB_W_NIBBLES, j, &w, scales, totals + n); break;
        case EB_W_PAIRS: thin_outputs(EB_W_PAIRS, j, &w, scales, totals + n); break;
        default: thin_outputs(EB_W_WIDE_PAIRS, j, &w, scales, totals + n);
        }
    }
    _tile_release();
    finish(j, n0, outputs, totals, THIN_OUTPUTS);
}
