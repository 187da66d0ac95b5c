// A residual block of 1×1 convolutions, y = x + relu(x·W1ᵀ)·W2ᵀ, on bfloat16 rows: a few at a time, from the first
// product to the last in a core's cache, and the gradients of both weights summed in float32.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "gemm.h"
#include "isa.h"

namespace fused_nce {
namespace {

using at::BFloat16;
using at::Tensor;
using Words = std::vector<uint32_t>;
using Halves = std::vector<uint16_t>;
using Floats = std::vector<float>;

constexpr int64_t kPixels = 128;  // at a time; even

const uint16_t* bits(const Tensor& t) { return reinterpret_cast<const uint16_t*>(t.const_data_ptr<BFloat16>()); }
template <class T>
const BFloat16* halves(const T* p) {
  return reinterpret_cast<const BFloat16*>(p);
}

// A weight (C, C) as the right operand of a product: pairs of what is summed over, of its rows or of its columns.
Tensor paired(const Tensor& w, bool rows) {
  const int64_t half = w.size(0) / 2;
  return (rows ? w.view({half, 2, w.size(1)}).transpose(1, 2) : w.t().reshape({half, 2, w.size(0)}).transpose(1, 2))
      .contiguous();
}

struct Block {
  int64_t width;
  const RowKernels& kernels = active_kernels();
  Tensor first, second;  // paired, for the way there
  size_t size = static_cast<size_t>(kPixels * width);
  Floats product = Floats(size);
  Halves hidden = Halves(size + kTransposeOver);

  void times(int64_t rows, const uint16_t* left, const Tensor& right) {
    gradient_gemm(halves(left), width, right.const_data_ptr<BFloat16>(), width, rows, width, width, false,
                  product.data(), width);
  }
  void find_hidden(int64_t rows, const uint16_t* x) {
    times(rows, x, first);
    kernels.rectify(product.data(), nullptr, hidden.data(), rows * width);
  }
};

void need(const char* name, const Tensor& t, at::IntArrayRef sizes) {
  TORCH_CHECK_VALUE(t.scalar_type() == at::kBFloat16 && t.is_contiguous() && t.sizes() == sizes && t.size(1) % 2 == 0,
                    name, " is ", t.scalar_type(), " ", t.sizes(), ", needed: contiguous bfloat16 ", sizes,
                    ", of an even width");
}

int64_t checked(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  TORCH_CHECK(has_bf16_gemm(), "cpu_pointwise: needed: a CPU that multiplies bfloat16, and oneDNN's leave");
  TORCH_CHECK_VALUE(x.dim() == 2, "x is ", x.sizes(), ", needed: two dimensions");
  const int64_t width = x.size(1);
  need("x", x, {x.size(0), width});
  need("w1", w1, {width, width});
  need("w2", w2, {width, width});
  return width;
}

Tensor cpu_pointwise(const Tensor& x, const Tensor& w1, const Tensor& w2) {
  const int64_t width = checked(x, w1, w2), count = x.size(0);
  const Tensor y = at::empty_like(x), first = paired(w1, false), second = paired(w2, false);
  at::parallel_for(0, (count + kPixels - 1) / kPixels, 4, [&](int64_t begin, int64_t end) {
    Block block{width};
    block.first = first, block.second = second;
    for (int64_t from = begin * kPixels; from < std::min(count, end * kPixels); from += kPixels) {
      const int64_t rows = std::min(kPixels, count - from);
      block.find_hidden(rows, bits(x) + from * width);
      block.times(rows, block.hidden.data(), second);
      block.kernels.add_narrow(block.product.data(), bits(x) + from * width,
                               reinterpret_cast<uint16_t*>(y.data_ptr<BFloat16>()) + from * width, rows * width);
    }
    at::native::cpublas::brgemm_release();
  });
  return y;
}

// dL/dx, and float32 dL/dW1 and dL/dW2, (C, C).
std::tuple<Tensor, Tensor, Tensor> cpu_pointwise_grads(const Tensor& dy, const Tensor& x, const Tensor& w1,
                                                       const Tensor& w2) {
  const int64_t width = checked(x, w1, w2), count = x.size(0), half = kPixels / 2;
  need("dy", dy, x.sizes());
  const Tensor dx = at::empty_like(x), first = paired(w1, false), back_first = paired(w1, true),
               back_second = paired(w2, true);
  const int64_t tiles = (count + kPixels - 1) / kPixels;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(tiles, at::get_num_threads()));
  const Tensor sums = at::zeros({parts, 2, width, width}, at::kFloat);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    Block block{width};
    block.first = first;
    const RowKernels& kernels = block.kernels;
    Halves up(block.size + kTransposeOver);
    Words left(block.size / 2), right(block.size / 2);
    // sums += lᵀ·r, of rows of bfloat16
    const auto add = [&](int64_t rows, const uint16_t* l, const uint16_t* r, float* to) {
      Tile tile{};
      tile.columns = rows, tile.rows = tile.lanes = width;
      kernels.transpose_pairs(tile, l, left.data(), half);
      for (int64_t i = 0; i < rows; i += 2)
        kernels.interleave(r + i * width, i + 1 < rows ? r + (i + 1) * width : nullptr, &right[i / 2 * width], width);
      gradient_gemm(halves(left.data()), kPixels, halves(right.data()), width, width, (rows + 1) / 2 * 2, width, true,
                    to, width);
    };
    for (int64_t part = begin; part < end; ++part) {
      float* d_first = sums.data_ptr<float>() + part * sums.stride(0);
      for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
        const int64_t from = t * kPixels, rows = std::min(kPixels, count - from), offset = from * width;
        block.find_hidden(rows, bits(x) + offset);
        std::copy_n(bits(dy) + offset, rows * width, up.data());
        add(rows, up.data(), block.hidden.data(), d_first + width * width);
        block.times(rows, up.data(), back_second);
        // fault: pointwise-gate
        kernels.rectify(block.product.data(), block.hidden.data(), block.hidden.data(), rows * width);
        std::swap(up, block.hidden);
        add(rows, up.data(), bits(x) + offset, d_first);
        block.times(rows, up.data(), back_first);
        kernels.add_narrow(block.product.data(), bits(dy) + offset,
                           reinterpret_cast<uint16_t*>(dx.data_ptr<BFloat16>()) + offset, rows * width);
        std::swap(up, block.hidden);
      }
    }
    at::native::cpublas::brgemm_release();
  });
  const Tensor total = parts == 1 ? sums[0] : sums.sum(0);
  return {dx, total[0].clone(), total[1].clone()};  // an operator's results share no storage
}

}  // namespace

// fused_nce/models/encoders/pointwise.py has their schemas and shapes.
TORCH_LIBRARY_IMPL(fused_nce, CPU, m) {
  m.impl("cpu_pointwise", cpu_pointwise);
  m.impl("cpu_pointwise_grads", cpu_pointwise_grads);
}

}  // namespace fused_nce
