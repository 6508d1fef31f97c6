/* floats.h with four lanes and a table that is read number by number. Defined before: fvec and f_fma. */
#define F_WIDTH 4
#define F_ROWS 4
#define F_NARROW 4
#define F_WIDE 4

EB_INLINE fvec f_load(const float *p) {
    fvec v;
    memcpy(&v, p, sizeof v);
    return v;
}
EB_INLINE void f_store(float *p, fvec v) { memcpy(p, &v, sizeof v); }
EB_INLINE fvec f_splat(float x) { return (fvec){x, x, x, x}; }
EB_INLINE fvec f_scaled(fvec v, fvec s) { return v * s; }

EB_INLINE void f_decode(const float *table, const int paired, const uint8_t *bytes, fvec *w) {
    float values[8][4];
    for (int i = 0; i < 4; i++)
        for (int t = 0; t < 4; t++) {
            int low = bytes[4 * i + t] & 15, high = bytes[4 * i + t] >> 4;
            values[2 * t][i] = table[paired && high == 8 ? 16 + low : low];
            values[2 * t + 1][i] = table[paired && low == 8 ? 16 + high : high];
        }
    for (int t = 0; t < 8; t++) w[t] = f_load(values[t]);
}

#include "floats.h"
