// What the driver asks of the machine that it drives: a GPU, or a CPU that plays one.
#pragma once

#include "columns.h"
#include "summary.h"

namespace fused_nce {
namespace cuda {

// out (m, n) = alpha * left (m, depth) @ right (depth, n) [+ out], row-major, accumulated in float and rounded once. A
// transposed operand is stored (depth, m) or (n, depth).
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
  void* out;
  int64_t out_stride;
  Element out_element;  // float32, or that of the operands
};

class Machine {
 public:
  virtual ~Machine() = default;
  virtual void gemm(const Gemm&) const = 0;
  // The four row kernels of groups.h, one group for each row, or for each part of one.
  virtual void fold(const Strip&, const Rules&, const RowArrays&, int64_t first_slot) const = 0;
  virtual void finish(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail) const = 0;
  virtual void weigh(const Strip&, const Rules&, const RowArrays&, Element) const = 0;
  // `count` strips at once, alike in clip and threads.
  virtual void loss(const RowTask*, int count, Element) const = 0;
  // Those of the statistics in further.h, likewise.
  virtual void fold_further(const Strip&, const Rules&, const RowArrays&, int64_t first_slot) const = 0;
  virtual void finish_further(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail) const = 0;
  // Those of columns.h, one group for each 32 columns, or thread for each column.
  virtual void fold_columns(const Strip&, const Rules&, const ColumnArrays&) const = 0;
  virtual void finish_columns(int64_t count, const Rules&, const ColumnArrays&) const = 0;
  virtual void summarize(const Summaries&) const = 0;
  // x *= factor, on the device. A factor of 1 costs no pass over x.
  virtual void multiply(void* x, Element element, int64_t count, const float* factor) const = 0;
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

// Beyond a clip, images by arithmetic or by index, and statistics of rows.
inline bool has_more(const Rules& rules, const RowArrays& rows) {
  return rules.bias || rules.column_ids || rows.columns.neg_lse || rows.further.found;
}

template <class F>
void with_flag(bool flag, const F& f) {
  flag ? f(Constant<true>()) : f(Constant<false>());
}

}  // namespace cuda
}  // namespace fused_nce
