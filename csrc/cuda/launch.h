// The launches of rows.cu, callable without the CUDA compiler.
#pragma once

#include "machine.h"

struct CUstream_st;

namespace fused_nce {
namespace cuda {

using Stream = CUstream_st*;

// Each gives cudaGetLastError().
int launch_fold(const Strip&, const Rules&, const RowArrays&, int64_t first_slot, Stream);
int launch_finish(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail, Stream);
int launch_weigh(const Strip&, const Rules&, const RowArrays&, Element, Stream);
int launch_loss(const Strip&, const Rules&, const RowArrays&, Element, Stream);
int launch_fold_further(const Strip&, const Rules&, const RowArrays&, int64_t first_slot, Stream);
int launch_finish_further(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail, Stream);
int launch_fold_columns(const Strip&, const Rules&, const ColumnArrays&, Stream);
int launch_finish_columns(int64_t count, const Rules&, const ColumnArrays&, Stream);
int launch_summary(const Summary&, Stream);
int launch_multiply(void* x, Element, int64_t count, const float* factor, Stream);

}  // namespace cuda
}  // namespace fused_nce
