// For each strip of rows: the transposed score tiles and the statistics of their rows; the rows' coefficients; the
// weights, over the scores, and from each tile of them its rows of dk and a share of dq. Tiles belong to groups by
// shape alone and groups are merged in order, so the bits do not depend on the number of threads. A column belongs to
// one tile, so its statistics run on from strip to strip; weights need them finished, in a sweep of their own.
#include "sweep.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "gemm.h"
#include "ids.h"
#include "isa.h"
#include "strip.h"
#include "workspace.h"

namespace fused_nce {

namespace {

Work work_of(const SweepInputs& in, bool statistics, bool gradients) {
  return {.rows = in.q.size(0),
          .columns = in.k.size(0),
          .width = in.q.size(1),
          .image = std::max(in.scoring.n_c, in.layout.n_pos),
          .elements = elements_of(in.q.scalar_type(), in.q.size(1)),
          .both = statistics && gradients,
          .gradients = gradients,
          .need_q = in.need_q,
          .need_k = in.need_k,
          .shared = in.shared,
          .labels = in.layout.column_ids.defined(),
          .row_stats = Wanted::mask(in.wanted.rows),
          .column_stats = Wanted::mask(in.wanted.columns)};
}

template <class E>
class Sweep {
  static constexpr bool kBf16 = kPaired<E>;

 public:
  Sweep(const SweepInputs& in, const Task& task)
      : rows_(active_kernels()), scoring_(in.scoring), n_(in.q.size(0)), m_(in.k.size(0)), width_(in.q.size(1)),
        elements_(elements_of(in.q.scalar_type(), width_)), half_(in.q.scalar_type() == at::kHalf), q_(in.q.data_ptr()),
        k_(in.k.data_ptr()), q_stride_(in.q.stride(0)), k_stride_(in.k.stride(0)), task_(task), need_q_(in.need_q),
        need_k_(in.need_k), need_scale_(in.need_scale), shared_(in.shared), stats_(arrays(task.stats, in.wanted)),
        columns_(arrays_of(task.stats.columns, in.wanted.columns)), n_pos_(in.layout.n_pos),
        own_columns_(n_pos_ > 0 && !in.layout.positives.defined()), work_{work_of(in, task.statistics, task.gradients)},
        plan_(checked_plan(in.workspace_bytes)), arena_(plan_.bytes), space_(work_, plan_, arena_),
        ids_(in, space_.labels, space_.ranks) {
    if (task.statistics) {
      if (work_.both)
        for (const Statistic name : further_of(task.tail.name)) d_further_[name] = space_.d_further[name];
    } else {
      upstream_ = arrays(task.upstream, in.wanted);
      d_columns_ = arrays_of(task.upstream.columns, in.wanted.columns);
    }
    groups_.resize(plan_.groups);
    for (Group<E>& group : groups_) {
      group.take(work_, plan_, &group == groups_.data(), arena_);
      accumulators_.push_back(group.acc);
    }
  }

  void run() {
    if (need_q_) use_large_pages(task_.out.dq);
    if (need_k_) use_large_pages(task_.out.dk);
    if (finds_columns()) clear(space_.columns, work_.column_stats, m_);
    double d_scale = 0.0, d_bias = 0.0;
    for (int64_t strip = 0; strip < plan_.strips; ++strip) {
      const int64_t first = strip * plan_.lanes;
      strip_ = {.first = first,
                .rows = std::min(plan_.lanes, n_ - first),
                .lanes = plan_.lanes,
                .n_c = scoring_.n_c,
                .n_pos = n_pos_,
                .ids = space_.lane_ids,
                .itself = ids_.drop_itself() ? space_.itself : nullptr};
      pack_queries();
      std::fill_n(space_.lane_ids, plan_.lanes, -1);
      std::fill_n(space_.itself, plan_.lanes, -1);
      ids_.name_rows(first, strip_.rows, space_.lane_ids, space_.itself);
      if (task_.statistics) {
        for_each_group([this](Group<E>& group, int64_t begin, int64_t end) { fold(group, begin, end); });
        finish_strip(strip_, scoring_, accumulators_, stats_, space_.coefficients);
      }
      if (!task_.gradients) continue;
      if (task_.statistics) coefficients_of_loss(strip_, stats_, task_.tail, space_.coefficients, d_further_);
      else coefficients_of_caller(strip_, scoring_, stats_, upstream_, space_.coefficients);
      for_each_group([this](Group<E>& group, int64_t begin, int64_t end) { weigh(group, begin, end); });
      for (const Group<E>& group : groups_) {
        d_scale += group.d_scale;
        d_bias += group.d_bias;
      }
      if (need_q_) merge_dq();
    }
    if (finds_columns()) finish_columns();
    if (need_scale_) *task_.out.dscale.template data_ptr<float>() = static_cast<float>(d_scale);
    if (need_scale_) *task_.out.dbias.template data_ptr<float>() = static_cast<float>(d_bias);
  }

 private:
  Plan checked_plan(int64_t workspace_bytes) const {
    const Plan plan = make_plan(work_, workspace_bytes);
    TORCH_CHECK_VALUE(plan.lanes > 0, "workspace_bytes is ", workspace_bytes, ", needed: at least ", plan.bytes,
                      " for ", n_, " rows, ", m_, " columns of width ", width_);
    return plan;
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
    (half_ ? rows_.widen_fp16 : rows_.widen_bf16)(from, out, width_);
  }

  const E* query_rows() const {
    return space_.query_rows ? space_.query_rows : static_cast<const E*>(q_) + strip_.first * q_stride_;
  }

  // The strip's queries transposed, in 32-bit words: one float, or the pair of bfloat16 that brgemm wants together.
  void pack_queries() {
    const int64_t lanes = plan_.lanes, words = width_ * static_cast<int64_t>(sizeof(E)) / 4;
    if (elements_ == Elements::widened) {
      float* wide = reinterpret_cast<float*>(space_.query_rows);
      for (int64_t l = 0; l < strip_.rows; ++l) widen(q_, q_stride_, strip_.first + l, wide + l * width_);
    }
    const bool wide = elements_ == Elements::widened;
    const E* from = wide ? space_.query_rows : static_cast<const E*>(q_) + strip_.first * q_stride_;
    const int64_t stride = (wide ? width_ : q_stride_) * static_cast<int64_t>(sizeof(E));
    uint32_t* to = reinterpret_cast<uint32_t*>(space_.packed);
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
      uint32_t* pairs = reinterpret_cast<uint32_t*>(space_.query_rows);
      interleave(reinterpret_cast<const uint16_t*>(from), q_stride_, strip_.rows, width_, pairs);
    }
  }

  bool finds_columns() const { return space_.columns.bad; }

  Tile tile_of(const Group<E>& group, int64_t index) const {
    const int64_t first = index * plan_.tile_columns, columns = std::min(plan_.tile_columns, m_ - first);
    return {.scores = space_.scores ? space_.scores + first * plan_.lanes : group.scores,
            .columns = columns,
            .lanes = plan_.lanes,
            .rows = strip_.rows,
            .first_column = first,
            .first_row = strip_.first,
            .ids = strip_.ids,
            .itself = strip_.itself,
            .line_ids = ids_.name_columns(first, columns, group.line_ids)};
  }

  // The same scores with columns for lanes: its rows' statistics are the tile's columns'.
  Tile turned(const Group<E>& group, const Tile& tile) const {
    rows_.transpose(tile, group.side, tile.columns);
    if (strip_.itself) ids_.rows_of_columns(tile.first_column, tile.columns, group.column_rows);
    return {.scores = group.side,
            .columns = strip_.rows,
            .lanes = tile.columns,
            .rows = tile.columns,
            .first_column = strip_.first,
            .first_row = tile.first_column,
            .ids = tile.line_ids,
            .itself = strip_.itself ? group.column_rows : nullptr,
            .line_ids = strip_.ids};
  }

  struct Keys {
    const E* data;
    int64_t stride;
  };

  // The keys of a tile as the GEMMs read them: in place, or widened.
  Keys keys_of(const Group<E>& group, const Tile& tile) const {
    if (elements_ != Elements::widened) return {static_cast<const E*>(k_) + tile.first_column * k_stride_, k_stride_};
    for (int64_t c = 0; c < tile.columns; ++c)
      widen(k_, k_stride_, tile.first_column + c, group.wide_keys + c * width_);
    return {reinterpret_cast<const E*>(group.wide_keys), width_};
  }

  void score(const Tile& tile, const Keys& keys) const {
    score_gemm(keys.data, keys.stride, space_.packed, tile.columns, tile.lanes, width_, tile.scores);
  }

  void fold(Group<E>& group, int64_t begin, int64_t end) {
    clear(group.acc, work_.row_stats, plan_.lanes);
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_of(group, t);
      score(tile, keys_of(group, tile));
      rows_.fold(tile, scoring_, group.acc);
      if (own_columns_) rows_.positives(tile, scoring_, n_pos_, stats_.pos);
      if (finds_columns())
        rows_.fold(turned(group, tile), scoring_, from(space_.columns, work_.column_stats, tile.first_column));
    }
  }

  void finish_columns() const {
    const std::vector<Accumulators> all = {space_.columns};
    at::parallel_for(0, m_, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) finish_statistics(all, j, scoring_, columns_, j);
    });
  }

  // What the statistics beyond the coefficients put on t, in the group's tile on the side.
  Further weigh_further(const Group<E>& group, const Tile& tile) const {
    const Upstreams of_rows{from(stats_.rows, strip_.first),
                            task_.statistics ? d_further_ : from(upstream_.rows, strip_.first)};
    const Upstreams of_columns{from(columns_, tile.first_column), from(d_columns_, tile.first_column)};
    rows_.weigh_further(tile, scoring_, of_rows, of_columns, group.side);
    std::fill_n(group.d_bias_lanes, plan_.lanes, 0.0f);
    return {group.side, of_columns.d[kSquare], group.d_bias_lanes};
  }

  void weigh(Group<E>& group, int64_t begin, int64_t end) {
    group.d_scale = group.d_bias = 0.0;
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_of(group, t);
      const Keys keys = space_.scores && !need_q_ ? Keys{nullptr, 0} : keys_of(group, tile);
      if (!space_.scores) score(tile, keys);
      std::fill_n(group.d_scale_lanes, plan_.lanes, 0.0f);
      if (work_.further()) {
        const Further further = weigh_further(group, tile);
        rows_.weigh(tile, scoring_, space_.coefficients, &further, group.rounded, group.d_scale_lanes);
        for (int64_t l = 0; l < strip_.rows; ++l) group.d_bias += group.d_bias_lanes[l];
      } else {
        rows_.weigh(tile, scoring_, space_.coefficients, nullptr, group.rounded,
                    need_scale_ ? group.d_scale_lanes : nullptr);
      }
      for (int64_t l = 0; l < strip_.rows; ++l) group.d_scale += group.d_scale_lanes[l];
      if (need_k_) write_dk(group, tile);
      if (need_q_) add_dq(group, tile, keys, t > begin);
    }
  }

  // dk of the tile's columns is this tile's alone: no race, and strips add up in order. Where k is q it is added to dq,
  // which begins at 0 and to which the groups' shares come later.
  void write_dk(const Group<E>& group, const Tile& tile) {
    const E* left = kBf16 ? reinterpret_cast<const E*>(group.rounded) : reinterpret_cast<const E*>(tile.scores);
    const int64_t depth = kBf16 ? round_up(strip_.rows, 2) : strip_.rows,
                  stride = space_.query_rows ? width_ : q_stride_;
    if (!plan_.dk_rounded) {
      float* dk = task_.out.dk.template data_ptr<float>() + tile.first_column * width_;
      gradient_gemm(left, tile.lanes, query_rows(), stride, tile.columns, depth, width_, shared_ || strip_.first > 0,
                    dk, width_);
      return;
    }
    auto* dk = static_cast<uint16_t*>(task_.out.dk.data_ptr()) + tile.first_column * width_;
    for (int64_t d = 0; d < width_; d += kOutputWidth) {
      const int64_t width = std::min(kOutputWidth, width_ - d);
      gradient_gemm(left, tile.lanes, query_rows() + 2 * d, stride, tile.columns, depth, width, false, group.wide_dk,
                    width);
      for (int64_t c = 0; c < tile.columns; ++c) rows_.narrow(group.wide_dk + c * width, dk + c * width_ + d, width);
    }
  }

  void add_dq(const Group<E>& group, const Tile& tile, const Keys& keys, bool add) {
    float* dq = group.dq ? group.dq : task_.out.dq.template data_ptr<float>() + strip_.first * width_;
    if (!kBf16) {
      rows_.transpose(tile, reinterpret_cast<float*>(group.left), tile.columns);
      gradient_gemm(group.left, tile.columns, keys.data, keys.stride, strip_.rows, tile.columns, width_, add, dq,
                    width_);
      return;
    }
    const int64_t pairs = ceil_div(tile.columns, 2);
    rows_.transpose_pairs(tile, group.rounded, reinterpret_cast<uint32_t*>(group.left), pairs);
    interleave(reinterpret_cast<const uint16_t*>(keys.data), keys.stride, tile.columns, width_,
               reinterpret_cast<uint32_t*>(group.right));
    gradient_gemm(group.left, 2 * pairs, group.right, width_, strip_.rows, 2 * pairs, width_, add, dq, width_);
  }

  // Rows 2i and 2i + 1 of a (rows, width) matrix as row i of 32-bit words; an odd last row is paired with zeros.
  void interleave(const uint16_t* from, int64_t stride, int64_t rows, int64_t width, uint32_t* to) const {
    for (int64_t r = 0; r < rows; r += 2, to += width)
      rows_.interleave(from + r * stride, r + 1 < rows ? from + (r + 1) * stride : nullptr, to, width);
  }

  void merge_dq() {
    float* dq = task_.out.dq.template data_ptr<float>() + strip_.first * width_;
    at::parallel_for(0, strip_.rows, 8, [&](int64_t begin, int64_t end) {
      for (size_t g = shared_ ? 0 : 1; g < groups_.size(); ++g)
        for (int64_t x = begin * width_; x < end * width_; ++x) dq[x] += groups_[g].dq[x];
    });
  }

  const RowKernels& rows_;
  const Scoring scoring_;
  const int64_t n_, m_, width_;
  const Elements elements_;
  const bool half_;
  const void *q_, *k_;
  const int64_t q_stride_, k_stride_;
  const Task& task_;
  const bool need_q_, need_k_, need_scale_, shared_;
  const StatisticArrays stats_;
  const ByStatistic columns_;
  const int64_t n_pos_;
  const bool own_columns_;  // the positives are columns, and of a number that `pos` has
  const Work work_;
  const Plan plan_;
  Arena arena_;
  const Workspace<E> space_;
  const Ids ids_;
  ByStatistic d_further_;  // (lanes), of those that the tail reads
  StatisticArrays upstream_{};
  ByStatistic d_columns_;
  std::vector<Group<E>> groups_;
  std::vector<Accumulators> accumulators_;
  Strip strip_{};
};

}  // namespace

void sweep(const SweepInputs& in, const Task& task) {
  if (elements_of(in.q.scalar_type(), in.q.size(1)) == Elements::bfloat16) Sweep<at::BFloat16>(in, task).run();
  else Sweep<float>(in, task).run();
}

int64_t flop_of_gemms() { return gemm_flop().load(); }

at::ScalarType dk_type(const SweepInputs& in, bool statistics) {
  return make_plan(work_of(in, statistics, true), in.workspace_bytes).dk_rounded ? at::kBFloat16 : at::kFloat;
}

// An odd width has no pairs for the bfloat16 GEMM.
Elements elements_of(at::ScalarType type, int64_t width) {
  if (type == at::kFloat) return Elements::float32;
  return type == at::kBFloat16 && width % 2 == 0 && has_bf16_gemm() ? Elements::bfloat16 : Elements::widened;
}

}  // namespace fused_nce
