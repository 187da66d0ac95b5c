// What happens once per row between the score tiles and the weights: partial statistics are merged, coefficients found.
#pragma once

#include <vector>

#include "../problem.h"

namespace fused_nce {

// Where the statistics of all rows live, or dL/d statistic.
struct StatisticArrays {
  float* pos;  // (N, n_pos)
  ByStatistic rows;
};

inline StatisticArrays arrays(const StatisticTensors& x, const Wanted& wanted) {
  return {x.pos.data_ptr<float>(), arrays_of(x.rows, wanted.rows)};
}

// Rows first .. first + rows - 1, in lanes 0 .. rows - 1 of the strip's arrays.
struct Strip {
  int64_t first, rows, lanes;
  int64_t n_c, n_pos;           // columns of an image, and how many of them are a row's positives
  const int32_t *ids, *itself;  // of a `Tile`
};

// Merges partial statistics in their order, and writes those wanted at `at`. Gives the sum over the negatives.
struct Sum {
  float shift;
  double sum;  // of exp(t - shift), t without the bias
};
inline float inverse_of(const Sum& of) { return of.sum == 0.0 ? 0.0f : static_cast<float>(1.0 / of.sum); }

Sum finish_statistics(const std::vector<Accumulators>& parts, int64_t lane, const Scoring& scoring,
                      const ByStatistic& out, int64_t at);

// Of all rows of a strip; sets `shift` and `inverse`.
void finish_strip(const Strip& strip, const Scoring& scoring, const std::vector<Accumulators>& groups,
                  const StatisticArrays& out, const Coefficients& coefficients);

// The statistics that a tail reads beyond those.
inline std::vector<Statistic> optional_of(Tail tail) {
  if (tail == kSigmoid) return {kNegSoftplus};
  return tail == kNce ? std::vector<Statistic>{} : std::vector<Statistic>{kPosLse, kPosGap};
}

// After finish_strip: the coefficients of the tail, and in `d` (lanes) those of the statistics beyond them.
void coefficients_of_loss(const Strip& strip, const Scoring& scoring, const StatisticArrays& stats,
                          const TailRule& tail, const Coefficients& out, const ByStatistic& d);

// dL/dbias of a strip whose weights come from those alone: a row's over its negatives add up to its d_neg_lse.
double slope_of_bias(const Strip& strip, const Coefficients& of, bool own_columns);

// The factors of two-sided weights. First those of the rows, from their statistics and `side.inverse`; `ways`, of each
// row's element, is 1 or, where columns have elements of their own, a half.
void side_of_rows(const Strip& strip, const Scoring& scoring, const StatisticArrays& stats, Tail tail, float ways,
                  const Side& side);

// Then, of the nce, what the strip's positives add to those of their columns, from 0 on and before `side.inverse`.
void add_to_columns(const Strip& strip, const StatisticArrays& stats, const float* column_lse, float ways,
                    float* negative);

// And what both sides put on the strip's positives.
void positives_of_both(const Strip& strip, const StatisticArrays& stats, const float* column_lse, float ways,
                       const Coefficients& out);

// All coefficients from given statistics and dL/d statistic.
void coefficients_of_caller(const Strip& strip, const Scoring& scoring, const StatisticArrays& stats,
                            const StatisticArrays& d, const Coefficients& out);

}  // namespace fused_nce
