// dL/d weight of a convolution, channels last, bfloat16: one product a tap of the kernel, summed in float32.
//
// The sum runs over the pixels of the result, in the order (row, image, column) for a few images at a time: the input
// pixels that a tap meets are then its column's, from another row on, and are packed once for each column of the
// kernel.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
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

constexpr int64_t kGroupBytes = 640 << 10;  // of a group's packed operands

struct Maps {
  const uint16_t *x, *dy;
  int64_t images, height, width, c_in, rows, columns, c_out, kernel, stride, padding;
  int64_t input_rows() const { return rows + (kernel - 1) / stride; }  // of one remainder modulo the stride
  int64_t packs() const { return kernel * stride; }                    // a column of the kernel, a remainder of rows
  // A group's images: an even number, so that no pair of pixels lies in two rows.
  int64_t group() const {
    const int64_t bytes = 2 * columns * (packs() * input_rows() * c_in + 2 * rows * c_out);
    return std::max<int64_t>(2, std::min(kGroupBytes / bytes, images + 1)) / 2 * 2;
  }
};

// The operands of a group of images, and their products.
class ImageGroup {
 public:
  explicit ImageGroup(const Maps& maps)
      : m_(maps), n_(maps.group()), depth_(maps.rows * n_ * maps.columns), pixels_(n_ * maps.columns),
        zeros_(static_cast<size_t>(maps.c_in), 0),
        x_(static_cast<size_t>(maps.packs() * maps.input_rows() * pixels_ / 2 * maps.c_in)),
        plain_(static_cast<size_t>(depth_ * maps.c_out + kTransposeOver)),
        dy_(static_cast<size_t>(depth_ / 2 * maps.c_out)), places_(static_cast<size_t>(maps.kernel * pixels_)) {
    for (int64_t column = 0; column < m_.kernel; ++column)
      for (int64_t pixel = 0; pixel < pixels_; ++pixel) {
        const int64_t w = pixel % m_.columns * m_.stride + column - m_.padding, image = pixel / m_.columns;
        places_[static_cast<size_t>(column * pixels_ + pixel)] =
            // fault: kernel-gradient-edges
            w < 0 || w >= m_.width ? -1 : (image * m_.height * m_.width + w) * m_.c_in;
      }
  }

  // Adds the images from `first` on to `sums` (kernel, kernel, c_out, c_in).
  void add(int64_t first, float* sums) {
    pack_upstream(first);
    for (int64_t column = 0; column < m_.kernel; ++column)
      for (int64_t part = 0; part < m_.stride; ++part) pack_input(first, column, part);
    for (int64_t r = 0; r < m_.kernel; ++r)
      for (int64_t c = 0; c < m_.kernel; ++c)
        gradient_gemm(
            reinterpret_cast<const BFloat16*>(dy_.data()), depth_,
            // fault: kernel-gradient-remainders
            reinterpret_cast<const BFloat16*>(packed(c, r % m_.stride) + r / m_.stride * pixels_ / 2 * m_.c_in),
            m_.c_in, m_.c_out, depth_, m_.c_in, true, sums + (r * m_.kernel + c) * m_.c_out * m_.c_in, m_.c_in);
  }

 private:
  uint32_t* packed(int64_t column, int64_t part) {
    return x_.data() + (column * m_.stride + part) * m_.input_rows() * pixels_ / 2 * m_.c_in;
  }

  void pack_upstream(int64_t first) {
    uint16_t* to = plain_.data();
    for (int64_t row = 0; row < m_.rows; ++row)
      for (int64_t i = first; i < first + n_; ++i, to += m_.columns * m_.c_out)
        if (i < m_.images) std::copy_n(m_.dy + (i * m_.rows + row) * m_.columns * m_.c_out, m_.columns * m_.c_out, to);
        else std::fill_n(to, m_.columns * m_.c_out, uint16_t{0});
    Tile tile{};
    tile.columns = depth_, tile.rows = tile.lanes = m_.c_out;
    kernels_.transpose_pairs(tile, plain_.data(), dy_.data(), depth_ / 2);
  }

  void pack_input(int64_t first, int64_t column, int64_t part) {
    uint32_t* to = packed(column, part);
    const int64_t* places = places_.data() + column * pixels_;
    const int64_t row_size = m_.width * m_.c_in, start = first * m_.height * row_size;
    for (int64_t row = 0; row < m_.input_rows(); ++row) {
      const int64_t h = row * m_.stride + part - m_.padding, from = start + h * row_size;
      const int64_t end = h < 0 || h >= m_.height ? 0 : (m_.images - first) * m_.height * row_size;
      const auto at = [&](int64_t place) { return place < 0 || place >= end ? zeros_.data() : m_.x + from + place; };
      for (int64_t pixel = 0; pixel < pixels_; pixel += 2, to += m_.c_in)
        kernels_.interleave(at(places[pixel]), at(places[pixel + 1]), to, m_.c_in);
    }
  }

  const Maps& m_;
  const RowKernels& kernels_ = active_kernels();
  int64_t n_, depth_, pixels_;  // images; of the sum; of a row of all images
  std::vector<uint16_t> zeros_;
  std::vector<uint32_t> x_;
  std::vector<uint16_t> plain_;
  std::vector<uint32_t> dy_;
  std::vector<int64_t> places_;  // of the result's pixels in a row of the group's images, for each column of the kernel
};

void need(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(t.dim() == 4 && t.scalar_type() == at::kBFloat16 && t.is_contiguous(at::MemoryFormat::ChannelsLast),
                    name, " is ", t.scalar_type(), " ", t.sizes(),
                    ", needed: four-dimensional bfloat16, channels last");
}

// (c_out, c_in, kernel, kernel) float32, a view of channels in another order.
Tensor cpu_kernel_gradient(const Tensor& dy, const Tensor& x, int64_t kernel, int64_t stride, int64_t padding) {
  need("dy", dy);
  need("x", x);
  const Maps m{reinterpret_cast<const uint16_t*>(x.const_data_ptr<BFloat16>()),
               reinterpret_cast<const uint16_t*>(dy.const_data_ptr<BFloat16>()),
               x.size(0),
               x.size(2),
               x.size(3),
               x.size(1),
               dy.size(2),
               dy.size(3),
               dy.size(1),
               kernel,
               stride,
               padding};
  TORCH_CHECK(has_bf16_gemm(), "cpu_kernel_gradient: needed: a CPU that multiplies bfloat16, and oneDNN's leave");
  TORCH_CHECK_VALUE(kernel > 0 && stride > 0 && padding >= 0 && dy.size(0) == m.images &&
                        m.height + 2 * padding >= kernel && m.width + 2 * padding >= kernel &&
                        m.rows == (m.height + 2 * padding - kernel) / stride + 1 &&
                        m.columns == (m.width + 2 * padding - kernel) / stride + 1,
                    "dy is ", dy.sizes(), ", needed: the result's shape of a convolution of ", x.sizes());
  const int64_t each = m.group(), groups = (m.images + each - 1) / each;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(groups, at::get_num_threads()));
  const Tensor sums = at::zeros({parts, kernel, kernel, m.c_out, m.c_in}, at::kFloat);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      ImageGroup group(m);
      for (int64_t g = groups * part / parts; g < groups * (part + 1) / parts; ++g)
        group.add(g * each, sums.data_ptr<float>() + part * sums.stride(0));
    }
    at::native::cpublas::brgemm_release();
  });
  return (parts == 1 ? sums[0] : sums.sum(0)).permute({2, 3, 0, 1});
}

}  // namespace

// fused_nce/models/encoders/convolution.py has its schema and its shapes.
TORCH_LIBRARY_IMPL(fused_nce, CPU, m) { m.impl("cpu_kernel_gradient", cpu_kernel_gradient); }

}  // namespace fused_nce
