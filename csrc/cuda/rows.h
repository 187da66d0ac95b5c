// What one thread does to its columns of a row. Formulas come from atoms.h; groups.h puts threads together.
#pragma once

#include "../atoms.h"
#include "../params.h"

namespace fused_nce {
namespace cuda {

using namespace portable;

constexpr int kColumns = 8;  // of one thread's turn
// Of a CTA: at 1024 the 64 registers that are left to a thread spill, at 896 the 72 do on sm_100; here there are 80.
constexpr int kMostThreads = 768;
constexpr int kMostTogether = 8;  // problems that share a launch: their arguments are 4 KB at most

enum class Element { float32, bfloat16, float16 };

// Rows first_row .. first_row + rows - 1 of S, columns first_column .. first_column + columns - 1.
struct Strip {
  float* scores;   // (rows, stride), <q, k> before the scale
  void* weights;   // (rows, stride) of `element`; the scores themselves for float32
  int64_t stride;  // a multiple of kColumns, and so is the space after the last row's last column
  int64_t first_row, rows, first_column, columns;
};

// What a call does to its scores, the same for all strips.
struct Rules {
  Scoring scoring;
  const float* scale_tensor;  // one more factor of the scale, on the device; or null
  const int64_t* row_ids;     // (N): the image of each row, or its label; null: by arithmetic
  const int64_t* column_ids;  // (M): the label of each column; null: by arithmetic
  const float* bias;          // t = s + bias, on the device; or null
  bool apart;                 // no column is a positive: they come from elsewhere
  int64_t itself;             // column that row 0 is, as row i is column itself + i, left out of every set; -1: none is
  int64_t positives;          // P, the width of `pos`: n_c, less the row itself
  int parts;                  // CTAs that share a row
  int threads;
  float unit;   // power of two that keeps float16 weights in range; 1 otherwise
  bool scaled;  // weights leave times the scale, so that the GEMMs' results may be rounded at once
};

// What the threads of a row have found so far.
struct RowPart {
  float max;     // largest t among the negatives
  float sum;     // of exp(t - shift) over the negatives: shift_of(max), or 0 under a clip
  float square;  // of s^2 over all columns
  float bad;     // of 0 * s: 0, or NaN as soon as one score is NaN or infinite
};

// What a strip adds to a column, as ever more strips have found it: a row's statistics, and Kahan's errors.
struct ColumnPart {
  float max, sum, sum_error, square, square_error, bad;
};

// Statistics of all M columns, or the coefficients that the weights need.
struct ColumnArrays {
  float *neg_lse, *neg_max, *square;  // (M)
  const float *d_neg_lse, *d_square;  // (M); d_square null: 0
  ColumnPart* partials;               // (M)
};

// What the threads of a row have found of the further statistics: over the negatives, all columns, the positives.
struct FurtherPart {
  float softplus, bad, count, max, sum, total;
};

// The statistics from kFirstFurther on, one line each: (kFurther, stride). Null: none is wanted.
constexpr int kFirstFurther = kNegSoftplus, kFurther = kStatistics - kFirstFurther;

struct FurtherArrays {
  float* found;  // of all N rows
  float* d;      // of the rows from first_coefficient on; null: 0
  int64_t found_stride, d_stride;
  FurtherPart* partials;  // (rows of a block, slots)

  FUSED_NCE_HD float& of(Statistic name, int64_t i) const { return found[(name - kFirstFurther) * found_stride + i]; }
  FUSED_NCE_HD float& d_of(Statistic name, int64_t c) const { return d[(name - kFirstFurther) * d_stride + c]; }
};

// Statistics of all N rows, and the coefficients that the weights need.
struct RowArrays {
  float* pos;                         // (N, P)
  float *neg_lse, *neg_max, *square;  // (N)
  float* d_pos;                       // (rows from first_coefficient on, P): given, or the tail's own
  float* d_neg_lse;                   // (rows from first_coefficient on)
  const float* d_square;              // (N); null: square_weight
  int64_t first_coefficient;
  TailRule tail;      // where the coefficients are its own
  float* d_scale;     // (N, parts), or null
  RowPart* partials;  // (rows of a block, slots), or null
  int64_t block_first, slots;
  ColumnArrays columns;   // of losses that classify both ways
  float* d_bias;          // (N, parts), or null
  FurtherArrays further;  // of losses with any number of positives
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

// One row of a strip, or the share of it that one CTA has.
struct Row {
  const float* scores;
  int begin, end;          // columns, counted from the panel's first
  int own_begin, own_end;  // those of the row's own image
  int itself;              // the column that the row itself is; one that is not there, where none is
  int after;               // own columns beyond this one have their place among the positives one further left
  int64_t index;           // of S
  int64_t first_column;    // of S, the panel's
  int64_t own_at;          // own_begin before the panel cut it: column - own_at is the location in the image
  float scale, clip, inverse_clip, bias;
  const int64_t* column_ids;  // of the panel's columns; null: those of the image are the row's own
  int64_t id;

  // A positive of the row, or the row itself. kMore: the rules may have labels.
  template <bool kMore>
  FUSED_NCE_HD bool own(int column) const {
    if (kMore && column_ids) return column_ids[column] == id;
    return column >= own_begin && column < own_end;
  }

  // Where in the row's `pos` its own column stands, counted from own_at.
  FUSED_NCE_HD int place(int column) const { return column - (column > after); }
};

FUSED_NCE_HD int clamp(int64_t x, int64_t most) { return static_cast<int>(x < 0 ? 0 : (x > most ? most : x)); }

FUSED_NCE_HD Row row_of(const Strip& strip, const Rules& rules, int64_t row, int part) {
  const Scoring& scoring = rules.scoring;
  Row out;
  out.scores = strip.scores + row * strip.stride;
  // Parts are whole turns of all threads, so that a part's vectors are aligned and no two CTAs share one.
  const int64_t turns = (strip.columns + kColumns - 1) / kColumns;
  const int64_t share = (turns + rules.parts - 1) / rules.parts * kColumns;
  out.begin = clamp(part * share, strip.columns);
  out.end = clamp((part + 1) * share, strip.columns);
  out.index = strip.first_row + row;
  out.first_column = strip.first_column;
  const int64_t id = rules.row_ids ? rules.row_ids[out.index] : out.index / scoring.rows_per_image + scoring.offset;
  const int64_t own = (rules.column_ids ? 0 : id * scoring.n_c) - strip.first_column;  // a label may be any number
  out.own_begin = clamp(own, strip.columns);
  out.own_end = rules.apart ? out.own_begin : clamp(own + scoring.n_c, strip.columns);
  out.own_at = own;
  const int64_t itself = rules.itself + out.index - strip.first_column;
  out.itself = rules.itself < 0 ? -1 : clamp(itself + 1, strip.columns + 1) - 1;
  out.after = rules.itself >= 0 && itself >= own && itself < own + scoring.n_c ? out.itself : out.own_end;
  out.scale = scale_of(rules);
  out.clip = scoring.clip;
  out.inverse_clip = scoring.clip > 0.0f ? 1.0f / scoring.clip : 0.0f;
  out.bias = rules.bias ? *rules.bias : 0.0f;
  out.column_ids = rules.column_ids ? rules.column_ids + strip.first_column : nullptr;
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

FUSED_NCE_HD float sum_of(const float (&x)[kColumns]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

template <bool kShift>
FUSED_NCE_HD float exp_shifted(float t, float shift) {
  return kShift ? exp_value(t - shift) : exp_bounded(t);
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

// One thread's columns into a part; their positives go to `pos`. Eight terms share a Kahan step.
template <bool kClip, bool kShift, bool kMore>
FUSED_NCE_HD RowPart fold_thread(const Row& row, const Rules& rules, const RowArrays& rows, int thread, int threads) {
  float* pos = rows.pos + row.index * rules.positives - row.own_at;
  RowPart part = no_part();
  float sum_error = 0.0f, square_error = 0.0f;
  for (int c = row.begin + thread * kColumns; c < row.end; c += threads * kColumns) {
    const Eight eight = load(row.scores + c, row.scale);
    float t[kColumns], e[kColumns], square[kColumns], bad[kColumns];
    float top = part.max;
    bool negative[kColumns];
    FUSED_NCE_UNROLL
    for (int u = 0; u < kColumns; ++u) {
      const int column = c + u;
      const bool inside = column < row.end && column != row.itself;
      const bool own = inside && row.own<kMore>(column);
      const float s = inside ? eight.s[u] : 0.0f;
      t[u] = transform<kClip>(s, row.clip, row.inverse_clip).value;
      if (kMore) t[u] += row.bias;
      negative[u] = inside && !own;
      square[u] = s * s;
      bad[u] = s * 0.0f;
      if (own && !(kMore && row.column_ids)) pos[row.place(column)] = t[u];
      top = negative[u] && t[u] > top ? t[u] : top;
    }
    if (kShift && top > part.max) {
      const float factor = part.sum == 0.0f ? 0.0f : exp_value(shift_of(part.max) - top);
      part.sum *= factor;
      sum_error *= factor;
    }
    part.max = top;
    const float shift = kShift ? shift_of(top) : 0.0f;
    FUSED_NCE_UNROLL
    for (int u = 0; u < kColumns; ++u) {
      const float x = exp_shifted<kShift>(t[u], shift);
      e[u] = negative[u] ? x : 0.0f;
    }
    add_exactly(part.sum, sum_error, sum_of(e));
    add_exactly(part.square, square_error, sum_of(square));
    part.bad += sum_of(bad);
  }
  part.sum -= sum_error;
  part.square -= square_error;
  return part;
}

// The statistics of a row whose parts are all in.
template <bool kShift>
FUSED_NCE_HD void write_statistics(const RowPart& all, int64_t i, const RowArrays& rows) {
  const LogSum<double> sum{kShift ? shift_of(all.max) : 0.0f, all.sum};
  rows.neg_lse[i] = log_value(sum) + all.bad;
  rows.neg_max[i] = all.max;
  rows.square[i] = all.square;
}

// One thread's share of the NCE tail: d_pos of its positives, and what they add to -d_neg_lse.
FUSED_NCE_HD float tail_thread(const RowArrays& rows, int64_t i, int64_t positives, int thread, int threads) {
  float sum = 0.0f, error = 0.0f;
  for (int64_t p = thread; p < positives; p += threads) {
    const float slope = nce_slope_positive(rows.neg_lse[i], rows.pos[i * positives + p]);
    rows.d_pos[(i - rows.first_coefficient) * positives + p] = rows.tail.unit * slope;
    add_exactly(sum, error, slope);
  }
  return sum - error;
}

}  // namespace cuda
}  // namespace fused_nce
