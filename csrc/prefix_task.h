// A call of several prefixes (fused_nce/core/prefixes.py), as both drivers take it.
#pragma once

#include <ATen/ops/zeros.h>

#include <tuple>
#include <utility>
#include <vector>

#include "problem.h"

namespace fused_nce {

struct PrefixTask {
  bool statistics, gradients;      // as of a `Task`
  std::vector<int64_t> widths;     // K, ascending
  std::vector<double> weights;     // K, of the loss; none where dL/d statistic are given
  float unit;                      // of the loss
  at::Tensor of_q, of_k;           // (K, N), (K, M) inverse norms
  at::Tensor pos, rows;            // (K, N, P), (K, S, N): written, or read
  at::Tensor d_pos, d_rows;        // the same shapes; undefined where the tail gives them
  Gradients out;                   // of unnormalised products: the norms' part is still to come
  at::Tensor row_sums, line_sums;  // (K, N), (K, M) sums of w * r
};

using PrefixTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The arguments of both operators after those of the scores, in C++ and in a schema.
#define FUSED_NCE_PREFIXES                                                                                        \
  const at::Tensor &of_q, const at::Tensor &of_k, std::vector<int64_t> widths, const std::vector<double>&weights, \
      double unit, const std::vector<at::Tensor>&found, bool need_q, bool need_k, bool need_sums,                 \
      int64_t workspace_bytes, double hardness
#define FUSED_NCE_PREFIXES_SCHEMA                                                                       \
  "Tensor of_q, Tensor of_k, int[] widths, float[] weights, float unit, Tensor[] found, bool need_q, "  \
  "bool need_k, bool need_sums, int workspace_bytes, float hardness=0.0) -> (Tensor pos, Tensor rows, " \
  "Tensor dq, Tensor dk, Tensor row_sums, Tensor line_sums)"

// Statistics (`found` empty), gradients from given ones, or, with weights, both of a sum of losses; s statistics a row.
inline PrefixTask prefix_task(const SweepInputs& in, int64_t s, const at::Tensor& of_q, const at::Tensor& of_k,
                              std::vector<int64_t> widths, const std::vector<double>& weights, double unit,
                              const std::vector<at::Tensor>& found) {
  const int64_t n = in.q.size(0), m = in.k.size(0), p = in.layout.n_pos, parts = static_cast<int64_t>(widths.size());
  const auto options = floats(in.q);
  PrefixTask task{.statistics = found.empty(),
                  .gradients = in.need_q || in.need_k || in.need_scale,
                  .widths = std::move(widths),
                  .weights = weights,
                  .unit = static_cast<float>(unit),
                  .of_q = coefficients("of_q", of_q, {parts, n}),
                  .of_k = coefficients("of_k", of_k, {parts, m})};
  TORCH_CHECK_VALUE(!task.statistics || !task.gradients || weights.size() == task.widths.size(), "weights has ",
                    weights.size(), " numbers, needed: one of each prefix");
  if (task.statistics) {
    task.pos = at::full({parts, n, p}, std::numeric_limits<float>::quiet_NaN(), options);
    task.rows = at::empty({parts, s, n}, options);
  } else {
    task.pos = coefficients("pos", found.at(0), {parts, n, p});
    task.rows = coefficients("rows", found.at(1), {parts, s, n});
    task.d_pos = coefficients("d_pos", found.at(2), {parts, n, p});
    task.d_rows = coefficients("d_rows", found.at(3), {parts, s, n});
  }
  task.out = new_gradients(in);
  task.row_sums = at::zeros({task.gradients ? parts : 0, n}, options);
  task.line_sums = at::zeros({task.gradients ? parts : 0, m}, options);
  return task;
}

inline PrefixTuple results_of(const PrefixTask& task) {
  return {task.pos, task.rows, task.out.dq, task.out.dk, task.row_sums, task.line_sums};
}

}  // namespace fused_nce
