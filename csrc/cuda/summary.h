// From the statistics of all rows to the numbers that a loss reports: what `core/tails.py` does in some forty small
// operations, whose launches alone would take longer than the GEMMs of a small batch. The same text on GPU and CPU.
#pragma once

#include "../summary.h"
#include "rows.h"

namespace fused_nce {
namespace cuda {

using Totals = NceTotals<float>;
using AddTotals = AddNceTotals<float>;

// One problem's statistics, and what its numbers count for.
struct Summary {
  const float *pos, *neg_lse, *neg_max, *square;  // (N, P), (N); square null where there is no penalty
  int64_t rows, positives;                        // N, P
  float weight;                                   // of its elements
  float penalty_weight;                           // lambda / (N * M)
  float chance, log_images, log_positives;        // log(1 + (n_k - 1) n_c), log n_k, log n_c
  int report_groups;  // row i is of group i mod report_groups, each with a report of its own
  int ctas;           // of each report
  float* report;      // (reports, kReport) in the order of core/tails.py
  float* elements;    // (N, P) of weight * nce, or null

  FUSED_NCE_HD int64_t reported() const { return rows / report_groups * positives; }
};

// Problems whose losses are added up.
struct Summaries {
  Summary of[kMostTogether];
  int count, ctas;              // of all their reports
  bool mean;                    // of nce, else the sum
  Totals* partials;             // (ctas)
  float *loss, *nce, *penalty;  // 0-d
};

constexpr int kReport = kNceReport;
// Elements that one thread sums one after the other; all else is a tree.
constexpr int kSummaryThreads = 256;
constexpr int kSummaryElements = 16;

// For the elements of one report.
inline int summary_ctas(int64_t elements) {
  constexpr int64_t share = int64_t{kSummaryThreads} * kSummaryElements;
  return static_cast<int>((elements + share - 1) / share);
}

FUSED_NCE_HD Totals totals_of(const Summary& s, int64_t i, int64_t p) {
  const Totals one = nce_terms<float>(s.pos[i * s.positives + p], s.neg_lse[i], s.neg_max[i],
                                      s.square ? s.square + i : nullptr, p == 0, s.log_positives);
  if (s.elements) s.elements[i * s.positives + p] = s.weight * one.nce;
  return one;
}

FUSED_NCE_HD Totals totals_thread(const Summary& s, int report, int64_t thread, int64_t threads) {
  Totals sum = {};
  for (int64_t e = thread; e < s.reported(); e += threads) {
    // fault: gpu-one-report
    const int64_t turn = e / s.positives, i = turn * s.report_groups + report, p = e - turn * s.positives;
    sum = AddTotals()(sum, totals_of(s, i, p));
  }
  return sum;
}

FUSED_NCE_HD void write_report(const Summary& s, int report, const Totals& all) {
  const int64_t rows = s.rows / s.report_groups;
  write_nce_report(all, static_cast<float>(s.reported()), static_cast<float>(rows), s.chance, s.log_images,
                   s.report + int64_t{report} * kReport);
}

// What a problem, all of whose elements are in, adds to the loss. A weight of 0 leaves the penalty out rather than
// multiply: 0 * infinity would turn a finite loss into NaN.
FUSED_NCE_HD void add_loss(const Summary& s, const Totals& all, bool mean, float& nce, float& penalty) {
  // fault: gpu-problems-added
  nce += s.weight * (mean ? all.nce / static_cast<float>(s.rows * s.positives) : all.nce);
  if (s.penalty_weight > 0.0f) penalty += all.square * s.penalty_weight;
}

FUSED_NCE_HD void write_loss(const Summaries& all, float nce, float penalty) {
  *all.loss = nce + penalty;
  *all.nce = nce;
  *all.penalty = penalty;
}

// CTA number g of all problems in turn. One alone writes the results, as nothing is left to merge.
template <class Group>
FUSED_NCE_HD void sum_up(Group& group, const Summaries& all, int g) {
  int problem = 0, place = g;
  while (place >= all.of[problem].ctas * all.of[problem].report_groups) {
    place -= all.of[problem].ctas * all.of[problem].report_groups;
    ++problem;
  }
  const Summary& s = all.of[problem];
  const int report = place / s.ctas, share = place - report * s.ctas;
  const Totals found = group.reduce(
      [&](int thread, int threads) {
        return totals_thread(s, report, static_cast<int64_t>(share) * threads + thread,
                             static_cast<int64_t>(s.ctas) * threads);
      },
      AddTotals());
  if (!group.first()) return;
  all.partials[g] = found;
  if (all.ctas > 1) return;
  float nce = 0.0f, penalty = 0.0f;
  write_report(s, 0, found);
  add_loss(s, found, all.mean, nce, penalty);
  write_loss(all, nce, penalty);
}

// The reports of one problem, whose every part is in `partials`: `count` of each report, `apart`, the first of the next
// report `next` away. Their sum.
template <class Group>
FUSED_NCE_HD Totals sum_parts(Group& group, const Summary& s, const Totals* partials, int64_t count, int64_t apart,
                              int64_t next) {
  Totals total = {};
  for (int report = 0; report < s.report_groups; ++report, partials += next) {
    const Totals found = group.reduce(
        [&](int thread, int threads) {
          Totals sum = {};
          for (int64_t i = thread; i < count; i += threads) sum = AddTotals()(sum, partials[i * apart]);
          return sum;
        },
        AddTotals());
    if (group.first()) write_report(s, report, found);
    total = AddTotals()(total, found);
  }
  return total;
}

template <class Group>
FUSED_NCE_HD void sum_up_ctas(Group& group, const Summaries& all) {
  const Totals* partials = all.partials;
  float nce = 0.0f, penalty = 0.0f;
  for (int problem = 0; problem < all.count; ++problem) {
    const Summary& s = all.of[problem];
    add_loss(s, sum_parts(group, s, partials, s.ctas, 1, s.ctas), all.mean, nce, penalty);
    partials += int64_t{s.ctas} * s.report_groups;
  }
  if (group.first()) write_loss(all, nce, penalty);
}

// The same of one problem, where a group of threads has a row: its part, and, once all rows' are in, the end.
template <class Group>
FUSED_NCE_HD void sum_up_row(Group& group, const Summaries& all, int64_t i) {
  const Summary& s = all.of[0];
  const Totals found = group.reduce(
      [&](int thread, int threads) {
        Totals sum = {};
        for (int64_t p = thread; p < s.positives; p += threads) sum = AddTotals()(sum, totals_of(s, i, p));
        return sum;
      },
      AddTotals());
  if (group.first()) all.partials[i] = found;
}

template <class Group>
FUSED_NCE_HD void sum_up_rows(Group& group, const Summaries& all) {
  const Summary& s = all.of[0];
  float nce = 0.0f, penalty = 0.0f;
  add_loss(s, sum_parts(group, s, all.partials, s.rows / s.report_groups, s.report_groups, 1), all.mean, nce, penalty);
  if (group.first()) write_loss(all, nce, penalty);
}

}  // namespace cuda
}  // namespace fused_nce
