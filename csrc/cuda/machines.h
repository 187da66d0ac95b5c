// The machines.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "machine.h"

namespace fused_nce {
namespace cuda {

std::unique_ptr<Machine> emulated_machine();  // a CPU emulation of the GPU driver, for the tests
int64_t emulated_launches();  // launches that a GPU would have made for what was emulated in this process
using MakeMachine = std::unique_ptr<Machine> (*)();
void emulate_by(MakeMachine make);  // another emulation, such as one of the compiled kernels; null: host.cpp's again
std::unique_ptr<Machine> device_machine();  // the current CUDA device, on its current stream

// Of all launches of a kernel.
struct Count {
  int64_t launches, scores, flop;
  int64_t bytes;        // read and written, but for those of scores
  int64_t strip_bytes;  // of scores
  int64_t strip;        // of scores that are alive together, the most
};
using Counts = std::map<std::string, Count>;

// What has been counted, by kernel, since the last call. From `begin` on calls are counted in the place of emulated.
Counts tally(bool begin);

}  // namespace cuda
}  // namespace fused_nce
