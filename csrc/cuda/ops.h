// What the operators and the loss that is one function do alike around a sweep.
#pragma once

#include <c10/core/DeviceGuard.h>

#include <memory>
#include <utility>

#include "machines.h"
#include "sweep.h"

namespace fused_nce {
namespace cuda {

// Selects q's device for this scope, and holds its Machine.
class MachineOnDevice {
 public:
  explicit MachineOnDevice(const at::Tensor& q) : guard_(q.device()), machine_(machine_of(q)) {}
  const Machine& operator*() const { return *machine_; }
  const Machine* operator->() const { return machine_.get(); }

 private:
  static std::unique_ptr<Machine> machine_of([[maybe_unused]] const at::Tensor& q) {
#ifdef FUSED_NCE_CUDA
    if (q.is_cuda()) return device_machine();
#endif
    return emulated_machine();
  }

  c10::DeviceGuard guard_;
  std::unique_ptr<Machine> machine_;
};

// The largest weight of a score.
float peak_of(const SweepInputs& in, const TailRule& tail);

// What the nce tail reports, added up over problems: the results, and what writes them.
struct Summing {
  at::Tensor loss, nce, penalty, report;
  at::Tensor partials, total;  // what `all` points at besides
  Summaries all;
};
Summing summing(at::TensorList pos, at::TensorList rows, at::IntArrayRef n_c, at::IntArrayRef images,
                at::IntArrayRef columns, at::ArrayRef<double> weight, at::ArrayRef<double> penalty, bool mean,
                bool elements, at::IntArrayRef report_groups);

}  // namespace cuda
}  // namespace fused_nce
