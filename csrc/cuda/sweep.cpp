// For each block of rows: scores a strip at a time, statistics, weights into the block's buffer, and the two gradient
// GEMMs on it. Everything is enqueued and nothing is read back, so a call can be captured in a CUDA graph.
#include "sweep.h"

#include <ATen/ops/sum.h>

#include <algorithm>
#include <cmath>

namespace fused_nce {
namespace cuda {

namespace {

float* floats_of(const at::Tensor& x) { return x.defined() ? x.data_ptr<float>() : nullptr; }

class Sweep {
 public:
  Sweep(const Machine& machine, const SweepInputs& in, const at::Tensor& scale_tensor, bool statistics, bool gradients,
        const RowStatistics& stats, const Upstream& upstream, float unit, const Gradients& out)
      : machine_(machine), in_(in), scale_tensor_(scale_tensor), out_(out), n_(in.q.size(0)), m_(in.k.size(0)),
        d_(in.q.size(1)), element_bytes_(in.q.element_size()), element_(element_of(in.q.scalar_type())),
        statistics_(statistics), gradients_(gradients), plan_(checked_plan()),
        rules_{in.scoring, floats_of(scale_tensor), static_cast<int>(plan_.parts), static_cast<int>(plan_.threads),
               unit} {
    scores_ = bytes(plan_.score_bytes);
    weights_ = bytes(plan_.weight_bytes);
    partials_ = bytes(plan_.partial_bytes);
    row_numbers_ = bytes(plan_.row_bytes);
    const int64_t coefficients = statistics && gradients ? plan_.block * (in.scoring.n_c + 1) : 0;
    float* numbers = static_cast<float*>(row_numbers_.data_ptr());
    rows_.pos = floats_of(stats.pos);
    rows_.neg_lse = floats_of(stats.neg_lse);
    rows_.neg_max = floats_of(stats.neg_max);
    rows_.square = floats_of(stats.square);
    rows_.d_pos = coefficients ? numbers : floats_of(upstream.d_pos);
    rows_.d_neg_lse = coefficients ? numbers + plan_.block * in.scoring.n_c : floats_of(upstream.d_neg_lse);
    rows_.d_square = floats_of(upstream.d_square);
    rows_.nce_weight = upstream.nce_weight;
    rows_.square_weight = upstream.square_weight;
    if (gradients && in.need_scale)
      d_scale_ = row_numbers_.view(at::kFloat).narrow(0, coefficients, n_ * plan_.parts);
    rows_.d_scale = floats_of(d_scale_);
    rows_.partials = reinterpret_cast<RowPart*>(partials_.data_ptr());
    rows_.slots = plan_.panels * plan_.parts;
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
    if (!gradients_) return;
    if (scale_tensor_.defined()) {
      if (in_.need_q) out_.dq.mul_(scale_tensor_);
      if (in_.need_k) out_.dk.mul_(scale_tensor_);
    }
    if (d_scale_.defined()) out_.dscale.copy_(d_scale_.sum(at::kDouble));
  }

 private:
  Plan checked_plan() const {
    const Work work{n_, m_, d_, in_.scoring.n_c, element_bytes_, statistics_, gradients_};
    const Plan plan = make_plan(work, in_.workspace_bytes);
    TORCH_CHECK_VALUE(plan.fits, "workspace_bytes is ", in_.workspace_bytes, ", needed: at least ", plan.bytes, " for ",
                      n_, " rows, ", m_, " columns of width ", d_);
    return plan;
  }

  at::Tensor bytes(int64_t count) const { return at::empty({count}, in_.q.options().dtype(at::kByte)); }

  const void* row(const at::Tensor& x, int64_t i) const {
    return static_cast<const char*>(x.data_ptr()) + i * x.stride(0) * element_bytes_;
  }

  // A strip of a block and a panel. Its weights have their place in the block's buffer; float ones are their scores.
  Strip strip_at(int64_t block_first, int64_t block_rows, int64_t first, int64_t column) const {
    const int64_t columns = std::min(plan_.panel, m_ - column), stride = stride_of(columns);
    void* weights = nullptr;
    if (gradients_)
      weights = static_cast<char*>(weights_.data_ptr()) + (first - block_first) * stride * element_bytes_;
    const bool in_place = gradients_ && element_ == Element::float32;
    float* scores = static_cast<float*>(in_place ? weights : scores_.data_ptr());
    return {scores, weights, stride, first, std::min(plan_.strip, block_first + block_rows - first), column, columns};
  }

  void score(const Strip& s) const {
    machine_.gemm({s.rows, s.columns, d_, row(in_.q, s.first_row), in_.q.stride(0), false,
                   row(in_.k, s.first_column), in_.k.stride(0), true, element_, 1.0f, false, s.scores, s.stride});
  }

  // First pass over panels: statistics alone.
  void fold_panels(int64_t first, int64_t count) const {
    for (int64_t column = 0, slot = 0; column < m_; column += plan_.panel, slot += plan_.parts)
      for (int64_t i = first; i < first + count; i += plan_.strip) {
        const Strip strip = strip_at(first, count, i, column);
        score(strip);
        machine_.fold(strip, rules_, rows_, slot);
      }
    machine_.finish(first, count, rules_, rows_, gradients_);
  }

  void run_panel(int64_t first, int64_t count, int64_t column) const {
    const bool fold = statistics_ && plan_.panels == 1;
    for (int64_t i = first; i < first + count; i += plan_.strip) {
      const Strip strip = strip_at(first, count, i, column);
      score(strip);
      if (fold && gradients_ && plan_.parts == 1) {
        machine_.loss(strip, rules_, rows_, element_);
        continue;
      }
      if (fold) {
        machine_.fold(strip, rules_, rows_, 0);
        machine_.finish(i, strip.rows, rules_, rows_, gradients_);
      }
      if (gradients_) machine_.weigh(strip, rules_, rows_, element_);
    }
    if (gradients_) descend(first, count, column);
  }

  // A block's weights to its rows of dq, which panels add to, and the panel's rows of dk, which blocks add to.
  void descend(int64_t first, int64_t count, int64_t column) const {
    const int64_t columns = std::min(plan_.panel, m_ - column), stride = stride_of(columns);
    const float alpha = in_.scoring.scale / rules_.unit;
    if (in_.need_q)
      machine_.gemm({count, d_, columns, weights_.data_ptr(), stride, false, row(in_.k, column), in_.k.stride(0), false,
                     element_, alpha, column > 0, out_.dq.data_ptr<float>() + first * d_, d_});
    if (in_.need_k)
      machine_.gemm({columns, d_, count, weights_.data_ptr(), stride, true, row(in_.q, first), in_.q.stride(0), false,
                     element_, alpha, first > 0, out_.dk.data_ptr<float>() + column * d_, d_});
  }

  const Machine& machine_;
  const SweepInputs& in_;
  const at::Tensor& scale_tensor_;
  const Gradients& out_;
  const int64_t n_, m_, d_, element_bytes_;
  const Element element_;
  const bool statistics_, gradients_;
  const Plan plan_;
  const Rules rules_;
  RowArrays rows_{};
  at::Tensor scores_, weights_, partials_, row_numbers_, d_scale_;
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

void sweep(const Machine& machine, const SweepInputs& in, const at::Tensor& scale_tensor, bool statistics,
           bool gradients, const RowStatistics& stats, const Upstream& upstream, float unit, const Gradients& out) {
  Sweep(machine, in, scale_tensor, statistics, gradients, stats, upstream, unit, out).run();
}

}  // namespace cuda
}  // namespace fused_nce
