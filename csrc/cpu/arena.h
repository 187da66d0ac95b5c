// One allocation, kept for the next call and handed out in aligned pieces; and large pages for buffers that are about
// to be written.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <utility>

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

// The workspace of the last call that ended. A fresh one each call was 14 MiB of page faults, and, freed beside a large
// dk, made the allocator give both back to the system: 2 ms of a 33 ms call. Calls that overlap allocate their own.
class KeptWorkspace {
 public:
  static at::Tensor borrow(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> guard(one().mutex_);
      if (one().buffer_.defined() && one().buffer_.numel() >= bytes) return std::move(one().buffer_);
    }
    const at::Tensor fresh = at::empty({bytes}, at::kByte);
    use_large_pages(fresh);
    return fresh;
  }

  static void give_back(at::Tensor buffer) {
    const std::lock_guard<std::mutex> guard(one().mutex_);
    const int64_t kept = one().buffer_.defined() ? one().buffer_.numel() : 0;
    if (buffer.numel() > kept && buffer.numel() <= kMostKept) std::swap(one().buffer_, buffer);
  }

 private:
  static constexpr int64_t kMostKept = int64_t{16} << 20;  // the default limit: more was asked for, and is given back

  // Never destroyed: the allocator may go first when the process ends.
  static KeptWorkspace& one() {
    static auto* kept = new KeptWorkspace;
    return *kept;
  }

  std::mutex mutex_;
  at::Tensor buffer_;
};

// Hands out aligned pieces of one buffer; made without bytes it has none, gives null and counts what they would take.
// So what a plan counts and what a sweep takes is one function.
class Arena {
 public:
  Arena() = default;
  explicit Arena(int64_t bytes) : buffer_(KeptWorkspace::borrow(bytes)) {
    const auto start = reinterpret_cast<uintptr_t>(buffer_.data_ptr());
    start_ = reinterpret_cast<char*>((start + kAlignment - 1) / kAlignment * kAlignment);
    size_ = bytes - static_cast<int64_t>(reinterpret_cast<uintptr_t>(start_) - start);
  }
  ~Arena() {
    if (start_) KeptWorkspace::give_back(std::move(buffer_));
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(int64_t count) {
    char* piece = start_ ? start_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    TORCH_INTERNAL_ASSERT(!start_ || used_ <= size_, "the plan counts less workspace than the sweep takes");
    return reinterpret_cast<T*>(piece);
  }

  int64_t bytes() const { return used_; }

  static constexpr int64_t kAlignment = 64;  // and as many bytes more, at most, are lost before the first piece

 private:
  at::Tensor buffer_;
  char* start_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace fused_nce
