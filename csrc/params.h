// Plain structs that the driver hands to the row kernels. No torch and no standard library types: each instruction set
// includes this file.
#pragma once

#include <stdint.h>

#include "names.h"

namespace fused_nce {

// What happens to a score, and which columns are the positives of which rows.
struct Scoring {
  float scale;             // s = scale * <q, k>
  float clip;              // t = clip * tanh(s / clip); 0: t = s
  int64_t n_c;             // columns per image: column j belongs to image j / n_c
  int64_t rows_per_image;  // row i belongs to image i / rows_per_image + offset
  int64_t offset;
  float bias = 0.0f;  // t = s + bias, where there is no clip
  // What is no positive has t = s + hardness * <q, k>, of slope 1 in s; beside neither of both. So the row kernels
  // score by scale + hardness: a positive, and a gradient on its way out, know the scale, and a square is brought back
  // to it.
  float hardness = 0.0f;
  bool no_shift = false;  // on a CPU: exp(t) is in range for every score of the call
};

// The loss that a sweep descends: unit * elements of the tail + square_weight * square.
struct TailRule {
  Tail name;
  float unit, square_weight;
};

// One array a statistic, by its name; null: not wanted.
struct ByStatistic {
  float* of[kStatistics] = {};

  float*& operator[](int name) { return of[name]; }
  float* operator[](int name) const { return of[name]; }
};

// A tile of the transposed scores: line `c` of the array holds column `first_column + c` of S, its lanes are the rows
// of the strip. Statistics of rows then need no horizontal reduction; those of columns come from the same kernels over
// the tile turned around, lines and lanes having changed their roles.
constexpr int kMostLanes = 256;

struct Tile {
  float* scores;  // (columns, lanes), <q, k> before the scale
  int64_t columns;
  int64_t lanes;             // at most kMostLanes; lanes from `rows` on are padding, their products are 0
  int64_t rows;              // rows of the strip
  int64_t first_column;      // of S
  int64_t first_row;         // of S
  const int32_t* ids;        // (lanes): a line with the same id is a positive; -1: none is
  const int32_t* itself;     // (lanes): the column that the row itself is, left out of every set; null: no row is
  const int32_t* line_ids;   // (columns)
  int32_t* marks = nullptr;  // (columns, lanes) `kNoNegative`, `kOutside` or 0; null: ids and `itself` say all
};

// A score that is none of its row's negatives, or, the row itself, of no set.
constexpr int32_t kNoNegative = 1, kOutside = 2;

// Running sum of exp(t - shift) over a set, `lanes` floats each.
struct LogSums {
  float* max;    // largest s of the set
  float* shift;  // t of `max`, as the kernel computed it, or 0 where the clip makes a shift needless
  float* sum;    // and its Kahan error
  float* error;
};

// Running statistics of a strip, `lanes` floats each. t is without the bias, which moves all scores of a sum alike.
struct Accumulators {
  LogSums negatives;
  float* square;  // sum of s^2 over all columns, and its Kahan error
  float* square_error;
  float* bad;  // sum of 0 * s: 0, or NaN as soon as one score is NaN or infinite
  // Null where not wanted:
  LogSums positives;
  float* total;  // sum of t over the positives, and its Kahan error
  float* total_error;
  int32_t* count;   // of the positives
  float* softplus;  // sum of softplus(t + bias) over the negatives, and its Kahan error
  float* softplus_error;
  float* negative_total;  // sum of t over the negatives, and its Kahan error
  float* negative_total_error;
  int32_t* negative_count;
};

// Coefficients of a strip, `lanes` floats each; padding lanes hold zeros.
struct Coefficients {
  float* shift;
  float* inverse;       // exp(t - shift) * inverse = exp(t - neg_lse)
  float* d_neg_lse;     // dL/d neg_lse
  float* two_d_square;  // 2 * dL/d square
  float* d_pos;         // dL/d pos by place in the image, (n_c, lanes)
};

// Finished statistics, and dL/d statistic, of the rows (by lane) or of the columns (by line) of a tile.
struct Upstreams {
  ByStatistic found, d;
};

// What optional statistics add to the weights of a tile.
struct OptionalWeights {
  const float* on_t;      // (columns, lanes), dL/ds through t
  const float* d_square;  // (columns), dL/d square of the columns; null: none
  float* d_bias;          // (lanes), to which dL/dt is added
};

// What a row, or a column, puts on the scores of its negatives and positives, where a weight has a share of both: one
// number each, up to the loss' `unit`.
struct Side {
  float *shift, *inverse;  // exp(t - shift) * inverse is the softmax over the negatives
  float* negative;         // exp(t - shift) * negative
  // Null where positives have places of their own in `d_pos`:
  float *pos_shift, *positive, *constant;  // exp(t - pos_shift) * positive + constant
};

struct TwoSided {
  Side rows, columns;  // (lanes), (lines)
  const float* d_pos;  // (n_c, lanes), of both sides
  float unit, square;  // the weight is unit * the sides' sum, and square * s
};

// Inverse norms of a prefix.
struct Norms {
  const float* rows;   // (lanes), padding 0
  const float* lines;  // (columns)
};

constexpr int64_t kTransposeOver = 32;  // elements that `transpose_pairs` may read beyond its input

// The row kernels of one instruction set.
struct RowKernels {
  const char* name;
  // Adds a tile to the statistics.
  void (*fold)(const Tile&, const Scoring&, const Accumulators&);
  // Marks what is above its lane's ceiling, (rows), by heights (columns, lanes).
  void (*mark)(const Tile&, const float* heights, const float* ceilings);
  // Adds a tile of bounded scores to the statistics of its rows and, unless null, of its columns.
  void (*fold_both)(const Tile&, const Scoring&, bool square, const Accumulators& rows, const Accumulators* columns);
  // Stores the transformed scores of the tile's positives in `pos` (N, n_pos): n_c a row, less itself. The score of a
  // line and a lane is at line * line_stride + lane * lane_stride.
  void (*positives)(const Tile&, const Scoring&, int64_t line_stride, int64_t lane_stride, int64_t n_pos, float* pos);
  // Writes to `on_t` (columns, lanes) what statistics of rows and columns beyond the coefficients put on t.
  void (*weigh_optional)(const Tile&, const Scoring&, const Upstreams& rows, const Upstreams& columns, float* on_t);
  // Writes scale * w as bfloat16 to `rounded` (columns, lanes), or, where that is null, as float over the scores; and
  // adds w * <q, k> to `d_scale` (lanes; null: not wanted, but needed with `optional`). `optional` null: nothing.
  void (*weigh)(const Tile&, const Scoring&, const Coefficients&, const OptionalWeights* optional, uint16_t* rounded,
                float* d_scale);
  // The same of a weight with two sides, `d_scale` always wanted.
  void (*weigh_both)(const Tile&, const Scoring&, const TwoSided&, uint16_t* rounded, float* d_scale);
  // The largest squared norm of `count` rows; NaN where a number is not finite.
  float (*largest_square)(const float* rows, int64_t stride, int64_t count, int64_t width);
  // in / divisor.
  void (*divide)(const float* in, float divisor, float* out, int64_t count);
  // (columns, lanes) -> (rows, out_stride).
  void (*transpose)(const Tile&, float* out, int64_t out_stride);
  // The same of bfloat16 weights, in pairs of columns: (rows, out_stride) words, an odd last column paired with zeros.
  void (*transpose_pairs)(const Tile&, const uint16_t* rounded, uint32_t* out, int64_t out_stride);
  void (*narrow)(const float* in, uint16_t* out, int64_t count);
  // Two bfloat16 rows interleaved, as a bfloat16 GEMM wants its right operand; `odd` null: zeros.
  void (*interleave)(const uint16_t* even, const uint16_t* odd, uint32_t* out, int64_t count);
  void (*widen_bf16)(const uint16_t* in, float* out, int64_t count);
  void (*widen_fp16)(const uint16_t* in, float* out, int64_t count);
  // Of prefixes: the tile's cosines from unnormalised products (columns, lanes).
  void (*cosines)(const Tile&, const Norms&, const float* products);
  // Writes, or adds, dL/d product to `total` (columns, lanes), and adds w * cosine to the sums of rows and of lines.
  void (*weigh_cosines)(const Tile&, const Scoring&, const Coefficients&, const Norms&, float* total, bool add,
                        float* row_sums, float* line_sums);
  // Rounded to bfloat16: max(in, 0), or, beside a gate, `in` where that is not 0; and in + other.
  void (*rectify)(const float* in, const uint16_t* gate, uint16_t* out, int64_t count);
  void (*add_narrow)(const float* in, const uint16_t* other, uint16_t* out, int64_t count);
};

}  // namespace fused_nce
