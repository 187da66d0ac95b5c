// Which row kernels run: the best that the CPU has, or the one that FUSED_NCE_ISA names.
#pragma once

#include <string>
#include <vector>

#include "../params.h"

namespace fused_nce {

const RowKernels& active_kernels();        // throws where FUSED_NCE_ISA asks for what the CPU lacks
std::vector<std::string> compiled_isas();  // best last
bool has_bf16_gemm();                      // the CPU multiplies bfloat16, and brgemm may use it

}  // namespace fused_nce
