// Row kernels for any CPU: the compiler's baseline.
#define FUSED_NCE_ISA rows_generic
#define FUSED_NCE_ISA_NAME "generic"
#define FUSED_NCE_VECTOR 4
#include "rows.inl"
