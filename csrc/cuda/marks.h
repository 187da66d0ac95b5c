// Marks of a strip: columns that filters take out of their rows' negatives, by the scores themselves, by the dot
// products of guides that are in the strip before its scores, or by their numbers. What reads the scores then reads a
// word a turn, whatever it was that marked.
#pragma once

#include "rows.h"

namespace fused_nce {
namespace cuda {

struct Marking {
  const float* ceilings;   // (N): a dot product in the strip that is above its row's is marked; null: none is
  const int64_t* several;  // (N, width): columns, each row in ascending order, -1 for none; null: none
  int64_t width;
  bool add;  // to the marks that are there
};

// How many of `count` numbers in ascending order are below x.
FUSED_NCE_HD int64_t count_below(const int64_t* numbers, int64_t count, int64_t x) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (numbers[middle] < x) low = middle + 1;
    else count = middle;
  }
  return low;
}

// One thread's turns of a row.
FUSED_NCE_HD void mark_thread(const Strip& strip, const Rules& rules, const Marking& by, int64_t r, int part,
                              int thread, int threads) {
  const Row row = row_of(strip, rules, r, part);
  const float ceiling = by.ceilings ? by.ceilings[row.index] : 0.0f;
  const int64_t* own = by.several ? by.several + row.index * by.width : nullptr;
  for (int c = row.begin + thread * kColumns; c < row.end; c += threads * kColumns) {
    uint16_t& marks = strip.marks[(r * strip.stride + c) / kColumns];
    unsigned found = by.add ? marks : 0u;  // fault: gpu-marks-forgotten
    if (by.ceilings) {
      const Eight heights = load(row.scores + c, 1.0f);
      FUSED_NCE_UNROLL
      for (int u = 0; u < kColumns; ++u) found |= heights.s[u] > ceiling ? 1u << u : 0u;  // a NaN stays, and shows
    }
    const int64_t first = row.first_column + c;  // fault: gpu-several-panels
    for (int64_t p = own ? count_below(own, by.width, first) : by.width; p < by.width && own[p] < first + kColumns; ++p)
      found |= 1u << (own[p] - first);
    marks = static_cast<uint16_t>(found);
  }
}

}  // namespace cuda
}  // namespace fused_nce
