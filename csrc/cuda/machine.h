// What the driver asks of the machine that it drives: a GPU, or a CPU that plays one.
#pragma once

#include "summary.h"

namespace fused_nce {
namespace cuda {

// out (m, n) = alpha * left (m, depth) @ right (depth, n) [+ out], row-major, accumulated in float. A transposed
// operand is stored (depth, m) or (n, depth).
struct Gemm {
  int64_t m, n, depth;
  const void* left;
  int64_t left_stride;
  bool left_transposed;
  const void* right;
  int64_t right_stride;
  bool right_transposed;
  Element element;  // of both operands
  float alpha;
  bool add;
  float* out;
  int64_t out_stride;
};

class Machine {
 public:
  virtual ~Machine() = default;
  virtual void gemm(const Gemm&) const = 0;
  // The four row kernels of rows.h, one group for each row, or for each part of one.
  virtual void fold(const Strip&, const Rules&, const RowArrays&, int64_t first_slot) const = 0;
  virtual void finish(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail) const = 0;
  virtual void weigh(const Strip&, const Rules&, const RowArrays&, Element) const = 0;
  virtual void loss(const Strip&, const Rules&, const RowArrays&, Element) const = 0;
  virtual void summarize(const Summary&) const = 0;
};

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// Calls f with the transform as two constants: is there a clip, and does exp(t) need a shift?
template <class F>
void with_transform(float clip, const F& f) {
  if (needs_no_shift(clip)) return f(Constant<true>(), Constant<false>());
  if (clip > 0.0f) return f(Constant<true>(), Constant<true>());
  f(Constant<false>(), Constant<true>());
}

}  // namespace cuda
}  // namespace fused_nce
