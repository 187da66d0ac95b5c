// A loss in one call of the CPU's kernels, differentiable: see loss.cpp.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fused_nce {

void bind_loss(pybind11::module_& m);

}  // namespace fused_nce
