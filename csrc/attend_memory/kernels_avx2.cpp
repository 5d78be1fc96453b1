#include "common/simd_avx2.h"
#include "attend_memory/kernels-inl.h"

namespace bridge_stg {

template <>
const AttendKernels KernelsOf<AttendKernels>::avx2 = kKernels;

}  // namespace bridge_stg
