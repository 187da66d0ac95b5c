// A loss as one differentiable function of a GPU's tensors: csrc/loss.cpp hands it what it serves.
#pragma once

#include <torch/csrc/autograd/variable.h>

#include "../served.h"

namespace fused_nce {
namespace cuda {

// Whether it does: the nce tail of rows alone, whose positives are by arithmetic or keys of their own.
bool serves(const Form& form, const fused_nce::Call& call, const Given& x);

// loss, nce, penalty, report, pos, rows.
torch::autograd::variable_list whole_loss(const c10::intrusive_ptr<fused_nce::Call>& call, const Given& x);

}  // namespace cuda
}  // namespace fused_nce
