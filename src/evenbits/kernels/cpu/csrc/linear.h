/* The product of quantized rows with packed weights, for all variants. A variant defines, then includes this file:

     LANES, VECTORS, BLOCK   outputs of a vector, vectors of a panel, bytes of a row that pack_block reads
     TILE, TILE_PART(m)      rows of x that micro handles at most, and how many of m rows it shall take next
     PANEL_OFFSET            128 if weights of a panel are unsigned (code + 128, what vpdpbusd wants), 0 if signed
     micro_group             optionally (HAVE_MICRO_GROUP): micro for a group of columns, scaled and summed in registers
     pack_block, micro       see below;   ROWS_UP_TO(a), HAVE_ROWS: the direct path for few rows (rows.h), or 0

   Two paths. Few rows: weights go from their bytes straight into dot products along K (rows.h). Many rows: the weights of
   OUTPUTS outputs are decoded into a panel in the L1 or L2 cache, [K/4 steps][OUTPUTS][4], PANEL_COLUMNS columns at a
   time, and used for all rows.

   K is cut into segments, each with its own int32 total: the groups of columns that share a scale, or all of K. With
   groups, y = Σ over groups, in order, of float(total) · scale: a product and a sum in float32, both rounded. Unsigned
   weights need 128 · Σ codes of a segment subtracted; it is what a total starts from.

   M: rows, K: columns, N: outputs. */
#include "quantize.h"

#define OUTPUTS (LANES * VECTORS)
#define STEP_BYTES (OUTPUTS * 4)
#define ROW_BLOCK 256  /* rows of x that are quantized together */
#define ROW_PAD 64     /* bytes between rows, so that their lines do not fall into one cache set */
#define ROWS_OUTPUTS 64 /* outputs of a task of the direct path */
#define MOST_OUTPUTS EB_MAX(OUTPUTS, ROWS_OUTPUTS)
#define PANEL_COLUMNS 384 /* with 64 outputs a panel and rows of x stay in an L1 cache of 32 KB */

typedef struct {
    const eb_args *a;
    int64_t m0, m;        /* rows of this block */
    int64_t stride;       /* bytes of a row of codes */
    int64_t segment, segments;
    int64_t direct;       /* few rows: rows.h, or thin.h */
    int8_t *thin;         /* thin.h: the right factor; else NULL */
    int8_t *codes;        /* [m, stride] in the order of the decoded weights */
    int32_t *starts;      /* [m, segments]; direct: [m, stride / 8] (int8 weights: / 4), one for every int32 lane */
    eb_row *rows;         /* [m] */
    int failed;           /* memory ran out */
} job;

EB_INLINE int64_t columns_per_byte(const eb_args *a) { return a->weight_kind == EB_W_INT8 ? 1 : 2; }

#include "ahead.h"

static void quantize_task(void *context, int64_t task);
static void finish(const job *j, int64_t n0, int64_t n, int32_t *totals, int64_t stride);

#ifdef HAVE_ROWS
#include "rows.h"
#else
#define ROWS_UP_TO(a) 0
static void rows_task(void *context, int64_t task) { (void)context, (void)task; }
#endif
#ifdef HAVE_THIN
#include "thin.h"
#include "tiles.h"
#endif

/* Codes of row m of the job, arranged, with the starts of its totals. */
static void quantize_one(job *j, int64_t m, float *floats, int8_t *natural) {
    const eb_args *a = j->a;
    int64_t k = a->columns, stride = j->stride;
    int8_t *codes = j->codes + m * stride;
    int plain = a->weight_kind == EB_W_INT8;
    if (plain) natural = codes;
    j->rows[m] = eb_quantize_row(a, j->m0 + m, floats, natural);
    memset(natural + k, 0, (size_t)(stride - k));
    if (!plain) eb_arrange(natural, stride - ROW_PAD, j->direct ? BLOCK : 4, codes);
#ifdef HAVE_THIN
    if (j->thin) {
        thin_put(j, m, codes);
        return;
    }
#endif
#ifdef HAVE_ROWS
    if (j->direct) {
        rows_starts(a, codes, (stride - ROW_PAD) / (plain ? BLOCK : 2 * BLOCK), plain,
                    j->starts + m * (stride / (plain ? 4 : 8)));
        return;
    }
#endif
    for (int64_t s = 0; s < j->segments; s++) {
        int64_t from = s * j->segment, count = EB_MIN(j->segment, k - from);
        j->starts[m * j->segments + s] = PANEL_OFFSET ? -PANEL_OFFSET * eb_sum(natural + from, count) : 0;
    }
}

#define QUANTIZE_ROWS 8

static void quantize_task(void *context, int64_t task) {
    job *j = context;
    float *floats = eb_memory(EB_MEM_FLOATS, (size_t)(j->a->columns + 1) * sizeof(float));
    int8_t *natural = eb_memory(EB_MEM_TOTALS, (size_t)j->stride);
    if (!floats || !natural) {
        EB_FAIL(j);
        return;
    }
    for (int64_t m = task * QUANTIZE_ROWS; m < EB_MIN(j->m, (task + 1) * QUANTIZE_ROWS); m++)
        quantize_one(j, m, floats, natural);
}

/* totals [n], int32 or with groups the bits of float32, of row m → y; scales: [n], without groups. */
static void finish_row(const job *j, int64_t m, int64_t n0, int64_t n, const float *restrict scales,
                       int32_t *restrict totals) {
    const eb_args *a = j->a;
    int64_t at = (j->m0 + m) * a->outputs + n0;
    float sums[MOST_OUTPUTS], *y = a->y_type == EB_FLOAT32 ? (float *)a->y + at : sums, row_scale = j->rows[m].scale;
    if (a->y_type == EB_INT32) {
        memcpy((int32_t *)a->y + at, totals, (size_t)n * sizeof(int32_t));
        return;
    }
    if (a->group)
        for (int64_t i = 0; i < n; i++) y[i] = eb_float((uint32_t)totals[i]) * row_scale;
    else {
        if (a->affine && j->rows[m].zero)
            for (int64_t i = 0; i < n; i++)
                totals[i] = eb_add(totals[i], -eb_mul(j->rows[m].zero, a->weight_sum[n0 + i]));
        for (int64_t i = 0; i < n; i++) y[i] = (float)totals[i] * (row_scale * scales[i]);
    }
    if (a->bias)
        for (int64_t i = 0; i < n; i++) y[i] += a->bias[n0 + i];
    if (a->activation) eb_activate(a->activation, y, n);
    if (a->y_type != EB_FLOAT32) eb_floats_to(sums, a->y_type, n, (uint16_t *)a->y + at);
}

/* All rows of outputs n0 … n0 + n: totals [m][stride] → y. */
static void finish(const job *j, int64_t n0, int64_t n, int32_t *totals, int64_t stride) {
    const eb_args *a = j->a;
    float scales[MOST_OUTPUTS];
    if (!a->group && a->y_type != EB_INT32) {
        eb_scales(a, a->scale_stride ? n0 : 0, a->scale_stride ? n : 1, scales);
        if (!a->scale_stride)
            for (int64_t i = 1; i < n; i++) scales[i] = scales[0];
    }
    for (int64_t m = 0; m < j->m; m++) finish_row(j, m, n0, n, scales, totals + m * stride);
}

/* Decodes bytes [from, from + bytes) of OUTPUTS weight rows into the panel. Returns whether some value exceeds int8; then
   `rest` holds what is left over. Rows beyond the last repeat it, bytes beyond a row are zeros (x is zero there too). */
static int pack(const eb_args *a, int64_t n0, int64_t from, int64_t bytes, uint8_t *panel, uint8_t *rest) {
    int64_t row_bytes = (a->columns + columns_per_byte(a) - 1) / columns_per_byte(a);
    int64_t block_bytes = BLOCK / 4 * columns_per_byte(a) * STEP_BYTES, exceeds = 0;
    uint8_t tail[LANES][BLOCK] __attribute__((aligned(64)));
    for (int v = 0; v < VECTORS; v++) {
        const uint8_t *rows[LANES];
        for (int i = 0; i < LANES; i++)
            rows[i] = a->weight + EB_MIN(n0 + v * LANES + i, a->outputs - 1) * a->weight_stride + from;
        for (int64_t at = 0; at < bytes; at += BLOCK) {
            int64_t left = row_bytes - (from + at), to = at / BLOCK * block_bytes + v * LANES * 4;
            for (int i = 0; i < LANES; i++) {
                if (left < BLOCK) {
                    memset(tail[i], 0, BLOCK);
                    memcpy(tail[i], rows[i], (size_t)left);
                    rows[i] = tail[i];
                }
            }
            exceeds |= pack_block(rows, (int)a->weight_kind, a->tables, panel + to, rest + to);
            for (int i = 0; i < LANES; i++) rows[i] += BLOCK;
        }
    }
    return exceeds != 0;
}

/* Scales of all groups, transposed: [segments][OUTPUTS]; line: [segments], scratch. */
static void gather_scales(const job *j, int64_t n0, float *scales, float *line) {
    const eb_args *a = j->a;
    for (int64_t i = 0; i < OUTPUTS; i++) {
        eb_scales(a, EB_MIN(n0 + i, a->outputs - 1) * a->scale_stride, j->segments, line);
        for (int64_t g = 0; g < j->segments; g++) scales[g * OUTPUTS + i] = line[g];
    }
}

static void fill(int32_t *restrict totals, int32_t value) {
    for (int i = 0; i < OUTPUTS; i++) totals[i] = value;
}

static void add(int32_t *restrict totals, int32_t value) {
    for (int i = 0; i < OUTPUTS; i++) totals[i] = eb_add(totals[i], value);
}

static void add_scaled(float *restrict sums, const int32_t *restrict tile, const float *restrict scales) {
    for (int i = 0; i < OUTPUTS; i++) sums[i] = sums[i] + (float)tile[i] * scales[i];
}

/* Columns from … from + count of a panel that begins at column `first`, added to int32 totals [rows][OUTPUTS]. */
static void micro_pair(const job *j, int64_t m, int64_t rows, int64_t first, int64_t from, int64_t count,
                       const uint8_t *panel, const uint8_t *rest, int32_t *totals) {
    int64_t offset = (from - first) / 4 * STEP_BYTES;
    int steps = (int)(EB_UP(count, 4 * columns_per_byte(j->a)) / 4);
    const int8_t *x = j->codes + m * j->stride + from;
    micro((int)rows, x, j->stride, panel + offset, steps, totals);
    if (!rest) return;
    if (PANEL_OFFSET) /* the rest is unsigned too */
        for (int64_t r = 0; r < rows; r++)
            add(totals + r * OUTPUTS, -PANEL_OFFSET * eb_sum(x + r * j->stride, 4 * steps));
    micro((int)rows, x, j->stride, rest + offset, steps, totals);
}

/* One panel, columns first … first + columns of OUTPUTS outputs, for all rows; totals [m][OUTPUTS]. The next one's bytes are
   fetched meanwhile. */
static void multiply(const job *j, int64_t first, int64_t columns, const uint8_t *panel, const uint8_t *rest,
                     const float *scales, upcoming *next, int32_t *totals) {
    int64_t tiles = (j->m + TILE - 1) / TILE, lines = (OUTPUTS * (next->bytes / 64 + 1) + tiles - 1) / tiles;
    int32_t tile[TILE * OUTPUTS] __attribute__((aligned(64)));
    int64_t s0 = first / j->segment;
    for (int64_t m = 0, rows; m < j->m; m += rows, totals += rows * OUTPUTS) {
        rows = TILE_PART(j->m - m);
        fetch(next, lines);
        if (!j->a->group) {
            micro_pair(j, m, rows, first, first, columns, panel, rest, totals);
            continue;
        }
        for (int64_t s = s0; s * j->segment < first + columns; s++) {
            int64_t from = s * j->segment, count = EB_MIN(j->segment, first + columns - from);
#ifdef HAVE_MICRO_GROUP
            if (!rest) {
                int64_t steps = EB_UP(count, 4 * columns_per_byte(j->a)) / 4;
                micro_group((int)rows, j->codes + m * j->stride + from, j->stride, panel + (from - first) / 4 * STEP_BYTES,
                            (int)steps, j->starts + m * j->segments + s, j->segments, scales + (s - s0) * OUTPUTS,
                            (float *)totals);
                continue;
            }
#endif
            for (int64_t r = 0; r < rows; r++) fill(tile + r * OUTPUTS, j->starts[(m + r) * j->segments + s]);
            micro_pair(j, m, rows, first, from, count, panel, rest, tile);
            for (int64_t r = 0; r < rows; r++)
                add_scaled((float *)(totals + r * OUTPUTS), tile + r * OUTPUTS, scales + (s - s0) * OUTPUTS);
        }
    }
}

static void panel_task(void *context, int64_t task) {
    job *j = context;
    const eb_args *a = j->a;
    int64_t n0 = task * OUTPUTS, outputs = EB_MIN(OUTPUTS, a->outputs - n0), per_byte = columns_per_byte(a);
    int64_t groups = a->group ? EB_MAX(1, PANEL_COLUMNS / a->group) : 0; /* of a panel */
    int64_t width = a->group ? groups * a->group : PANEL_COLUMNS;
    size_t panel_bytes = (size_t)EB_UP(EB_MIN(width, a->columns), BLOCK * per_byte) / 4 * STEP_BYTES;
    int wide = a->weight_kind == EB_W_WIDE_PAIRS;
    uint8_t *panel = eb_memory(EB_MEM_PANEL, panel_bytes);
    uint8_t *rest = wide ? eb_memory(EB_MEM_REST, panel_bytes) : panel;
    float *scales = eb_memory(EB_MEM_SCALES, (size_t)(j->segments * (OUTPUTS + 1)) * sizeof(float));
    int32_t *totals = eb_memory(EB_MEM_TOTALS, (size_t)(j->m * OUTPUTS) * sizeof(int32_t));
    if (!panel || !rest || !scales || !totals) {
        EB_FAIL(j);
        return;
    }
    for (int64_t m = 0; m < j->m; m++) fill(totals + m * OUTPUTS, a->group ? 0 : j->starts[m]);
    if (a->group) gather_scales(j, n0, scales, scales + j->segments * OUTPUTS);
    micro_begin();
    for (int64_t first = 0; first < a->columns; first += width) {
        int64_t columns = EB_MIN(width, a->columns - first);
        int any = pack(a, n0, first / per_byte, (columns + per_byte - 1) / per_byte, panel, rest);
        const float *scale = a->group ? scales + first / a->group * OUTPUTS : NULL;
        upcoming next = next_panel(a, n0, first + columns, width);
        multiply(j, first, columns, panel, wide && any ? rest : NULL, scale, &next, totals);
    }
    micro_end();
    finish(j, n0, outputs, totals, OUTPUTS);
}

/* Rows m0 … of the call. Returns 0, or -1 if there is no memory. */
static int run_block(const eb_args *a, int64_t m0, int64_t m) {
    int64_t per_byte = columns_per_byte(a), quantum = BLOCK * per_byte;
    job j = {.a = a, .m0 = m0, .m = m, .stride = EB_UP(a->columns, quantum) + ROW_PAD};
    j.direct = m <= ROWS_UP_TO(a);
#ifdef HAVE_THIN
    if (thin_fits(a, m)) {
        j.direct = 1;
        j.thin = eb_memory(EB_MEM_THIN, (size_t)(m * j.stride));
        if (!j.thin) return -1;
    }
#endif
#ifdef HAVE_THIN
    if (tiles_fit(a, m)) {
        j.thin = eb_memory(EB_MEM_THIN, (size_t)(EB_UP(m, 16) * j.stride));
        j.rows = eb_memory(EB_MEM_ROWS, (size_t)m * sizeof(eb_row));
        if (!j.thin || !j.rows) return -1;
        eb_parallel(tiles_quantize, &j, (m + 15) / 16, a->threads);
        if (!j.failed) eb_parallel(tiles_task, &j, (a->outputs + TILES_TASK - 1) / TILES_TASK, a->threads);
        return j.failed ? -1 : 0;
    }
#endif
    j.segment = a->group ? a->group : EB_UP(EB_MAX(a->columns, 1), quantum);
    j.segments = EB_MAX(1, (a->columns + j.segment - 1) / j.segment);
    j.codes = eb_memory(EB_MEM_CODES, (size_t)(m * j.stride));
    j.starts = eb_memory(EB_MEM_SUMS, (size_t)(m * (j.direct ? j.stride / (4 * per_byte) : j.segments)) * sizeof(int32_t));
    j.rows = eb_memory(EB_MEM_ROWS, (size_t)m * sizeof(eb_row));
    if (!j.codes || !j.starts || !j.rows) return -1;
    eb_parallel(quantize_task, &j, (m + QUANTIZE_ROWS - 1) / QUANTIZE_ROWS, a->threads);
    if (j.failed) return -1;
#ifdef HAVE_THIN
    if (j.thin) {
        eb_parallel(thin_task, &j, (a->outputs + THIN_OUTPUTS - 1) / THIN_OUTPUTS, a->threads);
        return j.failed ? -1 : 0;
    }
#endif
    if (j.direct)
        eb_parallel(rows_task, &j, (a->outputs + ROWS_OUTPUTS - 1) / ROWS_OUTPUTS, a->threads);
    else
        eb_parallel(panel_task, &j, (a->outputs + OUTPUTS - 1) / OUTPUTS, a->threads);
    return j.failed ? -1 : 0;
}

static int run_linear(const eb_args *a) {
    for (int64_t m = 0; m < a->rows; m += ROW_BLOCK)
        if (run_block(a, m, EB_MIN(ROW_BLOCK, a->rows - m))) return -1;
    return 0;
}

/* Codes alone, in natural order. */
static void codes_task(void *context, int64_t task) {
    job *j = context;
    const eb_args *a = j->a;
    float *floats = eb_memory(EB_MEM_FLOATS, (size_t)(a->columns + 1) * sizeof(float));
    if (!floats) {
        EB_FAIL(j);
        return;
    }
    for (int64_t m = task * QUANTIZE_ROWS; m < EB_MIN(a->rows, (task + 1) * QUANTIZE_ROWS); m++) {
        eb_row row = eb_quantize_row(a, m, floats, a->codes + m * a->columns);
        a->row_scales[m] = row.scale;
        a->row_zeros[m] = row.zero;
    }
}

static int run_quantize(const eb_args *a) {
    job j = {.a = a};
    eb_parallel(codes_task, &j, (a->rows + QUANTIZE_ROWS - 1) / QUANTIZE_ROWS, a->threads);
    return j.failed ? -1 : 0;
}

#define EB_VARIANT(symbol, label, test)                                                                               \
    EB_HIDDEN const eb_variant symbol;                                                                                \
    const eb_variant symbol = {label, test, run_linear, run_quantize, run_floats};
