// What csrc/cuda/rows.cu is linked with so that its launches run elsewhere: a CUDA runtime that hands each launch to a
// callback, and the rest of `Device`. For the tests alone.
#include <cstddef>
#include <map>
#include <stdexcept>
#include <string>

#include "device.h"
#include "machines.h"

struct dim3 {
  unsigned x, y, z;
};

// `allowed`: bytes of shared memory, where the kernel has asked for more than each has.
using Launch = int (*)(const char* kernel, unsigned ctas, unsigned threads, unsigned shared_bytes, unsigned allowed,
                       void** arguments);
using Product = int (*)(const fused_nce::cuda::Gemm*);

namespace {
Launch launch;
Product product;
dim3 grid, block;
size_t dynamic_bytes;
std::map<const void*, int> allowed;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> all;
  return all;
}
}  // namespace

extern "C" {
char fused_nce_fault[512];  // what the callback says of a launch that failed
int fused_nce_shared_bytes = 227 << 10;  // of a CTA, on the card that this is
size_t fused_nce_gemm_bytes = sizeof(fused_nce::cuda::Gemm);
void fused_nce_run_by(Launch launches, Product gemms) {
  launch = launches;
  product = gemms;
}

// What nvcc's host code calls.
void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t shared_bytes, void*) {
  grid = g;
  block = b;
  dynamic_bytes = shared_bytes;
  return 0;
}
int __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* shared_bytes, void* stream) {
  *g = grid;
  *b = block;
  *shared_bytes = dynamic_bytes;
  *static_cast<void**>(stream) = nullptr;
  return 0;
}
int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return 0;
}
static int failed = 0;
int cudaLaunchKernel(const void* host, dim3 g, dim3 b, void** arguments, size_t shared_bytes, void*) {
  return failed = launch(names()[host].c_str(), g.x, b.x, shared_bytes, allowed[host], arguments);
}
int __cudaLaunchKernel(void* host, dim3 g, dim3 b, void** arguments, size_t shared_bytes, void* stream) {
  return cudaLaunchKernel(host, g, b, arguments, shared_bytes, stream);
}
int cudaFuncSetAttribute(const void* host, int, int value) {
  allowed[host] = value;
  return 0;
}
int cudaGetDevice(int* device) { return *device = 0; }
int cudaDeviceGetAttribute(int* value, int, int) {
  *value = fused_nce_shared_bytes;
  return 0;
}
int cudaGetLastError() { return failed; }
}

namespace fused_nce {
namespace cuda {

void Device::gemm(const Gemm& g) const { check(product(&g)); }
unsigned* Device::counter() const {
  static unsigned count = 0;
  return &count;
}
void Device::check(int error) const {
  if (error) throw std::runtime_error(fused_nce_fault);
}

extern "C" std::unique_ptr<Machine> fused_nce_machine() { return std::make_unique<Device>(nullptr); }

}  // namespace cuda
}  // namespace fused_nce
