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
  const Plan plan =
      make_plan({n, m, d, in.layout.n_pos, in.q.element_size(), task.statistics, task.gradients,
                 in.need_scale ? (numbers.bias.defined() ? 2 : 1) : 0,
                 task.statistics && task.columns.neg_lse.defined(), task.statistics && task.rows.further.defined()},
                in.workspace_bytes);
  TORCH_CHECK_VALUE(plan.fits, "workspace_bytes is ", in.workspace_bytes, ", needed: at least ", plan.bytes, " for ", n,
                    " rows, ", m, " columns of width ", d);
  return plan;
}

class Sweep {
 public:
  Sweep(const Machine& machine, const SweepInputs& in, const OnDevice& numbers, const Task& task)
      : machine_(machine), in_(in), numbers_(numbers), out_(task.out), n_(in.q.size(0)), m_(in.k.size(0)),
        d_(in.q.size(1)), element_bytes_(in.q.element_size()), element_(element_of(in.q.scalar_type())),
        statistics_(task.statistics), gradients_(task.gradients), tail_(task.upstream.tail.name),
        plan_(plan_for(in, numbers, task)), rules_(rules(task.unit)) {
    scores_ = bytes(plan_.score_bytes);
    weights_ = bytes(plan_.weight_bytes);
    partials_ = bytes(plan_.partial_bytes);
    row_numbers_ = bytes(plan_.row_bytes);
    column_parts_ = bytes(plan_.column_bytes);
    name_rows(task.rows, task.upstream);
    name_columns(task.columns);
  }

  void run() {
    for (int64_t first = 0; first < n_; first += plan_.block) {
      const int64_t count = std::min(plan_.block, n_ - first);
      rows_.block_first = first;
      rows_.first_coefficient = statistics_ ? first : 0;
      if (statistics_ && plan_.panels > 1) fold_panels(first, count);
      if (plan_.panels == 1 || gradients_)
        for (int64_t column = 0; column < m_; column += plan_.panel) run_panel(first, count, column);
    }
    if (folds_columns()) machine_.finish_columns(m_, rules_, rows_.columns);
    if (gradients_) finish_gradients();
  }

  // `run` in three steps, for a sweep that is one strip: between them its row kernel runs, for which this is the task.
  RowTask begin(int threads) {
    rules_.threads = threads;
    const Strip strip = strip_at(0, n_, 0, 0);
    score(strip);
    return {strip, rules_, rows_};
  }

  void end() const {
    descend(0, n_, 0);
    finish_gradients();
  }

 private:
  void finish_gradients() const {
    if (numbers_.scale.defined() && !rules_.scaled) {
      if (in_.need_q) out_.dq.mul_(numbers_.scale);
      if (in_.need_k) out_.dk.mul_(numbers_.scale);
    }
    if (d_scale_.defined()) out_.dscale.copy_(d_scale_.sum(at::kDouble));
    if (d_bias_.defined()) out_.dbias.copy_(d_bias_.sum(at::kDouble));
  }

  // float16 weights have no exponents to spare for the scale.
  Rules rules(float unit) const {
    const Layout& layout = in_.layout;
    const auto ids = [](const at::Tensor& x) { return x.defined() ? x.const_data_ptr<int64_t>() : nullptr; };
    return {in_.scoring,
            floats_of(numbers_.scale),
            ids(layout.row_ids),
            ids(layout.column_ids),
            floats_of(numbers_.bias),
            layout.positives.defined(),
            layout.itself,
            layout.n_pos,
            static_cast<int>(plan_.parts),
            static_cast<int>(plan_.threads),
            unit,
            element_ != Element::float16};
  }

  // Coefficients that the tail makes are a block's, at the front of `row_numbers_`; the sums of all rows follow.
  void name_rows(const RowStatistics& stats, const Upstream& upstream) {
    const bool further = stats.further.defined(), own = statistics_ && gradients_;
    const int64_t positives = in_.layout.n_pos, block = plan_.block;
    float* numbers = static_cast<float*>(row_numbers_.data_ptr());
    rows_.pos = floats_of(stats.pos);
    rows_.neg_lse = floats_of(stats.neg_lse);
    rows_.neg_max = floats_of(stats.neg_max);
    rows_.square = floats_of(stats.square);
    rows_.d_pos = own ? numbers : floats_of(upstream.d_pos);
    rows_.d_neg_lse = own ? numbers + block * positives : floats_of(upstream.d_neg_lse);
    rows_.d_square = floats_of(upstream.d_square);
    rows_.tail = upstream.tail;
    rows_.slots = plan_.panels * plan_.parts;
    rows_.partials = reinterpret_cast<RowPart*>(partials_.data_ptr());
    if (further) {
      float* d = floats_of(upstream.d_further);
      if (own) d = tail_ == kNce ? nullptr : numbers + block * (positives + 1);
      rows_.further = {floats_of(stats.further), d, n_, own ? block : n_,
                       reinterpret_cast<FurtherPart*>(rows_.partials + block * rows_.slots)};
    }
    if (!gradients_ || !in_.need_scale) return;
    const int64_t first = own ? block * coefficients_of(positives, further) : 0, count = n_ * plan_.parts;
    const at::Tensor sums = row_numbers_.view(at::kFloat);
    d_scale_ = sums.narrow(0, first, count);
    if (numbers_.bias.defined()) d_bias_ = sums.narrow(0, first + count, count);
    rows_.d_scale = floats_of(d_scale_);
    rows_.d_bias = floats_of(d_bias_);
  }

  void name_columns(const ColumnStatistics& columns) {
    rows_.columns = {floats_of(columns.neg_lse),  floats_of(columns.neg_max),
                     floats_of(columns.square),   floats_of(columns.d_neg_lse),
                     floats_of(columns.d_square), reinterpret_cast<ColumnPart*>(column_parts_.data_ptr())};
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
    return {scores, weights, stride, first, std::min(plan_.strip, block_first + block_rows - first), column, columns};
  }

  void score(const Strip& s) const {
    machine_.gemm({s.rows, s.columns, d_, row(in_.q, s.first_row), in_.q.stride(0), false, row(in_.k, s.first_column),
                   in_.k.stride(0), true, element_, 1.0f, false, s.scores, s.stride, Element::float32});
  }

  void fold(const Strip& strip, int64_t first_slot) const {
    machine_.fold(strip, rules_, rows_, first_slot);
    if (rows_.further.found) machine_.fold_further(strip, rules_, rows_, first_slot);
    if (folds_columns()) machine_.fold_columns(strip, rules_, rows_.columns);
  }

  void finish(int64_t first, int64_t count) const {
    machine_.finish(first, count, rules_, rows_, gradients_ && tail_ == kNce);
    if (rows_.further.found) machine_.finish_further(first, count, rules_, rows_, gradients_ && tail_ != kNce);
  }

  // First pass over panels: statistics alone.
  void fold_panels(int64_t first, int64_t count) const {
    for (int64_t column = 0, slot = 0; column < m_; column += plan_.panel, slot += plan_.parts)
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
      if (whole && gradients_ && plan_.parts == 1 && !has_more(rules_, rows_)) {
        const RowTask task{strip, rules_, rows_};
        machine_.loss(&task, 1, element_);
        continue;
      }
      if (whole) {
        fold(strip, 0);
        finish(i, strip.rows);
      }
      if (gradients_) machine_.weigh(strip, rules_, rows_, element_);
    }
    if (gradients_) descend(first, count, column);
  }

  // A block's weights to its rows of dq, which panels add to, and the panel's rows of dk, which blocks add to. Where q
  // is k both go to one buffer, of zeros at first.
  void descend(int64_t first, int64_t count, int64_t column) const {
    const int64_t columns = std::min(plan_.panel, m_ - column), stride = stride_of(columns);
    const float alpha = (rules_.scaled ? 1.0f : in_.scoring.scale) / rules_.unit;
    const bool shared = in_.shared;
    if (in_.need_q)
      machine_.gemm({count, d_, columns, weights_.data_ptr(), stride, false, row(in_.k, column), in_.k.stride(0), false,
                     element_, alpha, shared || column > 0, row(out_.dq, first), d_,
                     element_of(out_.dq.scalar_type())});
    const at::Tensor& dk = shared ? out_.dq : out_.dk;
    if (shared ? in_.need_q : in_.need_k)
      machine_.gemm({columns, d_, count, weights_.data_ptr(), stride, true, row(in_.q, first), in_.q.stride(0), false,
                     element_, alpha, shared || first > 0, row(dk, column), d_, element_of(dk.scalar_type())});
  }

  const Machine& machine_;
  const SweepInputs& in_;
  const OnDevice& numbers_;
  const Gradients& out_;
  const int64_t n_, m_, d_, element_bytes_;
  const Element element_;
  const bool statistics_, gradients_;
  const Tail tail_;
  const Plan plan_;
  Rules rules_;
  RowArrays rows_{};
  at::Tensor scores_, weights_, partials_, row_numbers_, column_parts_, d_scale_, d_bias_;
};

}  // namespace

Element element_of(at::ScalarType type) {
  if (type == at::kFloat) return Element::float32;
  return type == at::kBFloat16 ? Element::bfloat16 : Element::float16;
}

float unit_of(Element element, float peak) {
  if (element != Element::float16 || !(peak > 0.0f) || !std::isfinite(peak)) return 1.0f;
  return std::ldexp(1.0f, std::clamp(7 - std::ilogb(peak), -100, 100));
}

Gradients new_results(const SweepInputs& in, const OnDevice& numbers, const Task& task) {
  const auto options = in.q.options(), wide = floats(in.q);
  const bool wanted = in.need_q || in.need_k || in.need_scale;
  // float16 gradients wait for a GradScaler's upstream, in float32.
  const bool narrow = wanted && in.q.scalar_type() == at::kBFloat16 && !in.shared;
  const Plan plan = wanted ? plan_for(in, numbers, task) : Plan();
  const bool narrow_q = narrow && plan.panels == 1, narrow_k = narrow && plan.block == in.q.size(0);
  const auto number = [&](bool needed) { return needed ? at::empty({}, wide) : at::empty({0}, wide); };
  at::Tensor dq = at::empty(in.need_q ? in.q.sizes() : at::IntArrayRef{0}, narrow_q ? options : wide);
  if (in.shared && in.need_q) dq.zero_();
  return {dq, at::empty(in.need_k && !in.shared ? in.k.sizes() : at::IntArrayRef{0}, narrow_k ? options : wide),
          number(in.need_scale), number(in.need_scale && numbers.bias.defined())};
}

void sweep(const Machine& machine, const SweepInputs& in, const OnDevice& numbers, const Task& task) {
  Sweep(machine, in, numbers, task).run();
}

bool are_brief(const std::vector<Job>& jobs) {
  int64_t bytes = 0, buffers = 0;
  for (const Job& job : jobs) {
    const Plan plan = plan_for(job.in, job.numbers, job.task);
    const bool one_strip = plan.strip == job.in.q.size(0) && plan.panels == 1 && plan.parts == 1;
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
  for (const Job& job : jobs)
    tasks.push_back(sweeps.emplace_back(machine, job.in, job.numbers, job.task).begin(static_cast<int>(threads)));
  machine.loss(tasks.data(), static_cast<int>(tasks.size()), element_of(jobs[0].in.q.scalar_type()));
  for (const Sweep& each : sweeps) each.end();
}

}  // namespace cuda
}  // namespace fused_nce
