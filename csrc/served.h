// What one function serves of a loss' calls, and what it is told.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>

#include "cpu/prefixes.h"
#include "cpu/sweep.h"
#include "tails.h"

namespace fused_nce {

enum class LayoutKind { block, index, labels, separate };

// A spec and a tail, read once.
struct Form {
  LayoutKind layout;
  int64_t n_c, rows_per_image, positives;  // Block's, Separate's
  bool drop_self, biased;
  double clip, hardness;  // 0: none
  Wanted wanted;
  TailOf tail;
  std::vector<std::string> report;  // the names of its numbers
  std::string code;                 // of the spec
  std::vector<int64_t> widths;      // of the prefixes; none: the rows as they are
};

// What a call is told beside tensors.
struct Call : torch::CustomClassHolder {
  std::shared_ptr<const Form> form;
  double scale;
  int64_t offset, report_groups, workspace_bytes;
  bool normalize, parts;
  bool twins = false;         // k is the second view of q's rows, and both are one tensor in both roles
  std::array<bool, 5> needs;  // of q, k, scale_tensor, bias, positives
  std::array<at::ScalarType, 5> dtypes;
};

// The tensors, in the order of the saved ones; those that are not given are undefined.
struct Given {
  at::Tensor q, k, scale_tensor, bias, positives, own_keys, row_ids, column_ids;

  const at::Tensor& keys() const { return k.defined() ? k : q; }
  std::array<const at::Tensor*, 5> leaves() const { return {&q, &k, &scale_tensor, &bias, &positives}; }

  // Whether all are on one device.
  bool together() const {
    const auto there = [&](const at::Tensor* x) { return !x->defined() || x->device() == q.device(); };
    return there(&k) && there(&scale_tensor) && there(&bias) && there(&positives) && there(&own_keys) &&
           there(&row_ids) && there(&column_ids);
  }
};

// Whether rows are divided by their norms strip by strip and tile by tile, which is worth it where unit rows of all
// would be more than the workspace's fourth: the same numbers, each divided once a strip.
inline bool divides(const Call& call, const Given& x) {
  const int64_t rows = x.q.size(0) + (x.k.defined() ? x.k.size(0) : 0);
  return call.normalize && !x.own_keys.defined() && x.q.scalar_type() == at::kFloat &&
         16 * rows * x.q.size(1) > call.workspace_bytes;
}

inline bool in_range(const at::Tensor& ids, int64_t least, int64_t most) {
  const at::Tensor all = ids.contiguous();
  const int64_t* at = all.const_data_ptr<int64_t>();
  return std::all_of(at, at + all.numel(), [&](int64_t id) { return id >= least && id < most; });
}

inline bool is_number(const at::Tensor& x) { return !x.defined() || (x.dim() == 0 && x.is_floating_point()); }

inline bool are_ids(const at::Tensor& ids, bool wanted, int64_t count) {
  if (!wanted) return !ids.defined();
  return ids.defined() && ids.scalar_type() == at::kLong && ids.dim() == 1 && ids.size(0) == count;
}

// What the checks in Python would let through, and this call serves.
inline bool sound(const Form& form, const Call& call, const Given& x) {
  const auto dtype = x.q.scalar_type();
  if (x.q.dim() != 2 || x.q.numel() == 0 || (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf))
    return false;
  const at::Tensor& k = x.keys();
  if (k.dim() != 2 || k.size(0) == 0 || k.size(1) != x.q.size(1) || k.scalar_type() != dtype) return false;
  const int64_t n = x.q.size(0), m = k.size(0), n_c = form.n_c, per_image = form.rows_per_image;
  if (!std::isfinite(call.scale) || !is_number(x.scale_tensor) || !is_number(x.bias) ||
      (x.bias.defined() && !form.biased))
    return false;
  const bool apart = form.layout == LayoutKind::separate, index = form.layout == LayoutKind::index;
  if (apart != (x.positives.defined() || x.own_keys.defined()) || (x.positives.defined() && x.own_keys.defined()))
    return false;
  if (x.positives.defined() && (x.positives.dim() != 2 || x.positives.size(0) != n ||
                                x.positives.size(1) != form.positives || !x.positives.is_floating_point()))
    return false;
  if (x.own_keys.defined() && (x.own_keys.sizes() != x.q.sizes() || x.own_keys.scalar_type() != dtype ||
                               x.own_keys.requires_grad() || form.positives != 1 || form.clip > 0.0 || form.biased))
    return false;
  const bool labels = form.layout == LayoutKind::labels;
  if (!are_ids(x.row_ids, index || labels, n) || !are_ids(x.column_ids, labels, m)) return false;
  if (form.layout == LayoutKind::block) {
    if (n_c < 1 || m % n_c || per_image < 1 || n % per_image || (form.drop_self && n_c != per_image)) return false;
    if (call.offset < 0 || call.offset + n / per_image > m / n_c) return false;
  } else if (form.drop_self && (call.offset < 0 || call.offset > m - n)) {
    return false;
  }
  if (index && !in_range(x.row_ids, 0, m)) return false;
  if (index && form.drop_self &&
      (x.row_ids == at::arange(call.offset, call.offset + n, x.row_ids.options())).any().item<bool>())
    return false;
  if (call.report_groups < 1 || n % call.report_groups) return false;
  if (!form.widths.empty() && (form.widths.back() > x.q.size(1) || call.normalize)) return false;
  return m != (form.layout == LayoutKind::block ? n_c : apart ? 0 : 1);  // no negatives: worth a warning
}

// Whether the workspace holds a plan for every sweep of the call and its backward; the last answer is kept.
inline bool fits(const Form& form, const Call& call, const Given& x) {
  const at::Tensor& k = x.keys();
  const bool shared = !x.k.defined(), labels = form.layout == LayoutKind::labels;
  const unsigned rows = Wanted::mask(form.wanted.rows), columns = Wanted::mask(form.wanted.columns);
  const int64_t image = std::max<int64_t>(form.n_c, form.positives);
  const Elements elements = elements_of(x.q.scalar_type(), x.q.size(1));
  const bool divided = divides(call, x);
  const auto parts = static_cast<int64_t>(form.widths.size());
  const std::array<int64_t, 12> key{x.q.size(0), k.size(0), x.q.size(1), image,   static_cast<int64_t>(elements),
                                    shared,      labels,    rows,        columns, call.workspace_bytes,
                                    divided,     parts};
  static thread_local std::array<int64_t, 12> last{};
  if (key == last) return true;
  for (const bool both : {true, false})
    if (parts && !prefix_workspace_bytes(key[0], key[1], key[2], image, parts, both, true, false, false, key[9]))
      return false;  // fault: whole-prefix-room
  for (const auto& [statistics, gradients] : {std::pair{true, true}, {true, false}, {false, true}}) {
    Work work{x.q.size(0), k.size(0), x.q.size(1), image, elements, statistics && gradients, gradients, gradients,
              gradients,   shared,    labels,      rows,  columns};
    work.divided = divided;
    if (parts == 0 && make_plan(work, call.workspace_bytes).lanes == 0) return false;
  }
  last = key;
  return true;
}

// The limit of core/workspace.py in bytes; 0 where it cannot be read.
inline int64_t workspace_limit() {
  const char* text = std::getenv("FUSED_NCE_WORKSPACE_MB");
  if (!text) return int64_t{16} << 20;
  char* end = nullptr;
  const double mb = std::strtod(text, &end);
  return end != text && *end == 0 && mb > 0.0 && mb < 1e12 ? static_cast<int64_t>(mb * (1 << 20)) : 0;
}

}  // namespace fused_nce
