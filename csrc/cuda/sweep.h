// The one driver behind `stats`, `grads` and `loss` on a GPU.
#pragma once

#include "../problem.h"
#include "machine.h"
#include "plan.h"

namespace fused_nce {
namespace cuda {

Element element_of(at::ScalarType type);

// The power of two that puts weights of at most `peak` near 2^8: float16 has 24 binary orders below that, and 2^8 of
// room above. 1 for the types that have float's exponents.
float unit_of(Element element, float peak);

// Statistics of columns, written or read, and the coefficients that come with those that are read.
struct ColumnStatistics {
  at::Tensor neg_lse, neg_max, square;  // (M); all undefined: the loss asks for none
  at::Tensor d_neg_lse, d_square;       // (M)
};

// What a sweep computes: statistics, or it reads them; gradients, those that its outputs have room for.
struct Task {
  bool statistics, gradients;
};

// Room for the gradients, in the inputs' type where one GEMM finishes them. Where q is k, dq is both roles' and zero.
Gradients new_results(const SweepInputs& in, const Task& task);

// `scale_tensor`: one more factor of the scale, 0-d float on q's device, or undefined.
void sweep(const Machine& machine, const SweepInputs& in, const at::Tensor& scale_tensor, const Task& task,
           const RowStatistics& rows, const ColumnStatistics& columns, const Upstream& upstream, float unit,
           const Gradients& out);

}  // namespace cuda
}  // namespace fused_nce
