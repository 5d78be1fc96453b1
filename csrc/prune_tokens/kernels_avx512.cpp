#include "common/simd_avx512.h"
#include "prune_tokens/kernels-inl.h"

namespace bridge_stg {

const PruneKernels kAvx512Prune = {score, backward, count_at_least};

}  // namespace bridge_stg
