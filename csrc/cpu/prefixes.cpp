// For each strip of rows and tile of columns, the products of one block of columns after the other, and from each state
// of them the cosines of a prefix. Back, from the widest prefix to the narrowest, the weights add up in one tile, which
// after each is the weight of the block of columns that this prefix has last. Groups, tiles and the order of every sum
// follow from the shapes alone, as in sweep.cpp.
#include "prefixes.h"

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

constexpr int64_t kLeastStored = 64, kTileScores = 1 << 15, kFewLanes = 128, kL2Bytes = 2 << 20, kWide = 512;
constexpr int64_t kLeastGroups = 4;                           // less would leave threads idle
constexpr int64_t kPrefixGroups[] = {16, 12, 8, 6, 4, 2, 1};  // as in `make_plan`

struct Shape {
  int64_t rows, columns, width, image, parts;
  bool both, need_q, marked, guided;
};

struct PrefixPlan {
  int64_t lanes = 0, strips = 0, tile_columns = 0, tiles = 0, groups = 0, bytes = 0;
  bool stored = false;  // a strip's cosines are kept from its statistics to its weights
};

struct PrefixGroup {
  std::vector<Accumulators> of;  // a prefix each
  std::vector<float*> row_sums;  // (lanes)
  int32_t* line_ids;
  MarkRoom marks;
  float *products, *left, *cosines = nullptr, *dq = nullptr;

  void take(const Shape& s, const PrefixPlan& p, Arena& arena) {
    of.clear(), row_sums.clear();
    for (int64_t i = 0; i < s.parts; ++i) {
      of.push_back(new_accumulators(kFused, p.lanes, arena));
      row_sums.push_back(arena.take<float>(p.lanes));
    }
    line_ids = arena.take<int32_t>(p.tile_columns);
    products = arena.take<float>(p.lanes * p.tile_columns);
    left = arena.take<float>(p.lanes * p.tile_columns);
    if (!p.stored) cosines = arena.take<float>(s.parts * p.lanes * p.tile_columns);
    if (s.marked) marks.take(s.guided, !p.stored, s.parts * p.tile_columns, p.lanes, arena);
    if (s.need_q) dq = arena.take<float>(p.lanes * s.width);
  }
};

struct PrefixSpace {
  float *packed, *cosines = nullptr;
  int32_t *ids, *itself, *marks = nullptr;
  std::vector<float*> norms;  // (lanes), a prefix each
  std::vector<Coefficients> coefficients;

  void take(const Shape& s, const PrefixPlan& p, Arena& arena) {
    packed = arena.take<float>(p.lanes * s.width);
    if (p.stored) cosines = arena.take<float>(s.parts * p.lanes * s.columns);
    if (p.stored && s.marked) marks = arena.take<int32_t>(s.parts * p.lanes * s.columns);
    ids = arena.take<int32_t>(p.lanes);
    itself = arena.take<int32_t>(p.lanes);
    norms.clear(), coefficients.clear();
    for (int64_t i = 0; i < s.parts; ++i) {
      norms.push_back(arena.take<float>(p.lanes));
      Coefficients c{};
      for (float** array : {&c.shift, &c.inverse, &c.d_neg_lse, &c.two_d_square}) *array = arena.take<float>(p.lanes);
      c.d_pos = arena.take<float>(s.image * p.lanes);
      coefficients.push_back(c);
    }
  }
};

int64_t bytes_of(const Shape& s, const PrefixPlan& p) {
  Arena shared, group;
  PrefixSpace().take(s, p, shared);
  PrefixGroup().take(s, p, group);
  return Arena::kAlignment + shared.bytes() + p.groups * group.bytes();
}

// `lanes` 0: nothing fits. As in `make_plan`, a sixteenth is left to the GEMM library.
PrefixPlan plan_prefixes(const Shape& s, int64_t workspace_bytes) {
  const int64_t limit = workspace_bytes - workspace_bytes / 16;
  PrefixPlan p;
  // A strip reads all keys, and writes all their gradients: the more rows it has, the less often. But one of few rows
  // whose cosines stay in the L2 until they are weighed does better where keys are narrow, unless those of many do too.
  const int64_t a_lane = 4 * s.parts * s.columns;
  const bool stay = kFewLanes * a_lane <= kL2Bytes && kMostLanes * a_lane > kL2Bytes;
  const bool few = !s.both || (s.width < kWide && stay);
  const int64_t most = few ? kFewLanes : kMostLanes;
  for (const auto& [stored, least_groups] :
       {std::pair{true, kLeastGroups}, {true, int64_t{1}}, {false, kLeastGroups}, {false, int64_t{1}}}) {
    if (stored && !s.both) continue;
    p.stored = stored;
    const int64_t whole = round_up(s.rows, kLaneBlock);
    const int64_t least = stored ? std::min(whole, kLeastStored) : kLaneBlock;
    for (int64_t columns = kTileScores / most; columns >= 16; columns /= 2)
      for (int64_t strips = ceil_div(s.rows, most);; ++strips) {
        p.lanes = round_up(ceil_div(s.rows, strips), kLaneBlock);
        if (p.lanes < least) break;
        p.strips = ceil_div(s.rows, p.lanes);
        p.tile_columns = std::min(columns, round_up(ceil_div(s.columns, 4), 2));
        p.tiles = ceil_div(s.columns, p.tile_columns);
        for (const int64_t groups : kPrefixGroups) {
          p.groups = std::min(p.tiles, groups);
          p.bytes = bytes_of(s, p);
          if (p.groups < std::min<int64_t>(p.tiles, least_groups)) break;
          if (p.bytes <= limit) return p;
        }
        if (p.lanes == kLaneBlock) break;
      }
  }
  p.lanes = 0;
  return p;
}

class PrefixSweep {
 public:
  PrefixSweep(const SweepInputs& in, const PrefixTask& task)
      : rows_(active_kernels()), in_(in), task_(task), scoring_(in.scoring), n_(in.q.size(0)), m_(in.k.size(0)),
        width_(in.q.size(1)), parts_(static_cast<int64_t>(task.widths.size())), n_pos_(in.layout.n_pos),
        q_(in.q.data_ptr<float>()), k_(in.k.data_ptr<float>()), q_stride_(in.q.stride(0)), k_stride_(in.k.stride(0)),
        shape_{n_,
               m_,
               width_,
               std::max(in.scoring.n_c, n_pos_),
               parts_,
               task.statistics && task.gradients,
               in.need_q,
               in.filters.any(),
               in.filters.guide_ceiling.defined()},
        plan_(plan_prefixes(shape_, in.workspace_bytes)), labels_(in.layout.column_ids.defined() ? n_ : 0),
        ranks_(in.layout.column_ids.defined() ? m_ : 0),
        ids_(in, labels_.empty() ? nullptr : labels_.data(), ranks_.empty() ? nullptr : ranks_.data()),
        marks_(in.filters), arena_(checked(plan_).bytes) {
    scoring_.no_shift = scoring_.clip > 0.0f ? portable::needs_no_shift(scoring_.clip)
                                             : std::abs(scoring_.scale) + scoring_.hardness <= kMostUnshifted;
    space_.take(shape_, plan_, arena_);
    groups_.resize(plan_.groups);
    for (PrefixGroup& group : groups_) group.take(shape_, plan_, arena_);
  }

  void run() {
    for (int64_t first = 0; first < n_; first += plan_.lanes) {
      begin_strip(first);
      if (task_.statistics)
        for_each_group([this](PrefixGroup& group, int64_t begin, int64_t end) { fold(group, begin, end); });
      at::parallel_for(0, parts_, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) finish(i);
      });
      if (!task_.gradients) continue;
      for_each_group([this](PrefixGroup& group, int64_t begin, int64_t end) { weigh(group, begin, end); });
      merge();
    }
  }

 private:
  // The statistics of prefix i and its coefficients.
  void finish(int64_t i) {
    const Coefficients& c = space_.coefficients[i];
    if (task_.statistics) {
      std::vector<Accumulators> found;
      found.reserve(groups_.size());
      for (const PrefixGroup& group : groups_) found.push_back(group.of[i]);
      finish_strip(strip_, scoring_, found, stats(i), c);
    }
    if (!task_.gradients) return;
    if (task_.d_rows.defined())
      coefficients_of_caller(strip_, scoring_, stats(i), arrays(i, task_.d_pos, task_.d_rows), c);
    else
      coefficients_of_loss(strip_, scoring_, stats(i), {kNce, task_.unit * static_cast<float>(task_.weights[i]), 0.0f},
                           c, {});
  }

  PrefixPlan checked(PrefixPlan plan) const {
    TORCH_CHECK_VALUE(plan.lanes > 0, "workspace_bytes is ", in_.workspace_bytes, ", needed: more for ", parts_,
                      " prefixes of ", n_, " rows and ", m_, " columns of width ", width_);
    return plan;
  }

  StatisticArrays arrays(int64_t i, const at::Tensor& pos, const at::Tensor& rows) const {
    StatisticArrays out{pos.data_ptr<float>() + i * n_ * n_pos_, {}};
    const auto& names = in_.wanted.rows;
    for (size_t s = 0; s < names.size(); ++s)
      out.rows[static_cast<int>(names[s])] =
          rows.data_ptr<float>() + (i * static_cast<int64_t>(names.size()) + static_cast<int64_t>(s)) * n_;
    return out;
  }
  StatisticArrays stats(int64_t i) const { return arrays(i, task_.pos, task_.rows); }

  int64_t start(int64_t i) const { return i > 0 ? task_.widths[i - 1] : 0; }

  void begin_strip(int64_t first) {
    strip_ = {.first = first,
              .rows = std::min(plan_.lanes, n_ - first),
              .lanes = plan_.lanes,
              .n_c = scoring_.n_c,
              .n_pos = n_pos_,
              .ids = space_.ids,
              .itself = ids_.drop_itself() ? space_.itself : nullptr};
    std::fill_n(space_.ids, plan_.lanes, -1);
    std::fill_n(space_.itself, plan_.lanes, -1);
    ids_.name_rows(first, strip_.rows, space_.ids, space_.itself);
    for (int64_t i = 0; i < parts_; ++i) {
      std::fill_n(space_.norms[i], plan_.lanes, 0.0f);
      std::copy_n(task_.of_q.data_ptr<float>() + i * n_ + first, strip_.rows, space_.norms[i]);
    }
    at::parallel_for(0, ceil_div(width_, 16), 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block)
        for (int64_t l = 0; l < plan_.lanes; ++l)
          for (int64_t d = block * 16; d < std::min(width_, block * 16 + 16); ++d)
            space_.packed[d * plan_.lanes + l] = l < strip_.rows ? q_[(first + l) * q_stride_ + d] : 0.0f;
    });
  }

  template <class F>
  void for_each_group(const F& f) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(plan_.groups, at::get_num_threads()), 1, [&](int64_t, int64_t) {
      for (int64_t g = next++; g < plan_.groups; g = next++)
        f(groups_[g], g * plan_.tiles / plan_.groups, (g + 1) * plan_.tiles / plan_.groups);
      at::native::cpublas::brgemm_release(false);
    });
  }

  // The cosines of prefix i at tile t.
  Tile tile_of(const PrefixGroup& group, int64_t t, int64_t i) const {
    const int64_t first = t * plan_.tile_columns, columns = std::min(plan_.tile_columns, m_ - first);
    float* scores = plan_.stored ? space_.cosines + (i * m_ + first) * plan_.lanes
                                 : group.cosines + i * plan_.tile_columns * plan_.lanes;
    int32_t* marks = space_.marks    ? space_.marks + (i * m_ + first) * plan_.lanes
                     : shape_.marked ? group.marks.own + i * plan_.tile_columns * plan_.lanes
                                     : nullptr;
    return {.scores = scores,
            .columns = columns,
            .lanes = plan_.lanes,
            .rows = strip_.rows,
            .first_column = first,
            .first_row = strip_.first,
            .ids = strip_.ids,
            .itself = strip_.itself,
            .line_ids = ids_.name_columns(first, columns, group.line_ids),
            .marks = marks};
  }

  Norms norms_of(const Tile& tile, int64_t i) const {
    return {space_.norms[i], task_.of_k.data_ptr<float>() + i * m_ + tile.first_column};
  }

  // Adds the block of prefix i to the products, and writes its cosines.
  void score(const PrefixGroup& group, const Tile& tile, int64_t i) const {
    for (int64_t d = start(i); d < task_.widths[i]; d += kScoreDepth)
      gemm(tile.columns, tile.lanes, std::min(kScoreDepth, task_.widths[i] - d), k_ + tile.first_column * k_stride_ + d,
           k_stride_, space_.packed + d * tile.lanes, tile.lanes, d > 0, group.products, tile.lanes);
    rows_.cosines(tile, norms_of(tile, i), group.products);
    if (tile.marks) marks_.write(rows_, tile, group.marks, i);
  }

  void fold(PrefixGroup& group, int64_t begin, int64_t end) {
    for (const Accumulators& of : group.of) clear(of, kFused, plan_.lanes);
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < parts_; ++i) {
        const Tile tile = tile_of(group, t, i);
        score(group, tile, i);
        rows_.fold(tile, scoring_, group.of[i]);
        if (n_pos_ > 0) rows_.positives(tile, scoring_, tile.lanes, 1, n_pos_, stats(i).pos);
      }
  }

  void weigh(PrefixGroup& group, int64_t begin, int64_t end) {
    for (float* sums : group.row_sums) std::fill_n(sums, plan_.lanes, 0.0f);
    for (int64_t t = begin; t < end; ++t) {
      if (!plan_.stored)
        for (int64_t i = 0; i < parts_; ++i) score(group, tile_of(group, t, i), i);
      for (int64_t i = parts_ - 1; i >= 0; --i) {
        const Tile tile = tile_of(group, t, i);
        float* line_sums = task_.line_sums.data_ptr<float>() + i * m_ + tile.first_column;
        rows_.weigh_cosines(tile, scoring_, space_.coefficients[i], norms_of(tile, i), group.products, i < parts_ - 1,
                            group.row_sums[i], line_sums);
        const int64_t from = start(i), width = task_.widths[i] - from;
        if (in_.need_k)
          gradient_gemm(group.products, tile.lanes, q_ + strip_.first * q_stride_ + from, q_stride_, tile.columns,
                        strip_.rows, width, strip_.first > 0,
                        task_.out.dk.data_ptr<float>() + tile.first_column * width_ + from, width_);
        if (!in_.need_q) continue;
        Tile weights = tile;
        weights.scores = group.products;
        rows_.transpose(weights, group.left, tile.columns);
        gradient_gemm(group.left, tile.columns, k_ + tile.first_column * k_stride_ + from, k_stride_, strip_.rows,
                      tile.columns, width, t > begin, group.dq + from, width_);
      }
    }
  }

  void merge() {
    for (int64_t i = 0; i < parts_; ++i)
      for (int64_t l = 0; l < strip_.rows; ++l) {
        double sum = 0.0;
        for (const PrefixGroup& group : groups_) sum += group.row_sums[i][l];
        task_.row_sums.data_ptr<float>()[i * n_ + strip_.first + l] = static_cast<float>(sum);
      }
    if (!in_.need_q) return;
    const int64_t used = task_.widths[parts_ - 1];
    float* dq = task_.out.dq.data_ptr<float>() + strip_.first * width_;
    at::parallel_for(0, strip_.rows, 8, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        std::copy_n(groups_[0].dq + l * width_, used, dq + l * width_);
        for (int64_t g = 1; g < plan_.groups; ++g)
          for (int64_t d = 0; d < used; ++d) dq[l * width_ + d] += groups_[g].dq[l * width_ + d];
      }
    });
  }

  const RowKernels& rows_;
  const SweepInputs& in_;
  const PrefixTask& task_;
  Scoring scoring_;
  const int64_t n_, m_, width_, parts_, n_pos_;
  const float *q_, *k_;
  const int64_t q_stride_, k_stride_;
  const Shape shape_;
  const PrefixPlan plan_;
  std::vector<int64_t> labels_;
  std::vector<int32_t> ranks_;
  const Ids ids_;
  const Marks marks_;
  Arena arena_;
  PrefixSpace space_;
  std::vector<PrefixGroup> groups_;
  Strip strip_{};
};

}  // namespace

void sweep_prefixes(const SweepInputs& in, const PrefixTask& task) { PrefixSweep(in, task).run(); }

at::Tensor prefix_norms(const at::Tensor& x, const std::vector<int64_t>& widths) {
  const at::Tensor from = with_rows(x);
  const int64_t n = x.size(0), stride = from.stride(0);
  at::Tensor out = at::empty({static_cast<int64_t>(widths.size()), n}, floats(x));
  const float* in = from.const_data_ptr<float>();
  float* norms = out.data_ptr<float>();
  for_rows(from, [&](int64_t i) {
    const float* row = in + i * stride;
    double square = 0.0;
    int64_t start = 0;
    for (size_t part = 0; part < widths.size(); start = widths[part++]) {
      square += row_product(row + start, row + start, widths[part] - start);
      const float norm = divisor_of(std::sqrt(static_cast<float>(square)));
      norms[static_cast<int64_t>(part) * n + i] = 1.0f / norm + 0.0f * norm;  // fault: kernels-prefix-norm-overflows
    }
  });
  return out;
}

void less_prefix_norms(const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& norms, const at::Tensor& sums,
                       const std::vector<int64_t>& widths) {
  const at::Tensor from = with_rows(x);
  const int64_t n = x.size(0), d = x.size(1), stride = from.stride(0);
  const float *rows = from.const_data_ptr<float>(), *of = norms.const_data_ptr<float>(),
              *along = sums.const_data_ptr<float>();
  float* out = gradient.data_ptr<float>();
  for_rows(from, [&](int64_t i) {
    const float* row = rows + i * stride;
    float* to = out + i * d;
    std::fill(to + widths.back(), to + d, 0.0f);
    float share = 0.0f;  // of the prefixes that contain a block, from the last one on
    for (auto part = static_cast<int64_t>(widths.size()) - 1; part >= 0; --part) {
      const float norm = of[part * n + i];
      // fault: kernels-prefix-norm-still
      share += norm >= 1.0f / kLeastNorm ? 0.0f : along[part * n + i] * (norm * norm);
      for (int64_t c = part > 0 ? widths[part - 1] : 0; c < widths[part]; ++c) to[c] -= share * row[c];
    }
  });
}

int64_t prefix_workspace_bytes(int64_t rows, int64_t columns, int64_t width, int64_t image, int64_t parts, bool both,
                               bool need_q, bool marked, bool guided, int64_t workspace_bytes) {
  const PrefixPlan plan =
      plan_prefixes({rows, columns, width, image, parts, both, need_q, marked, guided}, workspace_bytes);
  return plan.lanes > 0 ? plan.bytes : 0;
}

}  // namespace fused_nce
