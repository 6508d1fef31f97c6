/* The ceilings of one core: int8 products a second (AVX-512 VNNI) and bytes read a second. For linear_cpu.py.

       cc -O2 -march=native peaks.c -o peaks && ./peaks MEGABYTES

   prints {"gops": …, "gbytes": …}: the best of 20 tries each. 24 independent sums keep both multipliers busy; reading adds up
   64-byte lines of an array of MEGABYTES. */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static double gops(void) {
#ifdef __AVX512VNNI__
    __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5), sum[24];
    memset(sum, 0, sizeof sum);
    const long turns = 2000000;
    const double start = now();
    for (long i = 0; i < turns; i++) {
#pragma GCC unroll 24
        for (int j = 0; j < 24; j++) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum[j]) : "v"(a), "v"(b));
    }
    const double taken = now() - start;
    volatile int sink = 0;
    for (int j = 0; j < 24; j++) sink += _mm512_reduce_add_epi32(sum[j]);
    return turns * 24 * 128 / taken * 1e-9;
#else
    return 0;
#endif
}

static double gbytes(long size) {
    int64_t *x = aligned_alloc(64, size);
    if (!x) return 0;
    memset(x, 1, size);
    int64_t sums[8] = {0};
    const double start = now();
    for (long i = 0; i < size / 8; i += 8)
        for (int j = 0; j < 8; j++) sums[j] += x[i + j];
    const double taken = now() - start;
    volatile int64_t sink = 0;
    for (int j = 0; j < 8; j++) sink += sums[j];
    free(x);
    return size / taken * 1e-9;
}

int main(int count, char **words) {
    const long size = (count > 1 ? atol(words[1]) : 64) << 20;
    double products = 0, bytes = 0;
    for (int i = 0; i < 20; i++) {
        const double p = gops(), b = gbytes(size);
        products = p > products ? p : products;
        bytes = b > bytes ? b : bytes;
    }
    printf("{\"gops\": %.1f, \"gbytes\": %.1f}\n", products, bytes);
    return 0;
}
