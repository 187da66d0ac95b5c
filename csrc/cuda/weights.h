// From a row's scores to its weights dL/ds, by the statistics and their coefficients.
#pragma once

#include "optional_stats.h"

namespace fused_nce {
namespace cuda {

// exp(t - shift) * inverse = exp(t - neg_lse); a row without negatives has nothing to weigh, nor has one whose log-sum
// nobody asked for, which comes with -infinity too. Its negatives may then have any t: their exponentials are 0 by the
// shift, because one that overflows would stay NaN when multiplied by 0. Without a shift the clip bounds them.
struct Softmax {
  float shift, inverse;
};

template <bool kShift>
FUSED_NCE_HD Softmax softmax_of(float neg_lse) {
  Softmax out;
  const bool none = neg_lse == -infinity();
  out.shift = kShift ? (none ? infinity() : neg_lse) : 0.0f;  // fault: gpu-absent-overflows
  out.inverse = kShift ? 1.0f : (none ? 0.0f : exp_value(-neg_lse));
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

// What all turns of a row's weights share.
struct Weighing {
  Softmax soft;
  float d_neg_lse, two_d_square, factor;
  const float* d_pos;
  OptionalWeights optional;
  bool column_stats;
};

template <bool kShift, Extras kExtras>
FUSED_NCE_HD Weighing weighing_of(const Row& row, const Rules& rules, const RowArrays& rows) {
  const int64_t i = row.index, coefficient = i - rows.upstream.first_row;
  Weighing out;
  out.soft = softmax_of<kShift>(rows.stats.neg_lse[i]);
  out.d_neg_lse = rows.upstream.d_neg_lse[coefficient];
  out.d_pos = rows.upstream.d_pos + coefficient * rules.positives - row.image_begin;
  out.two_d_square =
      2.0f * row.share * (rows.upstream.d_square ? rows.upstream.d_square[i] : rows.upstream.tail.square_weight);
  out.factor = rules.prescaled ? rules.fp16_gain * row.scale * row.share : rules.fp16_gain;  // fault: gpu-hard-gradient
  out.optional = kExtras >= Extras::all ? optional_weights(rows, i) : OptionalWeights();
  out.column_stats = kExtras == Extras::columns || (kExtras >= Extras::all && rows.columns.neg_lse);
  return out;
}

// A turn of eight columns: their weights times fp16_gain into w, and what they add to the slopes. kRounds: w will be
// rounded to 16 bits, which hide what a tanh near 0 lacks; not where the terms of a gap cancel, or under a large clip.
template <bool kClip, bool kShift, Extras kExtras, bool kMasked, bool kRounds, class Turns>
FUSED_NCE_HD Slopes weigh_turn(const Row& row, const Rules& rules, const RowArrays& rows, const Weighing& by, int c,
                               const Turns& turns, float (&w)[kColumns]) {
  constexpr bool all = kExtras >= Extras::all, near = all || kShift || !kRounds;  // fault: gpu-near-left
  const Eight dot = turns.again(row.scores, c);
  float product[2] = {0.0f, 0.0f}, on_bias[2] = {0.0f, 0.0f};
  FUSED_NCE_UNROLL
  for (int u = 0; u < kColumns; ++u) {
    const int column = c + u;
    const bool inside = !kMasked || (column < row.end && column != row.self_column);
    const bool own = kMasked && inside && row.own<all>(column);
    const float r = inside ? dot.s[u] : 0.0f, s = r * row.scale;
    Score t = transform<kClip, near>(s, near ? row.clip : row.clip * kLog2E, row.inverse_clip);
    if (all) t.value += row.bias;  // fault: gpu-bias-left
    const float e = near ? exp_shifted<kShift>(t.value, by.soft.shift) : exp2_value(t.value);
    float weight = negative_weight(e, by.soft.inverse, by.d_neg_lse, t.slope);
    if (all && inside) weight += by.optional.negative(t.value) * t.slope;
    // fault: gpu-columns-weigh
    if (by.column_stats && inside) weight += back_weight<kShift>(rows.columns, row.first_column + column, t, e);
    if constexpr (kMasked && kExtras == Extras::marks)
      if (row.marked(c, u)) weight = 0.0f;  // fault: gpu-mark-weighed
    if (own) {
      float on_t = all ? by.optional.positive(kClip ? t.value : t.value * share_of(rules)) : 0.0f;
      if (!(all && row.column_ids)) on_t += by.d_pos[row.pos_index(column)];
      weight = on_t * t.slope;
    }
    if (all) on_bias[u % 2] += inside ? weight : 0.0f;  // fault: gpu-penalty-bias
    weight += by.two_d_square * s;
    if (by.column_stats && inside) weight += back_square(rows.columns, row.first_column + column) * s;
    product[u % 2] += inside ? weight * r : 0.0f;
    w[u] = inside ? weight * by.factor : 0.0f;
  }
  return {product[0] + product[1], on_bias[0] + on_bias[1]};
}

// One thread's columns into weights.
template <bool kClip, bool kShift, Extras kExtras, class Turns, class Store>
FUSED_NCE_HD Slopes weigh_thread(const Row& row, const Rules& rules, const RowArrays& rows, bool want_scale,
                                 const Turns& all, const Store& store, int thread, int threads) {
  const Weighing by = weighing_of<kShift, kExtras>(row, rules, rows);
  Slopes sum = {0.0f, 0.0f}, error = {0.0f, 0.0f};
  int c = row.begin + thread * kColumns;
  for (Turns turns = all.at(row.scores, c); c < row.end; c += threads * kColumns, turns.step(threads)) {
    float w[kColumns];
    const Slopes found =
        row.masked<kExtras>(c)
            ? weigh_turn<kClip, kShift, kExtras, true, Store::kRounds>(row, rules, rows, by, c, turns, w)
            : weigh_turn<kClip, kShift, kExtras, false, Store::kRounds>(row, rules, rows, by, c, turns, w);
    if (want_scale) add_exactly(sum.scale, error.scale, found.scale);
    if (kExtras >= Extras::all) add_exactly(sum.bias, error.bias, found.bias);
    store(c, w);
  }
  return {sum.scale - error.scale, sum.bias - error.bias};
}

}  // namespace cuda
}  // namespace fused_nce
