// How a call is cut up, and what that costs: a function of the shapes, the element type and the limit alone, so that
// neither the bits nor the memory depend on the number of threads. The sum of the parts is the published formula.
//
//   strip   `lanes` rows of q, packed once as the right operand of the GEMMs
//   stored  the strip's scores (M, lanes) are kept between statistics and weights: 3 GEMMs. Where fewer than 64 rows of
//           scores would fit they are computed again, tile by tile: 4 GEMMs, and no memory that grows with M
//   tile    `tile_columns` columns of the strip, transposed: 128 * 128 floats are 64 KiB of the 1-2 MiB of L2
//   group   a contiguous run of tiles: one task. Statistics and shares of dq are merged in the order of the groups
#pragma once

#include <algorithm>
#include <cstdint>

#include "../integers.h"
#include "../names.h"

namespace fused_nce {

enum class Elements {
  float32,   // float, used in place
  bfloat16,  // bfloat16 with hardware support: bfloat16 GEMMs
  widened,   // float16, and bfloat16 otherwise: widened to float tile by tile
};

struct Work {
  int64_t rows, columns, width;  // N, M, D
  int64_t image;                 // n_c, columns that share an id; or P, where positives are no columns
  Elements elements;
  bool both;       // statistics and gradients in one call: scores may be stored
  bool gradients;  // any gradient at all
  bool need_q, need_k;
  bool shared = false;                            // q is k: dk is one half of dq, added up in its place
  bool labels = false;                            // ids are ranks among the rows' labels
  unsigned row_stats = kFused, column_stats = 0;  // bits of statistics

  bool further() const { return column_stats || (row_stats & ~kFused); }
};

struct Plan {
  int64_t lanes = 0, strips = 0, tile_columns = 0, tiles = 0, groups = 0;
  bool stored = false;
  bool dk_rounded = false;  // one strip finishes dk, which can then leave in bfloat16
  int64_t bytes = 0;        // everything allocated beyond inputs and outputs
};

constexpr int64_t kLaneBlock = 16;
constexpr int64_t kOutputWidth = 128;  // of a gradient GEMM's call: a block of the right operand stays in L1 and L2
constexpr int64_t kMostLanes = 256;
constexpr int64_t kLeastStoredLanes = 64;
// Each group holds a share of dq, so there are few; even, or one of two threads would wait for the odd one's end.
constexpr int64_t kGroups[] = {16, 12, 8, 6, 4, 2, 1};

// Arrays of `Accumulators`, one float a row or a column.
constexpr int64_t accumulator_arrays(unsigned stats) {
  return 7 + (stats & kOverPositives ? 7 : 0) + (stats & bit_of(kNegSoftplus) ? 2 : 0);
}

constexpr int64_t kTailArrays = 3;  // dL/d pos_lse, pos_gap and neg_softplus, of a tail that reads them

// What belongs to the whole call: the ranks of labels, and the running statistics of all columns.
inline int64_t call_bytes(const Work& w) {
  const int64_t ranks = w.labels ? 8 * w.rows + 4 * w.columns + 2 * 64 : 0;
  const int64_t arrays = w.column_stats && !w.gradients ? accumulator_arrays(w.column_stats) : 0;
  return ranks + arrays * (4 * w.columns + 64);
}

// Buffers of one strip, shared by all groups.
inline int64_t strip_bytes(const Work& w, const Plan& p) {
  const int64_t element = w.elements == Elements::bfloat16 ? 2 : 4;
  const int64_t width = round_up(w.width, 2);
  int64_t bytes = p.lanes * width * element;  // q transposed, for the scores
  const bool copied = w.elements == Elements::widened || (w.need_k && w.elements == Elements::bfloat16);
  if (copied) bytes += p.lanes * width * element;  // q, for dk
  if (p.stored) bytes += w.columns * p.lanes * 4;  // the scores
  if (w.both && w.further()) bytes += kTailArrays * p.lanes * 4;
  return bytes + (6 + w.image) * p.lanes * 4;  // ids and coefficients
}

// The operands of dq: weights (lanes, columns), and bfloat16 keys in pairs. dk comes before dq, and what it leaves in
// float until it is rounded takes the same place.
inline int64_t operand_bytes(const Work& w, const Plan& p) {
  const int64_t columns = round_up(p.tile_columns, 2);
  const bool bf16 = w.elements == Elements::bfloat16;
  const int64_t dq = w.need_q ? columns * (bf16 ? 2 * (p.lanes + w.width) : 4 * p.lanes) : 0;
  return std::max(dq, p.dk_rounded ? columns * std::min(kOutputWidth, w.width) * 4 : 0);
}

// A tile on the side: turned around for the statistics of columns, or what further statistics put on t.
inline bool has_side(const Work& w) { return w.further() && (w.gradients || w.column_stats); }

// Buffers of one group; the first group writes its share of dq where it belongs, unless dk is added up there.
inline int64_t group_bytes(const Work& w, const Plan& p, bool first) {
  const int64_t columns = round_up(p.tile_columns, 2);
  int64_t bytes = (accumulator_arrays(w.row_stats) + 2) * p.lanes * 4;  // statistics, dscale, dbias
  bytes += columns * 4 * (w.column_stats ? 2 : 1);                      // ids of the tile's columns
  if (has_side(w)) bytes += columns * p.lanes * 4;
  if (!p.stored) bytes += columns * p.lanes * 4;                        // a tile of scores
  if (w.elements == Elements::widened) bytes += columns * w.width * 4;  // a tile of keys as float
  if (!w.gradients) return bytes;
  if (w.elements == Elements::bfloat16) bytes += columns * p.lanes * 2;  // weights, rounded
  bytes += operand_bytes(w, p);
  if (w.need_q && (!first || w.shared)) bytes += p.lanes * w.width * 4;  // share of dq
  return bytes;
}

inline int64_t total_bytes(const Work& w, const Plan& p) {
  const int64_t alignment = 64 * (13 * p.groups + 8);
  return call_bytes(w) + strip_bytes(w, p) + group_bytes(w, p, true) + (p.groups - 1) * group_bytes(w, p, false) +
         alignment;
}

// Cuts rows and columns evenly; false if even that does not fit.
inline bool try_plan(const Work& w, Plan& p, int64_t strips, int64_t most_columns, int64_t least_groups,
                     int64_t limit) {
  p.lanes = round_up(ceil_div(w.rows, strips), kLaneBlock);
  p.strips = ceil_div(w.rows, p.lanes);
  p.dk_rounded = w.need_k && !w.shared && p.strips == 1 && w.elements == Elements::bfloat16;
  p.tiles = ceil_div(w.columns, std::min(most_columns, round_up(ceil_div(w.columns, 4), 2)));
  p.tile_columns = round_up(ceil_div(w.columns, p.tiles), 2);
  p.tiles = ceil_div(w.columns, p.tile_columns);
  for (const int64_t groups : kGroups) {
    p.groups = std::min(p.tiles, groups);
    p.bytes = total_bytes(w, p);
    if (groups < least_groups) break;
    if (p.bytes <= limit) return true;
  }
  return false;
}

// One sixteenth of the workspace is left to the GEMM library's own scratch. `lanes` is 0 if nothing fits; `bytes` is
// then what the smallest plan needs.
inline Plan make_plan(const Work& w, int64_t workspace_bytes) {
  const int64_t limit = workspace_bytes - workspace_bytes / 16;
  const int64_t most = ceil_div(w.rows, kLaneBlock);
  Plan p;
  for (int64_t least_groups : {2, 1}) {
    for (int64_t columns : {128, 64, 32, 16}) {
      if (w.both && w.gradients) {
        p.stored = true;
        const int64_t least = std::min(round_up(w.rows, kLaneBlock), kLeastStoredLanes);
        for (int64_t strips = ceil_div(w.rows, kMostLanes); strips <= most; ++strips) {
          if (round_up(ceil_div(w.rows, strips), kLaneBlock) < least) break;
          if (try_plan(w, p, strips, columns, least_groups, limit)) return p;
        }
      }
      p.stored = false;
      for (int64_t strips = ceil_div(w.rows, kMostLanes); strips <= most; strips += std::max<int64_t>(1, strips / 8))
        if (try_plan(w, p, strips, columns, least_groups, limit)) return p;
    }
  }
  p.groups = 1;
  p.bytes = total_bytes(w, p);
  p.bytes += ceil_div(p.bytes, 15);
  p.lanes = 0;
  return p;
}

}  // namespace fused_nce
