// The three GEMMs of a tile on ATen's brgemm, and the packing that they want.
//
// brgemm is oneDNN's JIT kernel where the CPU has AVX2 or better and ATen's BLAS elsewhere. Measured on two AVX-512
// cores it reaches 290-330 GFLOP/s on every shape of interest with the keys used as they are stored, where torch.mm
// varies from 175 to 310.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>

#include "../params.h"
#include "plan.h"

namespace fused_nce {

// Reduction depth of one score call. Longer ones are no faster and sum more terms in one chain.
constexpr int64_t kScoreDepth = 512;

// FLOP of all GEMMs so far, for the tests that count them: 2·m·n·depth a call.
inline std::atomic<int64_t>& gemm_flop() {
  static std::atomic<int64_t> flop{0};
  return flop;
}

// out (m, n) [+]= left (m, depth) @ right (depth, n)
template <class E>
void gemm(int64_t m, int64_t n, int64_t depth, const E* left, int64_t left_stride, const E* right, int64_t right_stride,
          bool add, float* out, int64_t out_stride) {
  gemm_flop().fetch_add(2 * m * n * depth, std::memory_order_relaxed);
  at::native::cpublas::brgemm(m, n, depth, left_stride, right_stride, out_stride, add, left, right, out, kPaired<E>);
}

// scores (columns, lanes) = keys (columns, D) @ packed q (D, lanes)
template <class E>
void score_gemm(const E* keys, int64_t key_stride, const E* packed, int64_t columns, int64_t lanes, int64_t width,
                float* scores) {
  for (int64_t d = 0; d < width; d += kScoreDepth)
    gemm(columns, lanes, std::min(kScoreDepth, width - d), keys + d, key_stride, packed + d * lanes, lanes, d > 0,
         scores, lanes);
}

// out (m, D) [+]= left (m, depth) @ right (depth, D)
template <class E>
void gradient_gemm(const E* left, int64_t left_stride, const E* right, int64_t right_stride, int64_t m, int64_t depth,
                   int64_t width, bool add, float* out, int64_t out_stride) {
  for (int64_t d = 0; d < width; d += kOutputWidth)
    gemm(m, std::min(kOutputWidth, width - d), depth, left, left_stride, right + d * (kPaired<E> ? 2 : 1), right_stride,
         add, out + d, out_stride);
}

}  // namespace fused_nce
