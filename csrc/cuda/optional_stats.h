// The optional statistics of a row, which losses with any number of positives and the sigmoid loss read. They are
// folded in a pass of their own over scores that the L2 still has, so that the kernels of all other losses keep their
// registers.
#pragma once

#include "rows.h"

namespace fused_nce {
namespace cuda {

FUSED_NCE_HD OptionalPart no_optional() { return {0.0f, 0.0f, 0.0f, -infinity(), 0.0f, 0.0f, 0.0f, 0.0f}; }

struct MergeOptional {
  FUSED_NCE_HD OptionalPart operator()(const OptionalPart& a, const OptionalPart& b) const {
    OptionalPart out;
    out.softplus = a.softplus + b.softplus;
    out.bad = a.bad + b.bad;
    out.count = a.count + b.count;
    out.max = a.max > b.max ? a.max : b.max;
    // fault: gpu-parts-positives
    out.sum = merge(LogSum<float>{shift_of(a.max), a.sum}, LogSum<float>{shift_of(b.max), b.sum}).sum;
    out.total = a.total + b.total;
    out.neg_total = a.neg_total + b.neg_total;
    out.neg_count = a.neg_count + b.neg_count;
    return out;
  }
};

// What a thread has found of a row so far, with Kahan's errors: eight terms share a step.
struct OptionalFold {
  OptionalPart part;
  float softplus_error, sum_error, total_error, neg_error;
};

// A turn of eight columns. kTotals: the negatives' sum and number too; kMasked: see `Row::masked`; a turn without masks
// has negatives alone.
template <bool kClip, bool kTotals, Extras kExtras, bool kMasked>
FUSED_NCE_HD void optional_turn(const Row& row, int c, OptionalFold& fold) {
  OptionalPart& part = fold.part;
  const Eight eight = load(row.scores + c, row.scale);
  float t[kColumns], soft[kColumns], e[kColumns], own[kColumns], others[kColumns], bad[2] = {0.0f, 0.0f},
                                                                                   top = part.max;
  bool positive[kColumns];
  FUSED_NCE_UNROLL
  for (int u = 0; u < kColumns; ++u) {
    const int column = c + u;
    const bool inside = !kMasked || (column < row.end && column != row.self_column);
    const float s = inside ? eight.s[u] : 0.0f;
    t[u] = transform<kClip>(s, row.clip, row.inverse_clip).value + row.bias;
    positive[u] = kMasked && inside && row.own<true>(column);
    if (kMasked && positive[u]) t[u] *= row.share;  // fault: gpu-hard-positives
    const auto negative = [&] {
      if constexpr (kMasked && kExtras == Extras::marks)
        if (row.marked(c, u)) return false;  // fault: gpu-mark-summed
      return inside && !positive[u];
    };
    soft[u] = negative() ? softplus(t[u]) : 0.0f;
    own[u] = positive[u] ? t[u] : 0.0f;
    others[u] = kTotals && negative() ? t[u] : 0.0f;  // fault: gpu-sum-of-all
    if (kTotals) part.neg_count += negative() ? 1.0f : 0.0f;
    bad[u % 2] += s * 0.0f;
    part.count += positive[u] ? 1.0f : 0.0f;
    top = positive[u] && t[u] > top ? t[u] : top;
  }
  part.bad += bad[0] + bad[1];
  add_exactly(part.softplus, fold.softplus_error, sum_of(soft));
  if (kTotals) add_exactly(part.neg_total, fold.neg_error, sum_of(others));
  if (!kMasked) return;
  if (top > part.max) {
    const float factor = part.sum == 0.0f ? 0.0f : exp_value(shift_of(part.max) - top);
    part.sum *= factor;
    fold.sum_error *= factor;
    part.max = top;
  }
  FUSED_NCE_UNROLL
  for (int u = 0; u < kColumns; ++u) {
    const float x = exp_value(t[u] - shift_of(top));
    e[u] = positive[u] ? x : 0.0f;
  }
  add_exactly(part.sum, fold.sum_error, sum_of(e));
  add_exactly(part.total, fold.total_error, sum_of(own));
}

// One thread's columns.
template <bool kClip, bool kTotals, Extras kExtras>
FUSED_NCE_HD OptionalPart optional_thread(const Row& row, int thread, int threads) {
  OptionalFold fold = {no_optional(), 0.0f, 0.0f, 0.0f, 0.0f};
  for (int c = row.begin + thread * kColumns; c < row.end; c += threads * kColumns) {
    if (row.masked<kExtras>(c)) optional_turn<kClip, kTotals, kExtras, true>(row, c, fold);
    else optional_turn<kClip, kTotals, kExtras, false>(row, c, fold);
  }
  OptionalPart part = fold.part;
  part.softplus -= fold.softplus_error;
  part.sum -= fold.sum_error;
  part.total -= fold.total_error;
  part.neg_total -= fold.neg_error;
  return part;
}

// Writes a row's optional statistics once all its parts are merged.
FUSED_NCE_HD void write_optional(const OptionalPart& all, int64_t i, const OptionalArrays& out) {
  const float lse = log_value(LogSum<double>{shift_of(all.max), all.sum});
  out.of(kNegSoftplus, i) = all.softplus + all.bad;  // fault: gpu-softplus-number
  out.of(kPosLse, i) = lse;
  out.of(kPosMax, i) = all.max;
  out.of(kPosSum, i) = all.total;
  out.of(kPosCount, i) = all.count;
  out.of(kNegSum, i) = all.neg_total;
  out.of(kNegCount, i) = all.neg_count;
  out.of(kPosGap, i) = all.count > 0.0f ? lse - all.total / all.count : 0.0f;
}

// The coefficients of a tail that reads them, as `Sigmoid` and `_Supervised` of core/tails.py have them; `nce` does
// not.
FUSED_NCE_HD void tail_optional(const RowArrays& rows, int64_t i, int64_t positives) {
  const OptionalArrays& optional = rows.optional;
  const float unit = rows.upstream.tail.unit, count = optional.of(kPosCount, i);
  const int64_t c = i - rows.upstream.first_row;
  for (int name = kFirstOptional; name < kStatistics; ++name) optional.d_of(static_cast<Statistic>(name), c) = 0.0f;
  if (rows.upstream.tail.name == kSigmoid) {
    for (int64_t p = 0; p < positives; ++p)
      rows.upstream.d_pos[c * positives + p] = unit * nce_slope_positive(0.0f, rows.stats.pos[i * positives + p]);
    rows.upstream.d_neg_lse[c] = 0.0f;
    // An infinite score's sigmoid is 1 or 0, which would look sound but for the penalty's slope, 0 times infinity.
    optional.d_of(kNegSoftplus, c) = unit + nan_of(optional.of(kNegSoftplus, i));
    return;
  }
  const float share = unit * supervised_share(rows.stats.neg_lse[i], optional.of(kPosLse, i), count);
  for (int64_t p = 0; p < positives; ++p) rows.upstream.d_pos[c * positives + p] = 0.0f;
  rows.upstream.d_neg_lse[c] = share;
  optional.d_of(kPosLse, c) = -share;
  // A lone positive has no gap; and 1 - 1 of a score that a GPU computes again would not quite be 0.
  optional.d_of(kPosGap, c) = rows.upstream.tail.name == kLogOut && count > 1.0f ? unit : 0.0f;
}

// dL/dt that the optional statistics of a row add, of a negative and of a positive.
struct OptionalWeights {
  float softplus, lse, sum, gap, neg_sum, pos_lse, inverse_count;

  FUSED_NCE_HD float negative(float t) const { return neg_sum + (softplus == 0.0f ? 0.0f : softplus * sigmoid(t)); }
  // The gap's weight is small where those of its two terms cancel.
  FUSED_NCE_HD float positive(float t) const {
    const float x = lse == 0.0f && gap == 0.0f ? 0.0f : exp_value(t - pos_lse);
    return lse * x + sum + gap * (x - inverse_count);
  }
};

FUSED_NCE_HD OptionalWeights optional_weights(const RowArrays& rows, int64_t i) {
  const OptionalArrays& optional = rows.optional;
  if (!optional.d) return {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  const int64_t c = i - rows.upstream.first_row;
  const float count = optional.of(kPosCount, i);
  return {optional.d_of(kNegSoftplus, c),    optional.d_of(kPosLse, c), optional.d_of(kPosSum, c),
          optional.d_of(kPosGap, c),         optional.d_of(kNegSum, c), optional.of(kPosLse, i),
          count > 0.0f ? 1.0f / count : 0.0f};
}

}  // namespace cuda
}  // namespace fused_nce
