/* The ceilings of one core: int8 products a second (AVX-512 VNNI) and bytes read a second. For linear_cpu.py.

       cc -O2 -march=native peaks.c -o peaks && ./peaks MEGABYTES

   prints {"gops": …, "gbytes": …}: the best of 20 tries each. Twelve independent sums keep the multipliers busy; reading adds up
   64-byte lines of an array of MEGABYTES. */
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif
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
    const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    __m512i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
    const long turns = 4000000;
    const double start = now();
#define DOT(sum) "vpdpbusd %13, %12, %" #sum "\n\t"
    for (long i = 0; i < turns; i++)
        __asm__ volatile(DOT(0) DOT(1) DOT(2) DOT(3) DOT(4) DOT(5) DOT(6) DOT(7) DOT(8) DOT(9) DOT(10) DOT(11)
                         : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8),
                           "+v"(s9), "+v"(s10), "+v"(s11)
                         : "v"(a), "v"(b));
    return turns * 12 * 128 / (now() - start) * 1e-9;
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
