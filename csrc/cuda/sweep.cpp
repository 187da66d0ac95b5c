// For each block of rows: scores a strip at a time, statistics, weights into the block's buffer, and the two gradient
// GEMMs on it. Everything is enqueued and nothing is read back, so a call can be captured in a CUDA graph.
#include "sweep.h"

#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>
#include <deque>

namespace fused_nce {
namespace cuda {

namespace {

float* floats_of(const at::Tensor& x) { return x.defined() ? x.data_ptr<float>() : nullptr; }

Plan plan_for(const SweepInputs& in, const OnDevice& numbers, const Task& task) {
  const int64_t n = in.q.size(0), m = in.k.size(0), d = in.q.size(1);
  const Plan plan = make_plan({.rows = n,
                               .columns = m,
                               .width = d,
                               .positives = in.layout.n_pos,
                               .element_bytes = in.q.element_size(),
                               .statistics = task.statistics,
                               .gradients = task.gradients,
                               .sums = in.need_scale ? (numbers.bias.defined() ? 2 : 1) : 0,
                               .column_stats = task.statistics && task.columns.neg_lse.defined(),
                               .optional = task.statistics && task.rows.optional.defined(),
                               .marked = in.filters.any()},
                              in.workspace_bytes);
  TORCH_CHECK_VALUE(plan.fits, "workspace_bytes is ", in.workspace_bytes, ", needed: at least ", plan.bytes, " for ", n,
                    " rows, ", m, " columns of width ", d);
  return plan;
}

// Then the first gradient GEMM of all is one of all rows.
bool is_one_block(const Plan& plan, int64_t rows) { return plan.panels == 1 && plan.block == rows; }

class Sweep {
 public:
  Sweep(const Machine& machine, const SweepInputs& in, const OnDevice& numbers, const Task& task)
      : machine_(machine), in_(in), numbers_(numbers), out_(task.out), n_(in.q.size(0)), m_(in.k.size(0)),
        d_(in.q.size(1)), element_bytes_(in.q.element_size()), element_(element_of(in.q.scalar_type())),
        summary_(task.summary), statistics_(task.statistics), gradients_(task.gradients),
        tail_(task.upstream.tail.name), plan_(plan_for(in, numbers, task)),
        rules_(rules_of(in, numbers, plan_, task.fp16_gain)) {
    marks_ = bytes(plan_.mark_bytes);
    scores_ = bytes(plan_.score_bytes);
    weights_ = bytes(plan_.weight_bytes);
    partials_ = bytes(plan_.partial_bytes);
    row_numbers_ = bytes(plan_.row_bytes);
    column_parts_ = bytes(plan_.column_bytes);
    bind_rows(task.rows, task.upstream);
    bind_columns(task.columns);
  }

  bool run() {
    for (int64_t first = 0; first < n_; first += plan_.block) {
      const int64_t count = std::min(plan_.block, n_ - first);
      rows_.scratch.first_row = first;
      rows_.upstream.first_row = statistics_ ? first : 0;
      if (statistics_ && plan_.panels > 1) fold_panels(first, count);
      if (plan_.panels == 1 || gradients_)
        for (int64_t column = 0; column < m_; column += plan_.panel) run_panel(first, count, column);
    }
    if (folds_columns()) machine_.finish_columns(m_, rules_, rows_.columns);
    if (gradients_) finish_gradients();
    return summed_up();
  }

  // `run` in three steps, for a sweep that is one strip: between them its row kernel runs, for which this is the task.
  RowTask begin(int threads) {
    rules_.threads = threads;
    const Strip strip = strip_at(0, n_, 0, 0);
    score(strip);
    return {strip, rules_, rows_};
  }

  void end() const {
    add_gradients(0, n_, 0);
    finish_gradients();
  }

 private:
  void finish_gradients() const {
    if (numbers_.scale.defined() && !rules_.prescaled) {
      if (in_.need_q) out_.dq.mul_(numbers_.scale);
      if (in_.need_k) out_.dk.mul_(numbers_.scale);  // fault: gpu-learnable-scale
    }
    if (d_scale_.defined()) out_.dscale.copy_(d_scale_.sum(at::kDouble));
    if (d_bias_.defined()) out_.dbias.copy_(d_bias_.sum(at::kDouble));
  }

  // Coefficients that the tail makes are a block's, at the front of `row_numbers_`; the sums of all rows follow.
  void bind_rows(const RowStatistics& stats, const Upstream& upstream) {
    const bool optional = stats.optional.defined(), own = statistics_ && gradients_;
    const int64_t positives = in_.layout.n_pos, block = plan_.block;
    float* numbers = static_cast<float*>(row_numbers_.data_ptr());
    rows_.stats = {.pos = floats_of(stats.pos),
                   .neg_lse = floats_of(stats.neg_lse),
                   .neg_max = floats_of(stats.neg_max),
                   .square = floats_of(stats.square)};
    rows_.upstream = {.d_pos = own ? numbers : floats_of(upstream.d_pos),
                      .d_neg_lse = own ? numbers + block * positives : floats_of(upstream.d_neg_lse),
                      .d_square = floats_of(upstream.d_square),
                      .first_row = 0,
                      .tail = upstream.tail};
    rows_.scratch = {.partials = reinterpret_cast<RowPart*>(partials_.data_ptr()),
                     .first_row = 0,
                     .slots = plan_.panels * plan_.ctas_per_row};
    if (optional) {
      float* d = floats_of(upstream.d_optional);
      if (own) d = tail_ == kNce ? nullptr : numbers + block * (positives + 1);
      rows_.optional = {
          .found = floats_of(stats.optional),
          .d = d,
          .found_stride = n_,
          .d_stride = own ? block : n_,
          .partials = reinterpret_cast<OptionalPart*>(rows_.scratch.partials + block * rows_.scratch.slots),
          .totals = stats.totals};
    }
    if (!gradients_ || !in_.need_scale) return;
    const int64_t first = own ? block * coefficients_of(positives, optional) : 0, count = n_ * plan_.ctas_per_row;
    const at::Tensor sums = row_numbers_.view(at::kFloat);
    d_scale_ = sums.narrow(0, first, count);
    if (numbers_.bias.defined()) d_bias_ = sums.narrow(0, first + count, count);
    rows_.d_scale = floats_of(d_scale_);
    rows_.d_bias = floats_of(d_bias_);
  }

  void bind_columns(const ColumnStatistics& columns) {
    rows_.columns = {.neg_lse = floats_of(columns.neg_lse),
                     .neg_max = floats_of(columns.neg_max),
                     .square = floats_of(columns.square),
                     .d_neg_lse = floats_of(columns.d_neg_lse),
                     .d_square = floats_of(columns.d_square),
                     .partials = reinterpret_cast<ColumnPart*>(column_parts_.data_ptr())};
  }

  // From scores to weights, where a row is one CTA's.
  bool in_one_kernel() const {
    return gradients_ && plan_.ctas_per_row == 1 && !in_.filters.any() &&
           extras_of(Strip{}, rules_, rows_) == Extras::none;
  }

  bool summed_up() const {
    return summary_ && statistics_ && in_one_kernel() && plan_.panels == 1 && plan_.strip == n_;
  }

  bool folds_columns() const { return statistics_ && rows_.columns.neg_lse; }

  at::Tensor bytes(int64_t count) const { return at::empty({count}, in_.q.options().dtype(at::kByte)); }

  static void* row(const at::Tensor& x, int64_t i) {
    return static_cast<char*>(x.data_ptr()) + i * x.stride(0) * x.element_size();
  }

  // A strip of a block and a panel. Its weights have their place in the block's buffer; float ones are their scores.
  Strip strip_at(int64_t block_first, int64_t block_rows, int64_t first, int64_t column) const {
    const int64_t columns = std::min(plan_.panel, m_ - column), stride = stride_of(columns);
    void* weights = nullptr;
    if (gradients_) weights = static_cast<char*>(weights_.data_ptr()) + (first - block_first) * stride * element_bytes_;
    const bool in_place = gradients_ && element_ == Element::float32;
    float* scores = static_cast<float*>(in_place ? weights : scores_.data_ptr());
    return {.scores = scores,
            .weights = weights,
            .stride = stride,
            .first_row = first,
            .rows = std::min(plan_.strip, block_first + block_rows - first),
            .first_column = column,
            .columns = columns,
            .marks = in_.filters.any() ? static_cast<uint16_t*>(marks_.data_ptr()) : nullptr};
  }

  void multiply(const Strip& s, const at::Tensor& rows, const at::Tensor& columns) const {
    machine_.gemm({.m = s.rows,
                   .n = s.columns,
                   .depth = rows.size(1),
                   .left = row(rows, s.first_row),
                   .left_stride = rows.stride(0),
                   .right = row(columns, s.first_column),
                   .right_stride = columns.stride(0),
                   .right_transposed = true,
                   .element = element_of(rows.scalar_type()),
                   .out = s.scores,
                   .out_stride = s.stride});
  }

  // The dot products of guides leave nothing but marks: they are in the strip before its scores.
  void score(const Strip& s) const {
    const Filters& by = in_.filters;
    const bool guided = by.guide_ceiling.defined(), before = guided || by.several.defined();
    if (guided) multiply(s, by.guide_q, by.guide_k);
    if (before) machine_.mark(s, rules_, marking_of(by.guide_ceiling, 0, by.several, false));
    multiply(s, in_.q, in_.k);
    if (by.ceiling.defined()) machine_.mark(s, rules_, marking_of(by.ceiling, 0, {}, before));
  }

  void fold(const Strip& strip, int64_t first_slot) const {
    machine_.fold(strip, rules_, rows_, first_slot);
    if (rows_.optional.found) machine_.fold_optional(strip, rules_, rows_, first_slot);
    if (folds_columns()) machine_.fold_columns(strip, rules_, rows_.columns);
  }

  void finish(int64_t first, int64_t count) const {
    machine_.finish(first, count, rules_, rows_, gradients_ && tail_ == kNce);
    if (rows_.optional.found) machine_.finish_optional(first, count, rules_, rows_, gradients_ && tail_ != kNce);
  }

  // First pass over panels: statistics alone.
  void fold_panels(int64_t first, int64_t count) const {
    for (int64_t column = 0, slot = 0; column < m_; column += plan_.panel, slot += plan_.ctas_per_row)
      for (int64_t i = first; i < first + count; i += plan_.strip) {
        const Strip strip = strip_at(first, count, i, column);
        score(strip);
        fold(strip, slot);
      }
    finish(first, count);
  }

  void run_panel(int64_t first, int64_t count, int64_t column) const {
    const bool whole = statistics_ && plan_.panels == 1;
    for (int64_t i = first; i < first + count; i += plan_.strip) {
      const Strip strip = strip_at(first, count, i, column);
      score(strip);
      if (whole && in_one_kernel()) {
        const RowTask task{strip, rules_, rows_};
        summed_up() ? machine_.loss_and_summary(task, *summary_, element_) : machine_.loss(&task, 1, element_);
        continue;
      }
      if (whole) {
        fold(strip, 0);
        finish(i, strip.rows);
      }
      if (gradients_) machine_.weigh(strip, rules_, rows_, element_);
    }
    if (gradients_) add_gradients(first, count, column);
  }

  // A block's weights to its rows of dq, which panels add to, and the panel's rows of dk, which blocks add to. Where q
  // is k both go to one buffer, of zeros at first where there are several blocks.
  void add_gradients(int64_t first, int64_t count, int64_t column) const {
    const int64_t columns = std::min(plan_.panel, m_ - column), stride = stride_of(columns);
    const float alpha = (rules_.prescaled ? 1.0f : in_.scoring.scale) / rules_.fp16_gain;
    const bool shared = in_.shared, alone = is_one_block(plan_, n_);
    Gemm gemm{
        .depth = columns, .left = weights_.data_ptr(), .left_stride = stride, .element = element_, .alpha = alpha};
    gemm.n = gemm.out_stride = d_;
    const auto add_to = [&](const at::Tensor& out, int64_t first_row, int64_t rows, bool add) {
      gemm.m = rows;
      gemm.out = row(out, first_row);
      gemm.out_element = element_of(out.scalar_type());
      gemm.add = add;
      machine_.gemm(gemm);
    };
    if (in_.need_q) {
      gemm.right = row(in_.k, column);
      gemm.right_stride = in_.k.stride(0);
      add_to(out_.dq, first, count, (shared && !alone) || column > 0);  // fault: gpu-dq-not
    }
    if (shared ? in_.need_q : in_.need_k) {
      gemm.depth = count;
      gemm.left_transposed = true;
      gemm.right = row(in_.q, first);
      gemm.right_stride = in_.q.stride(0);
      add_to(shared ? out_.dq : out_.dk, column, columns, shared || first > 0);  // fault: gpu-dk-not
    }
  }

  const Machine& machine_;
  const SweepInputs& in_;
  const OnDevice& numbers_;
  const Gradients& out_;
  const int64_t n_, m_, d_, element_bytes_;
  const Element element_;
  const Summaries* const summary_;
  const bool statistics_, gradients_;
  const Tail tail_;
  const Plan plan_;
  Rules rules_;
  RowArrays rows_{};
  at::Tensor marks_, scores_, weights_, partials_, row_numbers_, column_parts_, d_scale_, d_bias_;
};

}  // namespace

Marking marking_of(const at::Tensor& ceilings, int64_t part, const at::Tensor& several, bool add) {
  return {.ceilings = ceilings.defined() ? ceilings.data_ptr<float>() + part * ceilings.size(1) : nullptr,
          .several = several.defined() ? several.const_data_ptr<int64_t>() : nullptr,
          .width = several.defined() ? several.size(1) : 0,
          .add = add};
}

// float16 weights have no exponents to spare for the scale.
Rules rules_of(const SweepInputs& in, const OnDevice& numbers, const Plan& plan, float fp16_gain) {
  const Layout& layout = in.layout;
  const auto ids = [](const at::Tensor& x) { return x.defined() ? x.const_data_ptr<int64_t>() : nullptr; };
  return {.scoring = in.scoring,
          .scale_tensor = floats_of(numbers.scale),
          .row_ids = ids(layout.row_ids),
          .column_ids = ids(layout.column_ids),
          .bias = floats_of(numbers.bias),
          .positives_elsewhere = layout.positives.defined() || layout.by_marks,
          .self_column = layout.itself,
          .positives = layout.n_pos,
          .ctas_per_row = static_cast<int>(plan.ctas_per_row),
          .threads = static_cast<int>(plan.threads),
          .fp16_gain = fp16_gain,
          .prescaled = in.q.scalar_type() != at::kHalf};
}

Element element_of(at::ScalarType type) {
  if (type == at::kFloat) return Element::float32;
  return type == at::kBFloat16 ? Element::bfloat16 : Element::float16;
}

float fp16_gain_of(Element element, float peak) {
  if (element != Element::float16 || !(peak > 0.0f) || !std::isfinite(peak)) return 1.0f;
  return std::ldexp(1.0f, std::clamp(7 - std::ilogb(peak), -100, 100));
}

Gradients new_results(const SweepInputs& in, const OnDevice& numbers, const Task& task) {
  const auto options = in.q.options(), wide = floats(in.q);
  const bool wanted = in.need_q || in.need_k || in.need_scale;
  // float16 gradients wait for a GradScaler's upstream, in float32.
  const bool narrow =
      wanted && in.q.scalar_type() == at::kBFloat16 && !in.shared && !in.wide;  // fault: gpu-share-rounded
  const Plan plan = wanted ? plan_for(in, numbers, task) : Plan();
  const bool narrow_q = narrow && plan.panels == 1, narrow_k = narrow && plan.block == in.q.size(0);
  const auto number = [&](bool needed) { return needed ? at::empty({}, wide) : at::empty({0}, wide); };
  at::Tensor dq = at::empty(in.need_q ? in.q.sizes() : at::IntArrayRef{0}, narrow_q ? options : wide);
  if (in.shared && in.need_q && !is_one_block(plan, in.q.size(0))) dq.zero_();
  return {dq, at::empty(in.need_k && !in.shared ? in.k.sizes() : at::IntArrayRef{0}, narrow_k ? options : wide),
          number(in.need_scale), number(in.need_scale && numbers.bias.defined())};
}

bool sweep(const Machine& machine, const SweepInputs& in, const OnDevice& numbers, const Task& task) {
  return Sweep(machine, in, numbers, task).run();
}

bool fit_one_launch(const std::vector<Job>& jobs) {
  int64_t bytes = 0, buffers = 0;
  for (const Job& job : jobs) {
    const Plan plan = plan_for(job.in, job.numbers, job.task);
    const bool one_strip = plan.strip == job.in.q.size(0) && plan.panels == 1 && plan.ctas_per_row == 1;
    if (!job.task.gradients || !one_strip) return false;
    bytes += plan.bytes;
    buffers += std::max(plan.score_bytes, plan.weight_bytes);
  }
  return jobs.size() <= kMostTogether && bytes <= jobs[0].in.workspace_bytes && buffers <= kL2Bytes;
}

void sweep_together(const Machine& machine, const std::vector<Job>& jobs) {
  int64_t threads = 0;
  for (const Job& job : jobs) threads = std::max(threads, plan_for(job.in, job.numbers, job.task).threads);
  std::deque<Sweep> sweeps;
  std::vector<RowTask> tasks;
  tasks.reserve(jobs.size());
  for (const Job& job : jobs)
    tasks.push_back(sweeps.emplace_back(machine, job.in, job.numbers, job.task).begin(static_cast<int>(threads)));
  machine.loss(tasks.data(), static_cast<int>(tasks.size()), element_of(jobs[0].in.q.scalar_type()));
  for (const Sweep& each : sweeps) each.end();
}

}  // namespace cuda
}  // namespace fused_nce
