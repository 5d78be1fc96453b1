#include "common/simd_scalar.h"
#include "prune_tokens/kernels-inl.h"

namespace bridge_stg {

template <>
const PruneKernels KernelsOf<PruneKernels>::scalar = kKernels;

}  // namespace bridge_stg
