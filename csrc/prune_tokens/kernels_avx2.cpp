#include "common/simd_avx2.h"
#include "prune_tokens/kernels-inl.h"

namespace bridge_stg {

const PruneKernels kAvx2Prune = {score, backward, count_at_least};

}  // namespace bridge_stg
