// The operations that the driver (sweep.cpp) runs: on a GPU (device.cpp), or emulated on a CPU for the tests
// (host.cpp).
#pragma once

#include <algorithm>

#include "../integers.h"
#include "columns.h"
#include "marks.h"
#include "prefixes.h"
#include "summary.h"
#include "unit.h"

namespace fused_nce {
namespace cuda {

// out (m, n) = alpha * left (m, depth) @ right (depth, n) [+ out], row-major, accumulated in float and rounded once. A
// transposed operand is stored (depth, m) or (n, depth).
struct Gemm {
  int64_t m = 0, n = 0, depth = 0;
  const void* left = nullptr;
  int64_t left_stride = 0;
  bool left_transposed = false;
  const void* right = nullptr;
  int64_t right_stride = 0;
  bool right_transposed = false;
  Element element = Element::float32;  // of both operands
  float alpha = 1.0f;
  bool add = false;
  void* out = nullptr;
  int64_t out_stride = 0;
  Element out_element = Element::float32;  // or that of the operands
};

// Shared memory that a CTA may have on an sm_90, which is what is emulated and counted.
constexpr int64_t kSharedBytes = 227 << 10;
constexpr int64_t kReductionBytes = 1056;  // of them
constexpr int64_t kSystemBytes = 1 << 10;  // each CTA takes besides, and a multiprocessor has beyond the most of one
constexpr int64_t kSharedStep = 128;       // in bytes, of what is handed out

// What the scores of a row take of a CTA's shared memory, if the `loss` kernel keeps them there between its two looks
// at them; 0 where it does not: fewer CTAs than the registers leave room for would then run on a multiprocessor.
inline int64_t kept_bytes(int64_t stride, int threads, float clip, int64_t shared_bytes) {
  const int64_t bytes = stride * 4;
  const int64_t ctas = (clip > 0.0f ? kBound<true> : kBound<false>) / threads;  // fault: gpu-kept-bound
  // fault: gpu-kept-once
  const int64_t each = round_up(bytes + kReductionBytes, kSharedStep) + kSystemBytes;
  return each * ctas <= shared_bytes + kSystemBytes ? bytes : 0;  // fault: gpu-kept-room
}

// Of several strips in one launch: room for each, or none.
inline int64_t kept_bytes(const RowTask* tasks, int count, int64_t shared_bytes) {
  int64_t most = 0;
  for (const RowTask* task = tasks; task < tasks + count; ++task) {
    const int64_t bytes = kept_bytes(task->strip.stride, task->rules.threads, task->rules.scoring.clip, shared_bytes);
    if (bytes == 0) return 0;
    most = std::max(most, bytes);
  }
  return most;
}

// Numbers of one type in one or two places.
struct Products {
  void* x[2];
  int64_t count[2];  // the second may be 0
};

class Machine {
 public:
  virtual ~Machine() = default;
  virtual void gemm(const Gemm&) const = 0;
  // That of marks.h, of the same CTAs.
  virtual void mark(const Strip&, const Rules&, const Marking&) const = 0;
  // The four row kernels of groups.h: ctas_per_row CTAs a row.
  virtual void fold(const Strip&, const Rules&, const RowArrays&, int64_t first_slot) const = 0;
  virtual void finish(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail) const = 0;
  virtual void weigh(const Strip&, const Rules&, const RowArrays&, Element) const = 0;
  // `count` strips in one launch, of the same clip and threads.
  virtual void loss(const RowTask*, int count, Element) const = 0;
  // One strip of all rows, and what its last group of threads makes of them all.
  virtual void loss_and_summary(const RowTask&, const Summaries&, Element) const = 0;
  // The same for optional_stats.h: a second pass, run only if the call asks for one of them.
  virtual void fold_optional(const Strip&, const Rules&, const RowArrays&, int64_t first_slot) const = 0;
  virtual void finish_optional(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail) const = 0;
  // Those of prefixes.h, of the same CTAs as a row kernel's.
  virtual void cosines(const Strip&, const Rules&, const PrefixStrip&) const = 0;
  virtual void weigh_prefix(const Strip&, const Rules&, const RowArrays&, const PrefixStrip&, Element) const = 0;
  // Those of columns.h: a CTA for 32 columns, then a thread a column.
  virtual void fold_columns(const Strip&, const Rules&, const ColumnArrays&) const = 0;
  virtual void finish_columns(int64_t count, const Rules&, const ColumnArrays&) const = 0;
  virtual void summarize(const Summaries&) const = 0;
  // Each x *= factor, on the device. A factor of 1 costs no pass over them.
  virtual void multiply(const Products&, Element, const float* factor) const = 0;
  // Those of unit.h: a CTA a row.
  virtual void unit_rows(const Units&, Element) const = 0;
  virtual void through_rows(const Throughs&, Element) const = 0;
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

inline bool has_bias_or_labels(const Rules& rules) { return rules.bias || rules.column_ids; }

// The `loss` kernel has none of them.
inline Extras extras_of(const Strip& strip, const Rules& rules, const RowArrays& rows) {
  if (strip.marks) return Extras::marks;
  if (has_bias_or_labels(rules) || rows.optional.found) return Extras::all;
  return rows.columns.neg_lse ? Extras::columns : Extras::none;
}

template <Extras kExtras>
struct ConstantExtras {
  static constexpr Extras value = kExtras;
};

template <class F>
void with_extras(Extras extras, const F& f) {
  if (extras == Extras::none) return f(ConstantExtras<Extras::none>());
  if (extras == Extras::columns) return f(ConstantExtras<Extras::columns>());
  if (extras == Extras::marks) return f(ConstantExtras<Extras::marks>());
  f(ConstantExtras<Extras::all>());
}

// Of a fold of the optional statistics, which may always have labels.
template <class F>
void with_optional_extras(const Strip& strip, const F& f) {
  if (strip.marks) return f(ConstantExtras<Extras::marks>());
  f(ConstantExtras<Extras::all>());
}

// Of a fold, which takes no statistics of columns.
template <class F>
void with_fold_extras(const Strip& strip, const Rules& rules, const F& f) {
  if (!strip.marks && !has_bias_or_labels(rules)) return f(ConstantExtras<Extras::none>());
  with_optional_extras(strip, f);
}

template <class F>
void with_flag(bool flag, const F& f) {
  flag ? f(Constant<true>()) : f(Constant<false>());
}

}  // namespace cuda
}  // namespace fused_nce
