// For each strip of rows: the transposed score tiles and the statistics of their rows; the rows' coefficients; the
// weights, over the scores, and from each tile of them its rows of dk and a share of dq. Tiles belong to groups by
// shape alone and groups are merged in order, so the bits do not depend on the number of threads. A column belongs to
// one tile, so its statistics run on from strip to strip. Weights that need them come after all strips, in a second
// pass: those of both ways, and those of symmetric scores, whose tiles left of the diagonal are never computed.
#include "sweep.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "../atoms.h"
#include "../unit_rows.h"
#include "gemm.h"
#include "ids.h"
#include "isa.h"
#include "strip.h"
#include "work.h"
#include "workspace.h"

namespace fused_nce {
namespace {

template <class E>
class Sweep {
  static constexpr bool kBf16 = kPaired<E>;

 public:
  Sweep(const SweepInputs& in, const Task& task)
      : rows_(active_kernels()), scoring_(in.scoring), n_(in.q.size(0)), m_(in.k.size(0)), width_(in.q.size(1)),
        elements_(elements_of(in.q.scalar_type(), width_)), half_(in.q.scalar_type() == at::kHalf), q_(in.q.data_ptr()),
        k_(in.k.data_ptr()), q_stride_(in.q.stride(0)), k_stride_(in.k.stride(0)), q_norms_(numbers_of(in.q_norms)),
        k_norms_(numbers_of(in.k_norms)), task_(task), need_q_(in.need_q), need_k_(in.need_k),
        need_scale_(in.need_scale), shared_(in.shared), stats_(arrays(task.stats, in.wanted)),
        columns_(arrays_of(task.stats.columns, in.wanted.columns)), n_pos_(in.layout.n_pos),
        own_columns_(n_pos_ > 0 && !in.layout.positives.defined()), work_(work_for(in, task)),
        plan_(checked_plan(in.workspace_bytes)), arena_(plan_.bytes), space_(work_, plan_, arena_),
        ids_(in, space_.labels, space_.ranks), marks_(in.filters) {
    bounded_ = is_bounded(rows_, in);
    scoring_.no_shift = bounded_ || portable::needs_no_shift(scoring_.clip);
    if (task.statistics) {
      if (work_.both)
        for (const Statistic name : optional_of(task.tail.name)) d_optional_[name] = space_.d_optional[name];
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
    if (finds_columns()) clear(space_.columns, column_stats(), m_);
    if (work_.two_sided()) run_two_sided();
    else run_by_strips();
    if (need_scale_) *task_.out.dscale.template data_ptr<float>() = static_cast<float>(d_scale_);
    if (need_scale_) *task_.out.dbias.template data_ptr<float>() = static_cast<float>(d_bias_);
  }

 private:
  // From the scores of a strip straight to its weights.
  void run_by_strips() {
    for (int64_t strip = 0; strip < plan_.strips; ++strip) {
      begin_strip(strip);
      pack_queries();
      if (task_.statistics) {
        for_each_group([this](Group<E>& group, int64_t begin, int64_t end) { fold(group, begin, end); });
        finish_strip(strip_, scoring_, accumulators_, stats_, space_.coefficients);
      }
      if (!task_.gradients) continue;
      if (task_.statistics)
        coefficients_of_loss(strip_, scoring_, stats_, task_.tail, space_.coefficients, d_optional_);
      else coefficients_of_caller(strip_, scoring_, stats_, upstream_, space_.coefficients);
      if (need_scale_ && !work_.optional()) d_bias_ += slope_of_bias(strip_, space_.coefficients, own_columns_);
      for_each_group([this](Group<E>& group, int64_t begin, int64_t end) { weigh(group, begin, end); });
      end_weights();
    }
    if (finds_columns()) finish_columns();
  }

  // All statistics, then all weights: the scores of the last strips are kept, others computed again. Where the scores
  // are symmetric, a strip's columns begin with its own rows, and what lies left of them has been seen as columns.
  void run_two_sided() {
    const float ways = work_.symmetric ? 1.0f : 0.5f;
    const float* column_lse = work_.symmetric ? stats_.rows[kNegLse] : columns_[kNegLse];
    for (int64_t strip = 0; strip < plan_.strips; ++strip) {
      begin_strip(strip);
      pack_queries();
      for_each_group([this](Group<E>& group, int64_t begin, int64_t end) { fold_both(group, begin, end); });
      std::vector<Accumulators> parts(accumulators_.begin(), accumulators_.begin() + groups_in_use_);
      // fault: symmetric-columns-no-part
      if (work_.symmetric) parts.push_back(from(space_.columns, work_.row_stats, strip_.first));
      Coefficients sums = space_.coefficients;
      const Side side = from(space_.row_side, strip_.first);
      sums.shift = side.shift;
      sums.inverse = side.inverse;
      finish_strip(strip_, scoring_, parts, stats_, sums);
      side_of_rows(strip_, scoring_, stats_, task_.tail.name, ways, side);
      for (float* array : {side.shift, side.negative, side.pos_shift, side.positive, side.constant})
        if (array) std::fill(array + strip_.rows, array + strip_.lanes, 0.0f);
    }
    if (!work_.symmetric) {
      finish_columns();
      std::fill_n(space_.column_side.negative, m_, 0.0f);
      for (int64_t strip = 0; strip < plan_.strips; ++strip) {
        begin_strip(strip);
        add_to_columns(strip_, stats_, column_lse, ways, space_.column_side.negative);
      }
      for (int64_t j = 0; j < m_; ++j) space_.column_side.negative[j] *= space_.column_side.inverse[j];
    }
    for (int64_t strip = 0; strip < plan_.strips; ++strip) {
      begin_strip(strip);
      if (strip_scores_) copy_queries();
      else pack_queries();
      if (task_.tail.name == kNce) positives_of_both(strip_, stats_, column_lse, ways, space_.coefficients);
      for_each_group([this](Group<E>& group, int64_t begin, int64_t end) { weigh_both(group, begin, end); });
      end_weights();
    }
  }

  void begin_strip(int64_t strip) {
    const int64_t first = strip * plan_.lanes;
    strip_ = {.first = first,
              .rows = std::min(plan_.lanes, n_ - first),
              .lanes = plan_.lanes,
              .n_c = scoring_.n_c,
              .n_pos = n_pos_,
              .ids = space_.lane_ids,
              .itself = ids_.drop_itself() ? space_.itself : nullptr};
    std::fill_n(space_.lane_ids, plan_.lanes, -1);
    std::fill_n(space_.itself, plan_.lanes, -1);
    ids_.name_rows(first, strip_.rows, space_.lane_ids, space_.itself);
    tiles_ = tiles_of(work_, plan_, strip);
    groups_in_use_ = std::min(plan_.groups, tiles_);
    first_column_ = first_column(work_, plan_, strip);
    strip_scores_ = plan_.stored ? space_.scores : nullptr;
    const int64_t first_kept = plan_.strips - plan_.kept_strips;
    if (strip < first_kept) return;
    strip_scores_ = space_.scores;
    for (int64_t before = first_kept; before < strip; ++before)
      // fault: kept-strips-overlap
      strip_scores_ += plan_.lanes * (m_ - first_column(work_, plan_, before));
  }

  void end_weights() {
    for (int64_t g = 0; g < groups_in_use_; ++g) {
      d_scale_ += groups_[g].d_scale;
      d_bias_ += groups_[g].d_bias;
    }
    if (need_q_) merge_dq();
  }

  unsigned column_stats() const { return work_.symmetric ? work_.row_stats : work_.column_stats; }

  Plan checked_plan(int64_t workspace_bytes) {
    const Plan plan = make_plan(work_, workspace_bytes);
    TORCH_CHECK_VALUE(plan.lanes > 0, "workspace_bytes is ", workspace_bytes, ", needed: at least ", plan.bytes,
                      " for ", n_, " rows, ", m_, " columns of width ", width_);
    work_.symmetric = plan.symmetric;
    return plan;
  }

  template <class F>
  void for_each_group(const F& f) {
    // Whoever is free takes the next group: with equal shares all waited for a thread that the system had interrupted.
    std::atomic<int64_t> next{0};
    const int64_t groups = groups_in_use_;
    at::parallel_for(0, std::min<int64_t>(groups, at::get_num_threads()), 1, [&](int64_t, int64_t) {
      for (int64_t g = next++; g < groups; g = next++) f(groups_[g], g * tiles_ / groups, (g + 1) * tiles_ / groups);
      at::native::cpublas::brgemm_release(kBf16);
    });
  }

  struct Operand {
    const E* data;
    int64_t stride;
  };

  Operand queries_in_place() const { return {static_cast<const E*>(q_) + strip_.first * q_stride_, q_stride_}; }

  // The strip's queries as the right operand of dk.
  Operand query_rows() const {
    return space_.query_rows ? Operand{space_.query_rows, padded(width_)} : queries_in_place();
  }

  // Rows from `first` on, widened, divided or further apart.
  void copy_rows(const void* base, int64_t stride, const float* norms, int64_t first, int64_t rows, float* to) const {
    for (int64_t r = first; r < first + rows; ++r, to += padded(width_)) {
      const float* from = static_cast<const float*>(base) + r * stride;
      if (elements_ == Elements::widened) widen_row(rows_, half_, base, stride, r, width_, to);
      else if (norms) rows_.divide(from, divisor_of(norms[r]), to, width_);
      else std::copy_n(from, width_, to);
    }
  }

  void copy_queries() {
    if (!space_.query_rows) return;
    if (kBf16)
      interleave(reinterpret_cast<const uint16_t*>(queries_in_place().data), q_stride_, strip_.rows,
                 reinterpret_cast<uint32_t*>(space_.query_rows));
    else copy_rows(q_, q_stride_, q_norms_, strip_.first, strip_.rows, reinterpret_cast<float*>(space_.query_rows));
  }

  // The strip's queries transposed, in 32-bit words: one float, or the pair of bfloat16 that brgemm wants together.
  void pack_queries() {
    copy_queries();
    const int64_t lanes = plan_.lanes, words = width_ * static_cast<int64_t>(sizeof(E)) / 4;
    const Operand from = work_.changes_rows() ? query_rows() : queries_in_place();
    const char* rows = reinterpret_cast<const char*>(from.data);
    const int64_t stride = from.stride * static_cast<int64_t>(sizeof(E));
    uint32_t* to = reinterpret_cast<uint32_t*>(space_.packed);
    at::parallel_for(0, ceil_div(words, 16), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t l = 0; l < lanes; ++l)
          for (int64_t w = block * 16; w < std::min(words, block * 16 + 16); ++w) {
            uint32_t word = 0;
            if (l < strip_.rows) __builtin_memcpy(&word, rows + l * stride + w * 4, 4);
            to[w * lanes + l] = word;
          }
    });
  }

  bool finds_columns() const { return space_.columns.bad; }

  // Whether a tile of a symmetric strip lies among its own rows.
  bool is_diagonal(const Tile& tile) const { return work_.symmetric && tile.first_column < strip_.first + strip_.rows; }

  Tile tile_of(const Group<E>& group, int64_t index) const {
    int64_t first = first_column_ + index * plan_.tile_columns, end = m_;
    if (work_.symmetric) {
      const int64_t diagonal = diagonal_tiles(plan_, strip_.rows), border = strip_.first + strip_.rows;
      if (index < diagonal) end = border;
      else first = border + (index - diagonal) * plan_.tile_columns;
    }
    const int64_t columns = std::min(plan_.tile_columns, end - first);
    return {.scores = strip_scores_ ? strip_scores_ + (first - first_column_) * plan_.lanes : group.scores,
            .columns = columns,
            .lanes = plan_.lanes,
            .rows = strip_.rows,
            .first_column = first,
            .first_row = strip_.first,
            .ids = strip_.ids,
            .itself = strip_.itself,
            .line_ids = ids_.name_columns(first, columns, group.line_ids),
            .marks = space_.marks ? space_.marks + (first - first_column_) * plan_.lanes : group.marks.own};
  }

  // The same tile with columns for lanes, where it lies: a line's scores are then `lanes` of the tile apart.
  Tile turned(const Group<E>& group, const Tile& tile) const {
    if (strip_.itself) ids_.rows_of_columns(tile.first_column, tile.columns, group.column_rows);
    return {.scores = tile.scores,
            .columns = strip_.rows,
            .lanes = tile.columns,
            .rows = tile.columns,
            .first_column = strip_.first,
            .first_row = tile.first_column,
            .ids = tile.line_ids,
            .itself = strip_.itself ? group.column_rows : nullptr,
            .line_ids = strip_.ids};
  }

  // And moved to the side, as the kernels read one: its rows' statistics are the tile's columns'.
  Tile transposed(const Group<E>& group, const Tile& tile) const {
    Tile moved = turned(group, tile);
    moved.scores = group.side;
    rows_.transpose(tile, group.side, tile.columns);
    return moved;
  }

  // The keys of a tile as the scores' left operand: in place, widened or divided.
  Operand keys_of(const Group<E>& group, const Tile& tile) const {
    if (!work_.changes_rows()) return {static_cast<const E*>(k_) + tile.first_column * k_stride_, k_stride_};
    // fault: kernels-keys-norms
    copy_rows(k_, k_stride_, k_norms_, tile.first_column, tile.columns, group.key_rows);
    return {reinterpret_cast<const E*>(group.key_rows), padded(width_)};
  }

  // And as dq's right one.
  Operand key_rows_of(const Group<E>& group, const Tile& tile, const Operand& keys) const {
    if (elements_ != Elements::float32 || !group.key_rows || work_.changes_rows()) return keys;
    copy_rows(k_, k_stride_, nullptr, tile.first_column, tile.columns, group.key_rows);
    return {reinterpret_cast<const E*>(group.key_rows), padded(width_)};
  }

  void score(const Group<E>& group, const Tile& tile, const Operand& keys) const {
    score_gemm(keys.data, keys.stride, space_.packed, tile.columns, tile.lanes, width_, tile.scores);
    if (tile.marks) marks_.write(rows_, tile, group.marks);
  }

  void fold(Group<E>& group, int64_t begin, int64_t end) {
    clear(group.acc, work_.row_stats, plan_.lanes);
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_of(group, t);
      score(group, tile, keys_of(group, tile));
      rows_.fold(tile, scoring_, group.acc);
      if (own_columns_) rows_.positives(tile, scoring_, tile.lanes, 1, n_pos_, stats_.pos);
      if (finds_columns())
        rows_.fold(transposed(group, tile), scoring_, from(space_.columns, work_.column_stats, tile.first_column));
    }
  }

  void fold_both(Group<E>& group, int64_t begin, int64_t end) {
    const bool fast = folds_fast();
    clear(group.acc, work_.row_stats, plan_.lanes);
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_of(group, t);
      score(group, tile, keys_of(group, tile));
      const bool rows_alone = is_diagonal(tile);
      const Accumulators columns = from(space_.columns, column_stats(), tile.first_column);
      if (fast) {
        // fault: symmetric-diagonal-columns
        rows_.fold_both(tile, scoring_, work_.row_stats & bit_of(kSquare), group.acc, rows_alone ? nullptr : &columns);
      } else {
        rows_.fold(tile, scoring_, group.acc);
        if (!rows_alone) rows_.fold(transposed(group, tile), scoring_, columns);
      }
      if (!own_columns_) continue;
      rows_.positives(tile, scoring_, tile.lanes, 1, n_pos_, stats_.pos);
      // fault: symmetric-no-positives-left
      if (work_.symmetric && !rows_alone)
        rows_.positives(turned(group, tile), scoring_, 1, tile.lanes, n_pos_, stats_.pos);
    }
  }

  bool folds_fast() const {
    if (!bounded_) return false;
    const unsigned known = work_.symmetric ? kFused | kOverPositives : kFused;
    return !((work_.row_stats | work_.column_stats) & ~known) && (work_.symmetric || !strip_.itself) &&
           !(work_.column_stats & bit_of(kSquare) & ~work_.row_stats);
  }

  void weigh_both(Group<E>& group, int64_t begin, int64_t end) {
    group.d_scale = group.d_bias = 0.0;
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_of(group, t);
      const Operand keys = strip_scores_ && !need_q_ ? Operand{nullptr, 0} : keys_of(group, tile);
      if (!strip_scores_) score(group, tile, keys);
      const TwoSided both{.rows = from(space_.row_side, strip_.first),
                          .columns = from(space_.column_side, tile.first_column),
                          .d_pos = space_.coefficients.d_pos,
                          .unit = task_.tail.unit,
                          // fault: symmetric-penalty-one-side
                          .square = (work_.symmetric ? 4.0f : 2.0f) * task_.tail.square_weight};
      std::fill_n(group.d_scale_lanes, plan_.lanes, 0.0f);
      rows_.weigh_both(tile, scoring_, both, group.rounded, group.d_scale_lanes);
      // On the diagonal a pair of rows is met twice.
      // fault: symmetric-diagonal-scale
      const double part = is_diagonal(tile) ? 0.5 : 1.0;
      for (int64_t l = 0; l < strip_.rows; ++l) group.d_scale += part * group.d_scale_lanes[l];
      if (need_k_ && !is_diagonal(tile)) write_dk(group, tile);
      if (need_q_) add_dq(group, tile, keys, t > begin);
    }
  }

  void finish_columns() const {
    const std::vector<Accumulators> all = {space_.columns};
    const Side& side = space_.column_side;
    at::parallel_for(0, m_, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const Sum negatives = finish_statistics(all, j, scoring_, columns_, j);
        if (!side.shift) continue;
        side.shift[j] = negatives.shift;
        side.inverse[j] = inverse_of(negatives);
      }
    });
  }

  // What the statistics beyond the coefficients put on t, in the group's tile on the side.
  OptionalWeights weigh_optional(const Group<E>& group, const Tile& tile) const {
    const Upstreams of_rows{from(stats_.rows, strip_.first),
                            task_.statistics ? d_optional_ : from(upstream_.rows, strip_.first)};
    const Upstreams of_columns{from(columns_, tile.first_column), from(d_columns_, tile.first_column)};
    rows_.weigh_optional(tile, scoring_, of_rows, of_columns, group.side);
    std::fill_n(group.d_bias_lanes, plan_.lanes, 0.0f);
    return {group.side, of_columns.d[kSquare], group.d_bias_lanes};
  }

  void weigh(Group<E>& group, int64_t begin, int64_t end) {
    group.d_scale = group.d_bias = 0.0;
    for (int64_t t = begin; t < end; ++t) {
      const Tile tile = tile_of(group, t);
      const Operand keys = strip_scores_ && !need_q_ ? Operand{nullptr, 0} : keys_of(group, tile);
      if (!strip_scores_) score(group, tile, keys);
      std::fill_n(group.d_scale_lanes, plan_.lanes, 0.0f);
      const OptionalWeights optional = work_.optional() ? weigh_optional(group, tile) : OptionalWeights{};
      rows_.weigh(tile, scoring_, space_.coefficients, work_.optional() ? &optional : nullptr, group.rounded,
                  need_scale_ || work_.optional() ? group.d_scale_lanes : nullptr);
      for (int64_t l = 0; work_.optional() && l < strip_.rows; ++l) group.d_bias += group.d_bias_lanes[l];
      for (int64_t l = 0; l < strip_.rows; ++l) group.d_scale += group.d_scale_lanes[l];
      if (need_k_) write_dk(group, tile);
      if (need_q_) add_dq(group, tile, keys, t > begin);
    }
  }

  // dk of the tile's columns is this tile's alone: no race, and strips add up in order. Where k is q it is added to dq,
  // which begins at 0 and to which the groups' shares come later.
  void write_dk(const Group<E>& group, const Tile& tile) {
    const E* left = kBf16 ? reinterpret_cast<const E*>(group.rounded) : reinterpret_cast<const E*>(tile.scores);
    const int64_t depth = kBf16 ? round_up(strip_.rows, 2) : strip_.rows;
    const Operand right = query_rows();
    if (!plan_.dk_rounded) {
      float* dk = task_.out.dk.template data_ptr<float>() + tile.first_column * width_;
      gradient_gemm(left, tile.lanes, right.data, right.stride, tile.columns, depth, width_,
                    // fault: kernels-dk-not
                    shared_ || strip_.first > 0, dk, width_);
      return;
    }
    auto* dk = static_cast<uint16_t*>(task_.out.dk.data_ptr()) + tile.first_column * width_;
    for (int64_t d = 0; d < width_; d += kOutputWidth) {
      const int64_t width = std::min(kOutputWidth, width_ - d);
      gradient_gemm(left, tile.lanes, right.data + 2 * d, right.stride, tile.columns, depth, width, false,
                    group.wide_dk, width);
      for (int64_t c = 0; c < tile.columns; ++c) rows_.narrow(group.wide_dk + c * width, dk + c * width_ + d, width);
    }
  }

  void add_dq(const Group<E>& group, const Tile& tile, const Operand& keys, bool add) {
    float* dq = group.dq ? group.dq : task_.out.dq.template data_ptr<float>() + strip_.first * width_;
    if (!kBf16) {
      rows_.transpose(tile, reinterpret_cast<float*>(group.left), tile.columns);
      const Operand right = key_rows_of(group, tile, keys);
      gradient_gemm(group.left, tile.columns, right.data, right.stride, strip_.rows, tile.columns, width_, add, dq,
                    width_);
      return;
    }
    const int64_t pairs = ceil_div(tile.columns, 2);
    rows_.transpose_pairs(tile, group.rounded, reinterpret_cast<uint32_t*>(group.left), pairs);
    interleave(reinterpret_cast<const uint16_t*>(keys.data), keys.stride, tile.columns,
               reinterpret_cast<uint32_t*>(group.right));
    gradient_gemm(group.left, 2 * pairs, group.right, padded(width_), strip_.rows, 2 * pairs, width_, add, dq, width_);
  }

  // Rows 2i and 2i + 1 of a (rows, D) matrix as row i of 32-bit words; an odd last row is paired with zeros.
  void interleave(const uint16_t* from, int64_t stride, int64_t rows, uint32_t* to) const {
    for (int64_t r = 0; r < rows; r += 2, to += padded(width_))
      rows_.interleave(from + r * stride, r + 1 < rows ? from + (r + 1) * stride : nullptr, to, width_);
  }

  void merge_dq() {
    float* dq = task_.out.dq.template data_ptr<float>() + strip_.first * width_;
    at::parallel_for(0, strip_.rows, 8, [&](int64_t begin, int64_t end) {
      // fault: symmetric-idle-group
      for (int64_t g = shared_ ? 0 : 1; g < groups_in_use_; ++g)
        for (int64_t x = begin * width_; x < end * width_; ++x) dq[x] += groups_[g].dq[x];
    });
  }

  const RowKernels& rows_;
  Scoring scoring_;
  const int64_t n_, m_, width_;
  const Elements elements_;
  const bool half_;
  const void *q_, *k_;
  const int64_t q_stride_, k_stride_;
  const float *q_norms_, *k_norms_;  // null: rows are as they lie
  const Task& task_;
  const bool need_q_, need_k_, need_scale_, shared_;
  const StatisticArrays stats_;
  const ByStatistic columns_;
  const int64_t n_pos_;
  const bool own_columns_;  // the positives are columns, and of a number that `pos` has
  Work work_;
  const Plan plan_;
  Arena arena_;
  const Workspace<E> space_;
  const Ids ids_;
  const Marks marks_;
  ByStatistic d_optional_;  // (lanes), of those that the tail reads
  StatisticArrays upstream_{};
  ByStatistic d_columns_;
  std::vector<Group<E>> groups_;
  std::vector<Accumulators> accumulators_;
  bool bounded_ = false;
  double d_scale_ = 0.0, d_bias_ = 0.0;
  // Of the strip at hand:
  Strip strip_{};
  int64_t tiles_ = 0, groups_in_use_ = 0, first_column_ = 0;
  float* strip_scores_ = nullptr;  // null: not kept
};

}  // namespace

void sweep(const SweepInputs& in, const Task& task) {
  if (elements_of(in.q.scalar_type(), in.q.size(1)) == Elements::bfloat16) Sweep<at::BFloat16>(in, task).run();
  else Sweep<float>(in, task).run();
}

}  // namespace fused_nce
