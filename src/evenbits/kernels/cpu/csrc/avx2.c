/* AVX2 alone. */
#include "simd256.h"

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

EB_VARIANT(eb_avx2, "avx2", supported)
