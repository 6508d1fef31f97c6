/* The bytes of the next panel, fetched a few lines after every tile of products: in one go they would fill the queue of
   outstanding reads and be waited for. */
typedef struct {
    const uint8_t *row;
    int64_t stride, bytes, at, left; /* between rows; of a row; done of this row; rows */
} upcoming;

static upcoming next_panel(const eb_args *a, int64_t n0, int64_t from, int64_t width) {
    int64_t per_byte = columns_per_byte(a);
    if (from >= a->columns) n0 += OUTPUTS, from = 0; /* of the next outputs */
    return (upcoming){.row = a->weight + n0 * a->weight_stride + from / per_byte, .stride = a->weight_stride,
                      .bytes = (EB_MIN(width, a->columns - from) + per_byte - 1) / per_byte,
                      .left = EB_MIN(OUTPUTS, a->outputs - n0)};
}

EB_INLINE void fetch(upcoming *u, int64_t lines) {
    for (; lines > 0 && u->left > 0; lines--) {
        __builtin_prefetch(u->row + u->at, 0, 2);
        u->at += 64;
        if (u->at < u->bytes) continue;
        u->at = 0, u->row += u->stride, u->left--;
    }
}
