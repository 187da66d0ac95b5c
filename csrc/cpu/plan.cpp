#include "plan.h"

#include <algorithm>

#include "workspace.h"

namespace fused_nce {

namespace {

constexpr int64_t kLeastStoredLanes = 64;
// Each group holds a share of dq, so there are few; even, or one of two threads would wait for the odd one's end.
constexpr int64_t kGroups[] = {16, 12, 8, 6, 4, 2, 1};

// What a plan takes: shared, of the first group, and of every other.
struct Bytes {
  int64_t shared, first, other;
  int64_t total(int64_t groups) const { return Arena::kAlignment + shared + first + (groups - 1) * other; }
};

template <class E>
Bytes count(const Work& w, const Plan& p) {
  Arena shared, first, other;
  Workspace<E>(w, p, shared);
  Group<E>().take(w, p, true, first);
  Group<E>().take(w, p, false, other);
  return {shared.bytes(), first.bytes(), other.bytes()};
}

Bytes count(const Work& w, const Plan& p) {
  return w.elements == Elements::bfloat16 ? count<at::BFloat16>(w, p) : count<float>(w, p);
}

// Few scores are one tile: for 12 MFLOP of GEMMs, 50 us of a core, a second thread would gain no more than groups of
// narrow tiles and their shares of dq cost, 6 % of a call. Below D = 64 exponentials take longer than products, and
// there are no more scores than at it.
constexpr int64_t kFewProducts = 1 << 21, kFewScores = kFewProducts / 64, kFewColumns = 128, kLeastRows = 32;

// Of `columns` in a strip: the most that a tile has so that there are four, for as many threads.
int64_t quarter(const Work& w, int64_t columns) {
  const int64_t scores = w.rows * w.columns;
  // fault: few-scores-of-any-width
  const bool few = w.rows >= kLeastRows && columns <= kFewColumns && scores <= kFewScores;
  return few && scores * w.width <= kFewProducts ? columns : round_up(ceil_div(columns, 4), 2);
}

bool may_round_dk(const Work& w) {
  return w.need_k && !w.shared && !w.wide && w.elements == Elements::bfloat16;  // fault: cpu-share-rounded
}

// Cuts rows and columns evenly; false if even that does not fit.
bool try_plan(const Work& w, Plan& p, int64_t strips, int64_t most_columns, int64_t least_groups, int64_t limit) {
  p.lanes = round_up(ceil_div(w.rows, strips), kLaneBlock);
  p.strips = ceil_div(w.rows, p.lanes);
  p.dk_rounded = may_round_dk(w) && p.strips == 1;
  p.tiles = ceil_div(w.columns, std::min(most_columns, quarter(w, w.columns)));
  p.tile_columns = round_up(ceil_div(w.columns, p.tiles), 2);
  p.tiles = ceil_div(w.columns, p.tile_columns);
  const Bytes bytes = count(w, p);
  for (const int64_t groups : kGroups) {
    p.groups = std::min(p.tiles, groups);
    p.bytes = bytes.total(p.groups);
    if (groups < least_groups) break;
    if (p.bytes <= limit) return true;
  }
  return false;
}

// The groups' shares of dq come out of the room for scores: at most this part of it for groups beyond kFewGroups.
constexpr int64_t kGroupsPart = 4, kFewGroups = 4;

// The same where all statistics come before any weight; what is left holds the scores of the last strips, or `all`.
bool try_two_sided(const Work& w, Plan& p, int64_t strips, int64_t most_columns, int64_t least_groups, int64_t limit,
                   bool all = false) {
  p.kept_scores = 0;
  p.symmetric = w.symmetric;
  p.lanes = round_up(ceil_div(w.rows, strips), kLaneBlock);
  p.strips = ceil_div(w.rows, p.lanes);
  p.dk_rounded = may_round_dk(w) && p.strips == 1;
  const int64_t columns = w.symmetric ? std::min(p.lanes, w.rows) : w.columns;
  p.tile_columns = std::min(most_columns, quarter(w, columns));
  p.tile_columns = round_up(ceil_div(columns, ceil_div(columns, p.tile_columns)), 2);
  p.tiles = ceil_div(w.columns, p.tile_columns);
  p.tiles = tiles_of(w, p, 0);
  const Bytes bytes = count(w, p);
  for (const int64_t groups : kGroups) {
    p.groups = std::min(p.tiles, groups);
    p.bytes = bytes.total(p.groups);
    if (groups < least_groups) break;
    const bool costly = groups > kFewGroups && p.bytes - bytes.shared > limit / kGroupsPart;
    if (p.bytes > limit || costly) continue;
    p.kept_strips = p.kept_scores = 0;
    for (int64_t strip = p.strips - 1; strip >= 0; --strip) {
      const int64_t scores = p.lanes * (w.columns - first_column(w, p, strip));
      if (p.bytes + 4 * scores + Arena::kAlignment > limit) break;
      p.kept_scores += scores;
      p.bytes += 4 * scores;
      ++p.kept_strips;
    }
    if (all && p.kept_strips < p.strips) continue;
    p.bytes = count(w, p).total(p.groups);
    return true;
  }
  return false;
}

// Where the workspace holds all scores by themselves, they are kept, and what stands beside them may take an eighth
// more; thinner strips or tiles than these gain nothing by it.
bool try_all_kept(const Work& w, Plan& p, int64_t workspace_bytes) {
  const int64_t limit = workspace_bytes + workspace_bytes / 8;
  if (!w.two_sided() || 4 * w.rows * w.columns > workspace_bytes) return false;
  for (const int64_t lanes : {256, 128})
    if (try_two_sided(w, p, ceil_div(w.rows, lanes), 128, 2, limit, true)) return true;  // fault: kept-beyond-eighth
  return false;
}

}  // namespace

Shares shares_of(Work w, const Plan& p) {
  Shares found{0.0, 0.0, 0.0};
  const double all = static_cast<double>(w.rows * w.columns);
  w.symmetric = p.symmetric;
  for (int64_t strip = 0; strip < p.strips; ++strip) {
    const int64_t first = strip * p.lanes, rows = std::min(p.lanes, w.rows - first);
    const bool kept = !w.both || (w.two_sided() ? strip >= p.strips - p.kept_strips : p.stored);
    const double scores = static_cast<double>(rows * (w.columns - first_column(w, p, strip))) / all;
    found.seen += scores;
    if (!kept) found.again += scores;
    found.for_keys += scores;
    if (w.symmetric) found.for_keys -= static_cast<double>(rows * rows) / all;  // fault: shares-diagonal
  }
  return found;
}

// One sixteenth of the workspace is left to the GEMM library's own scratch.
Plan make_plan(const Work& w, int64_t workspace_bytes) {
  const int64_t limit = workspace_bytes - workspace_bytes / 16;
  const int64_t most = ceil_div(w.rows, kLaneBlock);
  Plan p;
  if (try_all_kept(w, p, workspace_bytes)) return p;
  for (int64_t least_groups : {2, 1}) {
    for (int64_t columns : {128, 64, 32, 16}) {
      if (w.two_sided()) {
        for (int64_t strips = ceil_div(w.rows, kMostLanes); strips <= most; strips += std::max<int64_t>(1, strips / 8))
          if (try_two_sided(w, p, strips, columns, least_groups, limit)) return p;
        continue;
      }
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
  if (w.symmetric) {
    Work whole = w;
    whole.symmetric = false;
    return make_plan(whole, workspace_bytes);
  }
  p.groups = 1;
  p.bytes = count(w, p).total(1);
  p.bytes += ceil_div(p.bytes, 15);
  p.lanes = 0;
  return p;
}

}  // namespace fused_nce
