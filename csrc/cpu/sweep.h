// The one driver behind `stats`, `grads` and `loss`.
#pragma once

#include "../problem.h"
#include "plan.h"

namespace fused_nce {

Elements elements_of(at::ScalarType type, int64_t width);

void sweep_stats(const SweepInputs& in, const RowStatistics& out);
void sweep_grads(const SweepInputs& in, const RowStatistics& stats, const Upstream& upstream, const Gradients& out);
void sweep_loss(const SweepInputs& in, const RowStatistics& stats, const Upstream& upstream, const Gradients& out);

}  // namespace fused_nce
