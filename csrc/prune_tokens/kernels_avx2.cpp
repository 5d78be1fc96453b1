#include "common/simd_avx2.h"
#include "prune_tokens/kernels-inl.h"

namespace bridge_stg {

template <>
const PruneKernels KernelsOf<PruneKernels>::avx2 = kKernels;

}  // namespace bridge_stg
