// From the statistics of the rows to the numbers that a loss reports, and back to dL/d statistic: the formulas of
// core/tails.py. The terms of nce are one text for GPU and CPU.
#pragma once

#include "atoms.h"

namespace fused_nce {

// Sums over all positives, and over all rows.
template <class Real>
struct NceTotals {
  Real nce, bound, pos, top1, neg_lse, square;
};

template <class Real>
struct AddNceTotals {
  FUSED_NCE_HD NceTotals<Real> operator()(const NceTotals<Real>& a, const NceTotals<Real>& b) const {
    return {a.nce + b.nce,   a.bound + b.bound,     a.pos + b.pos,
            a.top1 + b.top1, a.neg_lse + b.neg_lse, a.square + b.square};
  }
};

constexpr int kNceReport = 5;

// Of one positive; `first` of its row. `log_positives` is log n_c; `square` null where there is no penalty.
template <class Real>
FUSED_NCE_HD NceTotals<Real> nce_terms(float pos, float neg_lse, float neg_max, const float* square, bool first,
                                       float log_positives) {
  const float gap = portable::deficit(neg_lse, pos);
  return {portable::softplus(gap), portable::softplus(gap - log_positives), pos, pos > neg_max ? 1.0f : 0.0f,
          first ? neg_lse : 0.0f,  first && square ? *square : 0.0f};
}

// `chance` is log(1 + (n_k - 1) n_c), `log_images` log n_k.
template <class Real>
FUSED_NCE_HD void write_nce_report(const NceTotals<Real>& all, Real elements, Real rows, Real chance, Real log_images,
                                   float* out) {
  out[0] = static_cast<float>(all.top1 / elements);
  out[1] = static_cast<float>(all.pos / elements);
  out[2] = static_cast<float>(all.neg_lse / rows);
  out[3] = static_cast<float>(all.nce / elements - chance);
  out[4] = static_cast<float>(log_images - all.bound / elements);
}

}  // namespace fused_nce
