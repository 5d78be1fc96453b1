#include "common/simd_scalar.h"
#include "attend_memory/kernels-inl.h"

namespace bridge_stg {

const AttendKernels kScalarAttend = kKernels;

}  // namespace bridge_stg
