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
using GradientTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using LossTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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

// A weight is at most what its positives or its share of the negatives bear, or 2 * square_weight * |s|, where
// |s| <= 512 is taken as usual: float16 weights then overflow, into infinite gradients, beyond |s| = 131072.
float peak_of(const SweepInputs& in, const TailRule& tail) {
  const float most = tail.name == kNce ? static_cast<float>(in.layout.n_pos) : 2.0f;
  return std::max(std::abs(tail.unit) * most, 1024.0f * std::abs(tail.square_weight));
}

// The arguments that the three operators begin with. k null: q, and one gradient for both roles.
#define FUSED_NCE_SCORES                                                                                               \
  const Tensor &q, const Maybe &k, double scale, const Maybe &scale_tensor, int64_t n_c, int64_t rows_per_image,       \
      int64_t offset, double clip, const Maybe &row_ids, int64_t itself, const Maybe &positives, const Maybe &column_ids, \
      const Maybe &bias
#define FUSED_NCE_SCORES_GIVEN \
  q, k, scale, scale_tensor, n_c, rows_per_image, offset, clip, row_ids, itself, positives, column_ids, bias

struct Call {
  SweepInputs in;
  OnDevice numbers;
};

Tensor number_on(const char* name, const Maybe& x, const Tensor& q) {
  if (!x) return {};
  TORCH_CHECK_TYPE(x->scalar_type() == at::kFloat, name, " is ", x->scalar_type(), ", needed: float32");
  TORCH_CHECK_VALUE(x->dim() == 0 && x->device() == q.device(), name, " has shape ", x->sizes(), " on ", x->device(),
                    ", needed: 0-d on ", q.device());
  return *x;
}

Call call_of(FUSED_NCE_SCORES, bool need_q, bool need_k, bool need_scale, int64_t workspace_bytes) {
  check_matrix("q", q);
  const Tensor& keys = k ? *k : q;
  TORCH_CHECK_VALUE(!bias || clip == 0.0, "clip is ", clip, ", needed: 0 beside a bias");
  auto in = inputs(q, keys, scale, n_c, rows_per_image, offset, clip, need_q, need_k && k, need_scale, workspace_bytes,
                   layout_of(q, keys, n_c, row_ids, itself, positives, column_ids));
  in.shared = !k;
  return {std::move(in), {number_on("scale_tensor", scale_tensor, q), number_on("bias", bias, q)}};
}

// Statistics are the lines of one tensor, (3, N) or, with the further ones, (9, N), in the order of names.h: no copy, no
// launch. Positives from elsewhere are handed on, and one that an index puts nowhere shows it.
std::pair<RowStatistics, Tensor> new_rows(const SweepInputs& in, bool further) {
  const int64_t n = in.q.size(0);
  const auto options = floats(in.q);
  const Tensor rows = at::empty({further ? kStatistics : kFirstFurther, n}, options);
  Tensor pos = at::empty({n, in.layout.n_pos}, options);
  if (in.layout.positives.defined()) pos.copy_(in.layout.positives);
  if (in.layout.row_ids.defined()) pos.fill_(std::numeric_limits<float>::quiet_NaN());
  return {{pos, rows.select(0, kNegLse), rows.select(0, kNegMax), rows.select(0, kSquare),
           further ? rows.narrow(0, kFirstFurther, kFurther) : Tensor()},
          rows};
}

ColumnStatistics columns_in(const Tensor& columns) {
  return {columns.select(0, kNegLse), columns.select(0, kNegMax), columns.select(0, kSquare), {}, {}};
}

Statistics stats(FUSED_NCE_SCORES, bool further, bool both_ways, int64_t workspace_bytes) {
  const Call call = call_of(FUSED_NCE_SCORES_GIVEN, false, false, false, workspace_bytes);
  const auto [found, rows] = new_rows(call.in, further);
  const Tensor columns = at::empty({3, both_ways ? call.in.k.size(0) : 0}, floats(q));
  sweep(*Lease(q), call.in, call.numbers,
        {true, false, found, both_ways ? columns_in(columns) : ColumnStatistics()});
  return {found.pos, rows, columns};
}

GradientTuple grads(FUSED_NCE_SCORES, const Tensor& pos, const Tensor& neg_lse, const Tensor& d_pos,
                    const Tensor& d_neg_lse, const Tensor& d_square, const Maybe& further, const Maybe& d_further,
                    const Maybe& column_neg_lse, const Maybe& d_column_neg_lse, const Maybe& d_column_square,
                    bool need_q, bool need_k, bool need_scale, int64_t workspace_bytes) {
  const Call call = call_of(FUSED_NCE_SCORES_GIVEN, need_q, need_k, need_scale, workspace_bytes);
  const SweepInputs& in = call.in;
  const int64_t n = q.size(0), m = in.k.size(0), n_pos = in.layout.n_pos;
  const auto numbers = [](const char* name, const Maybe& x, at::IntArrayRef shape) {
    return x ? coefficients(name, *x, shape) : Tensor();
  };
  Task task{false, true};
  task.rows = {coefficients("pos", pos, {n, n_pos}), coefficients("neg_lse", neg_lse, {n}), {}, {},
               numbers("further", further, {kFurther, n})};
  task.columns = {numbers("column_neg_lse", column_neg_lse, {m}), {}, {},
                  numbers("d_column_neg_lse", d_column_neg_lse, {m}),
                  numbers("d_column_square", d_column_square, {m})};
  task.upstream = {coefficients("d_pos", d_pos, {n, n_pos}), coefficients("d_neg_lse", d_neg_lse, {n}),
                   coefficients("d_square", d_square, {n}), numbers("d_further", d_further, {kFurther, n})};
  TORCH_CHECK_VALUE(task.columns.neg_lse.defined() == task.columns.d_neg_lse.defined(),
                    "column_neg_lse and d_column_neg_lse: got one, needed: both or none");
  TORCH_CHECK_VALUE(further.has_value() == d_further.has_value(),
                    "further and d_further: got one, needed: both or none");
  task.unit = unit_of(element_of(q.scalar_type()), 1.0f);
  task.out = new_results(in, call.numbers, task);
  if (need_q || in.need_k || need_scale) sweep(*Lease(q), in, call.numbers, task);
  return {task.out.dq, task.out.dk, task.out.dscale, task.out.dbias};
}

LossTuple loss(FUSED_NCE_SCORES, bool further, const std::string& tail, double unit, double square_weight, bool need_q,
               bool need_k, bool need_scale, int64_t workspace_bytes) {
  const Call call = call_of(FUSED_NCE_SCORES_GIVEN, need_q, need_k, need_scale, workspace_bytes);
  const TailRule rule{tail_named(tail), static_cast<float>(unit), static_cast<float>(square_weight)};
  TORCH_CHECK_VALUE(further || rule.name == kNce, "further is false, needed: true for the tail ", tail);
  const auto [found, rows] = new_rows(call.in, further);
  Task task{true, need_q || call.in.need_k || need_scale, found, {}, {{}, {}, {}, {}, rule}};
  task.unit = unit_of(element_of(q.scalar_type()), peak_of(call.in, rule));
  task.out = new_results(call.in, call.numbers, task);
  sweep(*Lease(q), call.in, call.numbers, task);
  return {found.pos, rows, task.out.dq, task.out.dk, task.out.dscale, task.out.dbias};
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

#define FUSED_NCE_SCHEMA                                                                                           \
  "Tensor q, Tensor? k, float scale, Tensor? scale_tensor, int n_c, int rows_per_image, int offset, float clip, "  \
  "Tensor? row_ids, int itself, Tensor? positives, Tensor? column_ids, Tensor? bias, "

TORCH_LIBRARY_FRAGMENT(fused_nce, m) {
  m.def("cuda_stats(" FUSED_NCE_SCHEMA
        "bool further, bool both_ways, int workspace_bytes) -> (Tensor pos, Tensor rows, Tensor columns)");
  m.def("cuda_grads(" FUSED_NCE_SCHEMA
        "Tensor pos, Tensor neg_lse, Tensor d_pos, Tensor d_neg_lse, Tensor d_square, Tensor? further, "
        "Tensor? d_further, Tensor? column_neg_lse, Tensor? d_column_neg_lse, Tensor? d_column_square, bool need_q, "
        "bool need_k, bool need_scale, int workspace_bytes) -> "
        "(Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)");
  m.def("cuda_loss(" FUSED_NCE_SCHEMA
        "bool further, str tail, float unit, float square_weight, bool need_q, bool need_k, bool need_scale, "
        "int workspace_bytes) -> (Tensor pos, Tensor rows, Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)");
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
