/* The direct path, for few rows of x: four rows of weights at a time go from their bytes straight into dot products.

   A block is BLOCK bytes of a weight row: 2 · BLOCK columns, their even ones in one vector, their odd ones in another
   (int8: BLOCK columns in one), and codes of x lie in the same order. A vector of totals has BLOCK / 4 int32 lanes; with
   groups it is summed up (lanes of 128 bits hold 32 columns, half of one 16) and scaled at the end of every unit, a block
   or a group of several blocks. What unsigned weights need subtracted is in what the lanes start from.

   Variants define vec, V_DOT, V_DOT_MEMORY, v_load, v_store, v_add, v_shuffle, decoder, v_decoder, v_decode, v_rest. */

typedef int32_t int4 __attribute__((vector_size(16)));
typedef float float4 __attribute__((vector_size(16)));

#define QUADS (BLOCK / 4)

EB_INLINE int4 load_int4(const int32_t *p) {
    int4 v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Whether the direct path has the groups of this call: 16, 32, 64 columns or whole blocks. */
EB_INLINE int rows_group(const eb_args *a) {
    return !a->group || a->group == 16 || a->group == 32 || (a->group == 64 && BLOCK >= 32) || a->group % (2 * BLOCK) == 0;
}

/* Blocks whose totals are summed up together. */
EB_INLINE int64_t rows_unit(const eb_args *a, int64_t blocks) {
    return a->group ? EB_MAX(1, a->group / (2 * BLOCK)) : EB_MAX(1, blocks);
}

/* -OFFSET · Σ of the codes that each int32 lane of a unit will see. */
static void rows_starts(const eb_args *a, const int8_t *restrict codes, int64_t blocks, int plain,
                        int32_t *restrict starts) {
    int64_t unit = rows_unit(a, blocks), columns = plain ? BLOCK : 2 * BLOCK;
    for (int64_t b = 0; b < blocks; b++, codes += columns) {
        int32_t *to = starts + b / unit * QUADS;
        if (b % unit == 0) memset(to, 0, QUADS * sizeof(int32_t));
        for (int64_t part = 0; part < columns; part += BLOCK)
            for (int i = 0; i < QUADS; i++) {
                int32_t four;
                memcpy(&four, codes + part + 4 * i, 4);
                int32_t sum = (int32_t)((uint32_t)four << 24) >> 24;
                sum += (int32_t)((uint32_t)four << 16) >> 24;
                sum += (int32_t)((uint32_t)four << 8) >> 24;
                to[i] -= OFFSET * (sum + (four >> 24));
            }
    }
}

EB_INLINE void rows_wide(const decoder *d, vec bytes, const int8_t *x, int64_t stride, const int rows, vec *acc,
                         const int acc_stride) {
    vec even, odd, offset = v_offset();
    if (__builtin_expect(!v_rest(d, bytes, &even, &odd), 1)) return;
    EB_UNROLL for (int m = 0; m < rows; m++) {
        vec less = v_zero();
        V_DOT_MEMORY(acc[m * acc_stride], even, x + m * stride);
        V_DOT_MEMORY(acc[m * acc_stride], odd, x + m * stride + BLOCK);
        if (OFFSET) {
            V_DOT_MEMORY(less, offset, x + m * stride);
            V_DOT_MEMORY(less, offset, x + m * stride + BLOCK);
        }
        acc[m * acc_stride] = v_subtract(acc[m * acc_stride], less);
    }
}

/* The totals of four rows, each lane of 128 bits by itself: lane l of `low` has the four rows' sums over the first 16
   columns of that lane, `high` those over the second 16. */
EB_INLINE void rows_reduce(const vec *acc, const int count, vec *low, vec *high) {
    vec zero = v_zero();
    vec a = acc[0], b = count > 1 ? acc[1] : zero, c = count > 2 ? acc[2] : zero, d = count > 3 ? acc[3] : zero;
    vec ab = v_add(v_shuffle(a, b, 0), v_shuffle(a, b, 1)), cd = v_add(v_shuffle(c, d, 0), v_shuffle(c, d, 1));
    *low = v_shuffle(ab, cd, 0);
    *high = v_shuffle(ab, cd, 1);
}

EB_INLINE int4 rows_lanes(const int32_t *lanes, int64_t count) {
    int4 dots = load_int4(lanes);
    for (int64_t i = 1; i < count; i++) dots += load_int4(lanes + 4 * i);
    return dots;
}

EB_INLINE float4 rows_scaled(float4 sum, int4 dots, const float *scales) {
    float4 s;
    memcpy(&s, scales, sizeof s);
    return sum + __builtin_convertvector(dots, float4) * s;
}

/* Adds the groups of one unit, in order, to the sums of four outputs. scales: [groups][4], `groups` are left. */
EB_INLINE float4 rows_groups(float4 sum, vec low, vec high, int64_t group, const float *scales, int64_t groups) {
    int32_t first[QUADS] __attribute__((aligned(64))), second[QUADS] __attribute__((aligned(64)));
    if (group >= 2 * BLOCK) {
        v_store(first, v_add(low, high));
        return rows_scaled(sum, rows_lanes(first, BLOCK / 16), scales);
    }
    if (group == 16) {
        v_store(first, low);
        v_store(second, high);
        for (int64_t g = 0; g < EB_MIN(BLOCK / 8, groups); g++)
            sum = rows_scaled(sum, load_int4((g & 1 ? second : first) + g / 2 * 4), scales + 4 * g);
        return sum;
    }
    v_store(first, v_add(low, high));
    if (group == 64)
        for (int64_t g = 0; g < EB_MIN(BLOCK / 32, groups); g++)
            sum = rows_scaled(sum, rows_lanes(first + 8 * g, 2), scales + 4 * g);
    else
        for (int64_t g = 0; g < EB_MIN(BLOCK / 16, groups); g++)
            sum = rows_scaled(sum, load_int4(first + 4 * g), scales + 4 * g);
    return sum;
}

typedef struct {
    const uint8_t *w[4];
    uint8_t tail[4][BLOCK] __attribute__((aligned(64)));
    int64_t whole, blocks; /* of a row: whole ones, all */
    int64_t ahead;         /* bytes to the rows that come next, for prefetching */
    const float *scales;   /* [groups][4] */
} weight_rows;

/* One block of one weight row with all rows of x. */
EB_INLINE void rows_block(const int kind, const int count, const int rows, const decoder *d, const uint8_t *from,
                          const int8_t *x, int64_t stride, vec *acc) {
    vec even, odd, bytes = v_load(from);
    if (kind == EB_W_INT8)
        even = v_decode_int8(d, bytes);
    else
        v_decode(d, kind, bytes, &even, &odd);
    EB_UNROLL for (int m = 0; m < rows; m++) {
        V_DOT_MEMORY(acc[m * count], even, x + m * stride);
        if (kind != EB_W_INT8) V_DOT_MEMORY(acc[m * count], odd, x + m * stride + BLOCK);
    }
    if (kind == EB_W_WIDE_PAIRS) rows_wide(d, bytes, x, stride, rows, acc, count);
}

/* totals[m · ROWS_OUTPUTS + r] of `count` weight rows with `rows` rows of x: int32, or with groups the bits of float32. */
EB_INLINE void rows_dots(const int kind, const int count, const int rows, const int grouped, const job *j,
                         const weight_rows *w, int32_t *totals) {
    const int columns = kind == EB_W_INT8 ? BLOCK : 2 * BLOCK;
    const int64_t unit = rows_unit(j->a, w->blocks), stride = j->stride;
    const int64_t starts_stride = stride / (kind == EB_W_INT8 ? 4 : 8), ahead = w->ahead, whole = w->whole;
    const int64_t group = j->a->group, groups = j->segments, per_unit = grouped ? EB_MAX(1, 2 * BLOCK / group) : 0;
    const decoder d = v_decoder(j->a->tables, kind, OFFSET);
    const int8_t *x = j->codes;
    const uint8_t *from[4];
    float4 sums[8];
    EB_UNROLL for (int r = 0; r < count; r++) from[r] = w->w[r];
    EB_UNROLL for (int m = 0; m < rows; m++) sums[m] = (float4){0, 0, 0, 0};
    for (int64_t b = 0, u = 0; b < w->blocks; u++) {
        vec acc[16], low, high;
        EB_UNROLL for (int m = 0; m < rows; m++) {
            vec start = OFFSET ? v_load(j->starts + m * starts_stride + u * QUADS) : v_zero();
            EB_UNROLL for (int r = 0; r < count; r++) acc[m * count + r] = start;
        }
        int64_t end = EB_MIN(b + unit, w->blocks);
        for (; b < EB_MIN(end, whole); b++, x += columns)
            EB_UNROLL for (int r = 0; r < count; r++, from[r - 1] += BLOCK) {
                __builtin_prefetch(from[r] + ahead, 0, 2);
                rows_block(kind, count, rows, &d, from[r], x, stride, acc + r);
            }
        for (; b < end; b++, x += columns)
            EB_UNROLL for (int r = 0; r < count; r++) rows_block(kind, count, rows, &d, w->tail[r], x, stride, acc + r);
        EB_UNROLL for (int m = 0; m < rows; m++) {
            rows_reduce(acc + m * count, count, &low, &high);
            if (grouped) {
                sums[m] = rows_groups(sums[m], low, high, group, w->scales + u * per_unit * 4, groups - u * per_unit);
                continue;
            }
            int32_t lanes[QUADS] __attribute__((aligned(64)));
            v_store(lanes, v_add(low, high));
            int4 dots = rows_lanes(lanes, BLOCK / 16);
            memcpy(totals + m * ROWS_OUTPUTS, &dots, (size_t)count * sizeof(int32_t));
        }
    }
    if (grouped)
        EB_UNROLL for (int m = 0; m < rows; m++) memcpy(totals + m * ROWS_OUTPUTS, &sums[m], sizeof sums[m]);
}

#define ROWS_CASE(kind, count, n, grouped)                                                                            \
    case n:                                                                                                           \
        if (n <= ROWS_MOST) rows_dots(kind, count, EB_MIN(n, ROWS_MOST), grouped, j, w, totals);                      \
        break;

#define ROWS_SWITCH(kind, name)                                                                                       \
    static void name(const job *j, int64_t rows, int64_t count, const weight_rows *w, int32_t *totals) {              \
        if (j->a->group) switch (rows) {                                                                              \
                ROWS_CASE(kind, 4, 1, 1) ROWS_CASE(kind, 4, 2, 1) ROWS_CASE(kind, 4, 3, 1) ROWS_CASE(kind, 4, 4, 1)   \
            }                                                                                                         \
        else if (count == 4) switch (rows) {                                                                          \
                ROWS_CASE(kind, 4, 1, 0) ROWS_CASE(kind, 4, 2, 0) ROWS_CASE(kind, 4, 3, 0) ROWS_CASE(kind, 4, 4, 0)   \
            }                                                                                                         \
        else switch (rows) {                                                                                          \
                ROWS_CASE(kind, 2, 5, 0) ROWS_CASE(kind, 2, 6, 0) ROWS_CASE(kind, 2, 7, 0) ROWS_CASE(kind, 2, 8, 0)   \
            }                                                                                                         \
    }

ROWS_SWITCH(EB_W_INT8, rows_int8)
ROWS_SWITCH(EB_W_NIBBLES, rows_nibbles)
ROWS_SWITCH(EB_W_PAIRS, rows_pairs)
ROWS_SWITCH(EB_W_WIDE_PAIRS, rows_wide_pairs)

static void rows_prepare(const job *j, int64_t n0, int64_t count, weight_rows *w, float *scales) {
    const eb_args *a = j->a;
    int64_t row_bytes = (a->columns + columns_per_byte(a) - 1) / columns_per_byte(a), groups = j->segments;
    w->whole = row_bytes / BLOCK;
    w->blocks = (row_bytes + BLOCK - 1) / BLOCK;
    w->ahead = count * a->weight_stride;
    w->scales = scales;
    for (int64_t r = 0; r < count; r++) {
        int64_t n = EB_MIN(n0 + r, a->outputs - 1);
        w->w[r] = a->weight + n * a->weight_stride;
        if (w->whole < w->blocks) {
            memset(w->tail[r], 0, BLOCK);
            memcpy(w->tail[r], w->w[r] + w->whole * BLOCK, (size_t)(row_bytes - w->whole * BLOCK));
        }
        if (a->group) eb_scales(a, n * a->scale_stride, groups, scales + (4 + r) * groups);
    }
    if (a->group) {
        const float *restrict line = scales + 4 * groups;
        for (int64_t g = 0; g < groups; g++)
            for (int r = 0; r < 4; r++) scales[4 * g + r] = line[r * groups + g];
    }
}

static void rows_task(void *context, int64_t task) {
    job *j = context;
    const eb_args *a = j->a;
    int64_t n0 = task * ROWS_OUTPUTS, outputs = EB_MIN(ROWS_OUTPUTS, a->outputs - n0);
    int64_t count = a->group || j->m <= 4 ? 4 : 2;
    int32_t totals[8 * ROWS_OUTPUTS] __attribute__((aligned(64)));
    float *scales = eb_memory(EB_MEM_SCALES, (size_t)(8 * j->segments + 1) * sizeof(float));
    weight_rows w;
    if (!scales) {
        EB_FAIL(j);
        return;
    }
    memset(totals, 0, sizeof totals);
    for (int64_t n = 0; n < outputs; n += count) {
        rows_prepare(j, n0 + n, count, &w, scales);
        switch (a->weight_kind) {
        case EB_W_INT8: rows_int8(j, j->m, count, &w, totals + n); break;
        case EB_W_NIBBLES: rows_nibbles(j, j->m, count, &w, totals + n); break;
        case EB_W_PAIRS: rows_pairs(j, j->m, count, &w, totals + n); break;
        default: rows_wide_pairs(j, j->m, count, &w, totals + n);
        }
    }
    finish(j, n0, outputs, totals, ROWS_OUTPUTS);
}
