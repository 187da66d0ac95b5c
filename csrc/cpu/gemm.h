// The three GEMMs of a tile on ATen's brgemm, and the packing that they want.
//
// brgemm is oneDNN's JIT kernel where the CPU has AVX2 or better and ATen's BLAS elsewhere. Measured on two AVX-512
// cores it reaches 290-330 GFLOP/s on every shape of interest with the keys used as they are stored, where torch.mm
// varies from 175 to 310.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "../params.h"

namespace fused_nce {

// Reduction depth of one score call. Longer ones are no faster and sum more terms in one chain.
constexpr int64_t kScoreDepth = 512;
// Output width of one call, so that a block of the right operand stays in L1 and L2.
constexpr int64_t kOutputWidth = 128;

// A right operand (K, N): row-major for float; for bfloat16, rows in pairs: element (k, n) at ((k/2)*N + n)*2 + k%2.
template <class E>
constexpr bool kPaired = sizeof(E) == 2;

// scores (columns, lanes) = keys (columns, D) @ packed q (D, lanes)
template <class E>
void score_gemm(const E* keys, int64_t key_stride, const E* packed, int64_t columns, int64_t lanes, int64_t width,
                float* scores) {
  for (int64_t d = 0; d < width; d += kScoreDepth)
    at::native::cpublas::brgemm(columns, lanes, std::min(kScoreDepth, width - d), key_stride, lanes, lanes, d > 0,
                                keys + d, packed + d * lanes, scores, kPaired<E>);
}

// out (m, D) [+]= left (m, depth) @ right (depth, D)
template <class E>
void gradient_gemm(const E* left, int64_t left_stride, const E* right, int64_t right_stride, int64_t m, int64_t depth,
                   int64_t width, bool add, float* out, int64_t out_stride) {
  for (int64_t d = 0; d < width; d += kOutputWidth)
    at::native::cpublas::brgemm(m, std::min(kOutputWidth, width - d), depth, left_stride, right_stride, out_stride, add,
                                left, right + d * (kPaired<E> ? 2 : 1), out + d, kPaired<E>);
}

}  // namespace fused_nce
