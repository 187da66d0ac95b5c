// The two machines.
#pragma once

#include <memory>

#include "machine.h"

namespace fused_nce {
namespace cuda {

std::unique_ptr<Machine> emulated_machine();  // a CPU emulation of the GPU driver, for the tests
int64_t emulated_launches();  // launches that a GPU would have made for what was emulated in this process
using MakeMachine = std::unique_ptr<Machine> (*)();
void emulate_by(MakeMachine make);  // another emulation, such as one of the compiled kernels; null: host.cpp's again
std::unique_ptr<Machine> device_machine();  // the current CUDA device, on its current stream

}  // namespace cuda
}  // namespace fused_nce
