// Rows brought to norm 1, and the gradient's way back through it.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace fused_nce {

constexpr float kLeastNorm = 1e-12f;  // a row below it is divided by it, and one of zeros stays

inline float divisor_of(float norm) { return norm < kLeastNorm ? kLeastNorm : norm; }

// sum x*y in an order that the width alone sets, of which a compiler makes vectors.
inline double row_product(const float* x, const float* y, int64_t width) {
  constexpr int64_t kLanes = 16;
  double sums[kLanes] = {}, total = 0.0;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(x[d + l]) * y[d + l];
  for (const double sum : sums) total += sum;
  for (; d < width; ++d) total += static_cast<double>(x[d]) * y[d];
  return total;
}

template <class F>
void for_rows(const at::Tensor& x, const F& f) {
  at::parallel_for(0, x.size(0), std::max<int64_t>(1, 32768 / x.size(1)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

struct UnitRows {
  at::Tensor wide;   // (N, D) float; undefined: nobody needs all at once
  at::Tensor norms;  // (N) float, of the rows as they were
};

inline at::Tensor norms_of(const at::Tensor& x) {
  const at::Tensor norms = at::empty({x.size(0)}, x.options());
  const int64_t width = x.size(1), stride = x.stride(0);
  const float* in = x.const_data_ptr<float>();
  float* out = norms.data_ptr<float>();
  for_rows(x, [&](int64_t i) {
    const float* row = in + i * stride;
    out[i] = static_cast<float>(std::sqrt(row_product(row, row, width)));
  });
  return norms;
}

inline UnitRows unit_rows(const at::Tensor& x) {
  const at::Tensor from = x.to(at::kFloat).contiguous();
  const UnitRows out{at::empty_like(from), norms_of(from)};
  const int64_t width = x.size(1);
  const float* in = from.const_data_ptr<float>();
  float* rows = out.wide.data_ptr<float>();
  const float* norms = out.norms.const_data_ptr<float>();
  for_rows(from, [&](int64_t i) {
    const float* row = in + i * width;
    const float divisor = divisor_of(norms[i]);
    for (int64_t d = 0; d < width; ++d) rows[i * width + d] = row[d] / divisor;
  });
  return out;
}

// (g - u <u, g>) / norm, in place of the (N, D) float gradient g; `x` are the rows as they were, where u is made anew.
inline void through_unit_rows(const at::Tensor& gradient, const UnitRows& unit, const at::Tensor& x = {}) {
  const int64_t width = gradient.size(1);
  const bool anew = !unit.wide.defined();
  const at::Tensor& from = anew ? x : unit.wide;
  float* g = gradient.data_ptr<float>();
  const int64_t stride = from.stride(0);
  const float *rows = from.const_data_ptr<float>(), *norms = unit.norms.const_data_ptr<float>();
  for_rows(gradient, [&](int64_t i) {
    const float *u = rows + i * stride, norm = norms[i], divisor = divisor_of(norm);
    float* row = g + i * width;
    thread_local std::vector<float> made;
    if (anew) {
      made.resize(static_cast<size_t>(width));
      for (int64_t d = 0; d < width; ++d) made[static_cast<size_t>(d)] = u[d] / divisor;
      u = made.data();
    }
    const bool small = norm < kLeastNorm;
    const float along = small ? 0.0f : static_cast<float>(row_product(u, row, width));
    for (int64_t d = 0; d < width; ++d) row[d] = (row[d] - u[d] * along) / divisor;
  });
}

}  // namespace fused_nce
