// How a call is cut up on a GPU, and what that costs: a function of the shapes, the element size and the limit alone.
// The sum of the parts is the published formula.
//
//   strip   rows whose scores, in float, are alive together: 32 MiB stay in the L2 between the GEMM that writes them
//           and the kernel that reads them, whose 16-bit weights take half as much again. Whatever the card has: a
//           call's memory and bits are a function of its shapes. Never below 128 rows where memory allows: thinner
//           GEMMs waste their tiles
//   block   rows whose weights are held together, in the inputs' precision: one pair of gradient GEMMs a block. A dk
//           that is read and written once a block costs 8 D / block bytes a score, which 735 rows hide behind the GEMM
//   panel   columns. One panel holds them all as long as a block of 256 rows fits: 3 GEMMs. Otherwise the statistics
//           of all panels come first and the scores are computed again: 4 GEMMs, and no memory that grows with N * M
//   part    a share of a row's columns, one CTA each: rows that are few would leave most of the GPU idle
//
// Statistics of columns are kept for all of them, 24 bytes each.
//
// 16-bit gradients that several GEMMs add to are float until the last of them. That is beyond `bytes`, but where it is
// at most half of the limit, it and the workspace share the limit; a sixteenth is left to what the tail computes.
//
// Marks of a strip are two bytes for eight scores.
//
// float weights take the place of their scores; then strip and block share one buffer.
#pragma once

#include <algorithm>

#include "../integers.h"
#include "rows.h"

namespace fused_nce {
namespace cuda {

struct Work {
  int64_t rows, columns, width;  // N, M, D
  int64_t positives;             // a row: P
  int64_t element_bytes;         // of q and k: 4 or 2
  bool statistics, gradients;
  int64_t sums;       // a row: 1 where dscale is wanted, 2 with dbias
  bool column_stats;  // statistics of columns too
  bool optional;      // those of optional_stats.h too
  bool marked;        // columns that marks.h takes out of their rows' negatives
};

struct Plan {
  bool fits = false;
  int64_t strip = 0, block = 0, panel = 0;  // rows, rows, columns
  int64_t panels = 0, ctas_per_row = 0;
  int64_t threads = 0;     // of one CTA
  int64_t mark_bytes = 0;  // of the buffers, in the order in which the driver takes them
  int64_t score_bytes = 0;
  int64_t weight_bytes = 0;
  int64_t partial_bytes = 0;
  int64_t row_bytes = 0;
  int64_t column_bytes = 0;
  int64_t bytes = 0;      // everything allocated beyond inputs and outputs
  int64_t sum_bytes = 0;  // of float gradients that will leave in 16 bits
};

constexpr int64_t kL2Bytes = 32 << 20;       // of an H100's 50 MiB, an H200's 60: the weights need their share
constexpr int64_t kAtOnceBytes = 64 << 20;   // of scores that are one strip although the L2 holds only most of them
constexpr int64_t kRowTile = 128;            // rows of a GEMM tile
constexpr int64_t kLeastBlock = 256;         // rows for which one panel is worth keeping
constexpr int64_t kPanelBlock = 1024;        // rows of a block whose columns are cut
constexpr int64_t kBusyRows = 128;           // CTAs that fill a GPU
constexpr int64_t kBusyThreads = 192 << 10;  // and threads
constexpr int64_t kAllocation = 512;         // what the caching allocator rounds to
constexpr int64_t kMostColumns = 1 << 30;    // of a panel: columns within one are counted in 32 bits

// Row stride of scores and weights: whole vectors.
inline int64_t stride_of(int64_t columns) { return round_up(columns, kColumns); }

// Coefficients a row: d_pos, d_neg_lse and those of the optional statistics.
inline int64_t coefficients_of(int64_t positives, bool optional) { return positives + 1 + (optional ? kOptional : 0); }

// The CTAs of a row and their threads.
inline void share_rows(Plan& p) {
  // A part is worth a CTA from 2048 columns on.
  const int64_t wanted = ceil_div(kBusyRows, p.strip);
  p.ctas_per_row = p.strip >= kBusyRows / 2 ? 1 : std::max<int64_t>(1, std::min(wanted, p.panel / 2048));
  const int64_t vectors = ceil_div(stride_of(p.panel), kColumns * p.ctas_per_row);
  // Many rows fill the GPU with small CTAs, whose barriers cost less; few need every thread that they can have.
  const int64_t most = std::min<int64_t>(kMostThreads, std::max<int64_t>(256, round_up(kBusyThreads / p.strip, 32)));
  // As many turns for each thread: 784 vectors are two turns of 416 threads, not one of 768 and one of 16.
  const int64_t turns = ceil_div(vectors, most);
  p.threads = std::max<int64_t>(64, round_up(ceil_div(vectors, turns), 32));
}

// Fills in what follows from strip, block and panel.
inline void account(const Work& w, Plan& p) {
  const bool in_place = w.gradients && w.element_bytes == 4;
  p.panels = ceil_div(w.columns, p.panel);
  share_rows(p);
  p.mark_bytes = w.marked ? round_up(p.strip * (stride_of(p.panel) / kColumns) * 2, kAllocation) : 0;
  p.score_bytes = in_place ? 0 : round_up(p.strip * stride_of(p.panel) * 4, kAllocation);
  p.weight_bytes = w.gradients ? round_up(p.block * stride_of(p.panel) * w.element_bytes, kAllocation) : 0;
  const int64_t part = static_cast<int64_t>(sizeof(RowPart) + (w.optional ? sizeof(OptionalPart) : 0));
  const int64_t partials = p.block * p.panels * p.ctas_per_row * part;
  p.partial_bytes = w.statistics ? round_up(partials, kAllocation) : 0;
  // What a block's weights need, where the tail makes it, and the rows' shares of dscale and dbias.
  const int64_t coefficients = w.statistics ? p.block * coefficients_of(w.positives, w.optional) : 0;
  p.row_bytes = w.gradients ? round_up((coefficients + w.sums * w.rows * p.ctas_per_row) * 4, kAllocation) : 0;
  p.column_bytes = w.column_stats ? round_up(w.columns * static_cast<int64_t>(sizeof(ColumnPart)), kAllocation) : 0;
  p.bytes = p.mark_bytes + p.score_bytes + p.weight_bytes + p.partial_bytes + p.row_bytes + p.column_bytes;
  const int64_t sums = (p.block < w.rows ? w.columns : 0) + (p.panels > 1 ? w.rows : 0);
  p.sum_bytes = w.gradients && !in_place ? sums * w.width * 4 : 0;
}

// The first plan within the limit; `roomy`: with the float sums and a sixteenth of it to spare.
inline Plan search_plan(const Work& w, int64_t limit, bool roomy) {
  Plan p;
  const auto fits = [&](int64_t strip, int64_t block, int64_t panel) {
    p.strip = strip;
    p.block = block;
    p.panel = panel;
    account(w, p);
    const int64_t sums = p.sum_bytes <= limit / 2 ? p.sum_bytes : 0;
    return p.fits = roomy ? p.bytes + sums <= limit - limit / 16 : p.bytes <= limit;
  };
  // One panel: rows cut evenly into the fewest blocks, and a block into the fewest strips that stay in the L2.
  if (w.columns <= kMostColumns) {
    const int64_t row = 4 * stride_of(w.columns), all = w.rows * row;
    // What of them crosses the memory costs no more than the launches of more strips.
    const int64_t in_l2 = (all <= std::min(kAtOnceBytes, limit / 4) ? all : std::min(kL2Bytes, limit / 4)) / row;
    const int64_t most = std::max(kRowTile, in_l2 >= w.rows ? w.rows : in_l2 / kRowTile * kRowTile);
    const int64_t least = std::min(w.rows, w.gradients ? kLeastBlock : kRowTile);
    for (int64_t blocks = 1; blocks <= w.rows && ceil_div(w.rows, blocks) >= least; blocks += 1 + blocks / 16) {
      const int64_t block = ceil_div(w.rows, blocks);
      const int64_t strips = ceil_div(block, most);
      const int64_t strip = strips == 1 ? block : std::min(block, round_up(ceil_div(block, strips), kRowTile));
      if (fits(strip, w.gradients ? block : strip, w.columns)) return p;
    }
  }
  // Panels: as many columns as fit the L2 and the limit, for the tallest block that still leaves 512 of them.
  for (const int64_t least : {512, kColumns}) {
    for (int64_t block = std::min(w.rows, kPanelBlock);; block = ceil_div(block, 2)) {
      const int64_t strip = std::min(block, 2 * kRowTile);
      const int64_t in_l2 = kL2Bytes / (4 * strip) / kColumns * kColumns;
      const int64_t most = std::min(w.columns, std::max<int64_t>(kColumns, in_l2));
      for (int64_t panels = ceil_div(w.columns, most);; panels += std::max<int64_t>(1, panels / 16)) {
        const int64_t panel = std::min(w.columns, stride_of(ceil_div(w.columns, panels)));
        if (panel < std::min<int64_t>(w.columns, least)) break;
        if (fits(strip, w.gradients ? block : strip, panel)) return p;
        if (panel <= kColumns) break;
      }
      if (block == 1) break;
    }
  }
  return p;
}

struct PrefixWork {
  int64_t rows, columns;  // N, M
  int64_t positives;      // a row: P
  int64_t parts;          // prefixes: K
  int64_t element_bytes;  // of q and k: 4 or 2
  bool gradients, marked;
};

// Strips of all columns, with the products, every prefix's cosines and its marks: as many rows as the L2 has room for,
// but a GEMM's tile of them where memory allows.
inline Plan plan_prefixes(const PrefixWork& w, int64_t limit) {
  const int64_t stride = stride_of(w.columns), held = 1 + (w.gradients ? w.parts : 1);
  const auto bytes = [](int64_t count) { return round_up(count, kAllocation); };
  Plan p;
  p.panel = w.columns;
  p.panels = 1;
  p.strip = std::min(w.rows, std::max(kRowTile, kL2Bytes / (4 * stride * held) / kRowTile * kRowTile));
  for (;; p.strip = ceil_div(p.strip, 2)) {
    share_rows(p);
    p.block = p.strip;
    p.score_bytes = bytes(p.strip * stride * 4 * held);
    p.mark_bytes = w.marked ? bytes(w.parts * p.strip * (stride / kColumns) * 2) : 0;
    p.weight_bytes = w.gradients && w.element_bytes == 2 ? 2 * bytes(p.strip * stride * 2) : 0;
    p.partial_bytes = bytes(p.strip * p.ctas_per_row * static_cast<int64_t>(sizeof(RowPart)));
    const int64_t numbers = p.strip * (w.positives + 1) + w.rows * p.ctas_per_row;
    p.row_bytes = w.gradients ? bytes(w.parts * numbers * 4) : 0;
    p.bytes = p.score_bytes + p.mark_bytes + p.weight_bytes + p.partial_bytes + p.row_bytes;
    p.fits = w.columns <= kMostColumns && p.bytes <= limit;
    if (p.fits || p.strip == 1) return p;
  }
}

// `fits` is false if nothing does; `bytes` is then what the smallest plan needs.
inline Plan make_plan(const Work& w, int64_t limit) {
  const Plan roomy = search_plan(w, limit, true);
  return roomy.fits ? roomy : search_plan(w, limit, false);
}

}  // namespace cuda
}  // namespace fused_nce
