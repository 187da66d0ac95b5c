#include "isa.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <cstdlib>

namespace fused_nce {

namespace rows_generic {
extern const RowKernels kernels;
}
#if defined(__x86_64__)
namespace rows_avx2 {
extern const RowKernels kernels;
}
namespace rows_avx512 {
extern const RowKernels kernels;
}
#endif

namespace {

struct Candidate {
  const RowKernels* kernels;
  bool supported;
};

std::vector<Candidate> candidates() {
  std::vector<Candidate> all = {{&rows_generic::kernels, true}};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  all.push_back({&rows_avx2::kernels, avx2});
  all.push_back({&rows_avx512::kernels, avx512});
#endif
  return all;
}

const RowKernels& choose() {
  const char* wanted = std::getenv("FUSED_NCE_ISA");
  const RowKernels* best = nullptr;
  std::string known;
  for (const Candidate& c : candidates()) {
    known += (known.empty() ? "" : ", ") + std::string(c.kernels->name);
    if (wanted && *wanted && wanted == std::string(c.kernels->name)) {
      TORCH_CHECK_VALUE(c.supported, "FUSED_NCE_ISA is '", wanted, "', which this CPU does not have");
      return *c.kernels;
    }
    if (c.supported) best = c.kernels;
  }
  TORCH_CHECK_VALUE(!wanted || !*wanted, "FUSED_NCE_ISA is '", wanted, "', needed: one of ", known);
  return *best;
}

}  // namespace

const RowKernels& active_kernels() {
  static const RowKernels& kernels = choose();
  return kernels;
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.emplace_back(c.kernels->name);
  return names;
}

// What the CPU has is not the question: oneDNN may have been told to leave it alone (ONEDNN_MAX_CPU_ISA, or mkldnn
// switched off), and its bfloat16 GEMM then raises. So one is tried.
bool has_bf16_gemm() {
#if defined(__x86_64__) && (!defined(__GNUC__) || defined(__clang__) || __GNUC__ >= 11)
  static const bool works = [] {
    if (!__builtin_cpu_supports("avx512bf16")) return false;
    alignas(64) at::BFloat16 a[16 * 16] = {}, b[16 * 16] = {};
    alignas(64) float c[16 * 16];
    try {
      at::native::cpublas::brgemm(16, 16, 16, 16, 16, 16, false, a, b, c);
      at::native::cpublas::brgemm_release();
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return works && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

}  // namespace fused_nce
