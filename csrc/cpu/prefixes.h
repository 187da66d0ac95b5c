// Prefixes of one pair of operands in one sweep (fused_nce/core/prefixes.py says what they are).
#pragma once

#include "../prefix_task.h"

namespace fused_nce {

void sweep_prefixes(const SweepInputs& in, const PrefixTask& task);

// (K, N) inverse norms of the rows' prefixes, and what they take off an (N, D) gradient of unnormalised products, whose
// columns beyond the widest become 0: `inverse_norms` and `less_norms` of core/prefixes.py in a pass each.
at::Tensor prefix_norms(const at::Tensor& x, const std::vector<int64_t>& widths);
void less_prefix_norms(const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& norms, const at::Tensor& sums,
                       const std::vector<int64_t>& widths);

int64_t prefix_workspace_bytes(int64_t rows, int64_t columns, int64_t width, int64_t image, int64_t parts, bool both,
                               bool need_q, bool marked, bool guided,
                               int64_t workspace_bytes);  // 0: not even the smallest plan fits

}  // namespace fused_nce
