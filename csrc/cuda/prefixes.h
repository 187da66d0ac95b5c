// Prefixes of one pair of operands (fused_nce/core/prefixes.py): from unnormalised products to the cosines of a prefix,
// and from its weights to those of the products.
#pragma once

#include "weights.h"

namespace fused_nce {
namespace cuda {

// What a strip of a prefix has beside its cosines.
struct PrefixStrip {
  float* products;  // (rows, stride); on the way back their weights, those of the wider prefixes first
  const float *of_rows, *of_columns;  // (N), (M) inverse norms
  bool add;                           // to the wider prefixes' weights
  void* rest;  // (rows, stride): what the strip's bfloat16 weights leave, in bfloat16 too; null for float
};

FUSED_NCE_HD void put(float* at, const float (&x)[kColumns]) {
  Four* four = reinterpret_cast<Four*>(at);
  four[0] = {x[0], x[1], x[2], x[3]};
  four[1] = {x[4], x[5], x[6], x[7]};
}

// One thread's turns of a row into the strip's scores.
FUSED_NCE_HD void cosines_thread(const Strip& strip, const Rules& rules, const PrefixStrip& by, int64_t r, int part,
                                 int thread, int threads) {
  const Row row = row_of(strip, rules, r, part);
  const float norm = by.of_rows[row.index];
  for (int c = row.begin + thread * kColumns; c < row.end; c += threads * kColumns) {
    const Eight product = load(by.products + r * strip.stride + c, norm);
    float cosines[kColumns];
    FUSED_NCE_UNROLL
    for (int u = 0; u < kColumns; ++u)
      cosines[u] = c + u < row.end ? product.s[u] * by.of_columns[row.first_column + c + u] : 0.0f;
    put(strip.scores + r * strip.stride + c, cosines);
  }
}

// Takes a row's weights: each times its cosine in the cosine's place, and the products' weights, which `Store` takes.
// The norms' part of a gradient, of unrounded weights, is taken off what these give, so bfloat16 alone is too coarse:
// kTwice keeps what it leaves too.
template <class Store, bool kTwice>
class StorePrefix {
 public:
  static constexpr bool kRounds = false;
  FUSED_NCE_HD StorePrefix(const Strip& strip, int64_t row, const Rules& rules, const PrefixStrip& by)
      : store_(strip, row), rest_(with_weights(strip, by.rest), row), along_(strip.scores + row * strip.stride),
        total_(by.products + row * strip.stride), of_columns_(by.of_columns + strip.first_column),
        norm_(by.of_rows[strip.first_row + row] * scale_of(rules)), columns_(static_cast<int>(strip.columns)),
        add_(by.add) {}

  FUSED_NCE_HD void operator()(int column, const float (&w)[kColumns]) const {
    const Eight cosine = load(along_ + column, 1.0f), before = load(total_ + column, 1.0f);
    float along[kColumns], there[kColumns];
    FUSED_NCE_UNROLL
    for (int u = 0; u < kColumns; ++u) {
      along[u] = w[u] * cosine.s[u];
      there[u] = column + u < columns_ ? w[u] * norm_ * of_columns_[column + u] : 0.0f;
      if (add_) there[u] += before.s[u];  // fault: gpu-prefix-weights
    }
    put(along_ + column, along);
    put(total_ + column, there);
    if constexpr (kTwice) {
      float rest[kColumns];
      FUSED_NCE_UNROLL
      for (int u = 0; u < kColumns; ++u) {
        const float high = float_of(bits_of(there[u]) & static_cast<int>(0xffff0000u));
        rest[u] = there[u] - high;
        there[u] = high;
      }
      rest_(column, rest);
    }
    store_(column, there);
  }

 private:
  FUSED_NCE_HD static Strip with_weights(Strip strip, void* weights) {
    strip.weights = weights;
    return strip;
  }

  Store store_, rest_;
  float *along_, *total_;
  const float* of_columns_;
  float norm_;
  int columns_;
  bool add_;
};

}  // namespace cuda
}  // namespace fused_nce
