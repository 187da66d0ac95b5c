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

// Of the rows' squared norms; NaN if one is, or holds an infinity.
float largest_square(const RowKernels& kernels, Elements elements, bool half, const void* base, int64_t stride,
                     int64_t count, int64_t width);

}  // namespace fused_nce
