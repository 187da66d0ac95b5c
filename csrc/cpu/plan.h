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

namespace fused_nce {

enum class Elements {
  float32,        // float, used in place
  bfloat16,       // bfloat16 with hardware support: bfloat16 GEMMs
  widened,        // float16, and bfloat16 otherwise: widened to float tile by tile
};

struct Work {
  int64_t rows, columns, width;  // N, M, D
  Elements elements;
  bool both;                     // statistics and gradients in one call: scores may be stored
  bool gradients;                // any gradient at all
  bool need_q, need_k;
};

struct Plan {
  int64_t lanes = 0, strips = 0, tile_columns = 0, tiles = 0, groups = 0;
  bool stored = false;
  int64_t bytes = 0;  // everything allocated beyond inputs and outputs
};

constexpr int64_t kLaneBlock = 16;
constexpr int64_t kMostLanes = 256;
constexpr int64_t kLeastStoredLanes = 64;
constexpr int64_t kMostGroups = 16;

// Buffers of one strip, shared by all groups.
inline int64_t strip_bytes(const Work& w, const Plan& p) {
  const int64_t element = w.elements == Elements::bfloat16 ? 2 : 4;
  const int64_t width = round_up(w.width, 2);
  int64_t bytes = p.lanes * width * element;                                            // q transposed, for the scores
  const bool copied = w.elements == Elements::widened || (w.need_k && w.elements == Elements::bfloat16);
  if (copied) bytes += p.lanes * width * element;                                       // q, for dk
  if (p.stored) bytes += w.columns * p.lanes * 4;                                       // the scores
  return bytes + 5 * p.lanes * 4;                                                       // coefficients
}

// Buffers of one group; the first group writes its share of dq where it belongs.
inline int64_t group_bytes(const Work& w, const Plan& p, bool first) {
  const int64_t element = w.elements == Elements::bfloat16 ? 2 : 4;
  const int64_t columns = round_up(p.tile_columns, 2);
  int64_t bytes = 9 * p.lanes * 4 + 8;                                             // statistics, dscale, scratch
  if (!p.stored) bytes += columns * p.lanes * 4;                                   // a tile of scores
  if (w.elements == Elements::widened) bytes += columns * w.width * 4;             // a tile of keys as float
  if (!w.gradients) return bytes;
  if (w.need_q) bytes += columns * p.lanes * element;                              // weights, transposed
  if (w.elements == Elements::bfloat16) bytes += columns * p.lanes * 2;            // weights, rounded
  if (w.need_q && w.elements == Elements::bfloat16) bytes += columns * w.width * 2;  // keys, interleaved
  if (w.need_q && !first) bytes += p.lanes * w.width * 4;                          // share of dq
  return bytes;
}

inline int64_t total_bytes(const Work& w, const Plan& p) {
  const int64_t alignment = 64 * (13 * p.groups + 8);
  return strip_bytes(w, p) + group_bytes(w, p, true) + (p.groups - 1) * group_bytes(w, p, false) + alignment;
}

// Cuts rows and columns evenly; false if even that does not fit.
inline bool try_plan(const Work& w, Plan& p, int64_t strips, int64_t most_columns, int64_t least_groups,
                     int64_t limit) {
  p.lanes = round_up(ceil_div(w.rows, strips), kLaneBlock);
  p.strips = ceil_div(w.rows, p.lanes);
  p.tiles = ceil_div(w.columns, std::min(most_columns, round_up(ceil_div(w.columns, 4), 2)));
  p.tile_columns = round_up(ceil_div(w.columns, p.tiles), 2);
  p.tiles = ceil_div(w.columns, p.tile_columns);
  for (p.groups = std::min(p.tiles, kMostGroups); p.groups >= std::min(p.tiles, least_groups); --p.groups) {
    p.bytes = total_bytes(w, p);
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
