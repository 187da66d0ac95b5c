// What the operators allocate around a sweep, and the rule of a tail.
#pragma once

#include <ATen/ops/empty_like.h>

#include <limits>
#include <string>

#include "cpu/sweep.h"

namespace fused_nce {

// A row whose positive is nowhere shows it. Positives from elsewhere are handed on: no column fills them in.
inline StatisticTensors new_statistics(const SweepInputs& in) {
  const int64_t n = in.q.size(0), s = static_cast<int64_t>(in.wanted.rows.size());
  const auto options = floats(in.q);
  return {
      in.layout.positives.defined() ? in.layout.positives.clone()
                                    : at::full({n, in.layout.n_pos}, std::numeric_limits<float>::quiet_NaN(), options),
      at::empty({s, n}, options), at::empty({static_cast<int64_t>(in.wanted.columns.size()), in.k.size(0)}, options)};
}

// Where k is q, dk is added up in dq.
inline Gradients new_gradients_of(const SweepInputs& in, bool statistics) {
  Gradients out = new_gradients(in, in.need_k ? dk_type(in, statistics) : at::kFloat);
  if (in.shared && in.need_q) out.dk = out.dq.zero_();
  out.dbias = at::empty_like(out.dscale);
  return out;
}

inline bool any_gradient(const SweepInputs& in) { return in.need_q || in.need_k || in.need_scale; }

inline TailRule tail_rule(Tail tail, double unit, double square_weight, const Wanted& wanted) {
  constexpr unsigned supervised = bit_of(kNegLse) | bit_of(kPosLse) | bit_of(kPosCount) | bit_of(kPosGap);
  constexpr unsigned reads[kTails] = {bit_of(kNegLse), supervised, supervised, bit_of(kNegSoftplus)};
  TORCH_CHECK_VALUE((reads[tail] & ~Wanted::mask(wanted.rows)) == 0, "stats are ", wanted.rows,
                    ", needed: all that the tail ", kTailNames[tail], " reads");
  return {tail, static_cast<float>(unit), static_cast<float>(square_weight)};
}

}  // namespace fused_nce
