/* pack_block for variants with vectors: LANES rows of BLOCK bytes → steps of a panel (linear.h). */
EB_INLINE int pack_kind(const uint8_t *const *rows, const int kind, const int8_t *tables, uint8_t *panel,
                        uint8_t *rest) {
    vec columns[BLOCK / 4];
    decoder d = v_decoder(tables, kind, PANEL_OFFSET);
    int any = 0;
    transpose(rows, columns);
    for (int t = 0; t < BLOCK / 4; t++) {
        vec even, odd;
        if (kind == EB_W_INT8) {
            v_store(panel + t * VECTORS * LANES * 4, v_decode_int8(&d, columns[t]));
            continue;
        }
        uint8_t *to = panel + t * 2 * VECTORS * LANES * 4;
        v_decode(&d, kind, columns[t], &even, &odd);
        v_store(to, even);
        v_store(to + VECTORS * LANES * 4, odd);
        if (kind == EB_W_WIDE_PAIRS) {
            any |= v_rest(&d, columns[t], &even, &odd);
            to = rest + t * 2 * VECTORS * LANES * 4;
            v_store(to, even);
            v_store(to + VECTORS * LANES * 4, odd);
        }
    }
    return any;
}

static int pack_block(const uint8_t *const *rows, int kind, const int8_t *tables, uint8_t *panel, uint8_t *rest) {
    switch (kind) {
    case EB_W_INT8: return pack_kind(rows, EB_W_INT8, tables, panel, rest);
    case EB_W_NIBBLES: return pack_kind(rows, EB_W_NIBBLES, tables, panel, rest);
    case EB_W_PAIRS: return pack_kind(rows, EB_W_PAIRS, tables, panel, rest);
    default: return pack_kind(rows, EB_W_WIDE_PAIRS, tables, panel, rest);
    }
}
