// The machine that is a GPU, on one stream. Its kernels' launches are in rows.cu, which includes no torch header; what
// needs torch is in device.cpp.
#pragma once

#include "machine.h"

struct CUstream_st;

namespace fused_nce {
namespace cuda {

class Device final : public Machine {
 public:
  explicit Device(CUstream_st* stream) : stream_(stream) {}
  void gemm(const Gemm&) const override;
  void mark(const Strip&, const Rules&, const Marking&) const override;
  void fold(const Strip&, const Rules&, const RowArrays&, int64_t first_slot) const override;
  void finish(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail) const override;
  void weigh(const Strip&, const Rules&, const RowArrays&, Element) const override;
  void loss(const RowTask*, int count, Element) const override;
  void loss_and_summary(const RowTask&, const Summaries&, Element) const override;
  void fold_optional(const Strip&, const Rules&, const RowArrays&, int64_t first_slot) const override;
  void finish_optional(int64_t first_row, int64_t count, const Rules&, const RowArrays&, bool tail) const override;
  void cosines(const Strip&, const Rules&, const PrefixStrip&) const override;
  void weigh_prefix(const Strip&, const Rules&, const RowArrays&, const PrefixStrip&, Element) const override;
  void fold_columns(const Strip&, const Rules&, const ColumnArrays&) const override;
  void finish_columns(int64_t count, const Rules&, const ColumnArrays&) const override;
  void summarize(const Summaries&) const override;
  void multiply(const Products&, Element element, const float* factor) const override;
  void unit_rows(const Units&, Element element) const override;
  void through_rows(const Throughs&, Element element) const override;
  void check(int error) const;  // of CUDA's runtime: raises torch's own

 private:
  unsigned* counter() const;  // 0 between launches: of this stream, or of the graph that is being captured

  CUstream_st* stream_;
};

}  // namespace cuda
}  // namespace fused_nce
