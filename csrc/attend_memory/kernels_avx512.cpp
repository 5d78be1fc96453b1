#include "common/simd_avx512.h"
#include "attend_memory/kernels-inl.h"

namespace bridge_stg {

template <>
const AttendKernels KernelsOf<AttendKernels>::avx512 = kKernels;

}  // namespace bridge_stg
