// What of a GPU needs torch: cuBLAS on ATen's handle, whose workspace and TF32 setting it shares.
#include <ATen/cuda/CUDAContext.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>

#include <map>
#include <mutex>
#include <utility>

#include "device.h"
#include "machines.h"

namespace fused_nce {
namespace cuda {

namespace {

cudaDataType_t type_of(Element element) {
  if (element == Element::float32) return CUDA_R_32F;
  return element == Element::bfloat16 ? CUDA_R_16BF : CUDA_R_16F;
}

}  // namespace

// cuBLAS counts columns first: its matrices are our transposed ones, so left and right change places.
void Device::gemm(const Gemm& g) const {
  const float beta = g.add ? 1.0f : 0.0f;
  // ATen's handle sets the math mode at each request: TF32 only where torch.backends.cuda.matmul allows it.
  const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
  // A product cut along its depth must not meet again in 16 bits; the next request for the handle undoes this.
  if (g.out_element != Element::float32)
    TORCH_CUDABLAS_CHECK(cublasSetMathMode(handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  TORCH_CUDABLAS_CHECK(cublasGemmEx_64(
      handle, g.right_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, g.left_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, g.n, g.m,
      g.depth, &g.alpha, g.right, type_of(g.element), g.right_stride, g.left, type_of(g.element), g.left_stride, &beta,
      g.out, type_of(g.out_element), g.out_stride, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// Launches of one stream follow each other, and each leaves it at 0. A graph may run beside them, so it has one of its
// own.
unsigned* Device::counter() const {
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  const auto fresh = [&] { return at::zeros({1}, at::TensorOptions(at::kInt).device(stream.device())); };
  const auto data = [](const at::Tensor& x) { return static_cast<unsigned*>(x.data_ptr()); };
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return data(fresh());
  static std::mutex mutex;
  static auto* counters = new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, at::Tensor>();  // outlives CUDA
  const std::lock_guard<std::mutex> lock(mutex);
  at::Tensor& found = (*counters)[{stream.device_index(), stream.id()}];
  if (!found.defined()) found = fresh();
  return data(found);
}

void Device::check(int error) const { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

std::unique_ptr<Machine> device_machine() { return std::make_unique<Device>(c10::cuda::getCurrentCUDAStream()); }

}  // namespace cuda
}  // namespace fused_nce
