// What happens once per row between the score tiles and the weights: partial statistics are merged, coefficients found.
#pragma once

#include <vector>

#include "../params.h"

namespace fused_nce {

// Where the statistics of all rows live; `neg_max` and `square` are null when they are only read.
struct StatisticArrays {
  float* pos;      // (N, n_pos)
  float* neg_lse;  // (N)
  float* neg_max;  // (N)
  float* square;   // (N)
};

// Rows first .. first + rows - 1, in lanes 0 .. rows - 1 of the strip's arrays.
struct Strip {
  int64_t first, rows, lanes;
  int64_t n_c, n_pos;     // columns of an image, and how many of them are a row's positives
  const int32_t *ids, *itself;  // of a `Tile`
};

// Merges the groups' statistics in their order, and sets `shift` and `inverse`.
void finish_statistics(const Strip& strip, const Scoring& scoring, const std::vector<Accumulators>& groups,
                       const StatisticArrays& out, const Coefficients& coefficients);

// After finish_statistics: the coefficients of nce_weight * sum softplus(neg_lse - pos) + square_weight * sum square.
void coefficients_of_loss(const Strip& strip, const StatisticArrays& stats, float nce_weight, float square_weight,
                          const Coefficients& out);

// All coefficients from given statistics and upstream gradients, (N, n_pos), (N) and (N).
void coefficients_of_caller(const Strip& strip, const Scoring& scoring, const StatisticArrays& stats,
                            const float* d_pos, const float* d_neg_lse, const float* d_square, const Coefficients& out);

}  // namespace fused_nce
