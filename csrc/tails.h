// A tail as the CPU's operators are told of it, and what it makes of the statistics of a problem.
#pragma once

#include "problem.h"

namespace fused_nce {

enum class Reduction { mean, sum, none };

struct TailOf {
  Tail name;
  double penalty, weight;
  Reduction reduction;
  std::vector<double> weights;  // of prefixes, whose statistics are (N, K P) and (K S, N); none: of one problem

  // d loss / d element, of so many.
  double unit(int64_t elements) const {
    return reduction == Reduction::sum ? weight : weight / static_cast<double>(elements);
  }
};

inline int64_t elements_a_row(const TailOf& tail, const Layout& layout) { return tail.name == kNce ? layout.n_pos : 1; }

struct LossNumbers {
  at::Tensor loss, nce, penalty;  // 0-d; nce (N, elements a row) under `none`
  at::Tensor report;              // (report_groups, numbers)
};

// What `core/tails.py` does in some forty small operations. Row i is of report i mod `report_groups`. The same bits for
// any number of threads.
LossNumbers summary_of(const TailOf& tail, const SweepInputs& in, const StatisticTensors& found, int64_t report_groups);

// dL/d statistic, from dL/d element (one for all, or one each) and dL/d penalty.
StatisticTensors slopes_of(const TailOf& tail, const SweepInputs& in, const StatisticTensors& found,
                           const at::Tensor& d_element, double d_penalty);

int64_t numbers_reported(Tail tail);

}  // namespace fused_nce
