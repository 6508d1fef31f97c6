/* The product of float rows with packed 4-bit weights (no quantized activations), for all variants.

     y_mn = f( tree(s_0 … s_15) + bias_n ),   s_j = Σ x_mk · w_nk over the columns k with (k mod 128) div 8 = j, in order
     w_nk = value of the nibble · scale, rounded to float32: the decoded weight

   Each step of a sum is one fused multiply-add; the tree adds halves: 16 → 8 → 4 → 2 → 1. This order is part of the
   definition, so that every variant, any number of threads and any number of rows give the same bits. Sixteen lanes are
   one AVX-512 vector. A lane takes eight neighbours because 64 bytes of a row are sixteen words of eight nibbles: shifted
   by 4t they are the sixteen indices of step t, and the table is permuted by them. x lies in the same order,
   [block][step][lane].

   Weights are decoded into a panel of 32 KB, which all rows of x are multiplied with.

   A variant defines, then includes this file:  F_WIDTH, fvec, f_load, f_store, f_scaled(v, s), f_splat, f_fma, f_decode
   (F_WIDTH words of eight nibbles → eight vectors), and what it keeps in registers: F_ROWS rows of x with F_NARROW
   outputs, one or two with F_WIDE.

   M: rows, K: columns, N: outputs. */
#include "numbers.h"

#define F_LANES 16
#define F_STEPS 8
#define F_COLUMNS (F_LANES * F_STEPS) /* of a block */
#define F_BYTES (F_COLUMNS / 2)
#define F_PARTS (F_LANES / F_WIDTH)
#define F_OUTPUTS 32    /* of a task */
#ifndef F_PANEL
#define F_PANEL 8192    /* floats of a panel: it stays in the L1 cache */
#endif
#define F_FEW 4         /* rows up to which a panel is narrow and long: weights are read in long pieces */
#define F_ROW_BLOCK 128 /* rows of x that are arranged together */
#ifndef F_UNROLL
#define F_UNROLL EB_UNROLL
#endif

/* Where scales go: into the table once a row; into the table once a group; group by group of lanes onto the values. */
enum { F_BY_ROW, F_BY_BLOCKS, F_BY_LANES };

typedef struct {
    const eb_args *a;
    int64_t m0, m;
    int64_t blocks, whole; /* of a row; those of it that are all there */
    int64_t groups, span;  /* of a row; blocks of a group */
    int64_t open;          /* rows of weights that a panel has */
    int mode, failed;
    float *x;              /* [m][blocks][F_STEPS][F_LANES] */
} float_job;

/* One row of weights. scales: of its groups, or of its lanes. table: values times the scale that holds now. */
typedef struct {
    const uint8_t *bytes;
    const float *scales;
    float table[32] __attribute__((aligned(64)));
    uint8_t tail[F_BYTES] __attribute__((aligned(64)));
} float_row;

/* Row m: [K] → [blocks][F_STEPS][F_LANES], zeros beyond K. */
static void f_arrange(const float_job *j, int64_t m, float *line) {
    const eb_args *a = j->a;
    int64_t k = a->columns, at = (j->m0 + m) * a->x_stride;
    float *restrict to = j->x + m * j->blocks * F_COLUMNS;
    if (a->x_type == EB_FLOAT32)
        memcpy(line, (const float *)a->x + at, (size_t)k * sizeof(float));
    else
        eb_floats_from((const uint16_t *)a->x + at, a->x_type, k, line);
    if (a->multiplier)
        for (int64_t i = 0; i < k; i++) line[i] *= a->multiplier[i];
    for (int64_t i = k; i < j->blocks * F_COLUMNS; i++) line[i] = 0.0f;
    for (int64_t b = 0; b < j->blocks; b++, line += F_COLUMNS, to += F_COLUMNS)
        for (int t = 0; t < F_STEPS; t++)
            for (int i = 0; i < F_LANES; i++) to[t * F_LANES + i] = line[i * F_STEPS + t];
}

static void f_arrange_task(void *context, int64_t task) {
    float_job *j = context;
    float *line = eb_memory(EB_MEM_FLOATS, (size_t)(j->blocks * F_COLUMNS + 1) * sizeof(float));
    if (!line)
        EB_FAIL(j);
    else
        f_arrange(j, task, line);
}

EB_INLINE void f_table(const float_job *j, float_row *row, float scale) {
    fvec s = f_splat(scale);
    F_UNROLL for (int i = 0; i < 32; i += F_WIDTH) f_store(row->table + i, f_scaled(f_load(j->a->values + i), s));
}

/* Scales of groups → one for every lane of every block; groups of 8·n columns, the last repeated. */
static void f_spread(const float_job *j, const float *scales, float *lanes) {
    int64_t per = j->a->group / F_STEPS, lane = 0, count = j->blocks * F_LANES;
    for (int64_t g = 0; lane < count; g += g + 1 < j->groups) {
        int64_t end = EB_MIN(lane + per, count);
        if (per == 4 && end == lane + 4) {
            for (int i = 0; i < 4; i++) lanes[lane + i] = scales[g];
            lane = end;
        } else
            while (lane < end) lanes[lane++] = scales[g];
    }
}

/* Row n, ready to be decoded; memory: groups + lanes of it. */
static void f_open(const float_job *j, int64_t n, float_row *row, float *memory) {
    const eb_args *a = j->a;
    n = EB_MIN(n, a->outputs - 1);
    row->bytes = a->weight + n * a->weight_stride;
    row->scales = memory;
    eb_scales(a, n * a->scale_stride, j->groups, memory);
    if (j->mode == F_BY_LANES) {
        f_spread(j, memory, memory + j->groups);
        row->scales = memory + j->groups;
        memcpy(row->table, a->values, sizeof row->table);
    } else
        f_table(j, row, memory[0]);
    if (j->whole < j->blocks) {
        int64_t left = (a->columns + 1) / 2 - j->whole * F_BYTES;
        memset(row->tail, 0, F_BYTES);
        memcpy(row->tail, row->bytes + j->whole * F_BYTES, (size_t)left);
    }
}

/* Part p of block b → eight vectors of decoded weights. */
EB_INLINE void f_weights(const int mode, const int paired, const float_job *j, const float_row *row, int64_t b, int p,
                         fvec *w) {
    const uint8_t *bytes = b < j->whole ? row->bytes + b * F_BYTES : row->tail;
    f_decode(row->table, paired, bytes + p * (F_BYTES / F_PARTS), w);
    if (mode != F_BY_LANES) return;
    fvec s = f_load(row->scales + b * F_LANES + p * F_WIDTH);
    F_UNROLL for (int t = 0; t < F_STEPS; t++) w[t] = f_scaled(w[t], s);
}

/* Blocks b0 … b1 of a row → floats [b1 - b0][F_STEPS][F_LANES]. */
EB_INLINE void f_unpack(const int mode, const int paired, const float_job *j, float_row *row, int64_t b0, int64_t b1,
                        float *to) {
    int64_t ahead = j->open == F_WIDE ? F_WIDE * j->a->weight_stride : (b1 - b0) * F_BYTES;
    for (int64_t b = b0; b < b1; b++, to += F_COLUMNS) {
        __builtin_prefetch(row->bytes + b * F_BYTES + ahead, 0, 3);
        if (mode == F_BY_BLOCKS && b % j->span == 0) f_table(j, row, row->scales[b / j->span]);
        for (int p = 0; p < F_PARTS; p++) {
            fvec v[F_STEPS];
            f_weights(mode, paired, j, row, b, p, v);
            F_UNROLL for (int t = 0; t < F_STEPS; t++) f_store(to + t * F_LANES + p * F_WIDTH, v[t]);
        }
    }
}

/* sums [rows][F_OUTPUTS][F_LANES] += products of rows of x with `outputs` rows of a panel. */
EB_INLINE void f_tile(const int rows, const int outputs, const float *x, int64_t x_stride, const float *w,
                      int64_t w_stride, int64_t count, float *sums) {
    for (int p = 0; p < F_PARTS; p++, x += F_WIDTH, w += F_WIDTH, sums += F_WIDTH) {
        fvec acc[F_ROWS][F_WIDE];
        F_UNROLL for (int m = 0; m < rows; m++)
            F_UNROLL for (int n = 0; n < outputs; n++) acc[m][n] = f_load(sums + (m * F_OUTPUTS + n) * F_LANES);
        for (int64_t i = 0; i < count; i += F_LANES) {
            fvec v[F_WIDE];
            F_UNROLL for (int n = 0; n < outputs; n++) v[n] = f_load(w + n * w_stride + i);
            F_UNROLL for (int m = 0; m < rows; m++) {
                fvec one = f_load(x + m * x_stride + i);
                F_UNROLL for (int n = 0; n < outputs; n++) acc[m][n] = f_fma(v[n], one, acc[m][n]);
            }
        }
        F_UNROLL for (int m = 0; m < rows; m++)
            F_UNROLL for (int n = 0; n < outputs; n++) f_store(sums + (m * F_OUTPUTS + n) * F_LANES, acc[m][n]);
    }
}

static void f_tile_rows(int64_t rows, const float *x, int64_t x_stride, const float *w, int64_t w_stride, int64_t count,
                        float *sums) {
    switch (rows) {
    case 1: f_tile(1, F_WIDE, x, x_stride, w, w_stride, count, sums); break;
    case 2: f_tile(2, F_WIDE, x, x_stride, w, w_stride, count, sums); break;
    case 3: f_tile(3, F_NARROW, x, x_stride, w, w_stride, count, sums); break;
    case 4: f_tile(4, F_NARROW, x, x_stride, w, w_stride, count, sums); break;
#if F_ROWS > 4
    case 5: f_tile(5, F_NARROW, x, x_stride, w, w_stride, count, sums); break;
    default: f_tile(6, F_NARROW, x, x_stride, w, w_stride, count, sums);
#endif
    }
}

static void f_unpack_rows(const float_job *j, float_row *rows, int64_t n, int64_t b0, int64_t b1, float *panel) {
    int64_t size = (b1 - b0) * F_COLUMNS;
    for (int64_t r = 0; r < n; r++, panel += size)
        switch (2 * j->mode + (j->a->weight_kind != EB_W_NIBBLES)) {
        case 0: f_unpack(F_BY_ROW, 0, j, rows + r, b0, b1, panel); break;
        case 1: f_unpack(F_BY_ROW, 1, j, rows + r, b0, b1, panel); break;
        case 2: f_unpack(F_BY_BLOCKS, 0, j, rows + r, b0, b1, panel); break;
        case 3: f_unpack(F_BY_BLOCKS, 1, j, rows + r, b0, b1, panel); break;
        case 4: f_unpack(F_BY_LANES, 0, j, rows + r, b0, b1, panel); break;
        default: f_unpack(F_BY_LANES, 1, j, rows + r, b0, b1, panel);
        }
}

/* All rows of x with n rows of weights, a multiple of F_WIDE → sums [m][F_OUTPUTS][F_LANES]. */
static void f_multiply(const float_job *j, float_row *rows, int64_t n, float *panel, float *sums) {
    int64_t stride = j->blocks * F_COLUMNS, blocks = F_PANEL / (n * F_COLUMNS);
    for (int64_t b0 = 0; b0 < j->blocks; b0 += blocks) {
        int64_t b1 = EB_MIN(b0 + blocks, j->blocks), count = (b1 - b0) * F_COLUMNS;
        f_unpack_rows(j, rows, n, b0, b1, panel);
        for (int64_t m = 0, part; m < j->m; m += part) {
            part = eb_even_part(j->m - m, F_ROWS);
            for (int64_t i = 0, step = part < 3 ? F_WIDE : F_NARROW; i < n; i += step)
                f_tile_rows(part, j->x + m * stride + b0 * F_COLUMNS, stride, panel + i * count, count, count,
                            sums + (m * F_OUTPUTS + i) * F_LANES);
        }
    }
}

EB_INLINE float f_total(const float *restrict s) {
    float eight[8], four[4];
    for (int i = 0; i < 8; i++) eight[i] = s[i] + s[i + 8];
    for (int i = 0; i < 4; i++) four[i] = eight[i] + eight[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

static void f_finish(const float_job *j, int64_t n0, int64_t n, const float *sums) {
    const eb_args *a = j->a;
    for (int64_t m = 0; m < j->m; m++, sums += F_OUTPUTS * F_LANES) {
        float line[F_OUTPUTS];
        int64_t at = (j->m0 + m) * a->outputs + n0;
        float *y = a->y_type == EB_FLOAT32 ? (float *)a->y + at : line;
        for (int64_t i = 0; i < n; i++) y[i] = f_total(sums + i * F_LANES);
        if (a->bias)
            for (int64_t i = 0; i < n; i++) y[i] += a->bias[n0 + i];
        if (a->activation) eb_activate(a->activation, y, n);
        if (a->y_type != EB_FLOAT32) eb_floats_to(line, a->y_type, n, (uint16_t *)a->y + at);
    }
}

static void f_task(void *context, int64_t task) {
    float_job *j = context;
    int64_t n0 = task * F_OUTPUTS, n = EB_MIN(F_OUTPUTS, j->a->outputs - n0), open = EB_UP(EB_MIN(n, j->open), F_WIDE);
    int64_t lanes = j->groups + (j->mode == F_BY_LANES ? j->blocks * F_LANES : 0);
    size_t sum_bytes = (size_t)(j->m * F_OUTPUTS * F_LANES) * sizeof(float);
    float_row *rows = eb_memory(EB_MEM_ROWS, (size_t)open * sizeof(float_row));
    float *scales = eb_memory(EB_MEM_SCALES, (size_t)(open * lanes) * sizeof(float));
    float *sums = eb_memory(EB_MEM_TOTALS, sum_bytes);
    float *panel = eb_memory(EB_MEM_PANEL, F_PANEL * sizeof(float));
    if (!rows || !scales || !sums || !panel) {
        EB_FAIL(j);
        return;
    }
    memset(sums, 0, sum_bytes);
    for (int64_t i = 0; i < n; i += open) {
        for (int64_t r = 0; r < open; r++) f_open(j, n0 + i + r, rows + r, scales + r * lanes);
        f_multiply(j, rows, open, panel, sums + i * F_LANES);
    }
    f_finish(j, n0, n, sums);
}

/* Rows m0 … of the call. Returns 0, or -1 if there is no memory. */
static int f_block(const eb_args *a, int64_t m0, int64_t m) {
    float_job j = {.a = a, .m0 = m0, .m = m, .blocks = (a->columns + F_COLUMNS - 1) / F_COLUMNS};
    j.whole = (a->columns + 1) / 2 / F_BYTES;
    j.groups = a->group ? (a->columns + a->group - 1) / a->group : 1;
    j.mode = j.groups < 2 ? F_BY_ROW : a->group % F_COLUMNS ? F_BY_LANES : F_BY_BLOCKS;
    j.open = m <= F_FEW ? F_WIDE : F_OUTPUTS;
    j.span = EB_MAX(1, a->group / F_COLUMNS);
    j.x = eb_memory(EB_MEM_CODES, (size_t)(m * j.blocks * F_COLUMNS) * sizeof(float));
    if (!j.x) return -1;
    eb_parallel(f_arrange_task, &j, m, a->threads);
    if (j.failed) return -1;
    eb_parallel(f_task, &j, (a->outputs + F_OUTPUTS - 1) / F_OUTPUTS, a->threads);
    return j.failed ? -1 : 0;
}

static int run_floats(const eb_args *a) {
    for (int64_t m = 0; m < a->rows; m += F_ROW_BLOCK)
        if (f_block(a, m, EB_MIN(F_ROW_BLOCK, a->rows - m))) return -1;
    return 0;
}
