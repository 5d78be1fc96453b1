#include "common/simd_avx2.h"
#include "attend_memory/kernels-inl.h"

namespace bridge_stg {

const AttendKernels kAvx2Attend = kKernels;

}  // namespace bridge_stg
