// What one thread does to its columns of a row. Formulas come from atoms.h; groups.h puts threads together.
#pragma once

#include "../atoms.h"
#include "../params.h"

namespace fused_nce {
namespace cuda {

using namespace portable;

constexpr int kColumns = 8;  // of one thread's turn
// Of a CTA: at 1024 the 64 registers that are left to a thread spill; at 896 there are 72.
constexpr int kMostThreads = 896;

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
  const int64_t* row_ids;     // (N): the image of each row; null: by arithmetic
  bool apart;                 // no column is a positive: they come from elsewhere
  int64_t itself;             // column that row 0 is, as row i is column itself + i, left out of every set; -1: none is
  int64_t positives;          // P, the width of `pos`: n_c, less the row itself
  int parts;                  // CTAs that share a row
  int threads;
  float unit;                 // power of two that keeps float16 weights in range; 1 otherwise
  bool scaled;                // weights leave times the scale, so that the GEMMs' results may be rounded at once
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
  float *neg_lse, *neg_max, *square;   // (M)
  const float *d_neg_lse, *d_square;   // (M); d_square null: 0
  ColumnPart* partials;                // (M)
};

// Statistics of all N rows, and the coefficients that the weights need.
struct RowArrays {
  float* pos;              // (N, P)
  float *neg_lse, *neg_max, *square;  // (N)
  float* d_pos;            // (rows from first_coefficient on, P): given, or the NCE tail's own
  float* d_neg_lse;        // (rows from first_coefficient on)
  const float* d_square;   // (N); null: square_weight
  int64_t first_coefficient;
  float nce_weight, square_weight;
  float* d_scale;          // (N, parts), or null
  RowPart* partials;       // (rows of a block, slots), or null
  int64_t block_first, slots;
  ColumnArrays columns;    // of losses that classify both ways
};

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
  float scale, clip, inverse_clip;

  // Where in the row's `pos` its own column stands, counted from own_at.
  FUSED_NCE_HD int place(int column) const { return column - (column > after); }
};

FUSED_NCE_HD int clamp(int64_t x, int64_t most) {
  return static_cast<int>(x < 0 ? 0 : (x > most ? most : x));
}

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
  const int64_t image =
      rules.row_ids ? rules.row_ids[out.index] : out.index / scoring.rows_per_image + scoring.offset;
  const int64_t own = image * scoring.n_c - strip.first_column;
  out.own_begin = clamp(own, strip.columns);
  out.own_end = rules.apart ? out.own_begin : clamp(own + scoring.n_c, strip.columns);
  out.own_at = own;
  const int64_t itself = rules.itself + out.index - strip.first_column;
  out.itself = rules.itself < 0 ? -1 : clamp(itself + 1, strip.columns + 1) - 1;
  out.after = rules.itself >= 0 && itself >= own && itself < own + scoring.n_c ? out.itself : out.own_end;
  out.scale = scale_of(rules);
  out.clip = scoring.clip;
  out.inverse_clip = scoring.clip > 0.0f ? 1.0f / scoring.clip : 0.0f;
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
template <bool kClip, bool kShift>
FUSED_NCE_HD RowPart fold_thread(const Row& row, const Rules& rules, const RowArrays& rows, int thread, int threads) {
  float* pos = rows.pos + row.index * rules.positives - row.own_at;
  RowPart part = no_part();
  float sum_error = 0.0f, square_error = 0.0f;
  for (int c = row.begin + thread * kColumns; c < row.end; c += threads * kColumns) {
    const Eight eight = load(row.scores + c, row.scale);
    float t[kColumns], e[kColumns], square[kColumns], bad[kColumns];
    float top = part.max;
    bool negative[kColumns];
    for (int u = 0; u < kColumns; ++u) {
      const int column = c + u;
      const bool inside = column < row.end && column != row.itself;
      const bool own = inside && column >= row.own_begin && column < row.own_end;
      const float s = inside ? eight.s[u] : 0.0f;
      t[u] = transform<kClip>(s, row.clip, row.inverse_clip).value;
      negative[u] = inside && !own;
      square[u] = s * s;
      bad[u] = s * 0.0f;
      if (own) pos[row.place(column)] = t[u];
      top = negative[u] && t[u] > top ? t[u] : top;
    }
    if (kShift && top > part.max) {
      const float factor = part.sum == 0.0f ? 0.0f : exp_value(shift_of(part.max) - top);
      part.sum *= factor;
      sum_error *= factor;
    }
    part.max = top;
    const float shift = kShift ? shift_of(top) : 0.0f;
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
    rows.d_pos[(i - rows.first_coefficient) * positives + p] = rows.nce_weight * slope;
    add_exactly(sum, error, slope);
  }
  return sum - error;
}

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

// One thread's columns into weights times `unit`; gives its share of dL/dscale, the sum of w * <q, k>.
template <bool kClip, bool kShift, bool kBothWays, class Store>
FUSED_NCE_HD float weigh_thread(const Row& row, const Rules& rules, const RowArrays& rows, bool want_scale,
                                const Store& store, int thread, int threads) {
  const int64_t i = row.index, coefficient = i - rows.first_coefficient;
  const Softmax soft = softmax_of<kShift>(rows.neg_lse[i]);
  const float d_neg_lse = rows.d_neg_lse[coefficient];
  const float* d_pos = rows.d_pos + coefficient * rules.positives - row.own_at;
  const float two_d_square = 2.0f * (rows.d_square ? rows.d_square[i] : rows.square_weight);
  const float factor = rules.scaled ? rules.unit * row.scale : rules.unit;
  float sum = 0.0f, error = 0.0f;
  for (int c = row.begin + thread * kColumns; c < row.end; c += threads * kColumns) {
    const Eight dot = load(row.scores + c, 1.0f);
    float w[kColumns], product[kColumns];
    for (int u = 0; u < kColumns; ++u) {
      const int column = c + u;
      const bool inside = column < row.end && column != row.itself;
      const bool own = inside && column >= row.own_begin && column < row.own_end;
      const float r = inside ? dot.s[u] : 0.0f, s = r * row.scale;
      const Score t = transform<kClip>(s, row.clip, row.inverse_clip);
      const float e = exp_shifted<kShift>(t.value, soft.shift);
      float weight = negative_weight(e, soft.inverse, d_neg_lse, t.slope);
      if (kBothWays && inside) weight += back_weight<kShift>(rows.columns, row.first_column + column, t, e);
      if (own) weight = d_pos[row.place(column)] * t.slope;
      weight += two_d_square * s;
      if (kBothWays && inside) weight += back_square(rows.columns, row.first_column + column) * s;
      product[u] = inside ? weight * r : 0.0f;
      w[u] = inside ? weight * factor : 0.0f;
    }
    if (want_scale) add_exactly(sum, error, sum_of(product));
    store(c, w);
  }
  return sum - error;
}

}  // namespace cuda
}  // namespace fused_nce
