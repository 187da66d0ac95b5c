// How a call is cut up, and what that costs: a function of the shapes, the element type and the limit alone, so that
// neither the bits nor the memory depend on the number of threads.
//
//   strip   `lanes` rows of q, packed once as the right operand of the GEMMs
//   stored  the strip's scores (M, lanes) are kept between statistics and weights: 3 GEMMs. Where fewer than 64 rows of
//           scores would fit they are computed again, tile by tile: 4 GEMMs, and no memory that grows with M
//           Where all statistics come before any weight: of as many strips as fit, the last ones
//   tile    `tile_columns` columns of the strip, transposed: 128 * 128 floats are 64 KiB of the 1-2 MiB of L2
//   group   a contiguous run of tiles: one task. Statistics and shares of dq are merged in the order of the groups
#pragma once

#include <cstdint>

#include "../integers.h"
#include "../names.h"

namespace fused_nce {

constexpr int64_t kLaneBlock = 16;  // the lanes of a strip are a multiple of it

enum class Elements {
  float32,   // float, used in place
  bfloat16,  // bfloat16 with hardware support: bfloat16 GEMMs
  widened,   // float16, and bfloat16 otherwise: widened to float tile by tile
};

// A GEMM's right operand (K, N) is row-major for float; for bfloat16 its rows come in pairs: element (k, n) at
// ((k/2)*N + n)*2 + k%2.
template <class E>
constexpr bool kPaired = sizeof(E) == 2;

// Numbers, or pairs of bfloat16, from a row of a GEMM's right operand to the next where it is copied: rows a multiple
// of 4 KiB apart would meet in the same lines of the L1 cache, which halved the rate of oneDNN's AVX2 kernel.
inline bool collides(int64_t width) { return width % 1024 == 0; }
inline int64_t padded(int64_t width) { return collides(width) ? width + 16 : width; }

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
  bool symmetric = false;  // and the scores are: one above the diagonal counts for its row and for its column
  bool divided = false;    // rows are divided by their norms on the way
  bool marked = false, guided = false;  // filters mark columns of each row, by the dot products of guides too
  bool wide = false;                    // no gradient leaves in 16 bits

  // Whether every GEMM reads copies of rows, widened or divided; or, further apart, those of the gradients do.
  bool changes_rows() const { return elements == Elements::widened || divided; }
  bool copies_rows() const { return changes_rows() || (elements == Elements::float32 && collides(width)); }

  // Every weight needs the statistics of a row and of a column, so all of them come before any weight.
  bool two_sided() const { return both && (symmetric || column_stats); }
  bool optional() const { return column_stats || (row_stats & ~kFused); }
};

struct Plan {
  int64_t lanes = 0, strips = 0, tile_columns = 0, tiles = 0, groups = 0;
  bool stored = false;
  bool symmetric = false;                    // as asked for, where that fits
  int64_t kept_strips = 0, kept_scores = 0;  // of two-sided weights: the last strips, whose scores are kept
  bool dk_rounded = false;                   // one strip finishes dk, which can then leave in bfloat16
  int64_t bytes = 0;                         // everything allocated beyond inputs and outputs
};

constexpr int64_t kOutputWidth = 128;  // of a gradient GEMM's call: a block of the right operand stays in L1 and L2

// The columns of a strip: all, or, above the diagonal, those from its own first row on.
inline int64_t first_column(const Work& w, const Plan& p, int64_t strip) { return w.symmetric ? strip * p.lanes : 0; }

// A symmetric strip's tiles: those of its own rows, the diagonal, and after them the rest.
inline int64_t diagonal_tiles(const Plan& p, int64_t rows) { return ceil_div(rows, p.tile_columns); }

inline int64_t tiles_of(const Work& w, const Plan& p, int64_t strip) {
  if (!w.symmetric) return p.tiles;
  const int64_t left = w.rows - strip * p.lanes, rows = left < p.lanes ? left : p.lanes;
  return diagonal_tiles(p, rows) + ceil_div(left - rows, p.tile_columns);
}

// Which scores the plan's tiles compute, in parts of all.
struct Shares {
  double seen;      // at all
  double again;     // a second time
  double for_keys;  // with a product of their own for dk: those off the diagonal of symmetric ones
};
Shares shares_of(Work w, const Plan& p);

// `lanes` is 0 if nothing fits; `bytes` is then what the smallest plan needs.
Plan make_plan(const Work& w, int64_t workspace_bytes);

}  // namespace fused_nce
