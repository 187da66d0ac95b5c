// The one driver behind `stats`, `grads` and `loss`.
#pragma once

#include "../problem.h"
#include "plan.h"

namespace fused_nce {

// What a sweep does: `statistics` alone are written to `stats`; `gradients` alone come from `stats` and `upstream`;
// both are those of the tail's loss, of statistics of rows.
struct Task {
  bool statistics, gradients;
  StatisticTensors stats, upstream;
  TailRule tail;
  Gradients out;
};

void sweep(const SweepInputs& in, const Task& task);

// bfloat16 where one strip finishes dk: summed over several it has to stay float until the last. `statistics` as in
// `Task`.
at::ScalarType dk_type(const SweepInputs& in, bool statistics);

Elements elements_of(at::ScalarType type, int64_t width);

int64_t flop_of_gemms();  // of all calls so far

}  // namespace fused_nce
