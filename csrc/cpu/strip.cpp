#include "strip.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>

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

// Where in its image lane l's positive p lies.
int64_t place_of(const Strip& strip, int64_t l, int64_t p) {
  const long long own = own_place(strip.ids, strip.itself, strip.n_c, l);
  return p + (own >= 0 && p >= own);
}

// Where its weights will be looked for.
float& d_pos_of(const Strip& strip, const Coefficients& c, int64_t l, int64_t p) {
  return c.d_pos[place_of(strip, l, p) * strip.lanes + l];
}

int64_t column_of(const Strip& strip, int64_t l, int64_t p) { return strip.ids[l] * strip.n_c + place_of(strip, l, p); }

float transformed(float s, const Scoring& scoring) {
  return scoring.clip > 0.0f ? tanh_clip(s, scoring.clip, 1.0f / scoring.clip).value : s + scoring.bias;
}

// What turns the sum of the kernels' squares, or what is put on such a score, to raw scores.
float share_of(const Scoring& scoring) { return raw_share(scoring.scale, scoring.hardness); }

void write(const ByStatistic& out, Statistic name, int64_t at, float value) {
  if (out[name]) out[name][at] = value;
}

// The Kahan sum of one part, to the last bit.
double exact(const float* sum, const float* error, int64_t lane) {
  return static_cast<double>(sum[lane]) - error[lane];
}

void add(LogSum<double>& total, float& max, const LogSums& part, int64_t lane) {
  max = part.max[lane] > max ? part.max[lane] : max;
  total = merge(total, LogSum<double>{part.shift[lane], exact(part.sum, part.error, lane)});
}

// An empty set's stays -inf, which a clip would bring to its bound.
float largest(float max, const Scoring& scoring) { return max == -infinity() ? max : transformed(max, scoring); }

void finish_positives(const std::vector<Accumulators>& parts, int64_t lane, const Scoring& scoring,
                      const ByStatistic& out, int64_t at) {
  LogSum<double> sum{0.0f, 0.0};
  float max = -infinity();
  double total = 0.0, count = 0.0;
  for (const Accumulators& part : parts) {
    add(sum, max, part.positives, lane);
    total += exact(part.total, part.total_error, lane);
    count += part.count[lane];
  }
  const double bias = scoring.bias, lse = sum.shift + __builtin_log(sum.sum);
  write(out, kPosLse, at, static_cast<float>(lse + bias));
  write(out, kPosMax, at, std::isnan(sum.sum) ? static_cast<float>(sum.sum) : largest(max, scoring));
  write(out, kPosSum, at, static_cast<float>(total + count * bias));
  write(out, kPosCount, at, static_cast<float>(count));
  write(out, kPosGap, at, count > 0.0 ? static_cast<float>(lse - total / count) : 0.0f);
}

}  // namespace

Sum finish_statistics(const std::vector<Accumulators>& parts, int64_t lane, const Scoring& scoring,
                      const ByStatistic& out, int64_t at) {
  LogSum<double> total{0.0f, 0.0};
  float max = -infinity(), bad = 0.0f;
  double square = 0.0, softplus = 0.0, sum = 0.0, count = 0.0;
  for (const Accumulators& part : parts) {
    add(total, max, part.negatives, lane);
    square += exact(part.square, part.square_error, lane);
    bad += part.bad[lane];
    if (part.softplus) softplus += exact(part.softplus, part.softplus_error, lane);
    if (!part.negative_count) continue;
    sum += exact(part.negative_total, part.negative_total_error, lane);
    count += part.negative_count[lane];
  }
  square *= share_of(scoring) * share_of(scoring);  // fault: kernels-hard-square
  // A bias that is not finite shows in a sum without terms too.
  bad += 0.0f * scoring.bias;
  write(out, kNegLse, at, log_value(total) + scoring.bias + bad);  // fault: kernels-nan-hidden
  write(out, kNegMax, at, largest(max, scoring));
  // Beyond the range of float the Kahan sum is inf - inf.
  write(out, kSquare, at, square != square && bad == 0.0f ? infinity() : static_cast<float>(square));
  write(out, kNegSoftplus, at, static_cast<float>(softplus) + bad);
  write(out, kNegSum, at, static_cast<float>(sum + count * scoring.bias));
  write(out, kNegCount, at, static_cast<float>(count));
  if (parts[0].count) finish_positives(parts, lane, scoring, out, at);
  return {total.shift, total.sum};
}

void finish_strip(const Strip& strip, const Scoring& scoring, const std::vector<Accumulators>& groups,
                  const StatisticArrays& out, const Coefficients& coefficients) {
  at::parallel_for(0, strip.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) {
      const Sum negatives = finish_statistics(groups, l, scoring, out.rows, strip.first + l);
      coefficients.shift[l] = negatives.shift;
      coefficients.inverse[l] = inverse_of(negatives);
    }
  });
}

void coefficients_of_loss(const Strip& strip, const Scoring& scoring, const StatisticArrays& stats,
                          const TailRule& tail, const Coefficients& out, const ByStatistic& d) {
  const int64_t n_pos = strip.n_pos;
  const float two_d_square = 2.0f * share_of(scoring) * tail.square_weight;
  clear_padding(strip, out);
  if (n_pos == 0) std::fill_n(out.d_pos, strip.n_c * strip.lanes, 0.0f);
  const auto row = [&](int64_t l) {
    const int64_t i = strip.first + l;
    const auto found = [&](Statistic name) { return stats.rows[name][i]; };
    const float* pos = stats.pos + i * n_pos;
    out.d_neg_lse[l] = 0.0f;
    out.two_d_square[l] = two_d_square;
    if (tail.name == kNce) {
      double sum = 0.0;
      for (int64_t p = 0; p < n_pos; ++p) {
        const float slope = nce_slope_positive(found(kNegLse), pos[p]);
        d_pos_of(strip, out, l, p) = tail.unit * slope;
        sum -= slope;
      }
      out.d_neg_lse[l] = static_cast<float>(tail.unit * sum);
    } else if (tail.name == kSigmoid) {
      for (int64_t p = 0; p < n_pos; ++p) d_pos_of(strip, out, l, p) = tail.unit * nce_slope_positive(0.0f, pos[p]);
      // The weight of an infinite score is 1, which would look sound.
      d[kNegSoftplus][l] = tail.unit + nan_of(found(kNegSoftplus));
    } else {
      const float share = tail.unit * supervised_share(found(kNegLse), found(kPosLse), found(kPosCount));
      out.d_neg_lse[l] = share;
      d[kPosLse][l] = -share;
      // A lone positive has no gap; and 1 - 1 of a score that is computed again would not quite be 0.
      d[kPosGap][l] = tail.name == kLogOut && found(kPosCount) > 1.0f ? tail.unit : 0.0f;
    }
  };
  at::parallel_for(0, strip.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) row(l);
  });
}

double slope_of_bias(const Strip& strip, const Coefficients& of, bool own_columns) {
  double sum = 0.0;
  for (int64_t l = 0; l < strip.rows; ++l) {
    if (of.inverse[l] != 0.0f) sum += of.d_neg_lse[l];
    for (int64_t place = 0; own_columns && place < strip.n_c; ++place)
      sum += of.d_pos[place * strip.lanes + l];  // fault: bias-of-positives
  }
  return sum;
}

void side_of_rows(const Strip& strip, const Scoring& scoring, const StatisticArrays& stats, Tail tail, float ways,
                  const Side& side) {
  const auto row = [&](int64_t l) {
    const int64_t i = strip.first + l;
    const auto found = [&](Statistic name) { return stats.rows[name][i]; };
    if (tail == kNce) {
      double sum = 0.0;
      for (int64_t p = 0; p < strip.n_pos; ++p)
        sum -= nce_slope_positive(found(kNegLse), stats.pos[i * strip.n_pos + p]);
      side.negative[l] = side.inverse[l] * static_cast<float>(ways * sum);
      return;
    }
    const float count = found(kPosCount), lse = found(kPosLse) - scoring.bias;
    const float share = supervised_share(found(kNegLse), found(kPosLse), count);
    // A lone positive has no gap; and 1 - 1 of a score that is computed again would not quite be 0.
    const float gap = tail == kLogOut && count > 1.0f ? 1.0f : 0.0f;
    side.negative[l] = side.inverse[l] * share;
    side.pos_shift[l] = scoring.no_shift || !(count > 0.0f) ? 0.0f : lse;
    side.positive[l] = (gap - share) * (scoring.no_shift && count > 0.0f ? exp_value(-lse) : 1.0f);
    side.constant[l] = count > 0.0f ? -gap / count : 0.0f;
  };
  at::parallel_for(0, strip.rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t l = begin; l < end; ++l) row(l);
  });
}

void add_to_columns(const Strip& strip, const StatisticArrays& stats, const float* column_lse, float ways,
                    float* negative) {
  for (int64_t l = 0; l < strip.rows; ++l)
    for (int64_t p = 0; p < strip.n_pos; ++p) {
      const int64_t j = column_of(strip, l, p);
      negative[j] -= ways * nce_slope_positive(column_lse[j], stats.pos[(strip.first + l) * strip.n_pos + p]);
    }
}

void positives_of_both(const Strip& strip, const StatisticArrays& stats, const float* column_lse, float ways,
                       const Coefficients& out) {
  clear_padding(strip, out);
  if (strip.n_pos == 0) std::fill_n(out.d_pos, strip.n_c * strip.lanes, 0.0f);
  for (int64_t l = 0; l < strip.rows; ++l)
    for (int64_t p = 0; p < strip.n_pos; ++p) {
      const float pos = stats.pos[(strip.first + l) * strip.n_pos + p];
      const float row_lse = stats.rows[kNegLse][strip.first + l];
      d_pos_of(strip, out, l, p) =
          // fault: both-positive-row-alone
          ways * (nce_slope_positive(row_lse, pos) + nce_slope_positive(column_lse[column_of(strip, l, p)], pos));
    }
}

void coefficients_of_caller(const Strip& strip, const Scoring& scoring, const StatisticArrays& stats,
                            const StatisticArrays& d, const Coefficients& out) {
  const int64_t n_pos = strip.n_pos;
  clear_padding(strip, out);
  if (n_pos == 0) std::fill_n(out.d_pos, strip.n_c * strip.lanes, 0.0f);
  const bool no_shift = scoring.no_shift;
  const float *neg_lse = stats.rows[kNegLse], *d_neg_lse = d.rows[kNegLse], *d_square = d.rows[kSquare];
  for (int64_t l = 0; l < strip.rows; ++l) {
    const int64_t i = strip.first + l;
    const float lse = neg_lse ? neg_lse[i] - scoring.bias : -infinity();
    const bool none = lse == -infinity();
    // exp(t - infinity) is 0, where exp(t) times an inverse of 0 might be infinity times 0.
    out.shift[l] = no_shift ? 0.0f : (none ? infinity() : lse);
    out.inverse[l] = none ? 0.0f : (no_shift ? exp_value(-lse) : 1.0f);
    out.d_neg_lse[l] = d_neg_lse ? d_neg_lse[i] : 0.0f;  // fault: kernels-upstream-row
    out.two_d_square[l] = d_square ? 2.0f * share_of(scoring) * d_square[i] : 0.0f;
    for (int64_t p = 0; p < n_pos; ++p) d_pos_of(strip, out, l, p) = d.pos[i * n_pos + p];
  }
}

}  // namespace fused_nce
