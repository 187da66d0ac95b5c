// The formulas of the engine, once: scalar functions that a compiler vectorises on a CPU and inlines into a GPU kernel.
// No torch and no standard library types, so that the same text compiles for both.
//
// Letters: s raw score scale*<q,k>, t transformed score, w weight dL/ds. Everything is float; sums that join many
// partial results are double.
#pragma once

#include "names.h"

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FUSED_NCE_HD __host__ __device__ __forceinline__
#define FUSED_NCE_UNROLL _Pragma("unroll")  // left to itself, ptxas puts the arrays of a large body in local memory
#else
#define FUSED_NCE_HD inline __attribute__((always_inline))
#define FUSED_NCE_UNROLL
#endif

// Each instruction set compiles the formulas in a namespace of its own: with one shared inline symbol the linker may
// keep the AVX-512 body and hand it to an AVX2 machine.
#ifndef FUSED_NCE_ISA
#define FUSED_NCE_ISA portable
#endif

namespace fused_nce {
namespace FUSED_NCE_ISA {

FUSED_NCE_HD int bits_of(float x) {
  int bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

FUSED_NCE_HD float float_of(int bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

FUSED_NCE_HD float infinity() { return float_of(0x7f800000); }

// x = n*log(2) + r with |r| <= log(2)/2; `power` is 2^n and `tail` is exp(r) - 1.
struct Reduced {
  float power, tail;
};

// Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits. log(2) is subtracted in two parts, the
// first with 11 trailing zero bits, so that n*log(2) is exact with or without a fused multiply-add. The polynomial is
// the minimax fit of (exp(r) - 1 - r) / r^2, relative error of exp(r) - 1 below 5e-10.
FUSED_NCE_HD Reduced reduce_exp(float x) {
  const float magic = 12582912.0f;
  const float shifted = x * 1.44269504f + magic;
  const float n = shifted - magic;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.99075846e-4f;
  p = p * r + 1.39485928e-3f;
  p = p * r + 8.33328627e-3f;
  p = p * r + 4.16662395e-2f;
  p = p * r + 0.166666672f;
  p = p * r + 0.5f;
  Reduced out;
  out.power = float_of((bits_of(shifted) - bits_of(magic) + 127) << 23);
  out.tail = p * (r * r) + r;
  return out;
}

// exp(x) within 1.5 ulp for |x| <= 87; outside, anything.
FUSED_NCE_HD float exp_bounded(float x) {
  const Reduced e = reduce_exp(x);
  return e.power * e.tail + e.power;
}

// exp(x): within 1.5 ulp; 0 below -87.33 (where the result would be subnormal), infinity above 88.37, NaN stays NaN.
FUSED_NCE_HD float exp_value(float x) {
  const float y = x < -87.33f ? 0.0f : exp_bounded(x);
  return x > 88.37f ? infinity() : y;
}

// A transformed score and its derivative dt/ds.
struct Score {
  float value, slope;
};

// clip*tanh(s/clip). With m = exp(2|x|) - 1: tanh = m/(m+2) keeps its relative accuracy near 0, and
// 1 - tanh^2 = 4(m+1)/(m+2)^2 keeps it where tanh saturates. tanh rounds to 1 beyond |x| = 9.02, so 2|x| stops at 20.
FUSED_NCE_HD Score tanh_clip(float s, float clip, float inverse_clip) {
  const int sign = bits_of(s) & static_cast<int>(0x80000000u);
  float y = (2.0f * inverse_clip) * float_of(bits_of(s) & 0x7fffffff);
  y = y > 20.0f ? 20.0f : y;
  const Reduced e = reduce_exp(y);
  const float m = e.power * e.tail + (e.power - 1.0f);
  const float a = 1.0f / (m + 2.0f);
  Score t;
  t.value = clip * float_of(bits_of(m * a) | sign);
  t.slope = 4.0f * (m + 1.0f) * (a * a);
  return t;
}

template <bool kClip>
FUSED_NCE_HD Score transform(float s, float clip, float inverse_clip) {
  return kClip ? tanh_clip(s, clip, inverse_clip) : Score{s, 1.0f};
}

// What of a score by scale + hardness is the raw score.
FUSED_NCE_HD float raw_share(float scale, float hardness) {
  return hardness > 0.0f ? scale / (scale + hardness) : 1.0f;
}

// The clip bounds t, so up to this value exp(t) itself lies in [e^-43, e^43] and 1e9 terms add up to less than 1e28:
// no maximum is needed, partial sums just add, and no t - shift is rounded.
constexpr float kMaxShiftFreeClip = 43.0f;

FUSED_NCE_HD bool needs_no_shift(float clip) { return clip > 0.0f && clip <= kMaxShiftFreeClip; }

// sum_j exp(t_j) as exp(shift) * sum. A row without terms has sum 0.
template <class Real>
struct LogSum {
  float shift;
  Real sum;
};

// The shift that a running maximum of t asks for; a row that has seen nothing (-infinity) asks for 0.
FUSED_NCE_HD float shift_of(float maximum) { return maximum == -infinity() ? 0.0f : maximum; }

template <class Real>
FUSED_NCE_HD LogSum<Real> merge(LogSum<Real> a, LogSum<Real> b) {
  if (b.sum == 0) return a;
  if (a.sum == 0) return b;
  LogSum<Real> out;
  out.shift = a.shift > b.shift ? a.shift : b.shift;
  // fault: kernels-groups-summed
  out.sum = a.sum * exp_value(a.shift - out.shift) + b.sum * exp_value(b.shift - out.shift);
  return out;
}

FUSED_NCE_HD float log_value(LogSum<double> a) { return static_cast<float>(a.shift + __builtin_log(a.sum)); }

// Kahan: a sum of many equal terms is otherwise rounded the same way every time, 30 ulp after 128 of them.
FUSED_NCE_HD void add_exactly(float& sum, float& error, float x) {
  const float y = x - error;
  const float next = sum + y;
  error = (next - sum) - y;
  sum = next;
}

// log(1 + y) for 0 <= y <= 1, within 1.2 ulp: y + y^2 * P(y), P the minimax fit of degree 10. libm's has no vector
// form.
FUSED_NCE_HD float log1p_unit(float y) {
  float p = -1.305469311773777e-3f;
  p = p * y + 9.223826229572296e-3f;
  p = p * y - 3.0529258772730827e-2f;
  p = p * y + 6.451538950204849e-2f;
  p = p * y - 1.016969233751297e-1f;
  p = p * y + 1.3452906906604767e-1f;
  p = p * y - 1.6462914645671844e-1f;
  p = p * y + 1.9967754185199738e-1f;
  p = p * y - 2.4996978044509888e-1f;
  p = p * y + 3.333319127559662e-1f;
  p = p * y - 4.999999701976776e-1f;
  return p * (y * y) + y;
}

// log(1 + exp(x)), never linear by fiat: the tail exp(-|x|) is kept to the last bit.
FUSED_NCE_HD float softplus(float x) {
  const float tail = log1p_unit(exp_value(x > 0.0f ? -x : x));
  return x > 0.0f ? x + tail : (x != x ? x : tail);
}

FUSED_NCE_HD float sigmoid(float x) {
  const float e = exp_value(x > 0.0f ? -x : x);
  return (x > 0.0f ? 1.0f : e) / (1.0f + e);
}

// neg_lse - pos; NaN at a positive of infinity, as a dense softmax has it, where softplus(-infinity) would be sound.
// fault: kernels-infinite-positive
FUSED_NCE_HD float deficit(float neg_lse, float pos) { return neg_lse - (pos + 0.0f * (pos > 0.0f ? pos : 0.0f)); }

// d/dpos of softplus(neg_lse - pos). Written as 1 - p it would cancel where the positive wins.
// fault: kernels-p-1
FUSED_NCE_HD float nce_slope_positive(float neg_lse, float pos) { return -sigmoid(deficit(neg_lse, pos)); }

// Weight of a negative: d_lse * exp(t - lse) * dt/ds. exp(t - shift) * inverse is the softmax, at most 1, before the
// upstream gradient meets it: their product in another order could leave the range of float.
FUSED_NCE_HD float negative_weight(float exp_shifted, float inverse, float d_lse, float slope) {
  return exp_shifted * inverse * d_lse * slope;  // fault: kernels-clip-slope
}

// d statistic / dt at a member of the statistic's set, one type each; `found(name)` is the finished statistic of the
// row or the column that the member is weighed for. Maxima and counts have none, and the square's belongs to s.
struct NegLse {
  static constexpr Statistic kName = kNegLse;
  static constexpr bool kPositives = false;
  template <class Found>
  static FUSED_NCE_HD float weight(float t, const Found& found) {
    return exp_value(t - found(kNegLse));
  }
};

struct NegSoftplus {
  static constexpr Statistic kName = kNegSoftplus;
  static constexpr bool kPositives = false;
  template <class Found>
  static FUSED_NCE_HD float weight(float t, const Found&) {
    return sigmoid(t);
  }
};

// A plain sum of t.
template <Statistic kSum, bool kOfPositives>
struct PlainSum {
  static constexpr Statistic kName = kSum;
  static constexpr bool kPositives = kOfPositives;
  template <class Found>
  static FUSED_NCE_HD float weight(float, const Found&) {
    return 1.0f;
  }
};

using NegSum = PlainSum<kNegSum, false>;
using PosSum = PlainSum<kPosSum, true>;

struct PosLse {
  static constexpr Statistic kName = kPosLse;
  static constexpr bool kPositives = true;
  template <class Found>
  static FUSED_NCE_HD float weight(float t, const Found& found) {
    return exp_value(t - found(kPosLse));
  }
};

// pos_lse - mean pos: small where the weights of its two terms cancel.
struct PosGap {
  static constexpr Statistic kName = kPosGap;
  static constexpr bool kPositives = true;
  template <class Found>
  static FUSED_NCE_HD float weight(float t, const Found& found) {
    return exp_value(t - found(kPosLse)) - 1.0f / found(kPosCount);
  }
};

// NaN where x is, else 0: what a row that counts for nothing contributes.
FUSED_NCE_HD float nan_of(float x) { return x != x ? x : 0.0f; }

// Of log_out and log_in, the negatives' share: d element / d neg_lse, and, negated, d element / d pos_lse.
FUSED_NCE_HD float supervised_share(float neg_lse, float pos_lse, float pos_count) {
  return pos_count > 0.0f ? -nce_slope_positive(neg_lse, pos_lse) : nan_of(neg_lse);
}

// Where in the image of its positives a row itself lies; negative, or n_c and more, where it does not. `itself` may be
// null: no row is a column.
FUSED_NCE_HD long long own_place(const int* ids, const int* itself, long long n_c, long long row) {
  return itself ? itself[row] - ids[row] * n_c : -1;
}

}  // namespace FUSED_NCE_ISA
}  // namespace fused_nce
