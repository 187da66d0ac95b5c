// The formulas that a row kernel evaluates for every score, by the exponential that the hardware has: atoms.h' own take
// three times the instructions. They hide the names of atoms.h within this namespace, so that the row kernels, and the
// CPU emulation of them, use these.
#pragma once

#include "../atoms.h"

namespace fused_nce {
namespace cuda {

using namespace portable;

constexpr float kLog2E = 1.44269504f;

// 2^x within 2 ulp; 0 below -126, infinity from 128 on, NaN stays NaN.
FUSED_NCE_HD float exp2_value(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = __builtin_exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#endif
}

// Within 2 ulp and a rounding of the argument's size. Where t and the shift are large and near each other, their
// difference is exact: one fused multiply-add for both would round to the size of the shift.
FUSED_NCE_HD float exp_value(float x) { return exp2_value(x * kLog2E); }

// log(1 + exp(x)) as 2*atanh(z), z = e/(2 + e) <= 1/3: an odd polynomial, the minimax fit to 5e-9, in place of a
// logarithm whose argument would have rounded a small e away.
FUSED_NCE_HD float softplus(float x) {
  const float e = exp_value(x > 0.0f ? -x : x);
  const float z = e / (e + 2.0f), y = z * z;
  float p = 0.1400599739f * y + 0.1400090188f;
  p = p * y + 0.2001076366f;
  p = p * y + 0.3333320814f;
  return (x > 0.0f ? x : 0.0f) + 2.0f * (z * (y * p) + z);  // fault: gpu-softplus-rounds
}

// A small one keeps its digits, and an infinite exp(-x) gives 0.
FUSED_NCE_HD float sigmoid(float x) { return 1.0f / (1.0f + exp_value(-x)); }

// clip*tanh(s/clip) and its slope. With b = 2/(exp(2|x|) + 1), tanh|x| = 1 - b, and 1 - tanh^2 = b(2 - b) keeps its
// accuracy where tanh saturates. Near 0, 1 - b cancels; the odd polynomial is the minimax fit of tanh up to 0.6. An
// error of 2e-7 of the clip is left without it, of no consequence to a weight that 16 bits hold.
template <bool kNear>
FUSED_NCE_HD Score tanh_clip(float s, float clip, float inverse_clip) {
  const int sign = bits_of(s) & static_cast<int>(0x80000000u);
  const float height = __builtin_fabsf(s), x = height * inverse_clip;
  const float b = 1.0f / (exp2_value(height * (inverse_clip * (2.0f * kLog2E))) * 0.5f + 0.5f);
  const float slope = b * (2.0f - b);
  if (!kNear) return {float_of(bits_of(clip - clip * b) | sign), slope};
  const float z = x * x;
  float p = -0.005895156081f * z + 0.02079596985f;
  p = p * z - 0.05378382970f;
  p = p * z + 0.1333192412f;
  p = p * z - 0.3333329800f;
  const float near = x * (z * p) + x;
  return {float_of(bits_of(clip * (x < 0.6f ? near : 1.0f - b)) | sign), slope};  // fault: gpu-tanh-cancels
}

template <bool kClip, bool kNear = true>
FUSED_NCE_HD Score transform(float s, float clip, float inverse_clip) {
  return kClip ? tanh_clip<kNear>(s, clip, inverse_clip) : Score{s, 1.0f};
}

}  // namespace cuda
}  // namespace fused_nce
