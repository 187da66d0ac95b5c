// What one task owns, and the arrays of running statistics.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../problem.h"
#include "arena.h"

namespace fused_nce {

// The arrays of `acc` that the statistics need; plan.h counts them.
inline std::vector<float**> arrays_for(Accumulators& acc, unsigned stats) {
  std::vector<float**> arrays = {&acc.negatives.max,
                                 &acc.negatives.shift,
                                 &acc.negatives.sum,
                                 &acc.negatives.error,
                                 &acc.square,
                                 &acc.square_error,
                                 &acc.bad};
  if (stats & kOverPositives)
    arrays.insert(arrays.end(), {&acc.positives.max, &acc.positives.shift, &acc.positives.sum, &acc.positives.error,
                                 &acc.total, &acc.total_error, &acc.count});
  if (stats & bit_of(kNegSoftplus)) arrays.insert(arrays.end(), {&acc.softplus, &acc.softplus_error});
  return arrays;
}

inline Accumulators new_accumulators(unsigned stats, int64_t count, Arena& arena) {
  Accumulators acc{};
  for (float** array : arrays_for(acc, stats)) *array = arena.take<float>(count);
  return acc;
}

// Those that begin with row, or column, `first`.
inline Accumulators from(Accumulators acc, unsigned stats, int64_t first) {
  for (float** array : arrays_for(acc, stats)) *array += first;
  return acc;
}

inline void clear(Accumulators acc, unsigned stats, int64_t count) {
  for (float** array : arrays_for(acc, stats)) std::fill_n(*array, count, 0.0f);
  for (float* max : {acc.negatives.max, acc.positives.max})
    if (max) std::fill_n(max, count, -std::numeric_limits<float>::infinity());
}

inline ByStatistic from(ByStatistic arrays, int64_t first) {
  for (float*& array : arrays.of)
    if (array) array += first;
  return arrays;
}

template <class E>
struct Group {
  Accumulators acc;
  float *d_scale_lanes, *d_bias_lanes;  // (lanes), of a tile
  int32_t* line_ids;                    // (tile_columns)
  int32_t* column_rows;                 // (tile_columns), the row that each column is; null: no column statistics
  float* side;        // (tile_columns, lanes): a tile turned around, or what further statistics put on t
  float* scores;      // a tile of them, unless the strip stores its own
  float* wide_keys;   // (tile_columns, D), of widened elements
  E* left;            // weights (rows, tile_columns), the left operand of dq
  uint16_t* rounded;  // weights (tile_columns, lanes), the left operand of dk; null: over the scores
  E* right;           // keys in pairs, the right operand of dq
  float* wide_dk;     // (tile_columns, kOutputWidth), where dk leaves in bfloat16; shares their place
  float* dq;          // (lanes, D), this group's share; null: the first group's, written in place
  double d_scale, d_bias;
};

}  // namespace fused_nce
