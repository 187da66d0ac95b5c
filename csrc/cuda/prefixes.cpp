// For each strip of rows, the products of one block of columns after the other, and from each state of them the cosines
// of a prefix and its statistics. Back, from the widest prefix to the narrowest, the weights add up where the products
// were, and each block of columns takes one product with what has been added so far: the GEMMs of one loss, but that in
// bfloat16 those of gradients come twice, for what rounding leaves of the weights. A strip has all columns, and all its
// prefixes' cosines from statistics to weights.
#include <ATen/ops/sum.h>

#include <algorithm>

#include "../prefix_task.h"
#include "sweep.h"

namespace fused_nce {
namespace cuda {

namespace {

class PrefixSweep {
 public:
  PrefixSweep(const Machine& machine, const SweepInputs& in, const OnDevice& numbers, const PrefixTask& task)
      : machine_(machine), in_(in), task_(task), n_(in.q.size(0)), m_(in.k.size(0)), d_(in.q.size(1)),
        parts_(static_cast<int64_t>(task.widths.size())), stride_(stride_of(m_)),
        element_(element_of(in.q.scalar_type())), plan_(checked(in, task)), rules_(rules_of(in, numbers, plan_, 1.0f)) {
    rules_.prescaled = false;
    scores_ = floats_for(plan_.score_bytes);
    numbers_ = floats_for(plan_.row_bytes);
    partials_ = bytes(plan_.partial_bytes);
    marks_ = bytes(plan_.mark_bytes);
    weights_ = bytes(plan_.weight_bytes);
    products_ = scores_.data_ptr<float>() + held() * plan_.strip * stride_;
  }

  void run() {
    for (int64_t first = 0; first < n_; first += plan_.strip) {
      const int64_t count = std::min(plan_.strip, n_ - first);
      mark_before(first, count);
      for (int64_t i = 0; i < parts_; ++i) fold(strip_at(first, count, i), i);
      if (task_.gradients)
        for (int64_t i = parts_ - 1; i >= 0; --i) weigh(strip_at(first, count, i), i);
    }
    if (task_.gradients) {
      const int64_t shares = n_ * plan_.ctas_per_row;
      task_.row_sums.copy_(numbers_.narrow(0, numbers_.numel() - parts_ * shares, parts_ * shares)
                               .view({parts_, n_, plan_.ctas_per_row})
                               .sum(2, false, at::kDouble));
    }
  }

 private:
  static Plan checked(const SweepInputs& in, const PrefixTask& task) {
    const Plan plan = plan_prefixes({.rows = in.q.size(0),
                                     .columns = in.k.size(0),
                                     .positives = in.layout.n_pos,
                                     .parts = static_cast<int64_t>(task.widths.size()),
                                     .element_bytes = in.q.element_size(),
                                     .gradients = task.gradients,
                                     .marked = in.filters.any()},
                                    in.workspace_bytes);
    TORCH_CHECK_VALUE(plan.fits, "workspace_bytes is ", in.workspace_bytes, ", needed: at least ", plan.bytes, " for ",
                      task.widths.size(), " prefixes of ", in.q.size(0), " rows and ", in.k.size(0), " columns");
    return plan;
  }

  at::Tensor bytes(int64_t count) const { return at::empty({count}, in_.q.options().dtype(at::kByte)); }
  at::Tensor floats_for(int64_t count) const { return bytes(count).view(at::kFloat); }

  // Prefixes whose cosines are alive together.
  int64_t held() const { return task_.gradients ? parts_ : 1; }

  int64_t start(int64_t i) const { return i > 0 ? task_.widths[i - 1] : 0; }

  Strip strip_at(int64_t first, int64_t count, int64_t i) const {
    float* scores = scores_.data_ptr<float>() + (held() > 1 ? i : 0) * plan_.strip * stride_;
    uint16_t* marks = static_cast<uint16_t*>(marks_.data_ptr());
    return {.scores = scores,
            .weights = element_ == Element::float32 ? products_ : weights_.data_ptr(),
            .stride = stride_,
            .first_row = first,
            .rows = count,
            .first_column = 0,
            .columns = m_,
            .marks = in_.filters.any() ? marks + i * plan_.strip * (stride_ / kColumns) : nullptr};
  }

  void* rest() const {
    return element_ == Element::float32 ? nullptr : static_cast<char*>(weights_.data_ptr()) + weights_.numel() / 2;
  }

  PrefixStrip beside(int64_t i) const {
    return {.products = products_,
            .of_rows = task_.of_q.data_ptr<float>() + i * n_,
            .of_columns = task_.of_k.data_ptr<float>() + i * m_,
            .add = i < parts_ - 1,
            .rest = rest()};
  }

  // Of prefix i, in a strip from row `first` on; coefficients are the caller's, or the tail's for the strip.
  RowArrays arrays(int64_t i, int64_t first) const {
    const auto line = [&](const at::Tensor& x, Statistic name) {
      return x.data_ptr<float>() + (i * kFirstOptional + name) * n_;
    };
    const int64_t p = in_.layout.n_pos;
    RowArrays out{};
    out.stats = {.pos = task_.pos.data_ptr<float>() + i * n_ * p,
                 .neg_lse = line(task_.rows, kNegLse),
                 .neg_max = line(task_.rows, kNegMax),
                 .square = line(task_.rows, kSquare)};
    out.scratch = {
        .partials = static_cast<RowPart*>(partials_.data_ptr()), .first_row = first, .slots = plan_.ctas_per_row};
    if (!task_.gradients) return out;
    float* numbers = numbers_.data_ptr<float>();
    out.d_scale = numbers + numbers_.numel() - (parts_ - i) * n_ * plan_.ctas_per_row;
    if (task_.d_rows.defined()) {
      out.upstream = {.d_pos = task_.d_pos.data_ptr<float>() + i * n_ * p,
                      .d_neg_lse = line(task_.d_rows, kNegLse),
                      .d_square = line(task_.d_rows, kSquare),
                      .first_row = 0,
                      .tail = {}};
      return out;
    }
    const float unit = task_.unit * static_cast<float>(task_.weights[i]);  // fault: gpu-prefix-unweighted
    float* own = numbers + i * plan_.strip * (p + 1);
    out.upstream = {.d_pos = own,
                    .d_neg_lse = own + plan_.strip * p,
                    .d_square = nullptr,
                    .first_row = first,
                    .tail = {kNce, unit, 0.0f}};
    return out;
  }

  // The marks of all prefixes that need no cosines: the guides' dot products lie where the first one's will.
  void mark_before(int64_t first, int64_t count) const {
    const Filters& by = in_.filters;
    if (!before()) return;
    const Strip heights = strip_at(first, count, 0);
    if (by.guide_ceiling.defined())
      machine_.gemm(products_of(heights, by.guide_q, by.guide_k, 0, by.guide_q.size(1), heights.scores));
    for (int64_t i = 0; i < parts_; ++i) {
      Strip strip = heights;
      strip.marks = strip_at(first, count, i).marks;
      machine_.mark(strip, rules_, marking_of(by.guide_ceiling, i, by.several, false));
    }
  }

  bool before() const { return in_.filters.guide_ceiling.defined() || in_.filters.several.defined(); }

  // What columns from `from` on add to the products, or all of the guides'.
  Gemm products_of(const Strip& s, const at::Tensor& rows, const at::Tensor& columns, int64_t from, int64_t width,
                   float* out) const {
    return {.m = s.rows,
            .n = s.columns,
            .depth = width,
            .left = at(rows, s.first_row, from),
            .left_stride = rows.stride(0),
            .right = at(columns, 0, from),
            .right_stride = columns.stride(0),
            .right_transposed = true,
            .element = element_of(rows.scalar_type()),
            .add = from > 0,
            .out = out,
            .out_stride = stride_};
  }

  static const void* at(const at::Tensor& x, int64_t row, int64_t column) {
    return static_cast<const char*>(x.const_data_ptr()) + (row * x.stride(0) + column) * x.element_size();
  }

  void fold(const Strip& s, int64_t i) const {
    machine_.gemm(products_of(s, in_.q, in_.k, start(i), task_.widths[i] - start(i), products_));
    machine_.cosines(s, rules_, beside(i));
    if (in_.filters.ceiling.defined()) machine_.mark(s, rules_, marking_of(in_.filters.ceiling, i, {}, before()));
    if (!task_.statistics) return;
    const RowArrays rows = arrays(i, s.first_row);
    machine_.fold(s, rules_, rows, 0);
    machine_.finish(s.first_row, s.rows, rules_, rows, task_.gradients);
  }

  void weigh(const Strip& s, int64_t i) const {
    machine_.weigh_prefix(s, rules_, arrays(i, s.first_row), beside(i), element_);
    const at::Tensor along = scores_.narrow(0, i * plan_.strip * stride_, s.rows * stride_).view({s.rows, stride_});
    task_.line_sums.select(0, i).add_(along.narrow(1, 0, m_).sum(0));
    for (const void* weights : {static_cast<const void*>(s.weights), static_cast<const void*>(rest())})
      if (weights) add_gradients(s, i, weights, weights != s.weights);  // fault: gpu-prefix-rest
  }

  void add_gradients(const Strip& s, int64_t i, const void* weights, bool again) const {
    Gemm gemm{.n = task_.widths[i] - start(i), .left = weights, .left_stride = stride_, .element = element_};
    gemm.out_stride = d_;
    if (in_.need_q) {
      gemm.m = s.rows;
      gemm.depth = m_;
      gemm.right = at(in_.k, 0, start(i));
      gemm.right_stride = in_.k.stride(0);
      gemm.add = again;
      gemm.out = task_.out.dq.data_ptr<float>() + s.first_row * d_ + start(i);
      machine_.gemm(gemm);
    }
    if (!in_.need_k) return;
    gemm.m = m_;
    gemm.depth = s.rows;
    gemm.left_transposed = true;
    gemm.right = at(in_.q, s.first_row, start(i));
    gemm.right_stride = in_.q.stride(0);
    gemm.add = again || s.first_row > 0;  // fault: gpu-prefix-strips
    gemm.out = task_.out.dk.data_ptr<float>() + start(i);
    machine_.gemm(gemm);
  }

  const Machine& machine_;
  const SweepInputs& in_;
  const PrefixTask& task_;
  const int64_t n_, m_, d_, parts_, stride_;
  const Element element_;
  const Plan plan_;
  Rules rules_;
  at::Tensor scores_, numbers_, partials_, marks_, weights_;
  float* products_;
};

}  // namespace

void sweep_prefixes(const Machine& machine, const SweepInputs& in, const OnDevice& numbers, const PrefixTask& task) {
  PrefixSweep(machine, in, numbers, task).run();
}

}  // namespace cuda
}  // namespace fused_nce
