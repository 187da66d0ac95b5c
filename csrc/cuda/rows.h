// One thread's columns of a row. Formulas come from atoms.h; groups.h puts threads together.
#pragma once

#include "../params.h"
#include "fast.h"

namespace fused_nce {
namespace cuda {

constexpr int kColumns = 8;  // of one thread's turn
// Of a CTA: at 1024 the 64 registers that are left to a thread spill, at 896 the 72 do on sm_100; here there are 80.
constexpr int kMostThreads = 768;
// What a kernel is bound to that needs but 64 registers without a clip: more CTAs of fewer threads run at once.
template <bool kClip>
constexpr int kBound = kClip ? kMostThreads : 1024;
constexpr int kMostTogether = 8;  // problems that share a launch: their arguments are 4 KB at most

enum class Element { float32, bfloat16, float16 };

// What a row kernel takes beside the row's statistics of its negatives and their square.
enum class Extras {
  none,
  columns,  // for weights: statistics of columns
  all,      // those, a bias, labels and the optional statistics, each if the call has it
  marks     // all, and marks
};

// Rows first_row .. first_row + rows - 1 of S, columns first_column .. first_column + columns - 1.
struct Strip {
  float* scores;   // (rows, stride), <q, k> before the scale
  void* weights;   // (rows, stride) of `element`; the scores themselves for float32
  int64_t stride;  // a multiple of kColumns, and so is the space after the last row's last column
  int64_t first_row, rows, first_column, columns;
  uint16_t* marks;  // (rows, stride / kColumns): a turn's columns, a bit each, that are no negatives; null: none is
};

// What a call does to its scores, the same for all strips.
struct Rules {
  Scoring scoring;
  const float* scale_tensor;  // one more factor of the scale, on the device; or null
  const int64_t* row_ids;     // (N): the image of each row, or its label; null: by arithmetic
  const int64_t* column_ids;  // (M): the label of each column; null: by arithmetic
  const float* bias;          // t = s + bias, on the device; or null
  bool positives_elsewhere;   // the positives are a tensor of their own: no column is one
  int64_t self_column;  // row i is column self_column + i, which its statistics leave out; -1: rows are no columns
  int64_t positives;    // P, the width of `pos`: n_c, less the row itself
  int ctas_per_row;
  int threads;      // of a CTA
  float fp16_gain;  // power of two that keeps float16 weights in range; 1 otherwise
  bool prescaled;   // weights leave times the scale, so that the GEMMs' results may be rounded at once
};

// Partial statistics of a row: one thread's, or merged.
struct RowPart {
  float max;     // largest t among the negatives
  float sum;     // of exp(t - shift) over the negatives: shift_of(max), or 0 under a clip
  float square;  // of s^2 over all columns
  float bad;     // of 0 * s: 0, or NaN as soon as one score is NaN or infinite
};

// Partial statistics of a column, over the strips folded so far, with Kahan's errors.
struct ColumnPart {
  float max, sum, sum_error, square, square_error, bad;
};

// Statistics of all M columns, or the coefficients that the weights need.
struct ColumnArrays {
  float *neg_lse, *neg_max, *square;  // (M)
  const float *d_neg_lse, *d_square;  // (M); d_square null: 0
  ColumnPart* partials;               // (M)
};

// Partial optional statistics of a row: softplus and totals over the negatives, 0 * s over all columns, the rest over
// the positives.
struct OptionalPart {
  float softplus, bad, count, max, sum, total, neg_total, neg_count;
};

// The statistics from kFirstOptional on, of losses with any number of positives: a line each, (kOptional, stride).
// `found` null: the call asks for none.
constexpr int kFirstOptional = kNegSoftplus, kOptional = kStatistics - kFirstOptional;

struct OptionalArrays {
  float* found;  // of all N rows
  float* d;      // dL/d statistic, of the rows from Upstream's first_row on; null: 0
  int64_t found_stride, d_stride;
  OptionalPart* partials;  // (rows of a block, slots)
  bool totals;             // the sum and the number of the negatives are asked for too; else they are 0

  FUSED_NCE_HD float& of(Statistic name, int64_t i) const { return found[(name - kFirstOptional) * found_stride + i]; }
  FUSED_NCE_HD float& d_of(Statistic name, int64_t c) const { return d[(name - kFirstOptional) * d_stride + c]; }
};

// Statistics of all N rows.
struct RowStats {
  float* pos;                         // (N, P)
  float *neg_lse, *neg_max, *square;  // (N)
};

// dL/d statistic of the rows from first_row on: given, or written by the tail.
struct RowUpstream {
  float* d_pos;           // (rows, P)
  float* d_neg_lse;       // (rows)
  const float* d_square;  // (N); null: tail.square_weight
  int64_t first_row;
  TailRule tail;  // of use where it writes them
};

// Partial statistics of a block of rows, one slot for each panel and CTA that shares the row.
struct RowScratch {
  RowPart* partials;  // (rows, slots), or null
  int64_t first_row, slots;
};

// Everything that the kernels read and write beside the scores.
struct RowArrays {
  RowStats stats;
  RowUpstream upstream;
  RowScratch scratch;
  float *d_scale, *d_bias;  // (N, ctas_per_row) shares of the sums, or null
  ColumnArrays columns;     // null: no statistics of columns
  OptionalArrays optional;
};

// A strip with all that its row kernels need.
struct RowTask {
  Strip strip;
  Rules rules;
  RowArrays rows;
};

// The strip that a row lies in, of several counted through; `row` becomes its own.
FUSED_NCE_HD const RowTask& task_of(const RowTask* tasks, int64_t& row) {
  for (; row >= tasks->strip.rows; ++tasks) row -= tasks->strip.rows;
  return *tasks;
}

FUSED_NCE_HD float scale_of(const Rules& rules) {
  return rules.scale_tensor ? rules.scoring.scale * *rules.scale_tensor : rules.scoring.scale;
}

FUSED_NCE_HD float share_of(const Rules& rules) { return raw_share(scale_of(rules), rules.scoring.hardness); }

// One row of a strip, or one CTA's share of it.
struct Row {
  const float* scores;
  int begin, end;          // columns, counted from the panel's first
  int own_begin, own_end;  // columns of the row's own image
  int self_column;         // the row itself; a column that is not there where none is
  int gap;                 // self_column where it lies in the row's image, which `pos` leaves out; otherwise own_end
  int64_t index;           // row of S
  int64_t first_column;    // of S, the panel's
  int64_t image_begin;     // own_begin before the panel cut it
  float scale, clip, inverse_clip, bias;  // scale + hardness, of scores
  float share;                            // what of them is a positive's
  const int64_t* column_ids;              // of the panel's columns; null: those of the image are the row's own
  const uint16_t* marks;                  // of the row's turns; null: none
  int64_t id;

  // A positive of the row, or the row itself.
  template <bool kLabels>
  FUSED_NCE_HD bool own(int column) const {
    if (kLabels && column_ids) return column_ids[column] == id;  // fault: gpu-label-taken
    return column >= own_begin && column < own_end;
  }

  // Of the turn at `column`, its u-th column.
  FUSED_NCE_HD bool marked(int column, int u) const { return marks[column / kColumns] >> u & 1; }

  // Whether a turn at `column` meets the row's own columns, the row itself, a mark or the end. Few do: the others need
  // no masks.
  template <Extras kExtras>
  FUSED_NCE_HD bool masked(int column) const {
    const int next = column + kColumns;
    const bool own = (column < own_end) & (next > own_begin), itself = (column <= self_column) & (next > self_column);
    bool met = (next > end) | own | itself;  // fault: gpu-unmasked-end, gpu-unmasked-positive, gpu-unmasked-itself
    if constexpr (kExtras >= Extras::all) met |= column_ids != nullptr;
    if constexpr (kExtras == Extras::marks) met |= marks[column / kColumns] != 0;  // fault: gpu-unmasked-mark
    return met;
  }

  // Place of an own column among the row's positives, counted from image_begin.
  FUSED_NCE_HD int pos_index(int column) const { return column - (column > gap); }  // fault: gpu-positives-beyond
};

FUSED_NCE_HD int clamp(int64_t x, int64_t most) { return static_cast<int>(x < 0 ? 0 : (x > most ? most : x)); }

FUSED_NCE_HD Row row_of(const Strip& strip, const Rules& rules, int64_t row, int cta) {
  const Scoring& scoring = rules.scoring;
  Row out;
  out.scores = strip.scores + row * strip.stride;
  // A share is a whole number of turns, so that its vectors are aligned and no two CTAs share one.
  const int64_t turns = (strip.columns + kColumns - 1) / kColumns;
  const int64_t share = (turns + rules.ctas_per_row - 1) / rules.ctas_per_row * kColumns;
  out.begin = clamp(cta * share, strip.columns);
  out.end = clamp((cta + 1) * share, strip.columns);  // fault: gpu-parts-share
  out.index = strip.first_row + row;
  out.first_column = strip.first_column;
  // fault: gpu-index-taken
  const int64_t id = rules.row_ids ? rules.row_ids[out.index] : out.index / scoring.rows_per_image + scoring.offset;
  const int64_t own = (rules.column_ids ? 0 : id * scoring.n_c) - strip.first_column;  // a label may be any number
  out.own_begin = clamp(own, strip.columns);
  out.own_end = rules.positives_elsewhere ? out.own_begin : clamp(own + scoring.n_c, strip.columns);
  out.image_begin = own;
  const int64_t self = rules.self_column + out.index - strip.first_column;
  out.self_column = rules.self_column < 0 ? -1 : clamp(self + 1, strip.columns + 1) - 1;
  out.gap = rules.self_column >= 0 && self >= own && self < own + scoring.n_c ? out.self_column : out.own_end;
  out.scale = scale_of(rules) + scoring.hardness;
  out.share = share_of(rules);
  out.clip = scoring.clip;
  out.inverse_clip = scoring.clip > 0.0f ? 1.0f / scoring.clip : 0.0f;
  out.bias = rules.bias ? *rules.bias : 0.0f;
  out.column_ids = rules.column_ids ? rules.column_ids + strip.first_column : nullptr;  // fault: gpu-panel-labels
  out.marks = strip.marks ? strip.marks + row * (strip.stride / kColumns) : nullptr;
  out.id = id;
  return out;
}

struct alignas(16) Four {
  float x[4];
};

// One thread's turn: eight neighbouring scores in two 16-byte loads. Beyond the row's end lies padding, to be ignored.
struct Eight {
  float s[kColumns];
};

FUSED_NCE_HD Eight load(const float* at, float scale) {
  const Four* four = reinterpret_cast<const Four*>(at);
  const Four a = four[0], b = four[1];
  Eight out;
  for (int u = 0; u < 4; ++u) {
    out.s[u] = a.x[u] * scale;
    out.s[4 + u] = b.x[u] * scale;
  }
  return out;
}

// A thread's turns of a row, which are read once or twice: from the strip.
struct InStrip {
  FUSED_NCE_HD InStrip at(const float*, int) const { return *this; }
  FUSED_NCE_HD void step(int) const {}
  FUSED_NCE_HD Eight first(const float* scores, int c) const { return load(scores + c, 1.0f); }
  FUSED_NCE_HD Eight again(const float* scores, int c) const { return load(scores + c, 1.0f); }
};

// The second time from memory of the CTA, where that has room. A turn's halves lie apart: a warp's threads then meet no
// bank twice.
struct InCta {
  Four* memory;  // a turn's first half; its second one is a row's turns further
  int turns;     // of the row; 0: there is no room
  const float* strip;

  FUSED_NCE_HD InCta at(const float* scores, int c) const { return {memory + c / kColumns, turns, scores + c}; }

  // So many turns on.
  FUSED_NCE_HD void step(int count) {
    memory += count;  // fault: gpu-kept-turn
    strip += static_cast<int64_t>(count * kColumns);
  }

  FUSED_NCE_HD Eight first(const float*, int) const {
    const Eight x = load(strip, 1.0f);
    if (turns == 0) return x;
    memory[0] = {x.s[0], x.s[1], x.s[2], x.s[3]};
    memory[turns] = {x.s[4], x.s[5], x.s[6], x.s[7]};  // fault: gpu-kept-half
    return x;
  }

  FUSED_NCE_HD Eight again(const float*, int) const {
    if (turns == 0) return load(strip, 1.0f);
    const Four a = memory[0], b = memory[turns];
    return {a.x[0], a.x[1], a.x[2], a.x[3], b.x[0], b.x[1], b.x[2], b.x[3]};
  }
};

FUSED_NCE_HD float sum_of(const float (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }

FUSED_NCE_HD float sum_of(const float (&x)[kColumns]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

template <bool kShift>
FUSED_NCE_HD float exp_shifted(float t, float shift) {
  return exp_value(kShift ? t - shift : t);
}

FUSED_NCE_HD RowPart no_part() { return {-infinity(), 0.0f, 0.0f, 0.0f}; }

template <bool kShift>
struct MergeParts {
  FUSED_NCE_HD RowPart operator()(RowPart a, RowPart b) const {
    RowPart out;
    out.max = a.max > b.max ? a.max : b.max;
    out.sum = kShift ? merge(LogSum<float>{shift_of(a.max), a.sum}, LogSum<float>{shift_of(b.max), b.sum}).sum
                     : a.sum + b.sum;
    out.square = a.square + b.square;
    out.bad = a.bad + b.bad;
    return out;
  }
};

struct Add {
  FUSED_NCE_HD float operator()(float a, float b) const { return a + b; }
};

// What a thread has found of a row so far, with Kahan's errors: eight terms share a step.
struct Fold {
  RowPart part;
  float sum_error, square_error;
};

FUSED_NCE_HD RowPart found(const Fold& fold) {
  RowPart out = fold.part;
  out.sum -= fold.sum_error;
  out.square -= fold.square_error;
  return out;
}

// A turn's transformed scores into the fold; `top` is the new maximum, square and bad are the turn's own sums.
template <bool kShift, int kTerms>
FUSED_NCE_HD void add_turn(Fold& fold, const float (&t)[kTerms], const bool (&negative)[kTerms], float top,
                           float square, float bad) {
  RowPart& part = fold.part;
  if (kShift && top > part.max) {
    const float factor = part.sum == 0.0f ? 0.0f : exp_value(shift_of(part.max) - top);
    part.sum *= factor;
    fold.sum_error *= factor;
  }
  part.max = top;
  const float shift = kShift ? shift_of(top) : 0.0f;
  float e[kTerms];
  FUSED_NCE_UNROLL
  for (int u = 0; u < kTerms; ++u) {
    const float x = exp_shifted<kShift>(t[u], shift);
    e[u] = negative[u] ? x : 0.0f;
  }
  add_exactly(part.sum, fold.sum_error, sum_of(e));
  add_exactly(part.square, fold.square_error, square);
  part.bad += bad;
}

// A turn of eight columns. kMasked: see `Row::masked`.
template <bool kClip, bool kShift, Extras kExtras, bool kMasked>
FUSED_NCE_HD void fold_turn(const Row& row, int c, const Eight& eight, float* pos, Fold& fold) {
  constexpr bool all = kExtras >= Extras::all;
  float t[kColumns], top = fold.part.max, square[2] = {0.0f, 0.0f}, bad[2] = {0.0f, 0.0f};
  bool negative[kColumns];
  FUSED_NCE_UNROLL
  for (int u = 0; u < kColumns; ++u) {
    const int column = c + u;
    const bool inside = !kMasked || (column < row.end && column != row.self_column);
    const bool own = kMasked && inside && row.own<all>(column);
    const float s = inside ? eight.s[u] * row.scale : 0.0f;
    t[u] = transform<kClip>(s, row.clip, row.inverse_clip).value;
    if (all) t[u] += row.bias;
    negative[u] = inside && !own;  // fault: gpu-padding-counted, gpu-row-itself
    if constexpr (kMasked && kExtras == Extras::marks)
      negative[u] = negative[u] && !row.marked(c, u);  // fault: gpu-mark-counted
    square[u % 2] += s * s;
    bad[u % 2] += s * 0.0f;
    if (own && !(all && row.column_ids)) pos[row.pos_index(column)] = t[u] * row.share;  // fault: gpu-hard-positive
    top = negative[u] ? __builtin_fmaxf(t[u], top) : top;                                // a NaN is no maximum
  }
  add_turn<kShift>(fold, t, negative, top, square[0] + square[1], bad[0] + bad[1]);
}

// One thread's columns into a part; their positives go to `pos`.
template <bool kClip, bool kShift, Extras kExtras, class Turns = InStrip>
FUSED_NCE_HD RowPart fold_thread(const Row& row, const Rules& rules, const RowArrays& rows, int thread, int threads,
                                 const Turns& all = Turns()) {
  float* pos = rows.stats.pos + row.index * rules.positives - row.image_begin;
  Fold fold = {no_part(), 0.0f, 0.0f};
  int c = row.begin + thread * kColumns;
  for (Turns turns = all.at(row.scores, c); c < row.end; c += threads * kColumns, turns.step(threads)) {
    const Eight eight = turns.first(row.scores, c);
    if (row.masked<kExtras>(c)) fold_turn<kClip, kShift, kExtras, true>(row, c, eight, pos, fold);
    else fold_turn<kClip, kShift, kExtras, false>(row, c, eight, pos, fold);
  }
  return found(fold);
}

// The statistics of a row whose parts are all in.
template <bool kShift>
FUSED_NCE_HD void write_statistics(const RowPart& all, int64_t i, const Rules& rules, const RowArrays& rows) {
  const LogSum<double> sum{kShift ? shift_of(all.max) : 0.0f, all.sum};
  rows.stats.neg_lse[i] = log_value(sum) + all.bad;
  rows.stats.neg_max[i] = all.max;
  rows.stats.square[i] = all.square * (share_of(rules) * share_of(rules));  // fault: gpu-hard-square
}

// One thread's share of the NCE tail: d_pos of its positives, and what they add to -d_neg_lse.
FUSED_NCE_HD float tail_thread(const RowArrays& rows, int64_t i, int64_t positives, int thread, int threads) {
  float sum = 0.0f, error = 0.0f;
  for (int64_t p = thread; p < positives; p += threads) {
    const float slope = nce_slope_positive(rows.stats.neg_lse[i], rows.stats.pos[i * positives + p]);
    rows.upstream.d_pos[(i - rows.upstream.first_row) * positives + p] = rows.upstream.tail.unit * slope;
    add_exactly(sum, error, slope);
  }
  return sum - error;
}

}  // namespace cuda
}  // namespace fused_nce
