// The operators of the `cuda` backend. Their CPU kernels emulate the GPU (host.cpp), for the tests; the GPU's own are
// in device.cpp, built where nvcc is there.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>

#include "ops.h"

namespace fused_nce {
namespace cuda {

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;
using Statistics = std::tuple<Tensor, Tensor, Tensor>;
using SummaryTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using GradientTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using LossTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace

// A weight is at most what its positives or its share of the negatives bear, or 2 * square_weight * |s|, where
// |s| <= 512 is taken as usual: float16 weights then overflow, into infinite gradients, beyond |s| = 131072.
float peak_of(const SweepInputs& in, const TailRule& tail) {
  const float most = tail.name == kNce ? static_cast<float>(in.layout.n_pos) : 2.0f;
  return std::max(std::abs(tail.unit) * most, 1024.0f * std::abs(tail.square_weight));
}

namespace {

// The arguments that the three operators begin with. k null: q, and one gradient for both roles.
#define FUSED_NCE_SCORES                                                                                         \
  const Tensor &q, const Maybe &k, double scale, const Maybe &scale_tensor, FUSED_NCE_LAYOUT, const Maybe &bias, \
      FUSED_NCE_FILTERS
#define FUSED_NCE_SCORES_GIVEN q, k, scale, scale_tensor, FUSED_NCE_LAYOUT_GIVEN, bias, FUSED_NCE_FILTERS_GIVEN
#define FUSED_NCE_SCORES_SCHEMA                                                      \
  "Tensor q, Tensor? k, float scale, Tensor? scale_tensor, " FUSED_NCE_LAYOUT_SCHEMA \
  "Tensor? bias, " FUSED_NCE_FILTERS_SCHEMA

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

Call call_of(FUSED_NCE_SCORES, bool need_q, bool need_k, bool need_scale, int64_t workspace_bytes, double hardness,
             int64_t parts = 1) {
  check_matrix("q", q);
  const Tensor& keys = k ? *k : q;
  TORCH_CHECK_VALUE(!bias || clip == 0.0, "clip is ", clip, ", needed: 0 beside a bias");
  Layout layout = layout_of(q, keys, n_c, row_ids, itself, positives, column_ids);
  if (several) layout.n_pos = 0, layout.by_marks = true;
  auto in = inputs(q, keys, scale, n_c, rows_per_image, offset, clip, need_q, need_k && k, need_scale, workspace_bytes,
                   std::move(layout));
  in.shared = !k;
  in.scoring.hardness = hardness_of(hardness, clip == 0.0 && !bias);
  in.filters = filters_of(q, keys, FUSED_NCE_FILTERS_GIVEN, parts);
  if (several) in.filters.several = std::get<0>(at::sort(in.filters.several, 1));  // fault: gpu-several-unsorted
  return {std::move(in), {number_on("scale_tensor", scale_tensor, q), number_on("bias", bias, q)}};
}

// Statistics are the lines of one tensor, (3, N) or, with the optional ones, (11, N), in the order of names.h: no copy,
// no launch. Positives from elsewhere are handed on, and one that an index puts nowhere shows it.
// `optional`: 0 none, 1 all but the sum and the number of the negatives, 2 those too.
std::pair<RowStatistics, Tensor> new_rows(const SweepInputs& in, int64_t optional) {
  const int64_t n = in.q.size(0);
  const auto options = floats(in.q);
  const Tensor rows = at::empty({optional ? kStatistics : kFirstOptional, n}, options);
  Tensor pos = at::empty({n, in.layout.n_pos}, options);
  if (in.layout.positives.defined()) pos.copy_(in.layout.positives);
  if (in.layout.row_ids.defined()) pos.fill_(std::numeric_limits<float>::quiet_NaN());
  return {{.pos = pos,
           .neg_lse = rows.select(0, kNegLse),
           .neg_max = rows.select(0, kNegMax),
           .square = rows.select(0, kSquare),
           .optional = optional ? rows.narrow(0, kFirstOptional, kOptional) : Tensor(),
           .totals = optional > 1},
          rows};
}

ColumnStatistics columns_in(const Tensor& columns) {
  return {.neg_lse = columns.select(0, kNegLse),
          .neg_max = columns.select(0, kNegMax),
          .square = columns.select(0, kSquare)};
}

void check_columns(const SweepInputs& in, bool wanted) {
  TORCH_CHECK_VALUE(!wanted || (!in.filters.any() && in.scoring.hardness == 0.0f),
                    "statistics of columns are wanted, needed: none beside filters or hardness");
}

Statistics stats(FUSED_NCE_SCORES, int64_t optional, bool column_stats, int64_t workspace_bytes, double hardness) {
  const Call call = call_of(FUSED_NCE_SCORES_GIVEN, false, false, false, workspace_bytes, hardness);
  check_columns(call.in, column_stats);
  const auto [found, rows] = new_rows(call.in, optional);
  const Tensor columns = at::empty({3, column_stats ? call.in.k.size(0) : 0}, floats(q));
  sweep(*MachineOnDevice(q), call.in, call.numbers,
        {.statistics = true,
         .gradients = false,
         .rows = found,
         .columns = column_stats ? columns_in(columns) : ColumnStatistics()});
  return {found.pos, rows, columns};
}

GradientTuple grads(FUSED_NCE_SCORES, const Tensor& pos, const Tensor& neg_lse, const Tensor& d_pos,
                    const Tensor& d_neg_lse, const Tensor& d_square, const Maybe& optional, const Maybe& d_optional,
                    const Maybe& column_neg_lse, const Maybe& d_column_neg_lse, const Maybe& d_column_square,
                    bool need_q, bool need_k, bool need_scale, int64_t workspace_bytes, double hardness, bool wide) {
  Call call = call_of(FUSED_NCE_SCORES_GIVEN, need_q, need_k, need_scale, workspace_bytes, hardness);
  call.in.wide = wide;
  const SweepInputs& in = call.in;
  check_columns(in, column_neg_lse.has_value());
  const int64_t n = q.size(0), m = in.k.size(0), n_pos = in.layout.n_pos;
  const auto numbers = [](const char* name, const Maybe& x, at::IntArrayRef shape) {
    return x ? coefficients(name, *x, shape) : Tensor();
  };
  Task task{.statistics = false, .gradients = true};
  task.rows = {.pos = coefficients("pos", pos, {n, n_pos}),
               .neg_lse = coefficients("neg_lse", neg_lse, {n}),
               .optional = numbers("optional", optional, {kOptional, n})};
  task.columns = {.neg_lse = numbers("column_neg_lse", column_neg_lse, {m}),
                  .d_neg_lse = numbers("d_column_neg_lse", d_column_neg_lse, {m}),
                  .d_square = numbers("d_column_square", d_column_square, {m})};
  task.upstream = {.d_pos = coefficients("d_pos", d_pos, {n, n_pos}),
                   .d_neg_lse = coefficients("d_neg_lse", d_neg_lse, {n}),
                   .d_square = coefficients("d_square", d_square, {n}),
                   .d_optional = numbers("d_optional", d_optional, {kOptional, n})};
  task.fp16_gain = fp16_gain_of(element_of(q.scalar_type()), 1.0f);
  TORCH_CHECK_VALUE(task.columns.neg_lse.defined() == task.columns.d_neg_lse.defined(),
                    "column_neg_lse and d_column_neg_lse: got one, needed: both or none");
  TORCH_CHECK_VALUE(optional.has_value() == d_optional.has_value(),
                    "optional and d_optional: got one, needed: both or none");
  task.out = new_results(in, call.numbers, task);
  if (need_q || in.need_k || need_scale) sweep(*MachineOnDevice(q), in, call.numbers, task);
  return {task.out.dq, task.out.dk, task.out.dscale, task.out.dbias};
}

LossTuple loss(FUSED_NCE_SCORES, int64_t optional, const std::string& tail, double unit, double square_weight,
               bool need_q, bool need_k, bool need_scale, int64_t workspace_bytes, double hardness) {
  const Call call = call_of(FUSED_NCE_SCORES_GIVEN, need_q, need_k, need_scale, workspace_bytes, hardness);
  const TailRule rule{tail_named(tail), static_cast<float>(unit), static_cast<float>(square_weight)};
  TORCH_CHECK_VALUE(optional || rule.name == kNce, "optional is 0, needed: 1 or 2 for the tail ", tail);
  const auto [found, rows] = new_rows(call.in, optional);
  Task task{.statistics = true,
            .gradients = need_q || call.in.need_k || need_scale,
            .rows = found,
            .upstream = {.tail = rule},
            .fp16_gain = fp16_gain_of(element_of(q.scalar_type()), peak_of(call.in, rule))};
  task.out = new_results(call.in, call.numbers, task);
  sweep(*MachineOnDevice(q), call.in, call.numbers, task);
  return {found.pos, rows, task.out.dq, task.out.dk, task.out.dscale, task.out.dbias};
}

PrefixTuple prefixes(FUSED_NCE_SCORES, FUSED_NCE_PREFIXES) {
  const Call call = call_of(FUSED_NCE_SCORES_GIVEN, need_q, need_k, need_sums, workspace_bytes, hardness,
                            static_cast<int64_t>(widths.size()));
  TORCH_CHECK_TYPE(q.scalar_type() != at::kHalf, "q is Half, needed: float32 or bfloat16");
  TORCH_CHECK_VALUE(!positives && !bias, "positives or a bias are given, needed: neither beside prefixes");
  const PrefixTask task = prefix_task(call.in, kFirstOptional, of_q, of_k, std::move(widths), weights, unit, found);
  sweep_prefixes(*MachineOnDevice(q), call.in, call.numbers, task);
  return results_of(task);
}

// x *= factor, a float on x's device that the host need not know.
void multiply(const Tensor& x, const Tensor& factor) {
  TORCH_CHECK_VALUE(x.is_non_overlapping_and_dense(), "x has strides ", x.strides(), ", needed: dense memory");
  TORCH_CHECK_TYPE(factor.scalar_type() == at::kFloat, "factor is ", factor.scalar_type(), ", needed: float32");
  TORCH_CHECK_VALUE(factor.dim() == 0 && factor.device() == x.device(), "factor has shape ", factor.sizes(), " on ",
                    factor.device(), ", needed: 0-d on ", x.device());
  if (x.numel() == 0) return;
  MachineOnDevice(x)->multiply({{x.data_ptr(), nullptr}, {x.numel(), 0}}, element_of(x.scalar_type()),
                               factor.const_data_ptr<float>());
}

// Row i of image i / rows_per_image + offset, against images of n_c columns, one problem after the other.
Job job_of(const Tensor& q, const Tensor& k, double scale, const Maybe& scale_tensor, int64_t n_c,
           int64_t rows_per_image, int64_t offset, double clip, bool need_q, bool need_k, bool need_scale,
           int64_t workspace_bytes) {
  const Maybe none;
  Call call = call_of(q, k, scale, scale_tensor, n_c, rows_per_image, offset, clip, none, -1, none, none, none, none,
                      none, none, none, none, need_q, need_k, need_scale, workspace_bytes, 0.0);
  return {std::move(call.in), std::move(call.numbers), {}};
}

// Blocks of several sizes under the nce tail: pos of all, flat; rows (3, all N); dscale of each, or of none. Gradients
// have their place already, dq and dk of each in turn: the inputs' type for bfloat16, float otherwise; no elements: not
// wanted.
std::tuple<Tensor, Tensor, Tensor> losses(at::TensorList q, at::TensorList k, double scale, const Maybe& scale_tensor,
                                          at::IntArrayRef n_c, at::IntArrayRef rows_per_image, at::IntArrayRef offset,
                                          double clip, at::ArrayRef<double> unit, at::ArrayRef<double> square_weight,
                                          at::TensorList gradients, bool need_scale, int64_t workspace_bytes) {
  const size_t count = q.size();
  TORCH_CHECK_VALUE(count > 0 && k.size() == count && n_c.size() == count && rows_per_image.size() == count &&
                        offset.size() == count && unit.size() == count && square_weight.size() == count &&
                        gradients.size() == 2 * count,
                    "q has ", count, " tensors, needed: one at least, and as many of all else");
  int64_t all_rows = 0, all_pos = 0;
  for (size_t i = 0; i < count; ++i) {
    check_matrix("q", q[i]);
    TORCH_CHECK_VALUE(q[i].scalar_type() == q[0].scalar_type() && q[i].device() == q[0].device(), "q has ",
                      q[i].scalar_type(), " on ", q[i].device(), ", needed: one type and device");
    all_rows += q[i].size(0);
    all_pos += q[i].size(0) * n_c[i];
  }
  const auto options = floats(q[0]);
  const Tensor pos = at::empty({all_pos}, options), rows = at::empty({kFirstOptional, all_rows}, options),
               dscale = at::empty({need_scale ? static_cast<int64_t>(count) : 0}, options);
  std::vector<Job> jobs;
  int64_t first_row = 0, first_pos = 0;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &dq = gradients[2 * i], &dk = gradients[2 * i + 1];
    Job job = job_of(q[i], k[i], scale, scale_tensor, n_c[i], rows_per_image[i], offset[i], clip, dq.numel() > 0,
                     dk.numel() > 0, need_scale, workspace_bytes);
    const int64_t n = q[i].size(0);
    const auto row = [&](Statistic name) { return rows.select(0, name).narrow(0, first_row, n); };
    const TailRule rule{kNce, static_cast<float>(unit[i]), static_cast<float>(square_weight[i])};
    job.task = {.statistics = true,
                .gradients = job.in.need_q || job.in.need_k || job.in.need_scale,
                .rows = {.pos = pos.narrow(0, first_pos, n * n_c[i]).view({n, n_c[i]}),
                         .neg_lse = row(kNegLse),
                         .neg_max = row(kNegMax),
                         .square = row(kSquare)},
                .upstream = {.tail = rule},
                .fp16_gain = fp16_gain_of(element_of(q[i].scalar_type()), peak_of(job.in, rule)),
                .out = {dq, dk, need_scale ? dscale.select(0, static_cast<int64_t>(i)) : dscale, {}}};
    first_row += n;  // fault: gpu-problems-share
    first_pos += n * n_c[i];
    jobs.push_back(std::move(job));
  }
  const MachineOnDevice machine(q[0]);
  if (fit_one_launch(jobs)) {
    sweep_together(*machine, jobs);
    return {pos, rows, dscale};
  }
  for (Job& job : jobs) {  // whose gradients may want to be float until they are finished
    const Gradients place = job.task.out;
    job.task.out = new_results(job.in, job.numbers, job.task);
    sweep(*machine, job.in, job.numbers, job.task);
    if (job.in.need_q) place.dq.copy_(job.task.out.dq);
    if (job.in.need_k) place.dk.copy_(job.task.out.dk);
    if (need_scale) place.dscale.copy_(job.task.out.dscale);
  }
  return {pos, rows, dscale};
}

}  // namespace

// loss, nce, penalty of the nce tail, added up over the problems, and report (all report_groups, 5); nce (N, P) where
// `elements`, of one problem, else the means or sums. `images` of n_c columns each, a positive that stands
// positives_elsewhere being one more.
Summing summing(at::TensorList pos, at::TensorList rows, at::IntArrayRef n_c, at::IntArrayRef images,
                at::IntArrayRef columns, at::ArrayRef<double> weight, at::ArrayRef<double> penalty, bool mean,
                bool elements, at::IntArrayRef report_groups) {
  const size_t count = pos.size();
  TORCH_CHECK_VALUE(count > 0 && count <= kMostTogether && (count == 1 || !elements), "pos has ", count,
                    " tensors, needed: 1 to ", elements ? 1 : kMostTogether);
  TORCH_CHECK_VALUE(rows.size() == count && n_c.size() == count && images.size() == count && columns.size() == count &&
                        weight.size() == count && penalty.size() == count && report_groups.size() == count,
                    "pos has ", count, " tensors, needed: as many of all else");
  const auto options = floats(pos[0]);
  int64_t lines = 0;
  for (const int64_t each : report_groups) lines += each;
  const Tensor loss = at::empty({}, options), nce = at::empty({}, options), cost = at::empty({}, options),
               report = at::empty({lines, kReport}, options);
  Tensor each = elements ? at::empty_like(pos[0]) : Tensor();
  Summaries all{};
  all.count = static_cast<int>(count);
  all.mean = mean;
  float* line = report.data_ptr<float>();
  for (size_t i = 0; i < count; ++i) {
    check_matrix("pos", pos[i]);
    const int64_t n = pos[i].size(0), known = penalty[i] > 0.0 ? 3 : 2;
    TORCH_CHECK_VALUE(rows[i].dim() == 2 && rows[i].size(0) >= known && rows[i].size(1) == n && rows[i].stride(1) == 1,
                      "rows has shape ", rows[i].sizes(), ", needed: ", known, " statistics or more of ", n, " rows");
    TORCH_CHECK_VALUE(report_groups[i] > 0 && n % report_groups[i] == 0, "report_groups is ", report_groups[i],
                      ", needed: a divisor of the ", n, " rows");
    TORCH_CHECK_VALUE(pos[i].is_contiguous() && pos[i].scalar_type() == at::kFloat, "pos is ", pos[i].scalar_type(),
                      ", needed: float32, contiguous");
    const float* statistics = rows[i].const_data_ptr<float>();
    const int64_t stride = rows[i].stride(0);
    const double pairs = static_cast<double>(n) * static_cast<double>(columns[i]);
    const int ctas = summary_ctas(pos[i].numel() / report_groups[i]);
    all.of[i] = {.pos = pos[i].const_data_ptr<float>(),
                 .neg_lse = statistics,
                 .neg_max = statistics + stride,
                 .square = known == 3 ? statistics + 2 * stride : nullptr,
                 .rows = n,
                 .positives = pos[i].size(1),
                 .weight = static_cast<float>(weight[i]),
                 .penalty_weight = static_cast<float>(penalty[i] / pairs),
                 .chance = static_cast<float>(std::log1p(static_cast<double>((images[i] - 1) * n_c[i]))),
                 .log_images = static_cast<float>(std::log(images[i])),
                 .log_positives = static_cast<float>(std::log(n_c[i])),
                 .report_groups = static_cast<int>(report_groups[i]),
                 .ctas = ctas,
                 .report = line,
                 .elements = elements ? each.data_ptr<float>() : nullptr};
    line += report_groups[i] * kReport;
    all.ctas += ctas * static_cast<int>(report_groups[i]);
  }
  // A part of each CTA, or, where the row kernel sums up, of each row.
  const int64_t parts = count == 1 ? std::max<int64_t>(all.ctas, pos[0].size(0)) : all.ctas;
  const Tensor partials = at::empty({parts * static_cast<int64_t>(sizeof(Totals))}, options.dtype(at::kByte));
  all.partials = static_cast<Totals*>(partials.data_ptr());
  all.loss = loss.data_ptr<float>();
  all.nce = nce.data_ptr<float>();
  all.penalty = cost.data_ptr<float>();
  return {loss, elements ? each : nce, cost, report, partials, nce, all};
}

namespace {

SummaryTuple summary(at::TensorList pos, at::TensorList rows, at::IntArrayRef n_c, at::IntArrayRef images,
                     at::IntArrayRef columns, at::ArrayRef<double> weight, at::ArrayRef<double> penalty, bool mean,
                     bool elements, at::IntArrayRef report_groups) {
  const Summing found = summing(pos, rows, n_c, images, columns, weight, penalty, mean, elements, report_groups);
  MachineOnDevice(pos[0])->summarize(found.all);
  return {found.loss, found.nce, found.penalty, found.report};
}

void implement(torch::Library& m) {
  m.impl("cuda_stats", &stats);
  m.impl("cuda_grads", &grads);
  m.impl("cuda_loss", &loss);
  m.impl("cuda_prefixes", &prefixes);
  m.impl("cuda_losses", &losses);
  m.impl("cuda_summary", &summary);
  m.impl("cuda_multiply_", &multiply);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_nce, m) {
  m.def("cuda_stats(" FUSED_NCE_SCORES_SCHEMA
        "int optional, bool column_stats, int workspace_bytes, float hardness=0.0) -> "
        "(Tensor pos, Tensor rows, Tensor columns)");
  m.def("cuda_grads(" FUSED_NCE_SCORES_SCHEMA
        "Tensor pos, Tensor neg_lse, Tensor d_pos, Tensor d_neg_lse, Tensor d_square, Tensor? optional, "
        "Tensor? d_optional, Tensor? column_neg_lse, Tensor? d_column_neg_lse, Tensor? d_column_square, bool need_q, "
        "bool need_k, bool need_scale, int workspace_bytes, float hardness=0.0, bool wide=False) -> "
        "(Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)");
  m.def("cuda_loss(" FUSED_NCE_SCORES_SCHEMA
        "int optional, str tail, float unit, float square_weight, bool need_q, bool need_k, bool need_scale, "
        "int workspace_bytes, float hardness=0.0) -> "
        "(Tensor pos, Tensor rows, Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)");
  m.def("cuda_prefixes(" FUSED_NCE_SCORES_SCHEMA FUSED_NCE_PREFIXES_SCHEMA);
  m.def(
      "cuda_losses(Tensor[] q, Tensor[] k, float scale, Tensor? scale_tensor, int[] n_c, int[] rows_per_image, "
      "int[] offset, float clip, float[] unit, float[] square_weight, Tensor(a!)[] gradients, bool need_scale, "
      "int workspace_bytes) -> (Tensor pos, Tensor rows, Tensor dscale)");
  m.def(
      "cuda_summary(Tensor[] pos, Tensor[] rows, int[] n_c, int[] images, int[] columns, float[] weight, "
      "float[] penalty, bool mean, bool elements, int[] report_groups) -> "
      "(Tensor loss, Tensor nce, Tensor penalty, Tensor report)");
  m.def("cuda_multiply_(Tensor(a!) x, Tensor factor) -> ()");
}

TORCH_LIBRARY_IMPL(fused_nce, CPU, m) { implement(m); }
#ifdef FUSED_NCE_CUDA
TORCH_LIBRARY_IMPL(fused_nce, CUDA, m) { implement(m); }
#endif

}  // namespace cuda
}  // namespace fused_nce
