// What a sweep has to do, read from its inputs: which of its short cuts they allow.
#include "work.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "../unit_rows.h"
#include "gemm.h"
#include "isa.h"
#include "sweep.h"

namespace fused_nce {

namespace {

// Whether the score of row i and column j is that of row j and column i, and a positive of both or of neither.
bool is_symmetric(const SweepInputs& in) {
  const Layout& layout = in.layout;
  if (!in.shared || !in.need_q || in.filters.any() || layout.positives.defined() || layout.itself > 0) return false;
  if (in.scoring.hardness > 0.0f) return false;  // of which the two-sided kernels know nothing
  // fault: symmetric-labels-stand
  if (layout.column_ids.defined()) return layout.row_ids.equal(layout.column_ids);
  return !layout.row_ids.defined() && in.scoring.offset == 0 && in.scoring.rows_per_image == in.scoring.n_c;
}

// A tail whose weights `Side` can hold.
bool has_sides(Tail tail) { return tail == kNce || tail == kLogOut || tail == kLogIn; }

Work work_of(const SweepInputs& in, bool statistics, bool gradients) {
  return {.rows = in.q.size(0),
          .columns = in.k.size(0),
          .width = in.q.size(1),
          .image = std::max(in.scoring.n_c, in.layout.n_pos),
          .elements = elements_of(in.q.scalar_type(), in.q.size(1)),
          .both = statistics && gradients,
          .gradients = gradients,
          .need_q = in.need_q,
          .need_k = in.need_k,
          .shared = in.shared,
          .labels = in.layout.column_ids.defined(),
          .row_stats = Wanted::mask(in.wanted.rows),
          .column_stats = Wanted::mask(in.wanted.columns),
          .divided = in.q_norms.defined(),
          .marked = in.filters.any(),
          .guided = in.filters.guide_ceiling.defined(),
          .wide = in.wide};
}

}  // namespace

Work work_for(const SweepInputs& in, const Task& task) {
  Work work = work_of(in, task.statistics, task.gradients);
  const unsigned known = kFused | kOverPositives;
  work.symmetric =
      work.both && !work.column_stats && !(work.row_stats & ~known) && has_sides(task.tail.name) && is_symmetric(in);
  return work;
}

at::ScalarType dk_type(const SweepInputs& in, bool statistics) {
  return make_plan(work_of(in, statistics, true), in.workspace_bytes).dk_rounded ? at::kBFloat16 : at::kFloat;
}

// An odd width has no pairs for the bfloat16 GEMM.
Elements elements_of(at::ScalarType type, int64_t width) {
  if (type == at::kFloat) return Elements::float32;
  return type == at::kBFloat16 && width % 2 == 0 && has_bf16_gemm() ? Elements::bfloat16 : Elements::widened;
}

int64_t flop_of_gemms() { return gemm_flop().load(); }

void widen_row(const RowKernels& kernels, bool half, const void* base, int64_t stride, int64_t row, int64_t width,
               float* out) {
  const uint16_t* from = static_cast<const uint16_t*>(base) + row * stride;
  (half ? kernels.widen_fp16 : kernels.widen_bf16)(from, out, width);
}

namespace {

constexpr int64_t kLeastToBound = 64;  // rows and columns, or the norms would take as long as the scores

// Of the rows' squared norms; NaN if one is, or holds an infinity.
float largest_square(const RowKernels& kernels, const at::Tensor& x) {
  const int64_t count = x.size(0), width = x.size(1), stride = x.stride(0);
  const Elements elements = elements_of(x.scalar_type(), width);
  const bool half = x.scalar_type() == at::kHalf;
  const void* base = x.const_data_ptr();
  constexpr int64_t block = 64;
  std::vector<float> found(ceil_div(count, block));
  at::parallel_for(0, ceil_div(count, block), 4, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(elements == Elements::float32 ? 0 : width);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, rows = std::min(block, count - first);
      if (elements == Elements::float32) {
        found[b] = kernels.largest_square(static_cast<const float*>(base) + first * stride, stride, rows, width);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) {
        widen_row(kernels, half, base, stride, first + i, width, wide.data());
        const float square = kernels.largest_square(wide.data(), width, 1, width);
        found[b] = square <= found[b] ? found[b] : square;
        if (std::isnan(square)) break;
      }
    }
  });
  float largest = 0.0f;
  for (const float square : found) {
    if (std::isnan(square)) return square;
    largest = std::max(largest, square);
  }
  return largest;
}

// The same of rows divided by their norms.
float largest_unit(const at::Tensor& of) {
  const float* norms = of.const_data_ptr<float>();
  float largest = 0.0f, bad = 0.0f;
  for (int64_t i = 0; i < of.size(0); ++i) {
    const float unit = norms[i] / divisor_of(norms[i]);
    largest = std::max(largest, unit * unit);
    bad += 0.0f * norms[i];
  }
  return largest + bad;
}

}  // namespace

bool is_bounded(const RowKernels& kernels, const SweepInputs& in) {
  if (in.scoring.clip > 0.0f || std::min(in.q.size(0), in.k.size(0)) < kLeastToBound) return false;
  const auto largest = [&](const at::Tensor& x, const at::Tensor& norms) {
    return norms.defined() ? largest_unit(norms) : largest_square(kernels, x);
  };
  const float of_q = largest(in.q, in.q_norms), of_k = in.shared ? of_q : largest(in.k, in.k_norms);
  const float scale = std::abs(in.scoring.scale) + in.scoring.hardness;  // fault: bounded-without-hardness
  // fault: bounded-queries-alone
  return scale * std::sqrt(of_q) * std::sqrt(of_k) <= kMostUnshifted;
}

}  // namespace fused_nce
