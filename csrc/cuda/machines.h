// The machines that there are.
#pragma once

#include <memory>

#include "machine.h"

namespace fused_nce {
namespace cuda {

std::unique_ptr<Machine> host_machine();    // a CPU that plays a GPU, for the tests
int64_t played_launches();                  // that all of them would have cost a GPU
std::unique_ptr<Machine> device_machine();  // the current CUDA device, on its current stream

}  // namespace cuda
}  // namespace fused_nce
