// The names that cross from Python, in the order of `KERNEL_STATISTICS` in core/statistics.py and of `KERNEL_TAILS` in
// core/tails.py; a test compares.
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
  kNegSum,
  kNegCount,
  kStatistics,
};

constexpr const char* kStatisticNames[kStatistics] = {"neg_lse", "neg_max", "square",   "neg_softplus",
                                                      "pos_lse", "pos_max", "pos_sum",  "pos_count",
                                                      "pos_gap", "neg_sum", "neg_count"};

constexpr unsigned bit_of(Statistic name) { return 1u << name; }

// What is found over the set of the positives, of which there may be any number.
constexpr unsigned kOverPositives =
    bit_of(kPosLse) | bit_of(kPosMax) | bit_of(kPosSum) | bit_of(kPosCount) | bit_of(kPosGap);

// The sum and the number of the negatives, which one pass finds.
constexpr unsigned kNegTotals = bit_of(kNegSum) | bit_of(kNegCount);

// What the fused kernels fold and weigh; a spec with any other takes passes of their own over the same tiles.
constexpr unsigned kFused = bit_of(kNegLse) | bit_of(kNegMax) | bit_of(kSquare);

enum Tail : int { kNce, kLogOut, kLogIn, kSigmoid, kTails };

constexpr const char* kTailNames[kTails] = {"nce", "log_out", "log_in", "sigmoid"};

}  // namespace fused_nce
