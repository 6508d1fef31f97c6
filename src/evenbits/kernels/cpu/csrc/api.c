/* The functions that loader.py calls, and the choice of a variant. */
#include "evenbits_cpu.h"

#define EB_API __attribute__((visibility("default")))
#define EB_STRING(x) #x
#define EB_QUOTE(x) EB_STRING(x)

extern const eb_variant eb_portable;
#ifdef EB_HAVE_AMX
extern const eb_variant eb_amx;
#endif
#ifdef EB_HAVE_AVX512VNNI
extern const eb_variant eb_avx512vnni;
#endif
#ifdef EB_HAVE_AVXVNNI
extern const eb_variant eb_avxvnni;
#endif
#ifdef EB_HAVE_AVX2
extern const eb_variant eb_avx2;
#endif
#ifdef EB_HAVE_NEON
extern const eb_variant eb_neon;
#endif

/* Best first. */
static const eb_variant *const variants[] = {
#ifdef EB_HAVE_AMX
    &eb_amx,
#endif
#ifdef EB_HAVE_AVX512VNNI
    &eb_avx512vnni,
#endif
#ifdef EB_HAVE_AVXVNNI
    &eb_avxvnni,
#endif
#ifdef EB_HAVE_AVX2
    &eb_avx2,
#endif
#ifdef EB_HAVE_NEON
    &eb_neon,
#endif
    &eb_portable,
};

#define VARIANTS ((int64_t)(sizeof variants / sizeof variants[0]))

EB_API const char *evenbits_source_hash(void) { return EB_QUOTE(EB_SOURCE_HASH); }
EB_API int64_t evenbits_args_bytes(void) { return (int64_t)sizeof(eb_args); }
EB_API int64_t evenbits_variants(void) { return VARIANTS; }
EB_API const char *evenbits_variant_name(int64_t i) { return i >= 0 && i < VARIANTS ? variants[i]->name : ""; }
EB_API int evenbits_variant_supported(int64_t i) { return i >= 0 && i < VARIANTS && variants[i]->supported(); }

/* 0, or -1 if memory ran out. `variant` is one that is supported. */
EB_API int evenbits_linear(int64_t variant, const eb_args *args) { return variants[variant]->linear(args); }
EB_API int evenbits_linear_float(int64_t variant, const eb_args *args) { return variants[variant]->floats(args); }
EB_API int evenbits_quantize(int64_t variant, const eb_args *args) { return variants[variant]->quantize(args); }
