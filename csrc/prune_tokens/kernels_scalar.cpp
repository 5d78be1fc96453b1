#include "common/simd_scalar.h"
#include "prune_tokens/kernels-inl.h"

namespace bridge_stg {

const PruneKernels kScalarPrune = {score, backward, count_at_least};

}  // namespace bridge_stg
