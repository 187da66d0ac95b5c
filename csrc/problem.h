// What every driver is given and gives back, and the checks of the operators' arguments.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "params.h"

namespace fused_nce {

// Which columns are the positives of which rows, beyond the arithmetic of `Scoring`.
struct Layout {
  int64_t n_pos;          // P
  at::Tensor row_ids;     // (N) int64: the image of each row, or its label; undefined: by arithmetic
  int64_t itself = -1;    // column that row 0 is, as row i is column itself + i, left out of every set; -1: none is
  at::Tensor positives;   // (N, P) transformed scores from elsewhere, no column being a positive; undefined: none
  at::Tensor column_ids;  // (M) int64: the label of each column; undefined: by arithmetic
  bool by_marks = false;  // the positives are `Filters::several`

  bool by_arithmetic() const { return !row_ids.defined() && !positives.defined() && !by_marks; }
};

// What takes columns out of a row's negatives, and out of no other set. Ceilings are of each prefix, or of one.
struct Filters {
  at::Tensor ceiling;                          // (K, N): a dot product above is left out; undefined: none is
  at::Tensor guide_ceiling, guide_q, guide_k;  // (K, N), (N, G), (M, G): likewise by the guides' dot products
  at::Tensor several;                          // (N, p) int64: columns that are left out, -1 for none

  bool any() const { return ceiling.defined() || guide_ceiling.defined() || several.defined(); }
};

// The statistics of a spec, in the order of the arrays that hold them.
struct Wanted {
  std::vector<int64_t> rows, columns;

  static unsigned mask(const std::vector<int64_t>& names) {
    unsigned bits = 0;
    for (const int64_t name : names) bits |= 1u << name;
    return bits;
  }
};

struct SweepInputs {
  at::Tensor q, k;  // (N, D), (M, D), rows contiguous
  Scoring scoring;
  Layout layout;
  bool need_q, need_k, need_scale;
  int64_t workspace_bytes;
  bool shared;  // q is k
  Wanted wanted = {};
  Filters filters = {};
  at::Tensor q_norms = {}, k_norms = {};  // (N), (M) float: rows count divided by these; undefined: as they are
  bool wide = false;  // gradients are shares of a sum over processes, which alone is rounded to 16 bits
};

// Statistics, written by stats and loss and read by grads; and dL/d statistic in the same shapes.
struct StatisticTensors {
  at::Tensor pos;            // (N, P)
  at::Tensor rows, columns;  // (S, N), (S', M)
};

// The rows of (S, count) by name.
inline ByStatistic arrays_of(const at::Tensor& x, const std::vector<int64_t>& names) {
  ByStatistic out;
  for (size_t s = 0; s < names.size(); ++s)
    out[static_cast<int>(names[s])] = x.data_ptr<float>() + static_cast<int64_t>(s) * x.size(1);
  return out;
}

struct Gradients {
  at::Tensor dq, dk, dscale;  // float, dk possibly the inputs' type; those not needed have no elements
  at::Tensor dbias = {};
};

// GEMMs read rows in place where their elements are adjacent and rows do not overlap; anything else is copied.
inline at::Tensor with_rows(const at::Tensor& x) {
  const bool in_place = (x.size(1) == 1 || x.stride(1) == 1) && x.stride(0) >= x.size(1);
  return in_place ? x : x.clone(at::MemoryFormat::Contiguous);
}

inline void check_matrix(const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(0) > 0 && x.size(1) > 0, name, " has shape ", x.sizes(),
                    ", needed: two non-empty dimensions");
  const auto type = x.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name, " is ", type,
                   ", needed: float32, bfloat16 or float16");
}

// The arguments of every operator that say which columns are a row's own, in C++, handed on, and in a schema.
#define FUSED_NCE_LAYOUT                                                                                     \
  int64_t n_c, int64_t rows_per_image, int64_t offset, double clip, const std::optional<at::Tensor>&row_ids, \
      int64_t itself, const std::optional<at::Tensor>&positives, const std::optional<at::Tensor>&column_ids
#define FUSED_NCE_LAYOUT_GIVEN n_c, rows_per_image, offset, clip, row_ids, itself, positives, column_ids
#define FUSED_NCE_LAYOUT_SCHEMA \
  "int n_c, int rows_per_image, int offset, float clip, Tensor? row_ids, int itself, Tensor? positives, Tensor? column_ids, "

inline SweepInputs inputs(const at::Tensor& q, const at::Tensor& k, double scale, int64_t n_c, int64_t rows_per_image,
                          int64_t offset, double clip, bool need_q, bool need_k, bool need_scale,
                          int64_t workspace_bytes, Layout layout) {
  check_matrix("q", q);
  check_matrix("k", k);
  TORCH_CHECK_TYPE(q.scalar_type() == k.scalar_type(), "k is ", k.scalar_type(), ", needed: the dtype of q, ",
                   q.scalar_type());
  TORCH_CHECK_VALUE(q.size(1) == k.size(1), "k has width ", k.size(1), ", needed: the width of q, ", q.size(1));
  TORCH_CHECK_VALUE(n_c > 0 && k.size(0) % n_c == 0, "n_c is ", n_c, ", needed: a divisor of the ", k.size(0),
                    " columns");
  TORCH_CHECK_VALUE(rows_per_image > 0, "rows_per_image is ", rows_per_image, ", needed: at least 1");
  const int64_t images = k.size(0) / n_c, last = (q.size(0) - 1) / rows_per_image + offset;
  TORCH_CHECK_VALUE(!layout.by_arithmetic() || (offset >= 0 && last < images), "offset is ", offset,
                    ", so the rows are of images ", offset, " to ", last, ", needed: within the ", images,
                    " images of k");
  TORCH_CHECK_VALUE(clip == 0.0 || (static_cast<float>(clip) > 0.0f && std::isfinite(static_cast<float>(clip))),
                    "clip is ", clip, ", needed: 0 (none) or a positive number in the range of float");
  TORCH_CHECK_VALUE(workspace_bytes > 0, "workspace_bytes is ", workspace_bytes, ", needed: a positive number");
  const Scoring scoring{static_cast<float>(scale), static_cast<float>(clip), n_c, rows_per_image, offset};
  return {with_rows(q), with_rows(k), scoring,         std::move(layout), need_q,
          need_k,       need_scale,   workspace_bytes, q.is_same(k)};
}

// As a `Scoring` has it, of a call whose transform is otherwise the identity, or not.
inline float hardness_of(double hardness, bool identity) {
  const auto found = static_cast<float>(hardness);
  TORCH_CHECK_VALUE(found == 0.0f || (found > 0.0f && std::isfinite(found) && identity), "hardness is ", hardness,
                    ", needed: 0 (none), or a positive number without a clip or a bias");
  return found;
}

inline void check_names(const char* what, const std::vector<int64_t>& names) {
  unsigned seen = 0;
  for (const int64_t name : names) {
    TORCH_CHECK_VALUE(name >= 0 && name < kStatistics && !(seen >> name & 1u), what, " has ", name,
                      ", needed: each of 0 to ", kStatistics - 1, " at most once");
    seen |= 1u << name;
  }
  constexpr unsigned parts = bit_of(kPosLse) | bit_of(kPosCount);
  TORCH_CHECK_VALUE(!(seen & bit_of(kPosGap)) || (seen & parts) == parts, what, " are ", names,
                    ", needed: pos_lse and pos_count beside pos_gap");
}

inline Tail tail_named(const std::string& name) {
  for (int tail = 0; tail < kTails; ++tail)
    if (name == kTailNames[tail]) return static_cast<Tail>(tail);
  TORCH_CHECK_VALUE(false, "tail is '", name, "', needed: nce, log_out, log_in or sigmoid");
}

inline at::TensorOptions floats(const at::Tensor& q) { return q.options().dtype(at::kFloat); }

inline at::Tensor coefficients(const char* name, const at::Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, name, " is ", x.scalar_type(), ", needed: float32");
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " has shape ", x.sizes(), ", needed: ", shape);
  return x.contiguous();
}

inline void check_ids(const char* name, const at::Tensor& x, int64_t count) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, name, " is ", x.scalar_type(), ", needed: int64");
  TORCH_CHECK_VALUE(x.sizes() == at::IntArrayRef{count}, name, " has shape ", x.sizes(), ", needed: ", count);
}

// `itself` -1: no row is a column of its own.
inline Layout layout_of(const at::Tensor& q, const at::Tensor& k, int64_t n_c, const std::optional<at::Tensor>& row_ids,
                        int64_t itself, const std::optional<at::Tensor>& positives,
                        const std::optional<at::Tensor>& column_ids) {
  const int64_t n = q.size(0), m = k.size(0);
  TORCH_CHECK_VALUE(m < int64_t{1} << 31, "k has ", m, " rows, needed: fewer than 2^31");
  TORCH_CHECK_VALUE(itself == -1 || (itself >= 0 && itself + n <= m), "itself is ", itself, ", needed: -1, or 0 to ",
                    m - n);
  TORCH_CHECK_VALUE(!column_ids || row_ids, "row_ids is None, needed: the rows' labels, as column_ids are given");
  Layout out{n_c, {}, itself, {}, {}};
  if (itself >= 0 && !row_ids && !positives) --out.n_pos;  // it lies in its own image
  if (row_ids) {
    check_ids("row_ids", *row_ids, n);
    out.row_ids = row_ids->contiguous();
  }
  if (column_ids) {
    check_ids("column_ids", *column_ids, m);
    out.column_ids = column_ids->contiguous();
    out.n_pos = 0;
  }
  if (positives) {
    TORCH_CHECK_VALUE(positives->dim() == 2 && positives->size(0) == n, "positives has shape ", positives->sizes(),
                      ", needed: ", n, " rows");
    out.positives = coefficients("positives", *positives, positives->sizes());
    out.n_pos = positives->size(1);
  }
  return out;
}

#define FUSED_NCE_FILTERS                                                                 \
  const std::optional<at::Tensor>&ceiling, const std::optional<at::Tensor>&guide_ceiling, \
      const std::optional<at::Tensor>&guide_q, const std::optional<at::Tensor>&guide_k,   \
      const std::optional<at::Tensor>&several
#define FUSED_NCE_FILTERS_GIVEN ceiling, guide_ceiling, guide_q, guide_k, several
#define FUSED_NCE_FILTERS_SCHEMA \
  "Tensor? ceiling, Tensor? guide_ceiling, Tensor? guide_q, Tensor? guide_k, Tensor? several, "

// Of `parts` prefixes, or 1.
inline Filters filters_of(const at::Tensor& q, const at::Tensor& k, FUSED_NCE_FILTERS, int64_t parts) {
  const int64_t n = q.size(0);
  Filters out;
  if (ceiling) out.ceiling = coefficients("ceiling", *ceiling, {parts, n});
  if (guide_ceiling) {
    TORCH_CHECK_VALUE(guide_q && guide_k && guide_q->dim() == 2, "guide_q is ", guide_q ? "no matrix" : "None",
                      ", needed: (N, G) and (M, G) beside guide_ceiling");
    out.guide_ceiling = coefficients("guide_ceiling", *guide_ceiling, {parts, n});
    out.guide_q = coefficients("guide_q", *guide_q, {n, guide_q->size(1)});
    out.guide_k = coefficients("guide_k", *guide_k, {k.size(0), guide_q->size(1)});
  }
  if (several) {
    TORCH_CHECK_VALUE(several->scalar_type() == at::kLong && several->dim() == 2 && several->size(0) == n,
                      "several is ", several->scalar_type(), " of ", several->sizes(), ", needed: int64 of ", n,
                      " rows");
    out.several = several->contiguous();
  }
  return out;
}

inline Gradients new_gradients(const SweepInputs& in, at::ScalarType dk_type = at::kFloat) {
  const auto options = floats(in.q);
  return {at::empty(in.need_q ? in.q.sizes() : at::IntArrayRef{0}, options),
          at::empty(in.need_k ? in.k.sizes() : at::IntArrayRef{0}, options.dtype(dk_type)),
          in.need_scale ? at::empty({}, options) : at::empty({0}, options)};
}

}  // namespace fused_nce
