// What a sweep has to do, and what it asks of its rows before it begins.
#pragma once

#include "plan.h"
#include "strip.h"
#include "sweep.h"

namespace fused_nce {

// Up to e^64 a sum of 1e9 exponentials and its inverse are ordinary floats, with room for the error of a norm.
constexpr float kMostUnshifted = 64.0f;  // fault: bound-beyond-floats

Work work_for(const SweepInputs& in, const Task& task);

// Row `row` of a 16-bit matrix, as float.
void widen_row(const RowKernels& kernels, bool half, const void* base, int64_t stride, int64_t row, int64_t width,
               float* out);

// Whether |t| stays so small, by the norms of the rows, that no exponential needs a shift, and all scores are finite.
bool is_bounded(const RowKernels& kernels, const SweepInputs& in);

inline const float* numbers_of(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<float>() : nullptr; }

}  // namespace fused_nce
