#include "common/simd_scalar.h"
#include "prune_tokens/row_kernels_body.h"

namespace bridge_stg {

const PruneKernels kScalarPrune = {score, backward, count_at_least};

}  // namespace bridge_stg
