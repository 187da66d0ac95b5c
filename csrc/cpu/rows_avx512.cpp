// Row kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define FUSED_NCE_ISA rows_avx512
#define FUSED_NCE_ISA_NAME "avx512"
#define FUSED_NCE_VECTOR 16
#include "rows.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
