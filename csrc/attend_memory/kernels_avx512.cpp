#include "common/simd_avx512.h"
#include "attend_memory/kernels-inl.h"

namespace bridge_stg {

const AttendKernels kAvx512Attend = kKernels;

}  // namespace bridge_stg
