// The buffers of a sweep. Each `take` is called with an arena that counts, for the plan, and with one that gives, for
// the sweep: the sum of its lines is the published formula of the workspace.
#pragma once

#include <algorithm>
#include <limits>

#include "../params.h"
#include "arena.h"
#include "marks.h"
#include "plan.h"

namespace fused_nce {

// f of each array of `acc` that the statistics need.
template <class F>
void for_arrays(Accumulators& acc, unsigned stats, const F& f) {
  for (float** array : {&acc.negatives.max, &acc.negatives.shift, &acc.negatives.sum, &acc.negatives.error, &acc.square,
                        &acc.square_error, &acc.bad})
    f(*array);
  if (stats & kOverPositives) {
    for (float** array : {&acc.positives.max, &acc.positives.shift, &acc.positives.sum, &acc.positives.error,
                          &acc.total, &acc.total_error})
      f(*array);
    f(acc.count);
  }
  if (stats & bit_of(kNegSoftplus))
    for (float** array : {&acc.softplus, &acc.softplus_error}) f(*array);
  if (stats & kNegTotals) {
    for (float** array : {&acc.negative_total, &acc.negative_total_error}) f(*array);
    f(acc.negative_count);
  }
}

inline Accumulators new_accumulators(unsigned stats, int64_t count, Arena& arena) {
  Accumulators acc{};
  for_arrays(acc, stats, [&]<class T>(T*& array) { array = arena.take<T>(count); });
  return acc;
}

// Those that begin with row, or column, `first`.
inline Accumulators from(Accumulators acc, unsigned stats, int64_t first) {
  for_arrays(acc, stats, [&](auto*& array) { array += first; });
  return acc;
}

inline void clear(Accumulators acc, unsigned stats, int64_t count) {
  for_arrays(acc, stats, [&]<class T>(T*& array) { std::fill_n(array, count, T{}); });
  for (float* max : {acc.negatives.max, acc.positives.max})
    if (max) std::fill_n(max, count, -std::numeric_limits<float>::infinity());
}

inline ByStatistic from(ByStatistic arrays, int64_t first) {
  for (float*& array : arrays.of)
    if (array) array += first;
  return arrays;
}

inline Side new_side(int64_t count, bool positives, Arena& arena) {
  Side side{
      .shift = arena.take<float>(count), .inverse = arena.take<float>(count), .negative = arena.take<float>(count)};
  if (positives)
    for (float** array : {&side.pos_shift, &side.positive, &side.constant}) *array = arena.take<float>(count);
  return side;
}

// What begins with row, or column, `first`.
inline Side from(Side side, int64_t first) {
  for (float** array : {&side.shift, &side.inverse, &side.negative, &side.pos_shift, &side.positive, &side.constant})
    if (*array) *array += first;
  return side;
}

// What one task owns.
template <class E>
struct Group {
  Accumulators acc;
  float *d_scale_lanes, *d_bias_lanes;  // (lanes), of a tile
  int32_t* line_ids;                    // (tile_columns)
  int32_t* column_rows = nullptr;       // (tile_columns), the row that each column is; null: no column statistics
  float* side = nullptr;    // (tile_columns, lanes): a tile turned around, or what optional statistics put on t
  float* scores = nullptr;  // a tile of them, unless the strip stores its own
  MarkRoom marks;
  float* key_rows = nullptr;    // (tile_columns, padded D), copies of keys; null: used where they are
  uint16_t* rounded = nullptr;  // weights (tile_columns, lanes), the left operand of dk; null: over the scores
  E *left, *right;              // weights (lanes, tile_columns) and, of bfloat16, keys in pairs: the operands of dq
  float* wide_dk;               // (tile_columns, kOutputWidth), where dk leaves in bfloat16; in their place
  float* dq = nullptr;          // (lanes, D), this group's share; null: the first group's, written in place
  double d_scale, d_bias;

  void take(const Work& w, const Plan& p, bool first, Arena& arena) {
    const int64_t columns = round_up(p.tile_columns, 2), tile = columns * p.lanes;
    acc = new_accumulators(w.row_stats, p.lanes, arena);
    d_scale_lanes = arena.take<float>(p.lanes);
    d_bias_lanes = arena.take<float>(p.lanes);
    line_ids = arena.take<int32_t>(columns);
    if (w.column_stats || w.symmetric) column_rows = arena.take<int32_t>(columns);
    if (w.two_sided() || (w.optional() && (w.gradients || w.column_stats))) side = arena.take<float>(tile);
    if (!p.stored) scores = arena.take<float>(tile);
    if (w.marked) marks.take(w.guided, !p.stored, columns, p.lanes, arena);
    if (w.changes_rows() || (w.copies_rows() && w.gradients && w.need_q))
      key_rows = arena.take<float>(columns * padded(w.width));
    if (!w.gradients) return;
    if (kPaired<E>) rounded = arena.take<uint16_t>(tile);
    // dk comes before dq: what it leaves in float until it is rounded takes the place of dq's operands.
    const int64_t dq_bytes = w.need_q ? sizeof(E) * (tile + (kPaired<E> ? columns * padded(w.width) : 0)) : 0;
    const int64_t dk_bytes = p.dk_rounded ? sizeof(float) * columns * std::min(kOutputWidth, w.width) : 0;
    left = arena.take<E>(std::max(dq_bytes, dk_bytes) / static_cast<int64_t>(sizeof(E)));
    right = left + tile;
    wide_dk = reinterpret_cast<float*>(left);
    if (w.need_q && (!first || w.shared)) dq = arena.take<float>(p.lanes * w.width);
  }
};

// What the groups share: of the whole call, and of one strip after the other.
template <class E>
struct Workspace {
  int64_t* labels = nullptr;  // (N) and
  int32_t* ranks = nullptr;   // (M), of a layout by labels
  Accumulators columns{};     // (M), running
  E* packed;                  // (D, lanes), the strip's queries as the right operand of the scores
  E* query_rows = nullptr;    // (lanes, padded D), and as that of dk; null: used where they are
  float* scores = nullptr;    // (M, lanes), the strip's; of two-sided weights, those of the strips that keep theirs
  int32_t* marks = nullptr;   // (M, lanes), of stored scores
  Side row_side{}, column_side{};  // (N), (M), of two-sided weights; symmetric ones have but one
  int32_t *lane_ids, *itself;      // (lanes)
  Coefficients coefficients;
  ByStatistic d_optional;  // (lanes), of the statistics that a tail may read beyond the coefficients

  Workspace(const Work& w, const Plan& p, Arena& arena) {
    const int64_t lanes = p.lanes;
    if (w.labels) {
      labels = arena.take<int64_t>(w.rows);
      ranks = arena.take<int32_t>(w.columns);
    }
    if (w.symmetric) columns = new_accumulators(w.row_stats, w.columns, arena);
    else if (w.column_stats && (!w.gradients || w.both)) columns = new_accumulators(w.column_stats, w.columns, arena);
    packed = arena.take<E>(lanes * w.width);
    if (w.changes_rows() || (w.need_k && (kPaired<E> || w.copies_rows())))
      query_rows = arena.take<E>(lanes * padded(w.width));
    if (p.stored || p.kept_scores) scores = arena.take<float>(p.stored ? w.columns * lanes : p.kept_scores);
    if (w.marked && p.stored) marks = arena.take<int32_t>(w.columns * lanes);
    if (w.two_sided()) {
      row_side = new_side(p.strips * lanes, w.row_stats & kOverPositives, arena);
      column_side = w.symmetric ? row_side : new_side(w.columns, false, arena);
    }
    lane_ids = arena.take<int32_t>(lanes);
    itself = arena.take<int32_t>(lanes);
    coefficients = {.shift = arena.take<float>(lanes),
                    .inverse = arena.take<float>(lanes),
                    .d_neg_lse = arena.take<float>(lanes),
                    .two_d_square = arena.take<float>(lanes),
                    .d_pos = arena.take<float>(w.image * lanes)};
    if (w.both && w.optional())
      for (const Statistic name : {kNegSoftplus, kPosLse, kPosGap}) d_optional[name] = arena.take<float>(lanes);
  }
};

}  // namespace fused_nce
