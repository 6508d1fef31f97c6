/* AMX with more rows of x than thin.h has, one scale a row: again the weights are the left factor, 16 rows of 64 bytes as
   they lie, so that nothing of a weight is transposed. x, quantized for this call anyway, is transposed once into tiles
   that lie in one piece, [token tile][step][16][16][4]; a step is 64 columns. Four totals, two tiles of weights with two
   of x, stay in registers along SLAB steps. They come out as [outputs][tokens] and are transposed on the way to y, which
   for K >= 512 is less work than to transpose weights.

   int8 weights are read where they are, unless rows lie so that they fall into few sets of the L1 cache; packed ones are
   decoded, SLAB steps of 32 rows at a time.

   M: rows (tokens), K: columns, N: outputs. */

#define TILES_OUTPUTS 32 /* of two tiles of weights */
#define TILES_TASK 64    /* outputs of a task */
#define SLAB 32          /* steps between which totals rest in memory */
#define TILE_BYTES 1024
#define LINES 64

/* Whether this path has the call. */
EB_INLINE int tiles_fit(const eb_args *a, int64_t m) { return m > THIN_ROWS && !a->group; }

static void tiles_configure(void) {
    tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) { /* totals 0 … 3, weights 4 5, x 6 7 */
        c.rows[i] = 16;
        c.bytes[i] = 64;
    }
    TILE_FENCE();
    _tile_loadconfig(&c);
    configured[0] = 0;
}

/* Token tile `task`: quantized, arranged, transposed into its tiles. */
static void tiles_quantize(void *context, int64_t task) {
    job *j = context;
    int64_t k = j->a->columns, stride = j->stride, steps = (stride - ROW_PAD) / 64, first = task * 16;
    int plain = j->a->weight_kind == EB_W_INT8;
    float *floats = eb_memory(EB_MEM_FLOATS, (size_t)(k + 1) * sizeof(float));
    int8_t *natural = eb_memory(EB_MEM_TOTALS, (size_t)stride), *codes = eb_memory(EB_MEM_CODES, (size_t)(16 * stride));
    if (!floats || !natural || !codes) {
        EB_FAIL(j);
        return;
    }
    const uint8_t *rows[16];
    for (int64_t i = 0; i < 16; i++) {
        int8_t *row = codes + i * stride, *to = plain ? row : natural;
        rows[i] = (const uint8_t *)row;
        if (first + i >= j->m) {
            memset(row, 0, (size_t)stride);
            continue;
        }
        j->rows[first + i] = eb_quantize_row(j->a, j->m0 + first + i, floats, to);
        memset(to + k, 0, (size_t)(stride - k));
        if (!plain) eb_arrange(natural, stride - ROW_PAD, BLOCK, row);
    }
    vec out[16];
    int8_t *to = j->thin + task * steps * TILE_BYTES;
    for (int64_t s = 0; s < steps; s++, to += TILE_BYTES) {
        transpose(rows, out);
        EB_UNROLL for (int i = 0; i < 16; i++) {
            v_store(to + 64 * i, out[i]);
            rows[i] += 64;
        }
    }
}

/* SLAB steps of 32 weight rows: of both tiles where they begin, how far rows and steps are apart; what is left over of
   values beyond int8, tiles of the steps `at`. */
typedef struct {
    const uint8_t *tile[2];
    int64_t stride, step, steps, extra;
    const uint8_t *next; /* what comes after this slab, to be fetched meanwhile: rows `stride` apart; or NULL */
    const uint8_t *rest;
    int64_t at[SLAB];
} tiles_slab;

EB_INLINE void tiles_load(const eb_args *a, const int kind, const decoder *d, int64_t n0, int64_t first, int64_t steps,
                          uint8_t *panel, uint8_t *rest, tiles_slab *w) {
    const int64_t per = kind == EB_W_INT8 ? 1 : 2;
    int64_t row_bytes = (a->columns + per - 1) / per, from = first * 64 / per, ahead = TILES_OUTPUTS * a->weight_stride;
    *w = (tiles_slab){.tile = {panel, panel + SLAB * TILE_BYTES}, .stride = 64, .step = TILE_BYTES, .steps = steps};
    w->rest = rest;
    for (int64_t s = 0; s < steps; s += per) {
        int64_t left = row_bytes - (from + s / per * 64);
        int any = 0;
        for (int64_t i = 0; i < TILES_OUTPUTS; i++) {
            const uint8_t *row = a->weight + EB_MIN(n0 + i, a->outputs - 1) * a->weight_stride + from + s / per * 64;
            uint8_t *to = panel + i / 16 * SLAB * TILE_BYTES + s * TILE_BYTES + i % 16 * 64;
            uint8_t tail[64] __attribute__((aligned(64)));
            vec bytes, even, odd;
            __builtin_prefetch(row + ahead, 0, 2);
            if (left < 64) {
                memset(tail, 0, sizeof tail);
                memcpy(tail, row, (size_t)left);
                row = tail;
            }
            bytes = v_load(row);
            if (kind == EB_W_INT8) {
                v_store(to, bytes);
                continue;
            }
            v_decode(d, kind, bytes, &even, &odd);
            v_store(to, even);
            v_store(to + TILE_BYTES, odd);
            if (kind != EB_W_WIDE_PAIRS) continue;
            any |= v_rest(d, bytes, &even, &odd);
            to = rest + (2 * w->extra + i / 16) * TILE_BYTES + i % 16 * 64;
            v_store(to, even);
            v_store(to + 2 * TILE_BYTES, odd);
        }
        if (!any) continue;
        w->at[w->extra++] = s;
        w->at[w->extra++] = s + 1;
    }
}

/* Adds a slab to the totals of two tiles of outputs with one or two of tokens, x0 and x1, and fetches `rows` rows of
   the next slab from `next`. */
EB_INLINE void tiles_multiply(const int two, const tiles_slab *w, const int8_t *x0, const int8_t *x1, int begin,
                              const uint8_t *next, int64_t rows, int32_t *totals) {
    const uint8_t *w0 = w->tile[0], *w1 = w->tile[1];
    if (begin) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, totals, 64);
        _tile_loadd(1, totals + 256, 64);
        if (two) _tile_loadd(2, totals + 512, 64);
        if (two) _tile_loadd(3, totals + 768, 64);
    }
    for (int64_t s = 0; s < w->steps; s++, w0 += w->step, w1 += w->step) {
        _tile_loadd(4, w0, w->stride);
        _tile_loadd(6, x0 + s * TILE_BYTES, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(5, w1, w->stride);
        _tile_dpbssd(1, 5, 6);
        for (int64_t r = 0; r < rows; r++) __builtin_prefetch(next + r * w->stride + 64 * s, 0, 2);
        if (!two) continue;
        _tile_loadd(7, x1 + s * TILE_BYTES, 64);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 5, 7);
    }
    for (int64_t e = 0; e < w->extra; e++) {
        _tile_loadd(4, w->rest + 2 * e * TILE_BYTES, 64);
        _tile_loadd(6, x0 + w->at[e] * TILE_BYTES, 64);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(5, w->rest + (2 * e + 1) * TILE_BYTES, 64);
        _tile_dpbssd(1, 5, 6);
        if (!two) continue;
        _tile_loadd(7, x1 + w->at[e] * TILE_BYTES, 64);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, totals, 64);
    _tile_stored(1, totals + 256, 64);
    if (two) _tile_stored(2, totals + 512, 64);
    if (two) _tile_stored(3, totals + 768, 64);
}

/* Totals [16 outputs][16 tokens], tokens 4c … 4c + 3 → four vectors of 16 outputs. Lanes of 128 bits are put in place by
   loads: half the shuffles of `transpose`. */
EB_INLINE void tiles_turn(const int32_t *totals, int c, __m512i *out) {
    __m512i a[4];
    EB_UNROLL for (int i = 0; i < 4; i++) {
        const int32_t *from = totals + 16 * i + 4 * c;
        a[i] = _mm512_castsi128_si512(_mm_load_si128((const __m128i *)from));
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x00f0, _mm_load_si128((const __m128i *)(from + 64)));
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0x0f00, _mm_load_si128((const __m128i *)(from + 128)));
        a[i] = _mm512_mask_broadcast_i32x4(a[i], 0xf000, _mm_load_si128((const __m128i *)(from + 192)));
    }
    __m512i b0 = _mm512_unpacklo_epi32(a[0], a[1]), b1 = _mm512_unpackhi_epi32(a[0], a[1]);
    __m512i b2 = _mm512_unpacklo_epi32(a[2], a[3]), b3 = _mm512_unpackhi_epi32(a[2], a[3]);
    out[0] = _mm512_unpacklo_epi64(b0, b2);
    out[1] = _mm512_unpackhi_epi64(b0, b2);
    out[2] = _mm512_unpacklo_epi64(b1, b3);
    out[3] = _mm512_unpackhi_epi64(b1, b3);
}

/* What the epilogue has of 16 outputs. */
typedef struct {
    __m512 scales, bias;
    __m512i sums;
    __mmask16 mask;
} tiles_outputs;

static void tiles_prepare(const eb_args *a, int64_t n0, tiles_outputs *o) {
    int64_t n = EB_MAX(0, EB_MIN(16, a->outputs - n0));
    float scales[16] = {0};
    o->mask = (__mmask16)((1u << n) - 1);
    if (n && a->y_type != EB_INT32) {
        eb_scales(a, a->scale_stride ? n0 : 0, a->scale_stride ? n : 1, scales);
        if (!a->scale_stride)
            for (int i = 1; i < 16; i++) scales[i] = scales[0];
    }
    o->scales = _mm512_loadu_ps(scales);
    o->bias = a->bias ? _mm512_maskz_loadu_ps(o->mask, a->bias + n0) : _mm512_setzero_ps();
    o->sums = a->affine ? _mm512_maskz_loadu_epi32(o->mask, a->weight_sum + n0) : _mm512_setzero_si512();
}

/* Totals of 16 tokens from m with two tiles of outputs → y. */
static void tiles_finish(const job *j, int64_t n0, int64_t m, const tiles_outputs *o, const int32_t *totals) {
    const eb_args *a = j->a;
    float sums[4][TILES_OUTPUTS] __attribute__((aligned(64)));
    int64_t outputs = EB_MIN(TILES_OUTPUTS, a->outputs - n0), plain = a->y_type == EB_FLOAT32;
    for (int c = 0; c < 4 && m + 4 * c < j->m; c++) {
        int64_t count = EB_MIN(4, j->m - m - 4 * c), at = (j->m0 + m + 4 * c) * a->outputs + n0;
        const eb_row *row = j->rows + m + 4 * c;
        for (int h = 0; h < 2; h++) {
            __m512i dots[4];
            tiles_turn(totals + 256 * h, c, dots);
            for (int64_t t = 0; t < count; t++) {
                int64_t to = at + t * a->outputs + 16 * h;
                if (a->y_type == EB_INT32) {
                    _mm512_mask_storeu_epi32((int32_t *)a->y + to, o[h].mask, dots[t]);
                    continue;
                }
                if (a->affine && row[t].zero)
                    dots[t] = v_subtract(dots[t], _mm512_mullo_epi32(_mm512_set1_epi32(row[t].zero), o[h].sums));
                __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row[t].scale), o[h].scales);
                __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t]), scale);
                if (a->bias) y = _mm512_add_ps(y, o[h].bias);
                _mm512_mask_storeu_ps(plain ? (float *)a->y + to : sums[t] + 16 * h, o[h].mask, y);
            }
        }
        if (a->y_type == EB_INT32 || (plain && !a->activation)) continue;
        for (int64_t t = 0; t < count; t++) {
            float *y = plain ? (float *)a->y + at + t * a->outputs : sums[t];
            if (a->activation) eb_activate(a->activation, y, outputs);
            if (!plain) eb_floats_to(y, a->y_type, outputs, (uint16_t *)a->y + at + t * a->outputs);
        }
    }
}

/* 32 outputs of all rows. */
EB_INLINE void tiles_run(const int kind, const job *j, int64_t n0, uint8_t *panel, uint8_t *rest, int32_t *totals) {
    const eb_args *a = j->a;
    const decoder d = v_decoder(a->tables, kind, 0);
    int64_t steps = (j->stride - ROW_PAD) / 64, tokens = (j->m + 15) / 16, pairs = (tokens + 1) / 2;
    int apart = a->weight_stride % 2048 != 0, whole = a->columns % 64 == 0 && n0 + TILES_OUTPUTS <= a->outputs;
    tiles_outputs outputs[2];
    tiles_slab w;
    tiles_prepare(a, n0, outputs);
    tiles_prepare(a, n0 + 16, outputs + 1);
    for (int64_t first = 0; first < steps; first += SLAB) {
        int64_t count = EB_MIN(SLAB, steps - first);
        if (kind == EB_W_INT8 && apart && whole) {
            const uint8_t *from = a->weight + n0 * a->weight_stride + first * 64;
            w = (tiles_slab){.tile = {from, from + 16 * a->weight_stride}, .stride = a->weight_stride, .step = 64};
            w.steps = count;
            w.next = from + (first + SLAB < steps ? SLAB * 64 : TILES_OUTPUTS * a->weight_stride - first * 64);
        } else
            tiles_load(a, kind, &d, n0, first, count, panel, rest, &w);
        TILE_FENCE();
        for (int64_t t = 0; t < tokens; t += 2) {
            const int8_t *x = j->thin + (t * steps + first) * TILE_BYTES;
            int64_t share = (TILES_OUTPUTS + pairs - 1) / pairs;
            const uint8_t *next = w.next ? w.next + t / 2 * share * w.stride : panel;
            if (!w.next) share = 0;
            if (t + 1 < tokens)
                tiles_multiply(1, &w, x, x + steps * TILE_BYTES, !first, next, share, totals + t * 512);
            else
                tiles_multiply(0, &w, x, x, !first, next, share, totals + t * 512);
            TILE_FENCE();
            if (first + SLAB < steps) continue;
            tiles_finish(j, n0, 16 * t, outputs, totals + t * 512);
            if (t + 1 < tokens) tiles_finish(j, n0, 16 * t + 16, outputs, totals + t * 512 + 512);
        }
    }
}

static void tiles_task(void *context, int64_t task) {
    job *j = context;
    const eb_args *a = j->a;
    uint8_t *panel = eb_memory(EB_MEM_PANEL, 2 * SLAB * TILE_BYTES);
    uint8_t *rest = eb_memory(EB_MEM_REST, (2 * SLAB + 4) * TILE_BYTES);
    int32_t *totals = eb_memory(EB_MEM_TOTALS, (size_t)EB_UP(j->m, 32) * TILES_OUTPUTS * sizeof(int32_t));
    if (!panel || !rest || !totals) {
        EB_FAIL(j);
        return;
    }
    tiles_configure();
    for (int64_t n0 = task * TILES_TASK; n0 < EB_MIN((task + 1) * TILES_TASK, a->outputs); n0 += TILES_OUTPUTS) {
        switch (a->weight_kind) {
        case EB_W_INT8: tiles_run(EB_W_INT8, j, n0, panel, rest, totals); break;
        case EB_W_NIBBLES: tiles_run(EB_W_NIBBLES, j, n0, panel, rest, totals); break;
        case EB_W_PAIRS: tiles_run(EB_W_PAIRS, j, n0, panel, rest, totals); break;
        default: tiles_run(EB_W_WIDE_PAIRS, j, n0, panel, rest, totals);
        }
    }
    _tile_release();
}
