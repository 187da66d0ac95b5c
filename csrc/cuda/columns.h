// Statistics of columns, for losses that classify both ways: a strip's rows are folded into what earlier strips found.
//
// A warp has 32 neighbouring columns, so that each row of scores is one load; the rows are shared out among the warps
// of a CTA, whose shares merge in a fixed tree. Strips follow each other on the stream.
#pragma once

#include "rows.h"

namespace fused_nce {
namespace cuda {

constexpr int kColumnLanes = 32;  // columns of a CTA
constexpr int kColumnWarps = 8;   // that share their rows
constexpr int kRowsAtOnce = 4;    // loads in flight, and terms of a Kahan step

// One column of a strip.
struct Column {
  const float* scores;
  int64_t stride;
  int rows;
  int own_begin, own_end;  // rows whose positive it is, by arithmetic
  const int64_t* row_ids;  // of the strip's rows; null: by arithmetic
  int64_t id;              // what makes them its own
  int self_row;            // the row that the column itself is; -1: none is
  int64_t index;           // of S
  float scale, clip, inverse_clip, bias;

  FUSED_NCE_HD bool own(int row) const { return row_ids ? row_ids[row] == id : row >= own_begin && row < own_end; }

  // As Row::masked, of kRowsAtOnce rows.
  FUSED_NCE_HD bool masked(int row) const {
    const int next = row + kRowsAtOnce;
    // fault: gpu-unmasked-column
    return row_ids || next > rows || (row < own_end && next > own_begin) || (row <= self_row && next > self_row);
  }
};

FUSED_NCE_HD Column column_of(const Strip& strip, const Rules& rules, int64_t column) {
  const Scoring& scoring = rules.scoring;
  Column out;
  out.scores = strip.scores + column;
  out.stride = strip.stride;
  out.rows = static_cast<int>(strip.rows);
  out.index = strip.first_column + column;
  const int64_t image = out.index / scoring.n_c;
  const int64_t first = (image - scoring.offset) * scoring.rows_per_image - strip.first_row;
  out.own_begin = clamp(first, strip.rows);
  out.own_end = rules.positives_elsewhere ? out.own_begin : clamp(first + scoring.rows_per_image, strip.rows);
  out.row_ids = rules.row_ids ? rules.row_ids + strip.first_row : nullptr;
  out.id = rules.column_ids ? rules.column_ids[out.index] : out.index;
  out.bias = rules.bias ? *rules.bias : 0.0f;
  out.self_row =
      rules.self_column < 0 ? -1 : clamp(out.index - rules.self_column - strip.first_row + 1, strip.rows + 1) - 1;
  out.scale = scale_of(rules);
  out.clip = scoring.clip;
  out.inverse_clip = scoring.clip > 0.0f ? 1.0f / scoring.clip : 0.0f;
  return out;
}

// A turn of kRowsAtOnce rows. kMasked: see `Column::masked`.
template <bool kClip, bool kShift, bool kMasked>
FUSED_NCE_HD void fold_column_turn(const Column& column, int r, Fold& fold) {
  float t[kRowsAtOnce], square = 0.0f, bad = 0.0f, top = fold.part.max;
  bool negative[kRowsAtOnce];
  const float* scores = column.scores + r * column.stride;
  FUSED_NCE_UNROLL
  for (int u = 0; u < kRowsAtOnce; ++u) {
    const int row = r + u;
    const bool inside = !kMasked || (row < column.rows && row != column.self_row);
    const float s = inside ? scores[u * column.stride] * column.scale : 0.0f;
    t[u] = transform<kClip>(s, column.clip, column.inverse_clip).value + column.bias;
    negative[u] = inside && !(kMasked && column.own(row));  // fault: gpu-column-positives
    square += s * s;
    bad += s * 0.0f;
    top = negative[u] ? __builtin_fmaxf(t[u], top) : top;
  }
  add_turn<kShift>(fold, t, negative, top, square, bad);
}

// One warp's share of the rows of a column.
template <bool kClip, bool kShift>
FUSED_NCE_HD RowPart fold_column_thread(const Column& column, int warp, int warps) {
  Fold fold = {no_part(), 0.0f, 0.0f};
  for (int r = warp * kRowsAtOnce; r < column.rows; r += warps * kRowsAtOnce) {
    if (column.masked(r)) fold_column_turn<kClip, kShift, true>(column, r, fold);
    else fold_column_turn<kClip, kShift, false>(column, r, fold);
  }
  return found(fold);
}

// A strip's part into the running one. A thousand plain additions would round a thousand times.
template <bool kShift>
FUSED_NCE_HD void add_strip(ColumnPart& all, const RowPart& part, bool first) {
  if (first) all = {-infinity(), 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  const float top = all.max > part.max ? all.max : part.max;
  float sum = part.sum;
  if (kShift) {
    const float old = all.sum == 0.0f ? 0.0f : exp_value(shift_of(all.max) - shift_of(top));
    all.sum *= old;  // fault: gpu-strips-column
    all.sum_error *= old;
    sum = sum == 0.0f ? 0.0f : sum * exp_value(shift_of(part.max) - shift_of(top));
  }
  all.max = top;
  add_exactly(all.sum, all.sum_error, sum);
  add_exactly(all.square, all.square_error, part.square);
  all.bad += part.bad;
}

// The `group`-th columns of a strip. Its `across` merges f(lane, warp, warps) over the warps, for the first one's use.
template <bool kClip, bool kShift, class Group>
FUSED_NCE_HD void fold_columns(Group& group, const Strip& strip, const Rules& rules, const ColumnArrays& columns,
                               int64_t block) {
  const int64_t begin = block * kColumnLanes;
  group.reduce_warps(
      [&](int lane, int warp, int warps) {
        if (begin + lane >= strip.columns) return no_part();
        return fold_column_thread<kClip, kShift>(column_of(strip, rules, begin + lane), warp, warps);
      },
      MergeParts<kShift>(),
      [&](int lane, const RowPart& found) {
        if (begin + lane < strip.columns)
          add_strip<kShift>(columns.partials[strip.first_column + begin + lane], found, strip.first_row == 0);
      });
}

// The statistics of a column whose strips are all in.
template <bool kShift>
FUSED_NCE_HD void finish_column(const ColumnArrays& columns, int64_t j) {
  const ColumnPart& all = columns.partials[j];
  const LogSum<double> sum{kShift ? shift_of(all.max) : 0.0f, static_cast<double>(all.sum) - all.sum_error};
  columns.neg_lse[j] = log_value(sum) + all.bad;  // fault: gpu-column-nan
  columns.neg_max[j] = all.max;
  columns.square[j] = all.square - all.square_error;
}

}  // namespace cuda
}  // namespace fused_nce
