// Row kernels for AVX2 with FMA.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FUSED_NCE_ISA rows_avx2
#define FUSED_NCE_ISA_NAME "avx2"
#define FUSED_NCE_VECTOR 8
#include "rows.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
