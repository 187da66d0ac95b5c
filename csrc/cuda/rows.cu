// The row kernels: groups.h, one CTA for each row or part of one. No torch headers, so three architectures compile in
// seconds.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cta.h"
#include "device.h"
#include "groups.h"

namespace fused_nce {
namespace cuda {

namespace {

__device__ unsigned pack(__nv_bfloat16*, float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&pair);
}

__device__ unsigned pack(__half*, float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Eight weights, rounded, in one 16-byte store; float ones in two.
template <class E>
class StoreAs {
 public:
  static constexpr bool kRounds = sizeof(E) == 2;
  __device__ StoreAs(const Strip& strip, int64_t row) : row_(static_cast<E*>(strip.weights) + row * strip.stride) {}

  __device__ void operator()(int column, const float (&w)[kColumns]) const {
    E* at = row_ + column;
    *reinterpret_cast<uint4*>(at) =
        // fault: gpu-pair-exchanged
        make_uint4(pack(at, w[0], w[1]), pack(at, w[2], w[3]), pack(at, w[4], w[5]), pack(at, w[6], w[7]));
  }

 private:
  E* row_;
};

template <>
__device__ void StoreAs<float>::operator()(int column, const float (&w)[kColumns]) const {
  float4* at = reinterpret_cast<float4*>(row_ + column);
  at[0] = make_float4(w[0], w[1], w[2], w[3]);
  at[1] = make_float4(w[4], w[5], w[6], w[7]);
}

// A row's scores, where a launch has asked for room for them.
extern __shared__ Four kept_scores[];

// Rows may be many, so they lie on the unbounded axis of the grid, parts next to each other.
struct Place {
  int64_t row;
  int part;
  __device__ explicit Place(const Rules& rules)
      : row(blockIdx.x / rules.ctas_per_row), part(static_cast<int>(blockIdx.x % rules.ctas_per_row)) {}
};

__global__ void __launch_bounds__(kMostThreads, 1) mark_kernel(const Strip strip, const Rules rules, const Marking by) {
  const Place at(rules);
  mark_thread(strip, rules, by, at.row, at.part, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
}

template <bool kClip, bool kShift, Extras kExtras>
__global__ void __launch_bounds__(kMostThreads, 1)
    fold_kernel(const Strip strip, const Rules rules, const RowArrays rows, int64_t first_slot) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  const Place at(rules);
  fold_row<kClip, kShift, kExtras>(cta, strip, rules, rows, at.row, at.part, first_slot + at.part);
}

template <bool kShift>
__global__ void __launch_bounds__(32)
    finish_kernel(int64_t first_row, const Rules rules, const RowArrays rows, bool tail) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  finish_row<kShift>(cta, rules, rows, first_row + blockIdx.x, tail);
}

template <bool kClip, bool kTotals, Extras kExtras>
__global__ void __launch_bounds__(kMostThreads, 1)
    fold_optional_kernel(const Strip strip, const Rules rules, const RowArrays rows, int64_t first_slot) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  const Place at(rules);
  fold_optional_row<kClip, kTotals, kExtras>(cta, strip, rules, rows, at.row, at.part, first_slot + at.part);
}

__global__ void __launch_bounds__(32)
    finish_optional_kernel(int64_t first_row, const Rules rules, const RowArrays rows, bool tail) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  finish_optional_row(cta, rules, rows, first_row + blockIdx.x, tail);
}

// No column is marked beside statistics of columns; what the compiler knows needs no registers.
template <Extras kExtras>
__device__ decltype(auto) known(const RowArrays& rows) {
  if constexpr (kExtras == Extras::marks) {
    RowArrays out = rows;
    out.columns = {};
    return out;
  } else {
    return (rows);
  }
}

template <bool kClip, bool kShift, Extras kExtras, class E>
__global__ void __launch_bounds__(kMostThreads, 1)
    weigh_kernel(const Strip strip, const Rules rules, const RowArrays rows) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  const Place at(rules);
  weigh_row<kClip, kShift, kExtras, StoreAs<E>>(cta, strip, rules, known<kExtras>(rows), at.row, at.part, InStrip());
}

__global__ void __launch_bounds__(kMostThreads, 1)
    cosines_kernel(const Strip strip, const Rules rules, const PrefixStrip by) {
  const Place at(rules);
  cosines_thread(strip, rules, by, at.row, at.part, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
}

template <bool kClip, bool kShift, Extras kExtras, class E>
__global__ void __launch_bounds__(kMostThreads, 1)
    weigh_prefix_kernel(const Strip strip, const Rules rules, const RowArrays rows, const PrefixStrip by) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  const Place at(rules);
  weigh_row<kClip, kShift, kExtras, StorePrefix<StoreAs<E>, sizeof(E) == 2>>(cta, strip, rules, rows, at.row, at.part,
                                                                             InStrip(), rules, by);
}

// By value: a launch that is captured in a graph keeps its arguments.
template <int kMost>
struct RowTasks {
  RowTask of[kMost];
};

// The rows of several strips, one after the other.
// The 1: some versions of ptxas would rather spill than have one CTA of an SM less.
template <bool kClip, bool kShift, class E, int kMost>
__global__ void __launch_bounds__(kBound<kClip>, 1)
    loss_kernel(const __grid_constant__ RowTasks<kMost> tasks, bool keeps) {
  static_assert(sizeof(tasks) + 8 <= 4096, "a launch takes 4 KB of arguments");
  __shared__ Slot shared[33];
  Cta cta(shared);
  int64_t row = blockIdx.x;
  const RowTask& task = kMost > 1 ? task_of(tasks.of, row) : tasks.of[0];
  loss_row<kClip, kShift, StoreAs<E>>(cta, task.strip, task.rules, task.rows, row, kept_scores, keeps);
}

// The rows of one strip. The CTA whose part comes last adds up all parts, always in their order; which one it is
// changes nothing.
template <bool kClip, bool kShift, class E>
__global__ void __launch_bounds__(kBound<kClip>, 1)
    loss_summary_kernel(const __grid_constant__ RowTask task, const __grid_constant__ Summaries all, unsigned* counter,
                        bool keeps) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  loss_row<kClip, kShift, StoreAs<E>>(cta, task.strip, task.rules, task.rows, blockIdx.x, kept_scores, keeps);
  sum_up_row(cta, all, blockIdx.x);
  const auto draw = [&](int thread, int) {
    if (thread > 0) return 0u;
    __threadfence();  // fault: gpu-part-late
    return atomicInc(counter, gridDim.x - 1);
  };
  if (cta.reduce(draw, [](unsigned a, unsigned b) { return a > b ? a : b; }) < gridDim.x - 1) return;
  __threadfence();
  sum_up_rows(cta, all);
}

template <bool kClip, bool kShift>
__global__ void __launch_bounds__(kColumnLanes* kColumnWarps)
    fold_columns_kernel(const Strip strip, const Rules rules, const ColumnArrays columns) {
  __shared__ Slot shared[kColumnLanes * kColumnWarps];
  Cta cta(shared);
  fold_columns<kClip, kShift>(cta, strip, rules, columns, blockIdx.x);
}

template <bool kShift>
__global__ void __launch_bounds__(kColumnLanes* kColumnWarps)
    finish_columns_kernel(int64_t count, const ColumnArrays columns) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j < count) finish_column<kShift>(columns, j);
}

// torch builds extensions without the conversions of 16-bit types.
__device__ float wide(float x) { return x; }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float wide(__half x) { return __half2float(x); }
__device__ void narrow(float x, float* out) { *out = x; }
__device__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half* out) { *out = __float2half_rn(x); }

// Upstream 1 is what `loss.backward()` has: then no thread touches x, and the launch is all that it costs.
template <class E>
__global__ void __launch_bounds__(256) multiply_kernel(const Products all, const float* factor) {
  const float by = *factor;
  if (by == 1.0f) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x, count = all.count[0] + all.count[1];
  // fault: gpu-product-last
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const bool second = i >= all.count[0];
    E* x = static_cast<E*>(second ? all.x[1] : all.x[0]) + (second ? i - all.count[0] : i);
    narrow(wide(*x) * by, x);
  }
}

template <class E>
struct Numbers {
  __device__ static float read(const void* x, int64_t i) { return wide(static_cast<const E*>(x)[i]); }
  __device__ static void write(void* x, int64_t i, float value) { narrow(value, static_cast<E*>(x) + i); }
  __device__ static float rounded(float value) {
    E out;
    narrow(value, &out);
    return wide(out);
  }
};

template <class E>
__global__ void __launch_bounds__(kUnitThreads, 1) unit_kernel(const __grid_constant__ Units all) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  unit_rows<Numbers<E>>(cta, all, blockIdx.x);
}

template <class E>
__global__ void __launch_bounds__(kUnitThreads, 1) through_kernel(const __grid_constant__ Throughs all) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  through_row<Numbers<E>>(cta, all, blockIdx.x);
}

__global__ void __launch_bounds__(kSummaryThreads) summary_kernel(const __grid_constant__ Summaries all) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  sum_up(cta, all, static_cast<int>(blockIdx.x));
}

__global__ void __launch_bounds__(kSummaryThreads) last_summary_kernel(const __grid_constant__ Summaries all) {
  __shared__ Slot shared[33];
  Cta cta(shared);
  sum_up_ctas(cta, all);
}

template <class F>
void with_element(Element element, const F& f) {
  if (element == Element::float32) return f(static_cast<float*>(nullptr));
  if (element == Element::bfloat16) return f(static_cast<__nv_bfloat16*>(nullptr));
  f(static_cast<__half*>(nullptr));
}

template <class P>
struct Pointee;
template <class E>
struct Pointee<E*> {
  using type = E;
};

// Bytes of shared memory in which a launch keeps its rows' scores. Beyond 48 KB a kernel has to be allowed them: always
// all that there are, or a launch of fewer columns, by another thread or while a graph is captured, would take back
// what this one needs.
template <class Kernel>
unsigned kept_by(const Device& on, Kernel* kernel, const RowTask* tasks, int count) {
  static_assert(sizeof(Slot[33]) == kReductionBytes, "kept_bytes leaves them room");
  int device = 0, most = 0;
  on.check(cudaGetDevice(&device));
  on.check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  const int64_t bytes = kept_bytes(tasks, count, most), all = most - kReductionBytes;
  if (bytes + kReductionBytes > 48 << 10)  // fault: gpu-kept-allowed
    // fault: gpu-kept-taken
    on.check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(all)));
  return static_cast<unsigned>(bytes);
}

unsigned grid_of(const Strip& strip, const Rules& rules) {
  return static_cast<unsigned>(strip.rows * rules.ctas_per_row);
}

}  // namespace

void Device::mark(const Strip& strip, const Rules& rules, const Marking& by) const {
  mark_kernel<<<grid_of(strip, rules), rules.threads, 0, stream_>>>(strip, rules, by);
  check(cudaGetLastError());
}

void Device::cosines(const Strip& strip, const Rules& rules, const PrefixStrip& by) const {
  cosines_kernel<<<grid_of(strip, rules), rules.threads, 0, stream_>>>(strip, rules, by);
  check(cudaGetLastError());
}

// float16 operands are widened before.
void Device::weigh_prefix(const Strip& strip, const Rules& rules, const RowArrays& rows, const PrefixStrip& by,
                          Element element) const {
  const auto launch = [&](auto* e) {
    with_transform(rules.scoring.clip, [&](auto clip, auto shift) {
      with_fold_extras(strip, rules, [&](auto extras) {
        weigh_prefix_kernel<decltype(clip)::value, decltype(shift)::value, decltype(extras)::value,
                            typename Pointee<decltype(e)>::type>
            <<<grid_of(strip, rules), rules.threads, 0, stream_>>>(strip, rules, rows, by);
      });
    });
  };
  element == Element::bfloat16 ? launch(static_cast<__nv_bfloat16*>(nullptr)) : launch(static_cast<float*>(nullptr));
  check(cudaGetLastError());
}

void Device::fold(const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t first_slot) const {
  with_transform(rules.scoring.clip, [&](auto clip, auto shift) {
    with_fold_extras(strip, rules, [&](auto extras) {
      fold_kernel<decltype(clip)::value, decltype(shift)::value, decltype(extras)::value>
          <<<grid_of(strip, rules), rules.threads, 0, stream_>>>(strip, rules, rows, first_slot);
    });
  });
  check(cudaGetLastError());
}

void Device::finish(int64_t first_row, int64_t count, const Rules& rules, const RowArrays& rows, bool tail) const {
  const auto kernel = needs_no_shift(rules.scoring.clip) ? finish_kernel<false> : finish_kernel<true>;
  kernel<<<static_cast<unsigned>(count), 32, 0, stream_>>>(first_row, rules, rows, tail);
  check(cudaGetLastError());
}

void Device::weigh(const Strip& strip, const Rules& rules, const RowArrays& rows, Element element) const {
  with_element(element, [&](auto* e) {
    with_transform(rules.scoring.clip, [&](auto clip, auto shift) {
      with_extras(extras_of(strip, rules, rows), [&](auto extras) {
        weigh_kernel<decltype(clip)::value, decltype(shift)::value, decltype(extras)::value,
                     typename Pointee<decltype(e)>::type>
            <<<grid_of(strip, rules), rules.threads, 0, stream_>>>(strip, rules, rows);
      });
    });
  });
  check(cudaGetLastError());
}

void Device::loss(const RowTask* tasks, int count, Element element) const {
  int64_t rows = 0;
  for (const RowTask* task = tasks; task < tasks + count; ++task) rows += task->strip.rows;
  const auto launch = [&](auto all) {
    std::copy_n(tasks, count, all.of);
    with_element(element, [&](auto* e) {
      with_transform(tasks->rules.scoring.clip, [&](auto clip, auto shift) {
        const auto kernel = loss_kernel<decltype(clip)::value, decltype(shift)::value,
                                        typename Pointee<decltype(e)>::type, sizeof(all) / sizeof(RowTask)>;
        const unsigned kept = kept_by(*this, kernel, tasks, count);
        kernel<<<static_cast<unsigned>(rows), tasks->rules.threads, kept, stream_>>>(all, kept > 0);
      });
    });
  };
  count == 1 ? launch(RowTasks<1>()) : launch(RowTasks<kMostTogether>());
  check(cudaGetLastError());
}

void Device::loss_and_summary(const RowTask& task, const Summaries& all, Element element) const {
  unsigned* const count = counter();
  with_element(element, [&](auto* e) {
    with_transform(task.rules.scoring.clip, [&](auto clip, auto shift) {
      const auto kernel =
          loss_summary_kernel<decltype(clip)::value, decltype(shift)::value, typename Pointee<decltype(e)>::type>;
      const unsigned kept = kept_by(*this, kernel, &task, 1);
      const auto rows = static_cast<unsigned>(task.strip.rows);
      kernel<<<rows, task.rules.threads, kept, stream_>>>(task, all, count, kept > 0);
    });
  });
  check(cudaGetLastError());
}

void Device::fold_optional(const Strip& strip, const Rules& rules, const RowArrays& rows, int64_t first_slot) const {
  with_flag(rules.scoring.clip > 0.0f, [&](auto clip) {
    with_optional_extras(strip, [&](auto extras) {
      with_flag(rows.optional.totals, [&](auto totals) {
        fold_optional_kernel<decltype(clip)::value, decltype(totals)::value, decltype(extras)::value>
            <<<grid_of(strip, rules), rules.threads, 0, stream_>>>(strip, rules, rows, first_slot);
      });
    });
  });
  check(cudaGetLastError());
}

void Device::finish_optional(int64_t first_row, int64_t count, const Rules& rules, const RowArrays& rows,
                             bool tail) const {
  finish_optional_kernel<<<static_cast<unsigned>(count), 32, 0, stream_>>>(first_row, rules, rows, tail);
  check(cudaGetLastError());
}

void Device::fold_columns(const Strip& strip, const Rules& rules, const ColumnArrays& columns) const {
  // fault: gpu-last-columns
  const auto blocks = static_cast<unsigned>((strip.columns + kColumnLanes - 1) / kColumnLanes);
  with_transform(rules.scoring.clip, [&](auto clip, auto shift) {
    fold_columns_kernel<decltype(clip)::value, decltype(shift)::value>
        <<<blocks, kColumnLanes * kColumnWarps, 0, stream_>>>(strip, rules, columns);
  });
  check(cudaGetLastError());
}

void Device::finish_columns(int64_t count, const Rules& rules, const ColumnArrays& columns) const {
  constexpr int threads = kColumnLanes * kColumnWarps;
  const auto kernel = needs_no_shift(rules.scoring.clip) ? finish_columns_kernel<false> : finish_columns_kernel<true>;
  kernel<<<static_cast<unsigned>((count + threads - 1) / threads), threads, 0, stream_>>>(count, columns);
  check(cudaGetLastError());
}

void Device::multiply(const Products& all, Element element, const float* factor) const {
  constexpr int64_t threads = 256, most = 132 * 8;  // CTAs: one wave, so that a factor of 1 costs no more
  const auto blocks = static_cast<unsigned>(std::min(most, (all.count[0] + all.count[1] + threads - 1) / threads));
  with_element(element, [&](auto* e) {
    multiply_kernel<typename Pointee<decltype(e)>::type><<<blocks, threads, 0, stream_>>>(all, factor);
  });
  check(cudaGetLastError());
}

void Device::unit_rows(const Units& all, Element element) const {
  with_element(element, [&](auto* e) {
    unit_kernel<typename Pointee<decltype(e)>::type>
        <<<static_cast<unsigned>(all.groups()), kUnitThreads, 0, stream_>>>(all);
  });
  check(cudaGetLastError());
}

void Device::through_rows(const Throughs& all, Element element) const {
  with_element(element, [&](auto* e) {
    through_kernel<typename Pointee<decltype(e)>::type>
        <<<static_cast<unsigned>(all.q.rows + all.k.rows), kUnitThreads, 0, stream_>>>(all);
  });
  check(cudaGetLastError());
}

void Device::summarize(const Summaries& all) const {
  summary_kernel<<<static_cast<unsigned>(all.ctas), kSummaryThreads, 0, stream_>>>(all);
  if (all.ctas > 1) last_summary_kernel<<<1, kSummaryThreads, 0, stream_>>>(all);
  check(cudaGetLastError());
}

}  // namespace cuda
}  // namespace fused_nce
