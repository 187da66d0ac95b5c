#include "strip.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "../atoms.h"

namespace fused_nce {

using namespace portable;

namespace {

// Padding lanes hold the products of zeros: with zero coefficients their weights are 0 too.
void clear_padding(const Strip& strip, const Coefficients& c) {
  for (float* array : {c.shift, c.inverse, c.d_neg_lse, c.two_d_square})
    std::fill(array + strip.rows, array + strip.lanes, 0.0f);
  for (int64_t place = 0; place < strip.n_c; ++place)
    std::fill(c.d_pos + place * strip.lanes + strip.rows, c.d_pos + (place + 1) * strip.lanes, 0.0f);
}

// Where the weights of lane l's positive p will be looked for.
float& d_pos_of(const Strip& strip, const Coefficients& c, int64_t l, int64_t p) {
  const long long own = own_place(strip.ids, strip.itself, strip.n_c, l);
  return c.d_pos[(p + (own >= 0 && p >= own)) * strip.lanes + l];
}

float transformed(float s, const Scoring& scoring) {
  return scoring.clip > 0.0f ? tanh_clip(s, scoring.clip, 1.0f / scoring.clip).value : s;
}

}  // namespace

void finish_statistics(const Strip& strip, const Scoring& scoring, const std::vector<Accumulators>& groups,
                       const StatisticArrays& out, const Coefficients& coefficients) {
  for (int64_t l = 0; l < strip.rows; ++l) {
    LogSum<double> total{0.0f, 0.0};
    float max = -infinity(), bad = 0.0f;
    double square = 0.0;
    for (const Accumulators& acc : groups) {
      max = acc.max[l] > max ? acc.max[l] : max;
      total = merge(total, LogSum<double>{acc.shift[l], static_cast<double>(acc.sum[l]) - acc.sum_error[l]});
      square += static_cast<double>(acc.square[l]) - acc.square_error[l];
      bad += acc.bad[l];
    }
    const int64_t i = strip.first + l;
    out.neg_lse[i] = log_value(total) + bad;
    out.neg_max[i] = max == -infinity() ? max : transformed(max, scoring);
    // Beyond the range of float the Kahan sum is inf - inf.
    out.square[i] = square != square && bad == 0.0f ? infinity() : static_cast<float>(square);
    coefficients.shift[l] = total.shift;
    coefficients.inverse[l] = total.sum == 0.0 ? 0.0f : static_cast<float>(1.0 / total.sum);
  }
}

void coefficients_of_loss(const Strip& strip, const StatisticArrays& stats, float nce_weight, float square_weight,
                          const Coefficients& out) {
  const int64_t n_pos = strip.n_pos;
  clear_padding(strip, out);
  at::parallel_for(0, strip.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      const int64_t i = strip.first + l;
      double sum = 0.0;
      for (int64_t p = 0; p < n_pos; ++p) {
        const float slope = nce_slope_positive(stats.neg_lse[i], stats.pos[i * n_pos + p]);
        d_pos_of(strip, out, l, p) = nce_weight * slope;
        sum -= slope;
      }
      out.d_neg_lse[l] = static_cast<float>(nce_weight * sum);
      out.two_d_square[l] = 2.0f * square_weight;
    }
  });
}

void coefficients_of_caller(const Strip& strip, const Scoring& scoring, const StatisticArrays& stats,
                            const float* d_pos, const float* d_neg_lse, const float* d_square,
                            const Coefficients& out) {
  const int64_t n_pos = strip.n_pos;
  clear_padding(strip, out);
  const bool no_shift = needs_no_shift(scoring.clip);
  for (int64_t l = 0; l < strip.rows; ++l) {
    const int64_t i = strip.first + l;
    const float lse = stats.neg_lse[i];
    const bool none = lse == -infinity();
    out.shift[l] = none || no_shift ? 0.0f : lse;
    out.inverse[l] = none ? 0.0f : (no_shift ? exp_value(-lse) : 1.0f);
    out.d_neg_lse[l] = d_neg_lse[i];
    out.two_d_square[l] = 2.0f * d_square[i];
    for (int64_t p = 0; p < n_pos; ++p) d_pos_of(strip, out, l, p) = d_pos[i * n_pos + p];
  }
}

}  // namespace fused_nce
