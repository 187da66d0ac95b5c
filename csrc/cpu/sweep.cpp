// For each strip of rows: the transposed score tiles and the statistics of their rows; the rows' coefficients; the
// weights, over the scores, and from each tile of them its rows of dk and a share of dq. Tiles belong to groups by
// shape alone and groups are merged in order, so the bits do not depend on the number of threads.
#include "sweep.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "arena.h"
#include "gemm.h"
#include "isa.h"
#include "strip.h"

namespace fused_nce {

namespace {

Work work_of(const SweepInputs& in, bool statistics, bool gradients) {
  return {in.q.size(0), in.k.size(0), in.q.size(1), std::max(in.scoring.n_c, in.layout.n_pos),
          elements_of(in.q.scalar_type(), in.q.size(1)), statistics && gradients, gradients, in.need_q, in.need_k,
          in.shared};
}

// What one task owns.
template <class E>
struct Group {
  Accumulators acc;
  float* tile_d_scale;          // (lanes)
  float* scores;                // a tile of them, unless the strip stores its own
  float* wide_keys;             // (tile_columns, D), of widened elements
  E* left;                      // weights (rows, tile_columns), the left operand of dq
  uint16_t* rounded;            // weights (tile_columns, lanes), the left operand of dk; null: over the scores
  E* right;                     // keys in pairs, the right operand of dq
  float* wide_dk;               // (tile_columns, kOutputWidth), where dk leaves in bfloat16; shares their place
  float* dq;                    // (lanes, D), this group's share; null: the first group's, written in place
  double d_scale;
};

template <class E>
class Sweep {
  static constexpr bool kBf16 = kPaired<E>;

 public:
  Sweep(const SweepInputs& in, bool statistics, bool gradients, const RowStatistics& stats, const Upstream& upstream,
        const Gradients& out)
      : rows_(active_kernels()), scoring_(in.scoring), layout_(in.layout), n_(in.q.size(0)), m_(in.k.size(0)), d_(in.q.size(1)),
        elements_(elements_of(in.q.scalar_type(), d_)), half_(in.q.scalar_type() == at::kHalf),
        q_(in.q.data_ptr()), k_(in.k.data_ptr()), q_stride_(in.q.stride(0)), k_stride_(in.k.stride(0)),
        statistics_(statistics), gradients_(gradients), need_q_(in.need_q), need_k_(in.need_k),
        need_scale_(in.need_scale), upstream_(upstream), out_(out),
        stats_{stats.pos.data_ptr<float>(), stats.neg_lse.data_ptr<float>(),
               statistics ? stats.neg_max.data_ptr<float>() : nullptr,
               statistics ? stats.square.data_ptr<float>() : nullptr},
        n_pos_(in.layout.n_pos), work_{work_of(in, statistics, gradients)},
        plan_(checked_plan(in.workspace_bytes)), arena_(plan_.bytes) {
    const int64_t lanes = plan_.lanes;
    packed_ = arena_.take<E>(lanes * d_);
    const bool copied = elements_ == Elements::widened || (need_k_ && kBf16);
    q_rows_ = copied ? arena_.take<E>(lanes * d_) : nullptr;
    stored_ = plan_.stored ? arena_.take<float>(m_ * lanes) : nullptr;
    ids_ = arena_.take<int32_t>(lanes);
    itself_ = arena_.take<int32_t>(lanes);
    coefficients_ = {arena_.take<float>(lanes), arena_.take<float>(lanes), arena_.take<float>(lanes),
                     arena_.take<float>(lanes), arena_.take<float>(work_.image * lanes)};
    for (int64_t g = 0; g < plan_.groups; ++g) {
      groups_.push_back(make_group(g == 0));
      accumulators_.push_back(groups_.back().acc);
    }
  }

  void run() {
    if (need_q_) use_large_pages(out_.dq);
    if (need_k_) use_large_pages(out_.dk);
    double d_scale = 0.0;
    for (int64_t strip = 0; strip < plan_.strips; ++strip) {
      const int64_t first = strip * plan_.lanes;
      strip_ = {first, std::min(plan_.lanes, n_ - first), plan_.lanes, scoring_.n_c, n_pos_, ids_,
                layout_.itself >= 0 ? itself_ : nullptr};
      pack_queries();
      name_rows();
      if (statistics_) {
        for_each_group([this](Group<E>& group, int64_t begin, int64_t end) { fold(group, begin, end); });
        finish_statistics(strip_, scoring_, accumulators_, stats_, coefficients_);
      }
      if (!gradients_) continue;
      if (statistics_)
        coefficients_of_loss(strip_, stats_, upstream_.nce_weight, upstream_.square_weight, coefficients_);
      else
        coefficients_of_caller(strip_, scoring_, stats_, upstream_.d_pos.template data_ptr<float>(),
                               upstream_.d_neg_lse.template data_ptr<float>(),
                               upstream_.d_square.template data_ptr<float>(), coefficients_);
      for_each_group([this](Group<E>& group, int64_t begin, int64_t end) { weigh(group, begin, end); });
      for (const Group<E>& group : groups_) d_scale += group.d_scale;
      if (need_q_) merge_dq();
    }
    if (need_scale_) *out_.dscale.template data_ptr<float>() = static_cast<float>(d_scale);
  }

 private:
  Plan checked_plan(int64_t workspace_bytes) const {
    const Plan plan = make_plan(work_, workspace_bytes);
    TORCH_CHECK_VALUE(plan.lanes > 0, "workspace_bytes is ", workspace_bytes, ", needed: at least ", plan.bytes,
                      " for ", n_, " rows, ", m_, " columns of width ", d_);
    return plan;
  }

  Group<E> make_group(bool first) {
    const int64_t lanes = plan_.lanes, columns = round_up(plan_.tile_columns, 2);
    Group<E> g{};
    float** const arrays[] = {&g.acc.max,    &g.acc.shift,        &g.acc.sum, &g.acc.sum_error,
                              &g.acc.square, &g.acc.square_error, &g.acc.bad, &g.tile_d_scale};
    for (float** array : arrays) *array = arena_.take<float>(lanes);
    if (!plan_.stored) g.scores = arena_.take<float>(columns * lanes);
    if (elements_ == Elements::widened) g.wide_keys = arena_.take<float>(columns * d_);
    if (!gradients_) return g;
    if (kBf16) g.rounded = arena_.take<uint16_t>(columns * lanes);
    char* operands = arena_.take<char>(operand_bytes(work_, plan_));
    g.left = reinterpret_cast<E*>(operands);
    g.right = g.left + columns * lanes;
    g.wide_dk = reinterpret_cast<float*>(operands);
    if (need_q_ && !first) g.dq = arena_.take<float>(lanes * d_);
    return g;
  }

  template <class F>
  void for_each_group(const F& f) {
    // Whoever is free takes the next group: with equal shares, a thread that the system had interrupted kept all others
    // waiting. Who computes a group does not show in its result.
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(plan_.groups, at::get_num_threads()), 1, [&](int64_t, int64_t) {
      for (int64_t g = next++; g < plan_.groups; g = next++)
        f(groups_[g], g * plan_.tiles / plan_.groups, (g + 1) * plan_.tiles / plan_.groups);
      at::native::cpublas::brgemm_release(kBf16);
    });
  }

  void widen(const void* base, int64_t stride, int64_t row, float* out) const {
    const uint16_t* from = static_cast<const uint16_t*>(base) + row * stride;
    (half_ ? rows_.widen_fp16 : rows_.widen_bf16)(from, out, d_);
  }

  const E* query_rows() const {
    return q_rows_ ? q_rows_ : static_cast<const E*>(q_) + strip_.first * q_stride_;
  }

  // The strip's queries transposed, in 32-bit words: one float, or the pair of bfloat16 that brgemm wants together.
  void pack_queries() {
    const int64_t lanes = plan_.lanes, words = d_ * static_cast<int64_t>(sizeof(E)) / 4;
    if (elements_ == Elements::widened) {
      float* wide = reinterpret_cast<float*>(q_rows_);
      for (int64_t l = 0; l < strip_.rows; ++l) widen(q_, q_stride_, strip_.first + l, wide + l * d_);
    }
    const bool wide = elements_ == Elements::widened;
    const E* from = wide ? q_rows_ : static_cast<const E*>(q_) + strip_.first * q_stride_;
    const int64_t stride = (wide ? d_ : q_stride_) * static_cast<int64_t>(sizeof(E));
    uint32_t* to = reinterpret_cast<uint32_t*>(packed_);
    at::parallel_for(0, ceil_div(words, 16), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t l = 0; l < lanes; ++l)
          for (int64_t w = block * 16; w < std::min(words, block * 16 + 16); ++w) {
            uint32_t word = 0;
            if (l < strip_.rows) __builtin_memcpy(&word, reinterpret_cast<const char*>(from) + l * stride + w * 4, 4);
            to[w * lanes + l] = word;
          }
    });
    if (kBf16 && need_k_) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(q_rows_);
      interleave(reinterpret_cast<const uint16_t*>(from), q_stride_, strip_.rows, d_, pairs);
    }
  }

  // Whose positives are whose, and which column is which row itself.
  void name_rows() {
    std::fill_n(ids_, plan_.lanes, -1);
    std::fill_n(itself_, plan_.lanes, -1);
    for (int64_t l = 0; l < strip_.rows; ++l) {
      const int64_t i = strip_.first + l;
      if (layout_.row_ids.defined()) ids_[l] = static_cast<int32_t>(layout_.row_ids.template const_data_ptr<int64_t>()[i]);
      else if (!layout_.positives.defined()) ids_[l] = static_cast<int32_t>(i / scoring_.rows_per_image + scoring_.offset);
      if (layout_.itself >= 0) itself_[l] = static_cast<int32_t>(i + layout_.itself);
    }
  }

  Tile tile_of(const Group<E>& group, int64_t index) const {
    const int64_t first = index * plan_.tile_columns;
    return {stored_ ? stored_ + first * plan_.lanes : group.scores,
            std::min(plan_.tile_columns, m_ - first), plan_.lanes, strip_.rows, first, strip_.first, strip_.ids,
            strip_.itself};
  }

  struct Keys {
    const E* data;
    int64_t stride;
  };

  // The keys of a tile as the GEMMs read them: in place, or widened.
  Keys keys_of(const Group<E>& group, const Tile& tile) const {
    if (elements_ != Elements::widened) return {static_cast<const E*>(k_) + tile.first_column * k_stride_, k_stride_};
    for (int64_t c = 0; c < tile.columns; ++c) widen(k_, k_stride_, tile.first_column + c, group.wide_keys + c * d_);
    return {reinterpret_cast<const E*>(group.wide_keys), d_};
  }

  void score(const Tile& tile, const Keys& keys) const {
    score_gemm(keys.data, keys.stride, packed_, tile.columns, tile.lanes, d_, tile.scores);
  }

  void fold(Group<E>& group, int64_t begin, int64_t end) {
    const Accumulators& acc = group.acc;
    std::fill_n(acc.max, plan_.lanes, -std::numeric_limits<float>::infinity());
    for (float* array : {acc.shift, acc.sum, acc.sum_error, acc.square, acc.square_error, acc.bad})
      std::fill_n(array, plan_.lanes, 0.0f);
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_of(group, t);
      score(tile, keys_of(group, tile));
      rows_.fold(tile, scoring_, acc);
      rows_.positives(tile, scoring_, n_pos_, stats_.pos);
    }
  }

  void weigh(Group<E>& group, int64_t begin, int64_t end) {
    group.d_scale = 0.0;
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_of(group, t);
      const Keys keys = stored_ && !need_q_ ? Keys{nullptr, 0} : keys_of(group, tile);
      if (!stored_) score(tile, keys);
      std::fill_n(group.tile_d_scale, plan_.lanes, 0.0f);
      rows_.weigh(tile, scoring_, coefficients_, group.rounded, need_scale_ ? group.tile_d_scale : nullptr);
      for (int64_t l = 0; l < strip_.rows; ++l) group.d_scale += group.tile_d_scale[l];
      if (need_k_) write_dk(group, tile);
      if (need_q_) add_dq(group, tile, keys, t > begin);
    }
  }

  // dk of the tile's columns is this tile's alone: no race, and strips add up in order.
  void write_dk(const Group<E>& group, const Tile& tile) {
    const E* left = kBf16 ? reinterpret_cast<const E*>(group.rounded) : reinterpret_cast<const E*>(tile.scores);
    const int64_t depth = kBf16 ? round_up(strip_.rows, 2) : strip_.rows, stride = q_rows_ ? d_ : q_stride_;
    if (!plan_.dk_rounded) {
      float* dk = out_.dk.template data_ptr<float>() + tile.first_column * d_;
      gradient_gemm(left, tile.lanes, query_rows(), stride, tile.columns, depth, d_, strip_.first > 0, dk, d_);
      return;
    }
    auto* dk = static_cast<uint16_t*>(out_.dk.data_ptr()) + tile.first_column * d_;
    for (int64_t d = 0; d < d_; d += kOutputWidth) {
      const int64_t width = std::min(kOutputWidth, d_ - d);
      gradient_gemm(left, tile.lanes, query_rows() + 2 * d, stride, tile.columns, depth, width, false, group.wide_dk,
                    width);
      for (int64_t c = 0; c < tile.columns; ++c) rows_.narrow(group.wide_dk + c * width, dk + c * d_ + d, width);
    }
  }

  void add_dq(const Group<E>& group, const Tile& tile, const Keys& keys, bool add) {
    float* dq = group.dq ? group.dq : out_.dq.template data_ptr<float>() + strip_.first * d_;
    if (!kBf16) {
      rows_.transpose(tile, reinterpret_cast<float*>(group.left), tile.columns);
      gradient_gemm(group.left, tile.columns, keys.data, keys.stride, strip_.rows, tile.columns, d_, add, dq, d_);
      return;
    }
    const int64_t pairs = ceil_div(tile.columns, 2);
    rows_.transpose_pairs(tile, group.rounded, reinterpret_cast<uint32_t*>(group.left), pairs);
    interleave(reinterpret_cast<const uint16_t*>(keys.data), keys.stride, tile.columns, d_,
               reinterpret_cast<uint32_t*>(group.right));
    gradient_gemm(group.left, 2 * pairs, group.right, d_, strip_.rows, 2 * pairs, d_, add, dq, d_);
  }

  // Rows 2i and 2i + 1 of a (rows, width) matrix as row i of 32-bit words; an odd last row is paired with zeros.
  void interleave(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, uint32_t* to) const {
    for (int64_t r = 0; r < rows; r += 2, to += width)
      rows_.interleave(from + r * stride, r + 1 < rows ? from + (r + 1) * stride : nullptr, to, width);
  }

  void merge_dq() {
    float* dq = out_.dq.template data_ptr<float>() + strip_.first * d_;
    at::parallel_for(0, strip_.rows, 8, [&](int64_t begin, int64_t end) {
      for (size_t g = 1; g < groups_.size(); ++g)
        for (int64_t x = begin * d_; x < end * d_; ++x) dq[x] += groups_[g].dq[x];
    });
  }

  const RowKernels& rows_;
  const Scoring scoring_;
  const Layout& layout_;
  const int64_t n_, m_, d_;
  const Elements elements_;
  const bool half_;
  const void *q_, *k_;
  const int64_t q_stride_, k_stride_;
  const bool statistics_, gradients_, need_q_, need_k_, need_scale_;
  const Upstream& upstream_;
  const Gradients& out_;
  const StatisticArrays stats_;
  const int64_t n_pos_;
  const Work work_;
  const Plan plan_;
  Arena arena_;
  E *packed_, *q_rows_;
  float* stored_;
  int32_t *ids_, *itself_;  // (lanes)
  Coefficients coefficients_;
  std::vector<Group<E>> groups_;
  std::vector<Accumulators> accumulators_;
  Strip strip_{};
};

void sweep(const SweepInputs& in, bool statistics, bool gradients, const RowStatistics& stats, const Upstream& upstream,
           const Gradients& out) {
  if (elements_of(in.q.scalar_type(), in.q.size(1)) == Elements::bfloat16)
    Sweep<at::BFloat16>(in, statistics, gradients, stats, upstream, out).run();
  else
    Sweep<float>(in, statistics, gradients, stats, upstream, out).run();
}

}  // namespace

int64_t flop_of_gemms() { return gemm_flop().load(); }

at::ScalarType dk_type(const SweepInputs& in, bool statistics) {
  return make_plan(work_of(in, statistics, true), in.workspace_bytes).dk_rounded ? at::kBFloat16 : at::kFloat;
}

// An odd width has no pairs for the bfloat16 GEMM.
Elements elements_of(at::ScalarType type, int64_t width) {
  if (type == at::kFloat) return Elements::float32;
  return type == at::kBFloat16 && width % 2 == 0 && has_bf16_gemm() ? Elements::bfloat16 : Elements::widened;
}

void sweep_stats(const SweepInputs& in, const RowStatistics& out) { sweep(in, true, false, out, {}, {}); }

void sweep_grads(const SweepInputs& in, const RowStatistics& stats, const Upstream& upstream, const Gradients& out) {
  if (in.need_q || in.need_k || in.need_scale) sweep(in, false, true, stats, upstream, out);
}

void sweep_loss(const SweepInputs& in, const RowStatistics& stats, const Upstream& upstream, const Gradients& out) {
  sweep(in, true, in.need_q || in.need_k || in.need_scale, stats, upstream, out);
}

}  // namespace fused_nce
