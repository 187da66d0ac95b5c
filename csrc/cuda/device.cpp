// The machine that is a GPU: cuBLAS on ATen's handle, whose workspace and TF32 setting it shares, and the kernels of
// rows.cu, all on the current stream.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <cublas_v2.h>

#include "launch.h"
#include "machines.h"

namespace fused_nce {
namespace cuda {

namespace {

cudaDataType_t type_of(Element element) {
  if (element == Element::float32) return CUDA_R_32F;
  return element == Element::bfloat16 ? CUDA_R_16BF : CUDA_R_16F;
}

void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

class Device final : public Machine {
 public:
  Device() : stream_(c10::cuda::getCurrentCUDAStream()) {}

  // cuBLAS counts columns first: its matrices are our transposed ones, so left and right change places.
  void gemm(const Gemm& g) const override {
    const float beta = g.add ? 1.0f : 0.0f;
    // ATen's handle sets the math mode at each request: TF32 only where torch.backends.cuda.matmul allows it.
    const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
    // A product cut along its depth must not meet again in 16 bits; the next request for the handle undoes this.
    if (g.out_element != Element::float32)
      TORCH_CUDABLAS_CHECK(cublasSetMathMode(handle, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    TORCH_CUDABLAS_CHECK(cublasGemmEx_64(
        handle, g.right_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, g.left_transposed ? CUBLAS_OP_T : CUBLAS_OP_N, g.n, g.m,
        g.depth, &g.alpha, g.right, type_of(g.element), g.right_stride, g.left, type_of(g.element), g.left_stride,
        &beta, g.out, type_of(g.out_element), g.out_stride, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

  void fold(const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t first_slot) const override {
    check(launch_fold(strip, rules, rows, first_slot, stream_));
  }

  void finish(int64_t first_row, int64_t count, const Rules& rules, const RowArrays& rows, bool tail) const override {
    check(launch_finish(first_row, count, rules, rows, tail, stream_));
  }

  void weigh(const Strip& strip, const Rules& rules, const RowArrays& rows, Element element) const override {
    check(launch_weigh(strip, rules, rows, element, stream_));
  }

  void loss(const RowTask* tasks, int count, Element element) const override {
    check(launch_loss(tasks, count, element, stream_));
  }

  void fold_further(const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t first_slot) const override {
    check(launch_fold_further(strip, rules, rows, first_slot, stream_));
  }

  void finish_further(int64_t first_row, int64_t count, const Rules& rules, const RowArrays& rows,
                      bool tail) const override {
    check(launch_finish_further(first_row, count, rules, rows, tail, stream_));
  }

  void fold_columns(const Strip& strip, const Rules& rules, const ColumnArrays& columns) const override {
    check(launch_fold_columns(strip, rules, columns, stream_));
  }

  void finish_columns(int64_t count, const Rules& rules, const ColumnArrays& columns) const override {
    check(launch_finish_columns(count, rules, columns, stream_));
  }

  void multiply(void* x, Element element, int64_t count, const float* factor) const override {
    check(launch_multiply(x, element, count, factor, stream_));
  }

  void summarize(const Summaries& all) const override { check(launch_summary(all, stream_)); }

 private:
  cudaStream_t stream_;
};

}  // namespace

std::unique_ptr<Machine> device_machine() { return std::make_unique<Device>(); }

}  // namespace cuda
}  // namespace fused_nce
