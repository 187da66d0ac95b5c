// The one driver behind `stats`, `grads` and `loss`.
#pragma once

#include <ATen/core/Tensor.h>

#include "../params.h"
#include "plan.h"

namespace fused_nce {

struct SweepInputs {
  at::Tensor q, k;  // (N, D), (M, D), rows contiguous
  Scoring scoring;
  bool need_q, need_k, need_scale;
  int64_t workspace_bytes;
};

// Statistics: written by stats and loss, read by grads.
struct RowStatistics {
  at::Tensor pos;                       // (N, n_c)
  at::Tensor neg_lse, neg_max, square;  // (N)
};

// Coefficients given by the caller (grads), or the weights of the NCE tail that the statistics feed (loss).
struct Upstream {
  at::Tensor d_pos, d_neg_lse, d_square;  // (N, n_c), (N), (N); undefined for loss
  float nce_weight = 0.0f, square_weight = 0.0f;
};

struct Gradients {
  at::Tensor dq, dk, dscale;  // float, dk of `dk_type`; those not needed have no elements
};

// bfloat16 where one strip finishes dk: summed over several it has to stay float until the last. `statistics` as in
// sweep_loss, not as in sweep_grads.
at::ScalarType dk_type(const SweepInputs& in, bool statistics);

int64_t flop_of_gemms();  // of all calls so far

Elements elements_of(at::ScalarType type, int64_t width);

void sweep_stats(const SweepInputs& in, const RowStatistics& out);
void sweep_grads(const SweepInputs& in, const RowStatistics& stats, const Upstream& upstream, const Gradients& out);
void sweep_loss(const SweepInputs& in, const RowStatistics& stats, const Upstream& upstream, const Gradients& out);

}  // namespace fused_nce
