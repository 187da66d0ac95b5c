// Rows brought to norm 1 before the scores, with the scores of keys of their own, and the gradient's way back. A group
// of threads has a row; `Numbers` reads and writes the inputs' type.
#pragma once

#include "rows.h"

namespace fused_nce {
namespace cuda {

constexpr int kUnitThreads = 128;
constexpr float kLeastNorm = 1e-12f;  // a row below it is divided by it, and one of zeros stays

struct UnitSide {
  const void* x;  // (rows, width), `stride` apart
  int64_t stride, rows;
  void* out;  // (rows, width), `out_stride` apart: unit rows, rounded to the inputs' type; null: of nobody's use
  int64_t out_stride;
  float* norms;  // (rows) out: NaN beyond float
};

// Of q and of k, or of q and a key of each row.
struct Units {
  UnitSide q, k;
  int64_t width;
  float* positives;  // (rows of q) out: q and k have as many rows, and this is scale * <q, k>; null: they are apart
                     // with a scale tensor as many more: <q, k>
  float scale;
  const float* scale_tensor;  // one more factor, or null

  FUSED_NCE_HD int64_t groups() const { return positives ? q.rows : q.rows + k.rows; }
};

FUSED_NCE_HD float divisor_of(float norm) { return norm < kLeastNorm ? kLeastNorm : norm; }

template <class F, class Group>
FUSED_NCE_HD float sum_over(Group& group, int64_t width, const F& f) {
  return group.reduce(
      [&](int thread, int threads) {
        float sum = 0.0f, error = 0.0f;
        for (int64_t d = thread; d < width; d += threads) add_exactly(sum, error, f(d));
        return sum - error;
      },
      Add());
}

// Elements of row i, by the thread that has them.
template <class F, class Group>
FUSED_NCE_HD void for_width(Group& group, int64_t width, const F& f) {
  group.each([&](int thread, int threads) {
    for (int64_t d = thread; d < width; d += threads) f(d);
  });
}

// One row's norm, and the row divided by it; its divisor.
template <class Numbers, class Group>
FUSED_NCE_HD float unit_row(Group& group, const UnitSide& side, int64_t width, int64_t i) {
  const int64_t from = i * side.stride;
  const float square = sum_over(group, width, [&](int64_t d) {
    const float x = Numbers::read(side.x, from + d);
    return x * x;
  });
  const float root = __builtin_sqrtf(square), norm = root + 0.0f * root;  // x / infinity would be zeros like any others
  const float divisor = divisor_of(norm);
  if (group.first()) side.norms[i] = norm;
  if (side.out)
    for_width(group, width, [&](int64_t d) {
      Numbers::write(side.out, i * side.out_stride + d, Numbers::read(side.x, from + d) / divisor);
    });
  return divisor;
}

// What a row is in the scores: divided, and rounded to the inputs' type.
template <class Numbers>
FUSED_NCE_HD float unit_at(const void* x, int64_t at, float divisor) {
  return Numbers::rounded(Numbers::read(x, at) / divisor);
}

template <class Numbers, class Group>
FUSED_NCE_HD void unit_rows(Group& group, const Units& all, int64_t g) {
  if (!all.positives) {
    const bool first = g < all.q.rows;
    unit_row<Numbers>(group, first ? all.q : all.k, all.width, first ? g : g - all.q.rows);
    return;
  }
  const float of_q = unit_row<Numbers>(group, all.q, all.width, g),
              of_k = unit_row<Numbers>(group, all.k, all.width, g);
  const float product = sum_over(group, all.width, [&](int64_t d) {
    return unit_at<Numbers>(all.q.x, g * all.q.stride + d, of_q) *
           unit_at<Numbers>(all.k.x, g * all.k.stride + d, of_k);
  });
  const float scale = all.scale_tensor ? all.scale * *all.scale_tensor : all.scale;
  if (!group.first()) return;
  all.positives[g] = scale * product;  // fault: gpu-own-score
  if (all.scale_tensor) all.positives[all.q.rows + g] = product;
}

struct ThroughSide {
  const void* x;  // (rows, width), `stride` apart
  int64_t stride, rows;
  const float* norms;    // (rows)
  const void* gradient;  // (rows, width), `gradient_stride` apart: dL/d unit row at upstream 1
  int64_t gradient_stride;
  bool wide;  // float, else of the inputs' type
  void* out;  // (rows, width) of the inputs' type: dL/dx
};

// Of q and k, which may have no rows. `own`: the key of each row of q, whose score is its positive; x null: none.
struct Throughs {
  ThroughSide q, k;
  int64_t width;
  const float* upstream;
  UnitSide own;
  const float *pos, *neg_lse;  // (rows of q)
  float unit;                  // of the tail
  float scale;
  const float* scale_tensor;
};

// upstream * (g - u <u, g>) / norm.
template <class Numbers, class Group>
FUSED_NCE_HD void through_row(Group& group, const Throughs& all, int64_t g) {
  const bool first = g < all.q.rows;
  const ThroughSide& side = first ? all.q : all.k;
  const int64_t i = first ? g : g - all.q.rows, from = i * side.stride, to = i * all.width,
                of = i * side.gradient_stride;
  const float norm = side.norms[i], divisor = divisor_of(norm);
  float d_score = 0.0f, own_divisor = 1.0f;
  if (first && all.own.x) {
    const float scale = all.scale_tensor ? all.scale * *all.scale_tensor : all.scale;
    d_score = scale * all.unit * nce_slope_positive(all.neg_lse[i], all.pos[i]);  // fault: gpu-own-gradient
    own_divisor = divisor_of(all.own.norms[i]);
  }
  const auto gradient_at = [&](int64_t d) {
    const float found =
        side.wide ? static_cast<const float*>(side.gradient)[of + d] : Numbers::read(side.gradient, of + d);
    if (!first || !all.own.x) return found;
    return found + d_score * unit_at<Numbers>(all.own.x, i * all.own.stride + d, own_divisor);
  };
  float along =
      sum_over(group, all.width, [&](int64_t d) { return Numbers::read(side.x, from + d) / divisor * gradient_at(d); });
  if (norm < kLeastNorm) along = 0.0f;
  const float upstream = *all.upstream;
  for_width(group, all.width, [&](int64_t d) {
    const float u = Numbers::read(side.x, from + d) / divisor;
    Numbers::write(side.out, to + d, upstream * ((gradient_at(d) - u * along) / divisor));  // fault: gpu-through-norm
  });
}

}  // namespace cuda
}  // namespace fused_nce
