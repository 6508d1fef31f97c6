/* Compares every variant of the CPU kernels that a processor runs with the portable one, bit for bit, without Python:
   for processors that the tests do not run on, under an emulator for instance.

     cd src/evenbits/kernels/cpu/csrc
     aarch64-linux-gnu-gcc -std=gnu11 -O2 -ffp-contract=off -march=armv8.2-a+dotprod -DEB_HAVE_NEON -DEB_SOURCE_HASH=0 -static
         ../../../../../tools/compare_variants.c api.c threads.c portable.c neon.c -o compare -lpthread
     qemu-aarch64 -cpu max ./compare */
#include <stdio.h>
#include <stdlib.h>

#include "../src/evenbits/kernels/cpu/csrc/evenbits_cpu.h"

int64_t evenbits_variants(void);
const char *evenbits_variant_name(int64_t);
int evenbits_variant_supported(int64_t);
int evenbits_linear(int64_t, const eb_args *);

static uint64_t state = 1;

static uint32_t random_bits(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static const int8_t tables[48] = {
    0, 1, 2, 3, 16, 8, 4, 6, 0, -1, -2, -3, -16, -8, -4, -6,                /* flint */
    0, 24, 32, 48, 64, 96, 64, 96, 0, -24, -32, -48, -64, -96, -64, -96,    /* its outliers, halved beyond 127 */
    0, 0, 0, 0, 0, 0, 64, 96, 0, 0, 0, 0, 0, 0, -64, -96};

static int64_t compare(int64_t variant, int64_t portable, int64_t m, int64_t n, int64_t k, int64_t kind, int64_t group) {
    int64_t width = kind ? (k + 1) / 2 : k, groups = group ? (k + group - 1) / group : 1, different = 0;
    float *x = malloc((size_t)(m * k) * 4), *bias = malloc((size_t)n * 4);
    float *y = malloc((size_t)(m * n) * 4), *z = malloc((size_t)(m * n) * 4);
    uint16_t *scale = malloc((size_t)(n * groups) * 2);
    uint8_t *w = malloc((size_t)(n * width)); /* exact sizes: a checker sees what is read beyond */
    for (int64_t i = 0; i < m * k; i++) x[i] = (float)((int32_t)random_bits() >> 8) * 1e-5f;
    for (int64_t i = 0; i < n; i++) bias[i] = (float)(random_bits() % 1000) * 0.01f;
    for (int64_t i = 0; i < n * groups; i++) scale[i] = (uint16_t)(0x2000 + random_bits() % 0x1400);
    for (int64_t i = 0; i < n * width; i++) w[i] = (uint8_t)random_bits();
    eb_args a = {.x = x, .weight = w, .weight_scale = scale, .bias = bias, .y = y, .tables = tables, .rows = m,
                 .columns = k, .outputs = n, .x_stride = k, .weight_kind = kind, .weight_stride = width,
                 .scale_type = EB_S_FLOAT16, .scale_stride = groups, .group = group, .code_min = -127,
                 .code_max = 127, .activation = EB_ACT_GELU, .threads = 1, .levels = 127, .unit = 1};
    evenbits_linear(variant, &a);
    a.y = z;
    evenbits_linear(portable, &a);
    for (int64_t i = 0; i < m * n; i++) different += memcmp(y + i, z + i, 4) != 0;
    free(x), free(bias), free(y), free(z), free(scale), free(w);
    return different;
}

int main(void) {
    static const int64_t rows[] = {1, 2, 3, 4, 5, 8, 9, 17, 33, 40}, outputs[] = {1, 3, 17, 70};
    static const int64_t columns[] = {1, 7, 33, 64, 129, 600}, groups[] = {0, 8, 16, 32, 64, 128, 256, 24};
    int64_t portable = evenbits_variants() - 1, failed = 0, done = 0;
    for (int64_t v = 0; v < portable; v++) {
        if (!evenbits_variant_supported(v)) continue;
        for (size_t i = 0; i < sizeof rows / 8; i++)
            for (size_t o = 0; o < sizeof outputs / 8; o++)
                for (size_t c = 0; c < sizeof columns / 8; c++)
                    for (int64_t kind = 0; kind < 4; kind++)
                        for (size_t g = 0; g < (kind ? sizeof groups / 8 : 1); g++, done++)
                            failed += compare(v, portable, rows[i], outputs[o], columns[c], kind, groups[g]) != 0;
        printf("%s: %lld products compared so far, %lld differ\n", evenbits_variant_name(v), (long long)done,
               (long long)failed);
    }
    return failed || !done;
}
