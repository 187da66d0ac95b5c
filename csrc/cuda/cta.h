// The group of threads of groups.h as a CTA. For nvcc alone.
#pragma once

#include "columns.h"

namespace fused_nce {
namespace cuda {

struct alignas(16) Slot {
  Four halves[2];
};

// The threads of a CTA. `gather` merges a warp's threads in a tree, then the warps in a tree: always the same one.
class Cta {
 public:
  __device__ explicit Cta(Slot* shared) : shared_(shared) {}

  __device__ bool first() const { return threadIdx.x == 0; }
  __device__ void barrier() const { __syncthreads(); }

  template <class F>
  __device__ void each(const F& f) const {
    f(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
  }

  template <class F, class Merge>
  __device__ auto reduce(const F& f, const Merge& merge) {
    using T = decltype(f(0, 1));
    static_assert(sizeof(T) <= sizeof(Slot), "a slot holds 32 bytes");
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    T x = f(static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x));
#pragma unroll
    for (unsigned offset = 16; offset > 0; offset /= 2) x = merge(x, from_lane_below(x, offset));
    // The last slot is for the answer. Writing the others cannot race with a thread that still reads it.
    if (lane == 0) *slot<T>(warp) = x;
    __syncthreads();  // fault: gpu-barrier-missing
    if (warp == 0) {
      if (lane < warps) x = *slot<T>(lane);
#pragma unroll
      for (unsigned offset = 16; offset > 0; offset /= 2) {
        const T y = from_lane_below(x, offset);
        if (lane + offset < warps) x = merge(x, y);
      }
      if (lane == 0) *slot<T>(32) = x;
    }
    __syncthreads();
    return *slot<T>(32);
  }

  // For a CTA of kColumnWarps warps, with a slot for each thread. One CTA calls it once.
  template <class F, class Merge, class Use>
  __device__ void reduce_warps(const F& f, const Merge& merge, const Use& use) {
    using T = decltype(f(0, 0, 1));
    static_assert(sizeof(T) <= sizeof(Slot), "a slot holds 32 bytes");
    const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
    T x = f(lane, warp, kColumnWarps);
#pragma unroll
    for (int offset = kColumnWarps / 2; offset > 0; offset /= 2) {
      if (warp >= offset && warp < 2 * offset) *slot<T>(threadIdx.x) = x;
      __syncthreads();
      if (warp < offset) x = merge(x, *slot<T>(threadIdx.x + 32 * offset));
    }
    if (warp == 0) use(lane, x);
  }

 private:
  template <class T>
  __device__ T* slot(unsigned index) const {
    return reinterpret_cast<T*>(shared_ + index);
  }

  // Word by word: x of the lane `offset` further down the warp.
  template <class T>
  __device__ static T from_lane_below(const T& x, unsigned offset) {
    static_assert(sizeof(T) % 4 == 0, "shuffles move words");
    T out;
    const unsigned* from = reinterpret_cast<const unsigned*>(&x);
    unsigned* to = reinterpret_cast<unsigned*>(&out);
#pragma unroll
    for (unsigned w = 0; w < sizeof(T) / 4; ++w) to[w] = __shfl_down_sync(0xffffffffu, from[w], offset);
    return out;
  }

  Slot* shared_;
};

}  // namespace cuda
}  // namespace fused_nce
