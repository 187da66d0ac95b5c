// The operators of the `cuda` backend. Their CPU kernels play the GPU (host.cpp), for the tests; the GPU's own are in
// device.cpp, where nvcc was there to build it.
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>

#include "machines.h"
#include "sweep.h"

namespace fused_nce {
namespace cuda {

namespace {

using Statistics = std::tuple<at::Tensor, at::Tensor>;
using SummaryTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using GradientTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor>;
using LossTuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// The machine that q is on, as the current device while it lives.
class Lease {
 public:
  explicit Lease(const at::Tensor& q) : guard_(q.device()), machine_(machine_of(q)) {}
  const Machine& operator*() const { return *machine_; }

 private:
  static std::unique_ptr<Machine> machine_of(const at::Tensor& q) {
#ifdef FUSED_NCE_CUDA
    if (q.is_cuda()) return device_machine();
#endif
    return host_machine();
  }

  c10::DeviceGuard guard_;
  std::unique_ptr<Machine> machine_;
};

// A weight of an NCE tail is at most n_c * nce_weight, or 2 * square_weight * |s|, where |s| <= 512 is taken as usual:
// float16 weights then overflow, into infinite gradients, beyond |s| = 131072.
float peak_of(const SweepInputs& in, const Upstream& upstream) {
  return std::max(std::abs(upstream.nce_weight) * static_cast<float>(in.scoring.n_c),
                  1024.0f * std::abs(upstream.square_weight));
}

// neg_lse, neg_max and square are the rows of one (3, N) tensor, as the caller wants them: no copy, no launch.
RowStatistics statistics_in(const at::Tensor& pos, const at::Tensor& rows) {
  return {pos, rows.select(0, 0), rows.select(0, 1), rows.select(0, 2)};
}

at::Tensor checked_scale(const std::optional<at::Tensor>& scale_tensor, const at::Tensor& q) {
  if (!scale_tensor) return {};
  TORCH_CHECK_TYPE(scale_tensor->scalar_type() == at::kFloat, "scale_tensor is ", scale_tensor->scalar_type(),
                   ", needed: float32");
  TORCH_CHECK_VALUE(scale_tensor->dim() == 0 && scale_tensor->device() == q.device(), "scale_tensor has shape ",
                    scale_tensor->sizes(), " on ", scale_tensor->device(), ", needed: 0-d on ", q.device());
  return *scale_tensor;
}

Statistics stats(const at::Tensor& q, const at::Tensor& k, double scale,
                 const std::optional<at::Tensor>& scale_tensor, int64_t n_c, int64_t rows_per_image, int64_t offset,
                 double clip, int64_t workspace_bytes) {
  const auto in = inputs(q, k, scale, n_c, rows_per_image, offset, clip, false, false, false, workspace_bytes, {n_c});
  const at::Tensor pos = at::empty({q.size(0), n_c}, floats(q)), rows = at::empty({3, q.size(0)}, floats(q));
  sweep(*Lease(q), in, checked_scale(scale_tensor, q), true, false, statistics_in(pos, rows), {}, 1.0f, {});
  return {pos, rows};
}

GradientTuple grads(const at::Tensor& q, const at::Tensor& k, double scale,
                    const std::optional<at::Tensor>& scale_tensor, int64_t n_c, int64_t rows_per_image, int64_t offset,
                    double clip, const at::Tensor& pos, const at::Tensor& neg_lse, const at::Tensor& d_pos,
                    const at::Tensor& d_neg_lse, const at::Tensor& d_square, bool need_q, bool need_k, bool need_scale,
                    int64_t workspace_bytes) {
  const auto in =
      inputs(q, k, scale, n_c, rows_per_image, offset, clip, need_q, need_k, need_scale, workspace_bytes, {n_c});
  const int64_t n = q.size(0);
  const RowStatistics stats{coefficients("pos", pos, {n, n_c}), coefficients("neg_lse", neg_lse, {n}), {}, {}};
  const Upstream upstream{coefficients("d_pos", d_pos, {n, n_c}), coefficients("d_neg_lse", d_neg_lse, {n}),
                          coefficients("d_square", d_square, {n})};
  const Gradients out = new_gradients(in);
  const float unit = unit_of(element_of(q.scalar_type()), 1.0f);
  if (need_q || need_k || need_scale)
    sweep(*Lease(q), in, checked_scale(scale_tensor, q), false, true, stats, upstream, unit, out);
  return {out.dq, out.dk, out.dscale};
}

LossTuple loss(const at::Tensor& q, const at::Tensor& k, double scale,
               const std::optional<at::Tensor>& scale_tensor, int64_t n_c, int64_t rows_per_image, int64_t offset,
               double clip, double nce_weight, double square_weight, bool need_q, bool need_k, bool need_scale,
               int64_t workspace_bytes) {
  const auto in =
      inputs(q, k, scale, n_c, rows_per_image, offset, clip, need_q, need_k, need_scale, workspace_bytes, {n_c});
  const at::Tensor pos = at::empty({q.size(0), n_c}, floats(q)), rows = at::empty({3, q.size(0)}, floats(q));
  const Upstream upstream{{}, {}, {}, static_cast<float>(nce_weight), static_cast<float>(square_weight)};
  const Gradients out = new_gradients(in);
  const float unit = unit_of(element_of(q.scalar_type()), peak_of(in, upstream));
  sweep(*Lease(q), in, checked_scale(scale_tensor, q), true, need_q || need_k || need_scale, statistics_in(pos, rows),
        upstream, unit, out);
  return {pos, rows, out.dq, out.dk, out.dscale};
}

// loss, nce, penalty, report of the NCE tail; nce (N, n_c) where `elements`, else its mean or sum.
SummaryTuple summary(const at::Tensor& pos, const at::Tensor& rows, int64_t columns, double penalty, bool mean,
                     bool elements) {
  check_matrix("pos", pos);
  const int64_t n = pos.size(0), n_c = pos.size(1), images = columns / n_c;
  const at::Tensor p = coefficients("pos", pos, {n, n_c}), r = coefficients("rows", rows, {3, n});
  const float* statistics = r.data_ptr<float>();
  const auto options = floats(pos);
  const at::Tensor loss = at::empty({}, options), nce = at::empty({}, options), cost = at::empty({}, options),
                   report = at::empty({5}, options), each = elements ? at::empty_like(p) : at::Tensor();
  const int groups = summary_groups(p.numel());
  const at::Tensor partials = at::empty({groups * static_cast<int64_t>(sizeof(Totals))}, options.dtype(at::kByte));
  const double pairs = static_cast<double>(n) * static_cast<double>(columns);
  (*Lease(pos)).summarize({p.data_ptr<float>(), statistics, statistics + n, statistics + 2 * n, n, n_c, mean,
                           static_cast<float>(penalty / pairs),
                           static_cast<float>(std::log1p(static_cast<double>((images - 1) * n_c))),
                           static_cast<float>(std::log(images)), static_cast<float>(std::log(n_c)),
                           static_cast<Totals*>(partials.data_ptr()), groups, loss.data_ptr<float>(),
                           nce.data_ptr<float>(), cost.data_ptr<float>(), report.data_ptr<float>(),
                           elements ? each.data_ptr<float>() : nullptr});
  return {loss, elements ? each : nce, cost, report};
}

void implement(torch::Library& m) {
  m.impl("cuda_stats", &stats);
  m.impl("cuda_grads", &grads);
  m.impl("cuda_loss", &loss);
  m.impl("cuda_summary", &summary);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_nce, m) {
  m.def(
      "cuda_stats(Tensor q, Tensor k, float scale, Tensor? scale_tensor, int n_c, int rows_per_image, int offset, "
      "float clip, int workspace_bytes) -> (Tensor pos, Tensor rows)");
  m.def(
      "cuda_grads(Tensor q, Tensor k, float scale, Tensor? scale_tensor, int n_c, int rows_per_image, int offset, "
      "float clip, Tensor pos, Tensor neg_lse, Tensor d_pos, Tensor d_neg_lse, Tensor d_square, bool need_q, "
      "bool need_k, bool need_scale, int workspace_bytes) -> (Tensor dq, Tensor dk, Tensor dscale)");
  m.def(
      "cuda_loss(Tensor q, Tensor k, float scale, Tensor? scale_tensor, int n_c, int rows_per_image, int offset, "
      "float clip, float nce_weight, float square_weight, bool need_q, bool need_k, bool need_scale, "
      "int workspace_bytes) -> (Tensor pos, Tensor rows, Tensor dq, Tensor dk, Tensor dscale)");
  m.def(
      "cuda_summary(Tensor pos, Tensor rows, int columns, float penalty, bool mean, bool elements) -> (Tensor loss, "
      "Tensor nce, Tensor penalty, Tensor report)");
}

TORCH_LIBRARY_IMPL(fused_nce, CPU, m) { implement(m); }
#ifdef FUSED_NCE_CUDA
TORCH_LIBRARY_IMPL(fused_nce, CUDA, m) { implement(m); }
#endif

}  // namespace cuda
}  // namespace fused_nce
