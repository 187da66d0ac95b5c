// The one driver behind `stats`, `grads` and `loss`.
#pragma once

#include "../problem.h"
#include "plan.h"

namespace fused_nce {

// bfloat16 where one strip finishes dk: summed over several it has to stay float until the last. `statistics` as in
// sweep_loss, not as in sweep_grads.
at::ScalarType dk_type(const SweepInputs& in, bool statistics);

int64_t flop_of_gemms();  // of all calls so far

Elements elements_of(at::ScalarType type, int64_t width);

void sweep_stats(const SweepInputs& in, const RowStatistics& out);
void sweep_grads(const SweepInputs& in, const RowStatistics& stats, const Upstream& upstream, const Gradients& out);
void sweep_loss(const SweepInputs& in, const RowStatistics& stats, const Upstream& upstream, const Gradients& out);

}  // namespace fused_nce
