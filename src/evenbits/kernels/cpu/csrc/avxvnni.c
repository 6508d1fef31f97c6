/* AVX2 with AVX-VNNI: vpdpbusd on 256 bits (client processors without AVX-512). */
#define USE_VNNI
#include "simd256.h"

static int supported(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(1));
    return (a >> 4) & 1; /* leaf 7, subleaf 1; an AVX2 processor has leaf 7, and an absent subleaf is zeros */
}

EB_VARIANT(eb_avxvnni, "avxvnni", supported)
