// The names that cross from Python: statistics of `core/statistics.py` and tails of `core/tails.py`.
#pragma once

namespace fused_nce {

// Of a row over its columns, or of a column over its rows.
enum Statistic : int {
  kNegLse,
  kNegMax,
  kSquare,
  kNegSoftplus,
  kPosLse,
  kPosMax,
  kPosSum,
  kPosCount,
  kPosGap,
  kStatistics,
};

constexpr unsigned bit_of(Statistic name) { return 1u << name; }

// What is found over the set of the positives, of which there may be any number.
constexpr unsigned kOverPositives =
    bit_of(kPosLse) | bit_of(kPosMax) | bit_of(kPosSum) | bit_of(kPosCount) | bit_of(kPosGap);

// What the fused kernels fold and weigh; a spec with any other takes passes of their own over the same tiles.
constexpr unsigned kFused = bit_of(kNegLse) | bit_of(kNegMax) | bit_of(kSquare);

enum Tail : int { kNce, kLogOut, kLogIn, kSigmoid, kTails };

}  // namespace fused_nce
