#include "common/simd_avx512.h"
#include "prune_tokens/kernels-inl.h"

namespace bridge_stg {

template <>
const PruneKernels KernelsOf<PruneKernels>::avx512 = kKernels;

}  // namespace bridge_stg
