// The one driver behind `stats`, `grads` and `loss` on a GPU.
#pragma once

#include <vector>

#include "../prefix_task.h"
#include "machine.h"
#include "plan.h"

namespace fused_nce {
namespace cuda {

Element element_of(at::ScalarType type);

// Of the ceilings of one prefix, or undefined; `several` undefined: no columns by their numbers.
Marking marking_of(const at::Tensor& ceilings, int64_t part, const at::Tensor& several, bool add);

// The power of two that puts weights of at most `peak` near 2^8: float16 has 24 binary orders below that, and 2^8 of
// room above. 1 for the types that have float's exponents.
float fp16_gain_of(Element element, float peak);

// Numbers that the host does not know: 0-d floats on q's device, undefined where there are none.
struct OnDevice {
  at::Tensor scale;  // one more factor of the scale
  at::Tensor bias;   // t = s + bias
};

// Statistics of rows, written or read.
struct RowStatistics {
  at::Tensor pos;                       // (N, P)
  at::Tensor neg_lse, neg_max, square;  // (N)
  at::Tensor optional;                  // (kOptional, N); undefined: the loss asks for none
  bool totals = false;                  // of them the sum and the number of the negatives
};

// Statistics of columns, written or read, and the coefficients that come with those that are read.
struct ColumnStatistics {
  at::Tensor neg_lse, neg_max, square;  // (M); all undefined: the loss asks for none
  at::Tensor d_neg_lse, d_square;       // (M)
};

// The coefficients of the statistics that are read, or the tail that makes them.
struct Upstream {
  at::Tensor d_pos, d_neg_lse, d_square;  // (N, P), (N), (N)
  at::Tensor d_optional;                  // (kOptional, N)
  TailRule tail = {};
};

// What a sweep computes: statistics, or it reads them; gradients, those that `out` has room for.
struct Task {
  bool statistics, gradients;
  RowStatistics rows = {};
  ColumnStatistics columns = {};
  Upstream upstream = {};
  float fp16_gain = 1.0f;
  Gradients out = {};
  const Summaries* summary = nullptr;  // written with the statistics where one kernel has all rows
};

// Room for the gradients, in the inputs' type where one GEMM finishes them. Where q is k, dq is both roles' and zero.
Gradients new_results(const SweepInputs& in, const OnDevice& numbers, const Task& task);

// Whether it wrote the summary too.
bool sweep(const Machine& machine, const SweepInputs& in, const OnDevice& numbers, const Task& task);

Rules rules_of(const SweepInputs& in, const OnDevice& numbers, const Plan& plan, float fp16_gain);

// Statistics or gradients of several prefixes, of float32 or bfloat16.
void sweep_prefixes(const Machine& machine, const SweepInputs& in, const OnDevice& numbers, const PrefixTask& task);

struct Job {
  SweepInputs in;
  OnDevice numbers;
  Task task;
};

// Whether jobs that differ in shape alone may share a launch for their rows: each is one strip from scores to weights,
// and the L2 holds them all.
bool fit_one_launch(const std::vector<Job>& jobs);

// Those jobs. The gradients have room in the inputs' type where it is bfloat16.
void sweep_together(const Machine& machine, const std::vector<Job>& jobs);

}  // namespace cuda
}  // namespace fused_nce
