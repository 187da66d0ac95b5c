// Prefixes of one pair of operands in one sweep (fused_nce/core/prefixes.py says what they are).
#pragma once

#include <vector>

#include "../problem.h"

namespace fused_nce {

struct PrefixTask {
  bool statistics, gradients;      // as of a `Task`
  std::vector<int64_t> widths;     // K, ascending
  std::vector<double> weights;     // K, of the loss; none where dL/d statistic are given
  float unit;                      // of the loss
  at::Tensor of_q, of_k;           // (K, N), (K, M) inverse norms
  at::Tensor pos, rows;            // (K, N, P), (K, S, N): written, or read
  at::Tensor d_pos, d_rows;        // the same shapes; undefined where the tail gives them
  Gradients out;                   // of unnormalised products: the norms' part is still to come
  at::Tensor row_sums, line_sums;  // (K, N), (K, M) sums of w * r
};

void sweep_prefixes(const SweepInputs& in, const PrefixTask& task);

int64_t prefix_workspace_bytes(int64_t rows, int64_t columns, int64_t width, int64_t image, int64_t parts, bool both,
                               bool need_q, bool marked, bool guided,
                               int64_t workspace_bytes);  // 0: not even the smallest plan fits

}  // namespace fused_nce
