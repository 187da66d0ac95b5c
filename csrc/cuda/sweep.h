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

// `scale_tensor`: one more factor of the scale, 0-d float on q's device, or undefined.
// `statistics` are computed, or read; `gradients` are those that `out` has room for.
void sweep(const Machine& machine, const SweepInputs& in, const at::Tensor& scale_tensor, bool statistics,
           bool gradients, const RowStatistics& stats, const Upstream& upstream, float unit, const Gradients& out);

}  // namespace cuda
}  // namespace fused_nce
