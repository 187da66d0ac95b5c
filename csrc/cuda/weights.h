// From a row's scores to its weights dL/ds, by the statistics and their coefficients.
#pragma once

#include "optional_stats.h"

namespace fused_nce {
namespace cuda {

// exp(t - shift) * inverse = exp(t - neg_lse); a row without negatives has nothing to weigh.
struct Softmax {
  float shift, inverse;
};

template <bool kShift>
FUSED_NCE_HD Softmax softmax_of(float neg_lse) {
  Softmax out;
  const bool none = neg_lse == -infinity();
  out.shift = kShift && !none ? neg_lse : 0.0f;
  out.inverse = none ? 0.0f : (kShift ? 1.0f : exp_value(-neg_lse));
  return out;
}

// What a column's statistics add to the weight of a negative, and to the slope of s^2: the same formulas, with the
// column's numbers.
template <bool kShift>
FUSED_NCE_HD float back_weight(const ColumnArrays& columns, int64_t j, const Score& t, float e) {
  const float lse = columns.neg_lse[j];
  if (lse == -infinity()) return 0.0f;
  const float x = kShift ? exp_value(t.value - lse) : e, inverse = kShift ? 1.0f : exp_value(-lse);
  return negative_weight(x, inverse, columns.d_neg_lse[j], t.slope);
}

FUSED_NCE_HD float back_square(const ColumnArrays& columns, int64_t j) {
  return columns.d_square ? 2.0f * columns.d_square[j] : 0.0f;
}

// Shares of dL/dscale, the sum of w * <q, k>, and of dL/dbias, that of dL/dt.
struct Slopes {
  float scale, bias;
};

struct AddSlopes {
  FUSED_NCE_HD Slopes operator()(const Slopes& a, const Slopes& b) const {
    return {a.scale + b.scale, a.bias + b.bias};
  }
};

// One thread's columns into weights times fp16_gain. kExtras: see `uses_extras` in machine.h.
template <bool kClip, bool kShift, bool kExtras, class Store>
FUSED_NCE_HD Slopes weigh_thread(const Row& row, const Rules& rules, const RowArrays& rows, bool want_scale,
                                 const Store& store, int thread, int threads) {
  const int64_t i = row.index, coefficient = i - rows.upstream.first_row;
  const Softmax soft = softmax_of<kShift>(rows.stats.neg_lse[i]);
  const float d_neg_lse = rows.upstream.d_neg_lse[coefficient];
  const float* d_pos = rows.upstream.d_pos + coefficient * rules.positives - row.image_begin;
  const float two_d_square =
      2.0f * (rows.upstream.d_square ? rows.upstream.d_square[i] : rows.upstream.tail.square_weight);
  const float factor = rules.prescaled ? rules.fp16_gain * row.scale : rules.fp16_gain;
  const OptionalWeights optional = kExtras ? optional_weights(rows, i) : OptionalWeights();
  const bool column_stats = kExtras && rows.columns.neg_lse;
  float sum = 0.0f, error = 0.0f, bias_sum = 0.0f, bias_error = 0.0f;
  for (int c = row.begin + thread * kColumns; c < row.end; c += threads * kColumns) {
    const Eight dot = load(row.scores + c, 1.0f);
    float w[kColumns], product[kColumns], slope[kColumns];
    FUSED_NCE_UNROLL
    for (int u = 0; u < kColumns; ++u) {
      const int column = c + u;
      const bool inside = column < row.end && column != row.self_column;
      const bool own = inside && row.own<kExtras>(column);
      const float r = inside ? dot.s[u] : 0.0f, s = r * row.scale;
      Score t = transform<kClip>(s, row.clip, row.inverse_clip);
      if (kExtras) t.value += row.bias;  // fault: gpu-bias-left
      const float e = exp_shifted<kShift>(t.value, soft.shift);
      float weight = negative_weight(e, soft.inverse, d_neg_lse, t.slope);
      if (kExtras && inside) {
        weight += optional.negative(t.value) * t.slope;
        // fault: gpu-columns-weigh
        if (column_stats) weight += back_weight<kShift>(rows.columns, row.first_column + column, t, e);
      }
      if (own) {
        float on_t = kExtras ? optional.positive(t.value) : 0.0f;
        if (!(kExtras && row.column_ids)) on_t += d_pos[row.pos_index(column)];
        weight = on_t * t.slope;
      }
      slope[u] = inside ? weight : 0.0f;  // fault: gpu-penalty-bias
      weight += two_d_square * s;
      if (column_stats && inside) weight += back_square(rows.columns, row.first_column + column) * s;
      product[u] = inside ? weight * r : 0.0f;
      w[u] = inside ? weight * factor : 0.0f;
    }
    if (want_scale) add_exactly(sum, error, sum_of(product));
    if (kExtras) add_exactly(bias_sum, bias_error, sum_of(slope));
    store(c, w);
  }
  return {sum - error, bias_sum - bias_error};
}

}  // namespace cuda
}  // namespace fused_nce
