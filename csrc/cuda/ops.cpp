// The operators of the `cuda` backend. Their CPU kernels play the GPU (host.cpp), for the tests; the GPU's own are in
// device.cpp, where nvcc was there to build it.
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "machines.h"
#include "sweep.h"

namespace fused_nce {
namespace cuda {

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Statistics = std::tuple<Tensor, Tensor, Tensor>;
using SummaryTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using GradientTuple = std::tuple<Tensor, Tensor, Tensor>;
using LossTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

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

// A weight of an NCE tail is at most P * nce_weight, or 2 * square_weight * |s|, where |s| <= 512 is taken as usual:
// float16 weights then overflow, into infinite gradients, beyond |s| = 131072.
float peak_of(const SweepInputs& in, const Upstream& upstream) {
  return std::max(std::abs(upstream.nce_weight) * static_cast<float>(in.layout.n_pos),
                  1024.0f * std::abs(upstream.square_weight));
}

// k null: q, and one gradient for both roles.
SweepInputs inputs_of(const Tensor& q, const Maybe& k, double scale, int64_t n_c, int64_t rows_per_image,
                      int64_t offset, double clip, const Maybe& row_ids, int64_t itself, const Maybe& positives,
                      bool need_q, bool need_k, bool need_scale, int64_t workspace_bytes) {
  check_matrix("q", q);
  const Tensor& keys = k ? *k : q;
  auto in = inputs(q, keys, scale, n_c, rows_per_image, offset, clip, need_q, need_k && k, need_scale, workspace_bytes,
                   layout_of(q, keys, n_c, row_ids, itself, positives, {}));
  in.shared = !k;
  return in;
}

// neg_lse, neg_max and square are the rows of one (3, N) tensor, as the caller wants them: no copy, no launch. Positives
// from elsewhere are handed on, and one that an index puts nowhere shows it.
std::pair<RowStatistics, Tensor> new_rows(const SweepInputs& in) {
  const int64_t n = in.q.size(0);
  const auto options = floats(in.q);
  const Tensor rows = at::empty({3, n}, options);
  Tensor pos = at::empty({n, in.layout.n_pos}, options);
  if (in.layout.positives.defined()) pos.copy_(in.layout.positives);
  if (in.layout.row_ids.defined()) pos.fill_(std::numeric_limits<float>::quiet_NaN());
  return {{pos, rows.select(0, 0), rows.select(0, 1), rows.select(0, 2)}, rows};
}

ColumnStatistics columns_in(const Tensor& columns) {
  return {columns.select(0, 0), columns.select(0, 1), columns.select(0, 2), {}, {}};
}

Tensor checked_scale(const Maybe& scale_tensor, const Tensor& q) {
  if (!scale_tensor) return {};
  TORCH_CHECK_TYPE(scale_tensor->scalar_type() == at::kFloat, "scale_tensor is ", scale_tensor->scalar_type(),
                   ", needed: float32");
  TORCH_CHECK_VALUE(scale_tensor->dim() == 0 && scale_tensor->device() == q.device(), "scale_tensor has shape ",
                    scale_tensor->sizes(), " on ", scale_tensor->device(), ", needed: 0-d on ", q.device());
  return *scale_tensor;
}

Statistics stats(const Tensor& q, const Maybe& k, double scale, const Maybe& scale_tensor, int64_t n_c,
                 int64_t rows_per_image, int64_t offset, double clip, const Maybe& row_ids, int64_t itself,
                 const Maybe& positives, bool both_ways, int64_t workspace_bytes) {
  const auto in = inputs_of(q, k, scale, n_c, rows_per_image, offset, clip, row_ids, itself, positives, false, false,
                            false, workspace_bytes);
  const auto [out, rows] = new_rows(in);
  const Tensor columns = at::empty({3, both_ways ? in.k.size(0) : 0}, floats(q));
  sweep(*Lease(q), in, checked_scale(scale_tensor, q), {true, false}, out,
        both_ways ? columns_in(columns) : ColumnStatistics(), {}, 1.0f, {});
  return {out.pos, rows, columns};
}

GradientTuple grads(const Tensor& q, const Maybe& k, double scale, const Maybe& scale_tensor, int64_t n_c,
                    int64_t rows_per_image, int64_t offset, double clip, const Maybe& row_ids, int64_t itself,
                    const Maybe& positives, const Tensor& pos, const Tensor& neg_lse, const Tensor& d_pos,
                    const Tensor& d_neg_lse, const Tensor& d_square, const Maybe& column_neg_lse,
                    const Maybe& d_column_neg_lse, const Maybe& d_column_square, bool need_q, bool need_k,
                    bool need_scale, int64_t workspace_bytes) {
  const auto in = inputs_of(q, k, scale, n_c, rows_per_image, offset, clip, row_ids, itself, positives, need_q, need_k,
                            need_scale, workspace_bytes);
  const int64_t n = q.size(0), m = in.k.size(0), n_pos = in.layout.n_pos;
  const auto numbers = [m](const char* name, const Maybe& x) { return x ? coefficients(name, *x, {m}) : Tensor(); };
  const RowStatistics rows{coefficients("pos", pos, {n, n_pos}), coefficients("neg_lse", neg_lse, {n}), {}, {}};
  const ColumnStatistics columns{numbers("column_neg_lse", column_neg_lse), {}, {},
                                 numbers("d_column_neg_lse", d_column_neg_lse),
                                 numbers("d_column_square", d_column_square)};
  TORCH_CHECK_VALUE(columns.neg_lse.defined() == columns.d_neg_lse.defined(),
                    "column_neg_lse and d_column_neg_lse: got one, needed: both or none");
  const Upstream upstream{coefficients("d_pos", d_pos, {n, n_pos}), coefficients("d_neg_lse", d_neg_lse, {n}),
                          coefficients("d_square", d_square, {n})};
  const Task task{false, true};
  const Gradients out = new_results(in, task);
  const float unit = unit_of(element_of(q.scalar_type()), 1.0f);
  if (need_q || in.need_k || need_scale)
    sweep(*Lease(q), in, checked_scale(scale_tensor, q), task, rows, columns, upstream, unit, out);
  return {out.dq, out.dk, out.dscale};
}

LossTuple loss(const Tensor& q, const Maybe& k, double scale, const Maybe& scale_tensor, int64_t n_c,
               int64_t rows_per_image, int64_t offset, double clip, const Maybe& row_ids, int64_t itself,
               const Maybe& positives, double nce_weight, double square_weight, bool need_q, bool need_k,
               bool need_scale, int64_t workspace_bytes) {
  const auto in = inputs_of(q, k, scale, n_c, rows_per_image, offset, clip, row_ids, itself, positives, need_q, need_k,
                            need_scale, workspace_bytes);
  const auto [stats, rows] = new_rows(in);
  const Upstream upstream{{}, {}, {}, static_cast<float>(nce_weight), static_cast<float>(square_weight)};
  const Task task{true, need_q || in.need_k || need_scale};
  const Gradients out = new_results(in, task);
  const float unit = unit_of(element_of(q.scalar_type()), peak_of(in, upstream));
  sweep(*Lease(q), in, checked_scale(scale_tensor, q), task, stats, {}, upstream, unit, out);
  return {stats.pos, rows, out.dq, out.dk, out.dscale};
}

// x *= factor, a float on x's device that the host need not know.
void multiply(const Tensor& x, const Tensor& factor) {
  TORCH_CHECK_VALUE(x.is_non_overlapping_and_dense(), "x has strides ", x.strides(), ", needed: dense memory");
  TORCH_CHECK_TYPE(factor.scalar_type() == at::kFloat, "factor is ", factor.scalar_type(), ", needed: float32");
  TORCH_CHECK_VALUE(factor.dim() == 0 && factor.device() == x.device(), "factor has shape ", factor.sizes(), " on ",
                    factor.device(), ", needed: 0-d on ", x.device());
  if (x.numel() == 0) return;
  (*Lease(x)).multiply(x.data_ptr(), element_of(x.scalar_type()), x.numel(), factor.const_data_ptr<float>());
}

// loss, nce, penalty, report (reports, 5) of the NCE tail; nce (N, P) where `elements`, else its mean or sum. `images` of n_c columns
// each, a positive that stands apart being one more.
SummaryTuple summary(const Tensor& pos, const Tensor& rows, int64_t n_c, int64_t images, int64_t columns,
                     double penalty, bool mean, bool elements, int64_t reports) {
  check_matrix("pos", pos);
  const int64_t n = pos.size(0), positives = pos.size(1), known = penalty > 0.0 ? 3 : 2;
  TORCH_CHECK_VALUE(rows.dim() == 2 && rows.size(0) >= known, "rows has shape ", rows.sizes(), ", needed: ", known,
                    " statistics or more");
  TORCH_CHECK_VALUE(reports > 0 && n % reports == 0, "reports is ", reports, ", needed: a divisor of the ", n, " rows");
  const Tensor p = coefficients("pos", pos, {n, positives}), r = coefficients("rows", rows, {rows.size(0), n});
  const float* statistics = r.data_ptr<float>();
  const auto options = floats(pos);
  const Tensor loss = at::empty({}, options), nce = at::empty({}, options), cost = at::empty({}, options),
               report = at::empty({reports, kReport}, options), each = elements ? at::empty_like(p) : Tensor();
  const int groups = summary_groups(p.numel() / reports);
  const Tensor partials = at::empty({reports * groups * static_cast<int64_t>(sizeof(Totals))}, options.dtype(at::kByte));
  const double pairs = static_cast<double>(n) * static_cast<double>(columns);
  (*Lease(pos)).summarize({p.data_ptr<float>(), statistics, statistics + n,
                           known == 3 ? statistics + 2 * n : nullptr, n, positives, mean,
                           static_cast<float>(penalty / pairs),
                           static_cast<float>(std::log1p(static_cast<double>((images - 1) * n_c))),
                           static_cast<float>(std::log(images)), static_cast<float>(std::log(n_c)),
                           static_cast<int>(reports), static_cast<Totals*>(partials.data_ptr()), groups, loss.data_ptr<float>(),
                           nce.data_ptr<float>(), cost.data_ptr<float>(), report.data_ptr<float>(),
                           elements ? each.data_ptr<float>() : nullptr});
  return {loss, elements ? each : nce, cost, report};
}

void implement(torch::Library& m) {
  m.impl("cuda_stats", &stats);
  m.impl("cuda_grads", &grads);
  m.impl("cuda_loss", &loss);
  m.impl("cuda_summary", &summary);
  m.impl("cuda_multiply_", &multiply);
}

}  // namespace

#define FUSED_NCE_GPU_SCORES                                                                                      \
  "Tensor q, Tensor? k, float scale, Tensor? scale_tensor, int n_c, int rows_per_image, int offset, float clip, " \
  "Tensor? row_ids, int itself, Tensor? positives, "

TORCH_LIBRARY_FRAGMENT(fused_nce, m) {
  m.def("cuda_stats(" FUSED_NCE_GPU_SCORES
        "bool both_ways, int workspace_bytes) -> (Tensor pos, Tensor rows, Tensor columns)");
  m.def("cuda_grads(" FUSED_NCE_GPU_SCORES
        "Tensor pos, Tensor neg_lse, Tensor d_pos, Tensor d_neg_lse, Tensor d_square, Tensor? column_neg_lse, "
        "Tensor? d_column_neg_lse, Tensor? d_column_square, bool need_q, bool need_k, bool need_scale, "
        "int workspace_bytes) -> (Tensor dq, Tensor dk, Tensor dscale)");
  m.def("cuda_loss(" FUSED_NCE_GPU_SCORES
        "float nce_weight, float square_weight, bool need_q, bool need_k, bool need_scale, int workspace_bytes) -> "
        "(Tensor pos, Tensor rows, Tensor dq, Tensor dk, Tensor dscale)");
  m.def(
      "cuda_summary(Tensor pos, Tensor rows, int n_c, int images, int columns, float penalty, bool mean, "
      "bool elements, int reports) -> (Tensor loss, Tensor nce, Tensor penalty, Tensor report)");
  m.def("cuda_multiply_(Tensor(a!) x, Tensor factor) -> ()");
}

TORCH_LIBRARY_IMPL(fused_nce, CPU, m) { implement(m); }
#ifdef FUSED_NCE_CUDA
TORCH_LIBRARY_IMPL(fused_nce, CUDA, m) { implement(m); }
#endif

}  // namespace cuda
}  // namespace fused_nce
