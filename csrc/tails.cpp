#include "tails.h"

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>

#include "integers.h"
#include "summary.h"

namespace fused_nce {

using namespace portable;

namespace {

constexpr int64_t kRows = 256;  // one thread's, added up before all others

// Where a row's positives lie, and the statistics by name.
struct Rows {
  Rows(const SweepInputs& in, const StatisticTensors& found)
      : n(in.q.size(0)), n_pos(in.layout.n_pos), n_c(in.scoring.n_c), per_image(in.scoring.rows_per_image),
        offset(in.scoring.offset), itself(in.layout.itself),
        targets(in.layout.row_ids.defined() ? in.layout.row_ids.const_data_ptr<int64_t>() : nullptr),
        pos(found.pos.data_ptr<float>()), rows(arrays_of(found.rows, in.wanted.rows)),
        columns(arrays_of(found.columns, in.wanted.columns)) {}

  int64_t column(int64_t i, int64_t p) const {
    if (targets) return targets[i];
    const int64_t first = (i / per_image + offset) * n_c, own = itself >= 0 ? itself + i - first : -1;
    return first + p + (own >= 0 && p >= own);
  }

  int64_t n, n_pos, n_c, per_image, offset, itself;
  const int64_t* targets;
  float* pos;
  ByStatistic rows, columns;
};

// Sums of a report's rows; not all tails fill all.
struct Sums {
  NceTotals<double> nce{};
  double element = 0.0, square = 0.0, first = 0.0, anchors = 0.0, total = 0.0, count = 0.0;

  void add(const Sums& x) {
    nce = AddNceTotals<double>()(nce, x.nce);
    element += x.element, square += x.square, first += x.first;
    anchors += x.anchors, total += x.total, count += x.count;
  }
};

// The elements of row i, each times the weight in `out`, and what the report adds up.
void add_row(const TailOf& tail, const Rows& x, int64_t i, float log_positives, float* out, Sums& sums) {
  const auto of = [&](Statistic name) { return x.rows[name][i]; };
  const float weight = static_cast<float>(tail.weight);
  if (tail.penalty > 0.0) sums.square += of(kSquare);
  const auto put = [&](float element, int64_t p) {
    const float weighted = weight == 1.0f ? element : element * weight;  // fault: whole-weight
    sums.element += weighted;
    if (out) out[p] = weighted;
  };
  if (tail.name == kNce) {
    for (int64_t p = 0; p < x.n_pos; ++p) {
      const float pos = x.pos[i * x.n_pos + p];
      const auto one = nce_terms<double>(pos, of(kNegLse), of(kNegMax), nullptr, p == 0, log_positives);
      sums.nce = AddNceTotals<double>()(sums.nce, one);
      const float there = static_cast<float>(one.nce);
      put(x.columns[kNegLse] ? (there + softplus(deficit(x.columns[kNegLse][x.column(i, p)], pos))) / 2 : there, p);
    }
  } else if (tail.name == kSigmoid) {
    float sum = 0.0f;
    for (int64_t p = 0; p < x.n_pos; ++p) {
      const float pos = x.pos[i * x.n_pos + p];
      sum += softplus(deficit(0.0f, pos));
      sums.first += pos > of(kNegMax);
      sums.total += pos;
    }
    put(sum + of(kNegSoftplus), 0);
  } else {
    const float count = of(kPosCount);
    const float spread = tail.name == kLogOut ? of(kPosGap) : std::log(std::max(count, 1.0f));
    put(count > 0.0f ? softplus(of(kNegLse) - of(kPosLse)) + spread : nan_of(of(kNegLse)), 0);
    sums.first += of(kPosMax) > of(kNegMax);
    sums.anchors += count > 0.0f;
    sums.total += of(kPosSum);
    sums.count += count;
    sums.nce.neg_lse += of(kNegLse);
  }
}

void write_report(const TailOf& tail, const SweepInputs& in, const Sums& sums, double rows, float* out) {
  const bool apart = in.layout.positives.defined();
  const int64_t n_c = in.scoring.n_c, n_k = in.k.size(0) / n_c + apart;
  const double elements = rows * static_cast<double>(in.layout.n_pos);
  if (tail.name == kNce) {
    const double chance = std::log1p(static_cast<double>((n_k - 1) * n_c));
    write_nce_report(sums.nce, elements, rows, chance, std::log(static_cast<double>(n_k)), out);
  } else if (tail.name == kSigmoid) {
    out[0] = static_cast<float>(sums.first / elements);
    out[1] = static_cast<float>(sums.total / elements);
  } else {
    out[0] = static_cast<float>(sums.first / std::max(sums.anchors, 1.0));
    out[1] = static_cast<float>(sums.total / std::max(sums.count, 1.0));
    out[2] = static_cast<float>(sums.nce.neg_lse / rows);
    out[3] = static_cast<float>(sums.count / rows);  // fault: whole-report
  }
}

// What of a tail, and of the statistics of all, is of one prefix.
TailOf tail_of(const TailOf& all, size_t part) {
  return {all.name, 0.0, all.weight * all.weights[part], all.reduction};  // fault: whole-prefix-weight
}

StatisticTensors statistics_of(const StatisticTensors& all, size_t part, size_t parts) {
  const auto i = static_cast<int64_t>(part), k = static_cast<int64_t>(parts);
  return {all.pos.tensor_split(k, 1)[part].contiguous(), all.rows.view({k, -1, all.rows.size(1)})[i], all.columns};
}

}  // namespace

int64_t numbers_reported(Tail tail) { return tail == kNce ? kNceReport : tail == kSigmoid ? 2 : 4; }

LossNumbers summary_of(const TailOf& tail, const SweepInputs& in, const StatisticTensors& found,
                       int64_t report_groups) {
  LossNumbers sum;
  std::vector<at::Tensor> reports;
  for (size_t part = 0, parts = tail.weights.size(); part < parts; ++part) {
    const LossNumbers one = summary_of(tail_of(tail, part), in, statistics_of(found, part, parts), report_groups);
    reports.push_back(one.report);
    if (part == 0) sum = one;
    else sum.loss.add_(one.loss), sum.nce.add_(one.nce);
  }
  if (!reports.empty()) return {sum.loss, sum.nce, sum.penalty, at::cat(reports, 1)};
  const Rows x(in, found);
  const int64_t width = elements_a_row(tail, in.layout), parts = ceil_div(x.n, kRows);
  const auto options = floats(in.q);
  LossNumbers out{at::empty({}, options),
                  {},
                  at::empty({}, options),
                  at::empty({report_groups, numbers_reported(tail.name)}, options)};
  const bool none = tail.reduction == Reduction::none;
  out.nce = none ? at::empty({x.n, width}, options) : at::empty({}, options);
  float* elements = none ? out.nce.data_ptr<float>() : nullptr;
  const float log_positives = static_cast<float>(std::log(static_cast<double>(in.scoring.n_c)));
  std::vector<Sums> sums(static_cast<size_t>(parts * report_groups));
  at::parallel_for(0, parts, std::max<int64_t>(1, 512 / (kRows * std::max<int64_t>(width, 1))),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin * kRows; i < std::min(x.n, end * kRows); ++i)
                       add_row(tail, x, i, log_positives, elements ? elements + i * width : nullptr,
                               sums[static_cast<size_t>(i / kRows * report_groups + i % report_groups)]);
                   });
  Sums all;
  for (int64_t group = 0; group < report_groups; ++group) {
    Sums total;
    for (int64_t part = 0; part < parts; ++part) total.add(sums[static_cast<size_t>(part * report_groups + group)]);
    const int64_t rows = x.n / report_groups;
    write_report(tail, in, total, static_cast<double>(rows), out.report.data_ptr<float>() + group * out.report.size(1));
    all.add(total);
  }
  // A weight of 0 leaves the penalty out rather than multiply: 0 * infinity would turn a finite loss into NaN.
  const double pairs = static_cast<double>(x.n) * static_cast<double>(in.k.size(0));
  const double penalty = tail.penalty > 0.0 ? all.square * (tail.penalty / pairs) : 0.0;
  const double mean = all.element / static_cast<double>(x.n * width);
  const double nce = tail.reduction == Reduction::sum ? all.element : mean;
  *out.loss.data_ptr<float>() = static_cast<float>(nce + penalty);
  *out.penalty.data_ptr<float>() = static_cast<float>(penalty);
  if (!none) *out.nce.data_ptr<float>() = static_cast<float>(nce);
  return out;
}

StatisticTensors slopes_of(const TailOf& tail, const SweepInputs& in, const StatisticTensors& found,
                           const at::Tensor& d_element, double d_penalty) {
  std::vector<at::Tensor> pos_of, rows_of;
  for (size_t part = 0, parts = tail.weights.size(); part < parts; ++part) {
    const StatisticTensors one = slopes_of(tail_of(tail, part), in, statistics_of(found, part, parts),
                                           d_element * tail.weights[part], 0.0);  // fault: whole-prefix-slope
    pos_of.push_back(one.pos), rows_of.push_back(one.rows);
  }
  if (!pos_of.empty()) return {at::cat(pos_of, 1), at::cat(rows_of), found.columns};
  const Rows x(in, found);
  StatisticTensors out{at::zeros(found.pos.sizes(), found.pos.options()),
                       at::zeros(found.rows.sizes(), found.rows.options()),
                       at::zeros(found.columns.sizes(), found.columns.options())};
  const ByStatistic d = arrays_of(out.rows, in.wanted.rows), d_columns = arrays_of(out.columns, in.wanted.columns);
  float* d_pos = out.pos.data_ptr<float>();
  const at::Tensor upstream = d_element.to(at::kFloat).contiguous();
  const float* given = upstream.const_data_ptr<float>();
  const int64_t each = upstream.numel() > 1 || d_element.dim() > 0;
  const float ways = x.columns[kNegLse] ? 0.5f : 1.0f;
  const double pairs = static_cast<double>(x.n) * static_cast<double>(in.k.size(0));
  if (tail.penalty > 0.0) std::fill_n(d[kSquare], x.n, static_cast<float>(d_penalty * (tail.penalty / pairs)));
  for (int64_t i = 0; i < x.n; ++i) {
    const auto of = [&](Statistic name) { return x.rows[name][i]; };
    if (tail.name == kNce) {
      double sum = 0.0;
      for (int64_t p = 0; p < x.n_pos; ++p) {
        const int64_t at = i * x.n_pos + p;
        const float up = given[each * at], q = -nce_slope_positive(of(kNegLse), x.pos[at]) * up * ways;
        sum += q;
        d_pos[at] = -q;
        if (!x.columns[kNegLse]) continue;
        const int64_t column = x.column(i, p);
        const float back = -nce_slope_positive(x.columns[kNegLse][column], x.pos[at]) * up * ways;
        d_pos[at] -= back;
        d_columns[kNegLse][column] += back;
      }
      d[kNegLse][i] = static_cast<float>(sum);
    } else if (tail.name == kSigmoid) {
      const float up = given[each * i];
      for (int64_t p = 0; p < x.n_pos; ++p)
        d_pos[i * x.n_pos + p] = nce_slope_positive(0.0f, x.pos[i * x.n_pos + p]) * up;
      d[kNegSoftplus][i] = up + nan_of(of(kNegSoftplus));  // the weight of an infinite score is 1, and would look sound
    } else {
      const float up = given[each * i], count = of(kPosCount);
      const float share = count > 0.0f ? supervised_share(of(kNegLse), of(kPosLse), count) * up : nan_of(of(kNegLse));
      d[kNegLse][i] = share;
      d[kPosLse][i] = -share;
      d[kPosGap][i] = tail.name == kLogOut && count > 1.0f ? up : 0.0f;
    }
  }
  return out;
}

}  // namespace fused_nce
