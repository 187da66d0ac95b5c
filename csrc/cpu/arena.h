// One allocation, handed out in aligned pieces; and large pages for buffers that are about to be written.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>

namespace fused_nce {

// Asks for 2 MiB pages. With 4 KiB ones the first touch of a large dk cost as much as its GEMM: 22 ms for 51 MB.
inline void use_large_pages(const at::Tensor& buffer) {
#if defined(__linux__)
  constexpr uintptr_t page = 4096, large_page = uintptr_t{2} << 20;
  const auto start = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + buffer.nbytes()) / page * page;
  if (begin + large_page <= end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

class Arena {
 public:
  explicit Arena(int64_t bytes) : buffer_(at::empty({bytes + kAlignment}, at::kByte)) {
    use_large_pages(buffer_);
    const auto start = reinterpret_cast<uintptr_t>(buffer_.data_ptr());
    next_ = reinterpret_cast<char*>((start + kAlignment - 1) / kAlignment * kAlignment);
    end_ = static_cast<char*>(buffer_.data_ptr()) + bytes + kAlignment;
  }

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    TORCH_INTERNAL_ASSERT(next_ <= end_, "plan.h counts less workspace than sweep.cpp takes");
    return piece;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  at::Tensor buffer_;
  char *next_, *end_;
};

}  // namespace fused_nce
