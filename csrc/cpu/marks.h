// Marks of a tile's scores that filters take out of their rows' negatives: by the scores themselves, by the dot
// products of guides, or by their columns.
#pragma once

#include <ATen/ops/sort.h>

#include <algorithm>

#include "../problem.h"
#include "arena.h"
#include "gemm.h"

namespace fused_nce {

// What a group needs to mark a tile; the same for guides of any width.
struct MarkRoom {
  static constexpr int64_t kGuideDepth = 128;  // of one GEMM
  int32_t* own = nullptr;                      // (tile_columns, lanes) marks, unless the strip stores its own
  float* heights = nullptr;                    // (tile_columns, lanes) dot products of the guides
  float* packed = nullptr;                     // (kGuideDepth, lanes), columns of the rows' guides

  void take(bool guided, bool owns, int64_t columns, int64_t lanes, Arena& arena) {
    if (owns) own = arena.take<int32_t>(columns * lanes);
    if (!guided) return;
    heights = arena.take<float>(columns * lanes);
    packed = arena.take<float>(kGuideDepth * lanes);
  }
};

class Marks {
 public:
  // Every tile looks its own columns up, so a row's positives are in order: P = M of them in M / 128 tiles would
  // otherwise be M * M / 128 steps a row.
  explicit Marks(const Filters& filters) : filters_(filters), several_(filters.several) {
    if (!several_.defined()) return;
    const int64_t *columns = several_.const_data_ptr<int64_t>(), p = several_.size(1);
    for (int64_t row = 0; row < several_.size(0); ++row)
      if (!std::is_sorted(columns + row * p, columns + (row + 1) * p)) {
        several_ = std::get<0>(at::sort(several_, 1));  // fault: marks-unsorted
        return;
      }
  }

  // Those of prefix `part`. `tile.scores` are before the scale.
  void write(const RowKernels& kernels, const Tile& tile, const MarkRoom& room, int64_t part = 0) const {
    std::fill_n(tile.marks, tile.columns * tile.lanes, 0);
    if (filters_.ceiling.defined()) kernels.mark(tile, tile.scores, line(filters_.ceiling, tile, part));
    if (filters_.guide_ceiling.defined()) {
      if (part == 0) measure(tile, room);  // else still there  // fault: kernels-guide-forgotten
      kernels.mark(tile, room.heights, line(filters_.guide_ceiling, tile, part));
    }
    for (int64_t l = 0; l < tile.rows; ++l) {
      if (several_.defined()) {
        const int64_t p = several_.size(1);
        const int64_t* columns = several_.const_data_ptr<int64_t>() + (tile.first_row + l) * p;
        const int64_t* own = std::lower_bound(columns, columns + p, tile.first_column);
        for (; own < columns + p && *own < tile.first_column + tile.columns; ++own) put(tile, l, *own, kNoNegative);
      }
      if (tile.itself) put(tile, l, tile.itself[l], kOutside);  // fault: kernels-marks-itself
    }
  }

 private:
  // Of all rows from the tile's first on.
  static const float* line(const at::Tensor& ceilings, const Tile& tile, int64_t part) {
    return ceilings.const_data_ptr<float>() + part * ceilings.size(1) + tile.first_row;
  }

  static void put(const Tile& tile, int64_t lane, int64_t column, int32_t mark) {
    const int64_t c = column - tile.first_column;
    if (c >= 0 && c < tile.columns) tile.marks[c * tile.lanes + lane] = mark;
  }

  void measure(const Tile& tile, const MarkRoom& room) const {
    const int64_t width = filters_.guide_q.size(1);
    const float* rows = filters_.guide_q.const_data_ptr<float>() + tile.first_row * width;
    const float* lines = filters_.guide_k.const_data_ptr<float>() + tile.first_column * width;
    for (int64_t d = 0; d < width; d += MarkRoom::kGuideDepth) {
      const int64_t depth = std::min(MarkRoom::kGuideDepth, width - d);
      for (int64_t l = 0; l < tile.lanes; ++l)
        for (int64_t x = 0; x < depth; ++x)
          room.packed[x * tile.lanes + l] = l < tile.rows ? rows[l * width + d + x] : 0.0f;
      // fault: kernels-guide-first-block
      gemm(tile.columns, tile.lanes, depth, lines + d, width, room.packed, tile.lanes, d > 0, room.heights, tile.lanes);
    }
  }

  const Filters& filters_;
  at::Tensor several_;  // (N, P), each row in ascending order
};

}  // namespace fused_nce
